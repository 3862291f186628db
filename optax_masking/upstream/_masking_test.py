"""Tests that what `where` leaves out has no effect on a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from optax import losses


def _arrays(shape, *makers):
  """Data for a loss, the same each time."""
  rng = np.random.default_rng(0)
  return tuple(make(rng, shape) for make in makers)


_CASES = ()


def _masked_at_random(shape):
  """Masks some elements of each row, and all of some rows."""
  where = np.random.default_rng(1).random(shape) < 0.6
  where[1] = False
  where[2, 3:] = False
  return where


def _filled(arrays, where, garbage, dtype=jnp.float32):
  return [
    jnp.where(where, x, garbage).astype(dtype)
    if x.shape == where.shape
    else jnp.asarray(x)
    for x in arrays
  ]


def _values_and_gradients(loss, arrays, where):
  floats = [
    i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)
  ]

  def total(*arrays):
    values = loss(*arrays, where=where)
    return jnp.sum(values), values

  gradients, values = jax.grad(total, floats, has_aux=True)(*arrays)
  return values, gradients


def _is_elementwise(loss, arrays):
  """Whether it returns an element for each, and can sum them over an axis."""
  if jax.eval_shape(loss, *arrays).shape != arrays[0].shape:
    return False
  sums = jax.eval_shape(lambda *arrays: loss(*arrays, axis=-1), *arrays)
  return sums.shape != arrays[0].shape


# NumPy by itself takes NaN for equal to NaN.
_assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-5, atol=1e-6, equal_nan=False
)


class MaskTest(parameterized.TestCase):
  """Each loss, with masks."""

  @parameterized.named_parameters(*_CASES)
  def test_garbage(self, loss, arrays):
    """No value and no gradient depends on it, and its own gradient is 0."""
    where = _masked_at_random(arrays[0].shape)
    expected = _values_and_gradients(loss, _filled(arrays, where, 0.5), where)
    for garbage in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
      garbled = _filled(arrays, where, garbage)
      values, gradients = _values_and_gradients(loss, garbled, where)
      jax.tree.map(np.testing.assert_array_equal, (values, gradients), expected)
      self.assertTrue(jnp.all(jnp.isfinite(values)))
      for gradient in gradients:
        self.assertTrue(jnp.all(jnp.isfinite(gradient)))
        np.testing.assert_array_equal(gradient[~where], 0)

  @parameterized.named_parameters(*_CASES)
  def test_second_derivatives(self, loss, arrays):
    where = _masked_at_random(arrays[0].shape)

    def squares(x, *others):
      _, gradients = _values_and_gradients(loss, [x, *others], where)
      return sum(jnp.sum(gradient**2) for gradient in gradients)

    garbled = jax.grad(squares)(*_filled(arrays, where, np.nan))
    expected = jax.grad(squares)(*_filled(arrays, where, 0.5))
    self.assertTrue(jnp.all(jnp.isfinite(garbled)))
    np.testing.assert_array_equal(garbled, expected)
    np.testing.assert_array_equal(garbled[~where], 0)

  @parameterized.named_parameters(*_CASES)
  def test_transformed(self, loss, arrays):
    """The same numbers under jit, and finite ones in half precision."""
    where = _masked_at_random(arrays[0].shape)
    arrays = _filled(arrays, where, np.nan)
    values, gradients = _values_and_gradients(loss, arrays, where)
    compiled = jax.jit(lambda *x: _values_and_gradients(loss, x[:-1], x[-1]))
    jax.tree.map(
      _assert_close,
      compiled(*arrays, where),
      (values, gradients),
    )
    half = _filled(arrays, where, np.nan, jnp.bfloat16)
    for x in jax.tree.leaves(_values_and_gradients(loss, half, where)):
      self.assertTrue(jnp.all(jnp.isfinite(x)))

  @parameterized.named_parameters(*_CASES)
  def test_compaction(self, loss, arrays):
    """The rest is the loss of an array without what is masked."""
    where = np.ones(arrays[0].shape, bool)
    where[..., 3:] = False
    # No label is one of these.
    arrays = [x % 3 if x.dtype.kind == "i" else x for x in arrays]
    values = loss(*_filled(arrays, where, np.nan), where=where)
    shorter = [x[..., :3] if x.shape == where.shape else x for x in arrays]
    everything = np.ones(shorter[0].shape, bool)
    expected = loss(*_filled(shorter, everything, np.nan))
    if values.shape == where.shape:
      np.testing.assert_array_equal(values[..., 3:], 0)
      values = values[..., :3]
    _assert_close(values, expected)

  @parameterized.named_parameters(*_CASES)
  def test_axis(self, loss, arrays):
    """Another axis is that axis moved to the end."""
    where = _masked_at_random(arrays[0].shape)
    arrays = _filled(arrays, where, np.nan)
    expected = loss(*arrays, where=where)
    if "dice" in self.id():  # Whose axes are those of the pixels.
      axis, swapped = tuple(range(1, where.ndim)), arrays
      if "binary" not in self.id():
        axis = axis[:-1]
    else:
      axis, where = where.ndim - 2, where.swapaxes(-1, -2)
      swapped = [
        x.swapaxes(-1, -2) if x.ndim == where.ndim else x for x in arrays
      ]
      if _is_elementwise(loss, arrays):
        clean = [jnp.where(where, x, 0.5) for x in swapped]
        _assert_close(loss(*clean, axis=axis), loss(*clean).sum(axis), atol=0)
        expected = expected.sum(-1)
      elif expected.shape == arrays[0].shape:
        expected = expected.swapaxes(-1, -2)
    got = loss(*swapped, axis=axis, where=where)
    _assert_close(got, expected)

  @parameterized.named_parameters(*_CASES)
  def test_mask_of_examples(self, loss, arrays):
    """A mask without the axis is a mask that is the same along the axis."""
    shape = arrays[0].shape
    where = _masked_at_random(shape)[..., 0]
    arrays = _filled(arrays, np.ones(shape, bool), np.nan)
    kwargs = {}
    if "binary_dice" in self.id():
      where = where[..., None]  # All axes of an example are those of pixels.
    elif _is_elementwise(loss, arrays):
      kwargs = {"axis": -1}
      with self.assertRaisesRegex(ValueError, "`where` has shape"):
        loss(*arrays, where=where)
    everywhere = np.broadcast_to(where[..., None], (*where.shape, shape[-1]))
    expected = loss(*arrays, where=everywhere.reshape(shape), **kwargs)
    got = loss(*arrays, where=where, **kwargs)
    _assert_close(got, expected)

  @parameterized.named_parameters(*_CASES)
  def test_nothing_included(self, loss, arrays):
    where = np.zeros(arrays[0].shape, bool)
    arrays = _filled(arrays, where, np.nan)
    for nothing in (where, False):
      result = _values_and_gradients(loss, arrays, nothing)
      jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), result)

  @parameterized.named_parameters(*_CASES)
  def test_everything_included(self, loss, arrays):
    where = np.ones(arrays[0].shape, bool)
    arrays = _filled(arrays, where, np.nan)
    for everything in (where, True):
      _assert_close(loss(*arrays, where=everything), loss(*arrays))

  @parameterized.named_parameters(*_CASES)
  def test_wrong_mask(self, loss, arrays):
    shape = arrays[0].shape
    arrays = _filled(arrays, np.ones(shape, bool), np.nan)
    with self.assertRaisesRegex(TypeError, "`where` must be boolean"):
      loss(*arrays, where=np.ones(shape))
    with self.assertRaisesRegex(ValueError, "`where` has shape"):
      loss(*arrays, where=np.ones((7, *shape[1:]), bool))


class WeightsTest(parameterized.TestCase):
  """Weights and exponents that are arrays."""

  def test_garbage(self):
    def loss(logits, labels, weights, exponents, where):
      return losses.sigmoid_focal_loss(
        logits, labels, alpha=weights, gamma=exponents, where=where
      )

    rng = np.random.default_rng(0)
    arrays = rng.uniform(0.1, 0.9, (4, 4, 6, 5))
    where = _masked_at_random((4, 6, 5))
    expected = _values_and_gradients(loss, _filled(arrays, where, 0.5), where)
    self.assertTrue(np.all(expected[1][3][where] < 0))
    got = _values_and_gradients(loss, _filled(arrays, where, np.nan), where)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    for gradient in got[1]:
      np.testing.assert_array_equal(gradient[~where], 0)


class IntegerLabelsTest(parameterized.TestCase):
  """Integer labels, and the same labels one-hot."""

  def test_one_hot(self):
    rng = np.random.default_rng(0)
    where = _masked_at_random((4, 6, 5))
    logits = jnp.where(where, rng.normal(size=(4, 6, 5)), np.nan)
    classes = rng.integers(0, 3, size=(4, 6))
    one_hot = jax.nn.one_hot(classes, 5)
    self.assertFalse(np.all(jnp.sum(where * one_hot, -1)))

    def of_integers(logits):
      return losses.softmax_cross_entropy_with_integer_labels(
        logits, classes, where=where
      )

    def of_one_hot(logits):
      return losses.softmax_cross_entropy(logits, one_hot, where=where)

    integers, one_hots = (
      (loss(logits), jax.grad(lambda x, loss=loss: jnp.sum(loss(x)))(logits))
      for loss in (of_integers, of_one_hot)
    )
    jax.tree.map(
      _assert_close,
      integers,
      one_hots,
    )


if __name__ == "__main__":
  absltest.main()
