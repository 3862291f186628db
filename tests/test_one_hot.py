"""Value and gradient of every loss next to Optax's, by the one-hot path.

A mask of examples and classes is written without a mask: each example by
itself, its included elements chosen by a matrix of one-hot rows, and its label
one of those. What is not chosen has a gradient of 0.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from cases import SLICED, assert_all_close, masks

from optax_masking.losses import _table as table


def by_one_hot_rows(case, arguments, where):
  """The losses of the examples, 0 for those with nothing included."""
  losses = []
  for i, kept in enumerate(where):
    of_label = case.positions(table.class_index)
    labels = [int(np.asarray(arguments[p])[i]) for p in of_label]
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


@pytest.mark.slow
class OneHotTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(SLICED)
  def test_value_and_gradient(self, case):
    arguments = [
      np.asarray(x) if p in case.per_example else x.astype("float32")
      for p, x in enumerate(case.arguments("float32"))
    ]
    for where in (masks()["random"], masks()["whole classes"]):

      def masked(arguments, where=where):
        return case.loss(*arguments, where=where)

      def total(floats, loss):
        given = [*floats, *arguments[len(floats) :]]
        return jnp.sum(loss(given)), loss(given)

      def value_and_gradient(loss):
        floats = [arguments[p] for p in case.floating]
        function = jax.grad(lambda x: total(x, loss), has_aux=True)
        return function(floats)

      got = self.variant(lambda: value_and_gradient(masked))()
      right = jax.jit(
        lambda where=where: value_and_gradient(
          lambda x: by_one_hot_rows(case, x, where)
        )
      )()
      assert_all_close(got, right, "float32")


if __name__ == "__main__":
  absltest.main()
