"""Checks losses of the Optax that PYTHONPATH names, and prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_masking
from optax_masking.losses._table import ROWS


def verdict(name: str) -> str:
  """Describes what a mask of full rank, or padding, does in a loss."""
  row = ROWS[name]
  args = row.arguments()
  where = np.random.default_rng(0).uniform(size=args[0].shape) < 0.7
  where[-1] = False  # An example with nothing included.
  keywords = {"where": where}
  if not row.compacts:  # A sequence, with frames of padding.
    where = np.broadcast_to(np.arange(4)[:, None] < 3, where.shape)
    keywords = {}
  floating = [args[i] for i in row.floating]

  def of(losses):
    def total(floating):
      values = list(args)
      for position, x in zip(row.floating, floating, strict=True):
        values[position] = x
      loss = row.of(losses) if row.compacts else _padded(losses, name)
      return jnp.sum(loss(*values, **keywords))

    return jax.jit(jax.value_and_grad(total))

  try:
    results = []
    for garbage in (0.5, np.nan, np.inf, 3e38):
      poisoned = [jnp.where(where, x, garbage) for x in floating]
      results.append(jax.tree.leaves(of(optax.losses)(poisoned)))
  except TypeError:
    return "takes no `where`"
  if np.isnan(np.concatenate(jax.tree.leaves(results), None)).any():
    return "NaN gradients"
  if any(np.where(where, 0, x).any() for x in results[0][1:]):
    return "masked elements have gradients"
  others = [x for result in results[1:] for x in result]
  if not all(map(np.array_equal, results[0] * 3, others)):
    return "depends on masked elements"
  expected = of(optax_masking.losses)(floating) if row.compacts else results[0]
  for x, y in zip(results[0], jax.tree.leaves(expected), strict=True):
    if not np.allclose(x, y, 1e-4, 1e-6 * np.abs(y).max(initial=0)):
      return "differs from the loss of what is included"
  return "no finding"


def _padded(losses, name):
  def loss(logits):
    paddings = jnp.zeros(logits.shape[:2]).at[:, 3:].set(1)
    labels = jnp.array([[1, 2], [2, 1]])
    result = getattr(losses, name)(logits, paddings, labels, 0.0 * labels)
    return result[0] if isinstance(result, tuple) else result

  return loss


def program(name: str) -> str:
  """The jaxpr of a loss without a mask."""
  row = ROWS[name]
  return str(jax.make_jaxpr(row.of(optax.losses))(*row.arguments()))


if __name__ == "__main__":
  print(json.dumps({n: (verdict(n), program(n)) for n in sys.argv[1:]}))
