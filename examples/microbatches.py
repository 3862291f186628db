"""Accumulates the gradient of a batch over microbatches with uneven padding.

The sentences are sorted by length, so that one microbatch has few characters
and another many, and the first three are nothing but padding.

The output is the distance of the accumulated gradient from that of the whole
batch: with a scan, with `optax.microbatching` and with `optax.MultiSteps`, all
with the count of the whole batch as the denominator; with a scan that counts on
the way, for microbatches that arrive one by one; and with the mean of the means
of the microbatches, which is wrong.

    python examples/microbatches.py
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from padded_text import (
  END,
  PADDING,
  Params,
  encode,
  find_characters,
  find_sentences,
  init_params,
  masked_loss,
  masked_losses,
  pad,
)

import optax_masking as optax
from optax_masking import reductions

ROWS = 24

# The sum over the included elements of a batch, divided by their number or by
# the third argument.
Loss = Callable[[Params, jax.Array, jax.Array | None], jax.Array]


def split(batch: jax.Array, microbatches: int) -> jax.Array:
  return batch.reshape(microbatches, -1, *batch.shape[1:])


def with_scan(
  loss: Loss, params: Params, batch: jax.Array, count: jax.Array, k: int
) -> Params:
  """Sums of gradients, each divided by the count of the whole batch."""

  def add(total: Params, part: jax.Array) -> tuple[Params, None]:
    grads = jax.grad(loss)(params, part, count)
    return jax.tree.map(jnp.add, total, grads), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  return jax.lax.scan(add, zeros, split(batch, k))[0]


def with_microbatching(
  loss: Loss, params: Params, batch: jax.Array, count: jax.Array, k: int
) -> Params:
  """The same by `optax.microbatching`, which splits the batch itself."""
  accumulated = optax.microbatching.microbatch(
    jax.grad(loss),
    argnums=1,
    microbatch_size=len(batch) // k,
    accumulator=optax.microbatching.AccumulationType.SUM,
  )
  return accumulated(params, batch, count)


def with_multi_steps(
  loss: Loss, params: Params, batch: jax.Array, count: jax.Array, k: int
) -> Params:
  """The gradient that reaches the optimizer at the last of k steps."""
  descent = optax.sgd(1.0)  # Its update is the gradient, with the sign changed.
  optimizer = optax.MultiSteps(descent, k, use_grad_mean=False)  # A sum.
  state = optimizer.init(params)
  for part in split(batch, k):
    grads = jax.grad(loss)(params, part, count)
    updates, state = optimizer.update(grads, state, params)
  return jax.tree.map(jnp.negative, updates)


def with_sums(
  loss_sum: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]],
  params: Params,
  batch: jax.Array,
  k: int,
) -> Params:
  """Divides the sum of the gradients by a count that is known at the end."""

  def add(total: tuple, part: jax.Array) -> tuple[tuple, None]:
    grads, count = jax.grad(loss_sum, has_aux=True)(params, part)
    return jax.tree.map(jnp.add, total, (grads, count)), None

  zeros = jax.tree.map(jnp.zeros_like, params), 0
  (grads, count), _ = jax.lax.scan(add, zeros, split(batch, k))
  return jax.tree.map(lambda g: g / jnp.maximum(count, 1), grads)


def with_mean_of_means(
  loss: Loss, params: Params, batch: jax.Array, k: int
) -> Params:
  """Wrong: a microbatch with few characters counts as much as another."""
  grads = [jax.grad(loss)(params, part, None) for part in split(batch, k)]
  return jax.tree.map(lambda *g: sum(g) / k, *grads)


def distance(grads: Params, expected: Params) -> float:
  """The length of the difference, relative to that of the expected gradient."""
  a, b = ravel_pytree(grads)[0], ravel_pytree(expected)[0]
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def summed_loss(
  params: Params, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
  terms = masked_losses(params, labels)
  return reductions.masked_sum(*terms), reductions.masked_count(*terms)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  divisors = [k for k in range(1, ROWS + 1) if ROWS % k == 0]
  parser.add_argument(
    *("--microbatches", "-k"), type=int, default=8, choices=divisors
  )
  k = parser.parse_args(argv).microbatches

  sentences = find_sentences()
  sentences = sorted(sentences, key=len)[:: len(sentences) // ROWS][:ROWS]
  characters = find_characters(sentences)
  batch = pad([encode(text + END, characters) for text in sentences])
  batch = batch.at[:3].set(PADDING)
  params = init_params(jax.random.key(0), len(characters))
  counts = np.sum(split(batch, k) != PADDING, (1, 2))
  print(
    f"{ROWS} sentences in {k} microbatches, of {', '.join(map(str, counts))}"
    " characters\n"
  )
  count = reductions.masked_count(batch, batch != PADDING)
  expected = jax.jit(jax.grad(masked_loss))(params, batch)
  args = (masked_loss, params, batch)
  methods = (
    ("lax.scan", partial(with_scan, *args, count, k)),
    ("optax.microbatching", partial(with_microbatching, *args, count, k)),
    ("optax.MultiSteps", partial(with_multi_steps, *args, count, k)),
    ("count on the way", partial(with_sums, summed_loss, params, batch, k)),
    ("mean of means, wrong", partial(with_mean_of_means, *args, k)),
  )
  errors = []
  print("                        off the whole batch's gradient by")
  for name, method in methods:
    errors.append(distance(jax.jit(method)(), expected))
    print(f"  {name:20}  {errors[-1]:.1e}", flush=True)
  if not all(error <= 1e-6 for error in errors[:-1]):  # True for NaN, too.
    sys.exit("error: the gradients do not add up.")


if __name__ == "__main__":
  main()
