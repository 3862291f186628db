"""Value and gradient of losses of slices next to Optax's, by one-hot rows.

A mask of examples and classes is written without a mask: each example by
itself, its included elements chosen by a matrix of one-hot rows, and its label
one of those. What is not chosen has a gradient of 0.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from cases import SLICED, assert_all_close, masks

from optax_masking.losses import _table as table

WHERE = masks()["random"]


def by_one_hot_rows(case, arguments, where):
  """The losses of the examples, 0 for those with nothing included."""
  losses = []
  for i, kept in enumerate(where):
    labels = [int(arguments[p][i]) for p in case.positions(table.class_index)]
    kept = kept & all(kept[label] for label in labels)
    if not kept.any():
      losses.append(jnp.zeros(kept.shape if case.elementwise else ()))
      continue
    chosen = jnp.eye(len(kept))[np.flatnonzero(kept)]  # One-hot rows.
    row = [
      jnp.argmax(chosen[:, labels[0]])[None]
      if p in case.per_example
      else (chosen @ x[i])[None]
      for p, x in enumerate(arguments)
    ]
    (loss,) = case.original(*row)
    losses.append(loss @ chosen if case.elementwise else loss)
  return jnp.stack(losses)


def value_and_gradient(case, arguments, loss):
  """Of the floating arguments; the others are constants."""

  def total(floats):
    result = loss(case.with_floats(arguments, floats))
    return jnp.sum(result), result

  floats = [arguments[p] for p in case.floating]
  return jax.grad(total, has_aux=True)(floats)


@functools.cache  # For both variants.
def arguments_and_expected(case):
  arguments = [np.asarray(x) for x in case.arguments("float32")]
  expected = jax.jit(
    lambda: value_and_gradient(
      case, arguments, lambda x: by_one_hot_rows(case, x, WHERE)
    )
  )
  return arguments, expected()


@pytest.mark.slow
class OneHotTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters([(case.name, case) for case in SLICED])
  def test_value_and_gradient(self, case):
    arguments, expected = arguments_and_expected(case)
    got = self.variant(
      lambda: value_and_gradient(
        case, arguments, lambda x: case.loss(*x, where=WHERE)
      )
    )()
    # The gradient of a cosine is the difference of two larger numbers.
    roundings = 32 if case.name == "cosine_similarity" else 16
    assert_all_close(got, expected, "float32", roundings)


if __name__ == "__main__":
  absltest.main()
