"""The ranking loss: weights and reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import assert_allclose, assert_equal

import optax_masking as optax

NAN = float("nan")
RNG = np.random.default_rng(4)
LOGITS = RNG.normal(size=(3, 4, 5)).astype("float32")
LABELS = RNG.integers(0, 3, size=(3, 4, 5))
WEIGHTS = RNG.uniform(size=(3, 4, 5)).astype("float32")
WHERE = RNG.uniform(size=(3, 4, 5)) < 0.6
WHERE[:, 1] = False
WHERE[2] = False
loss = optax.losses.ranking_softmax_loss

REDUCTIONS = (
  jnp.sum,
  jnp.mean,
  functools.partial(jnp.mean, axis=0),
  functools.partial(jnp.mean, axis=-1, keepdims=True),
  functools.partial(jnp.mean, axis=(0, 1)),
  functools.partial(jnp.sum, axis=1),
  lambda x, where: jnp.mean(x, where=where),
  lambda x, where: jnp.mean(x, 0, where=where),
)


def of_lists(where):
  """The losses of the lists, of their included items alone."""
  losses = np.zeros((3, 4), "float32")
  for i in np.ndindex(3, 4):
    if where[i].any():
      losses[i] = upstream.losses.ranking_softmax_loss(
        LOGITS[i][where[i]],
        LABELS[i][where[i]],
        weights=WEIGHTS[i][where[i]],
        reduce_fn=None,
      )
  return losses


def mean_of_counted(losses, where):
  return jnp.sum(losses * where) / jnp.sum(where)


@pytest.mark.slow
class ReductionTest(parameterized.TestCase):
  @parameterized.parameters([(f,) for f in REDUCTIONS])
  def test_reductions(self, reduce_fn):
    """Lists without an item do not count; means of none are 0."""
    included = WHERE.any(-1)
    expected = reduce_fn(jnp.asarray(of_lists(WHERE)), where=included)
    expected = jnp.where(jnp.isnan(expected), 0, expected)
    arguments = (
      np.where(WHERE, LOGITS, NAN),
      LABELS,
      np.where(WHERE, WEIGHTS, NAN),
    )

    def total(x, y, w):
      return loss(x, y, weights=w, where=WHERE, reduce_fn=reduce_fn)

    for f in (total, jax.jit(total)):
      assert_allclose(f(*arguments), expected, rtol=1e-5)
    gradients = jax.grad(lambda x, w: total(x, LABELS, w).sum(), (0, 1))(
      arguments[0], arguments[2]
    )
    for gradient in gradients:
      assert_equal(gradient[~WHERE], 0)
      self.assertTrue(jnp.all(jnp.isfinite(gradient)))

  def test_mask_that_broadcasts(self):
    """A reduction may count it."""
    for where in (np.array(True), WHERE[..., :1, :]):
      assert_allclose(
        *(
          loss(LOGITS, LABELS, where=mask, reduce_fn=mean_of_counted)
          for mask in (where, np.broadcast_to(where, WHERE.shape))
        ),
        rtol=1e-5,
      )

  @parameterized.parameters([(f,) for f in REDUCTIONS])
  def test_nothing_included(self, reduce_fn):
    def total(x):
      return loss(x, LABELS, where=WHERE & False, reduce_fn=reduce_fn)

    assert_equal(total(LOGITS), 0)
    assert_equal(jax.grad(lambda x: total(x).sum())(LOGITS), 0)

  @parameterized.parameters([(f,) for f in REDUCTIONS[:6]])
  def test_no_division_by_zero(self, reduce_fn):
    """Where it is known which axis a mean is over."""
    with jax.debug_nans(True), jax.debug_infs(True):
      for where in (WHERE, WHERE & False):
        jax.grad(
          lambda x, where=where: loss(
            x, LABELS, where=where, reduce_fn=reduce_fn
          ).sum()
        )(LOGITS)

  def test_reduction_that_depends_on_the_values(self):
    """One that is NaN for other values than those of the lists is kept."""
    for reduce_fn in (
      lambda x, where: jnp.sum(x * x, where=where) / jnp.sum(x, where=where),
      lambda x, where: jnp.mean(x, where=where) / jnp.ptp(x) * jnp.ptp(x),
    ):
      got = loss(LOGITS, LABELS, where=WHERE, reduce_fn=reduce_fn)
      expected = reduce_fn(
        jnp.asarray(loss(LOGITS, LABELS, where=WHERE, reduce_fn=None)),
        where=WHERE.any(-1),
      )
      assert_allclose(got, expected, rtol=1e-6)

  def test_nan_is_not_hidden(self):
    logits = LOGITS.copy()
    logits[0, 0, np.flatnonzero(WHERE[0, 0])[0]] = NAN
    for reduce_fn in REDUCTIONS:
      got = loss(logits, LABELS, where=WHERE, reduce_fn=reduce_fn)
      self.assertTrue(np.isnan(np.ravel(got)[0]))

  def test_none(self):
    got = loss(LOGITS, LABELS, weights=WEIGHTS, where=WHERE, reduce_fn=None)
    assert_allclose(got, of_lists(WHERE), rtol=1e-5)

  def test_mask_of_lists(self):
    lists = WHERE.any(-1)
    got = loss(np.where(lists[..., None], LOGITS, NAN), LABELS, where=lists)
    expected = upstream.losses.ranking_softmax_loss(
      LOGITS[lists], LABELS[lists]
    )
    assert_allclose(got, expected, rtol=1e-5)

  def test_optax_where(self):
    """On clean data Optax's mask of items means the same."""
    for reduce_fn in (jnp.mean, jnp.sum, None):
      assert_allclose(
        loss(LOGITS, LABELS, where=WHERE, weights=WEIGHTS, reduce_fn=reduce_fn),
        upstream.losses.ranking_softmax_loss(
          LOGITS, LABELS, where=WHERE, weights=WEIGHTS, reduce_fn=reduce_fn
        ),
        rtol=1e-5,
      )

  @parameterized.parameters(0, 1, ((0, 2),), None)
  def test_axis(self, axis):
    axes = range(3) if axis is None else np.atleast_1d(axis)
    order = [a for a in range(3) if a not in axes] + list(axes)
    batch = [LOGITS.shape[a] for a in order[: 3 - len(axes)]]
    x, y, w, where = (
      np.transpose(a, order).reshape(*batch, -1)
      for a in (LOGITS, LABELS, WEIGHTS, WHERE)
    )
    for reduce_fn in (jnp.mean, None):
      got = loss(
        LOGITS,
        LABELS,
        weights=WEIGHTS,
        axis=axis,
        where=WHERE,
        reduce_fn=reduce_fn,
      )
      expected = loss(x, y, weights=w, where=where, reduce_fn=reduce_fn)
      assert_allclose(got, expected, rtol=1e-5)
      got = loss(
        LOGITS, LABELS, weights=WEIGHTS, axis=axis, reduce_fn=reduce_fn
      )
      expected = upstream.losses.ranking_softmax_loss(
        x, y, weights=w, reduce_fn=reduce_fn
      )
      assert_allclose(got, expected, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
