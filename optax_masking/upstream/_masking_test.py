"""Tests that masked elements have no effect on a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from optax import losses


def _arrays(shape, *makers):
  """Makes data for a loss, from a fixed seed."""
  rng = np.random.default_rng(0)
  return tuple(make(rng, shape) for make in makers)


_CASES = ()


def _random_mask(shape):
  """Masks some elements of each row, and all of some rows."""
  where = np.random.default_rng(1).random(shape) < 0.6
  where[1] = False
  where[2, 3:] = False
  return where


def _fill_masked(arrays, where, garbage, dtype=jnp.float32):
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
  """Whether a loss is elementwise, and sums over an axis if it is given one."""
  if jax.eval_shape(loss, *arrays).shape != arrays[0].shape:
    return False
  sums = jax.eval_shape(lambda *arrays: loss(*arrays, axis=-1), *arrays)
  return sums.shape != arrays[0].shape


# By default NumPy takes NaN for equal to NaN.
_assert_close = functools.partial(
  np.testing.assert_allclose, rtol=1e-5, atol=1e-6, equal_nan=False
)


class MaskTest(parameterized.TestCase):
  """Each loss, with masks."""

  @parameterized.named_parameters(*_CASES)
  def test_garbage(self, loss, arrays):
    """Masked garbage changes no result, and has gradient 0."""
    where = _random_mask(arrays[0].shape)
    expected = _values_and_gradients(
      loss, _fill_masked(arrays, where, 0.5), where
    )
    for garbage in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
      with_garbage = _fill_masked(arrays, where, garbage)
      values, gradients = _values_and_gradients(loss, with_garbage, where)
      jax.tree.map(np.testing.assert_array_equal, (values, gradients), expected)
      self.assertTrue(jnp.all(jnp.isfinite(values)))
      for gradient in gradients:
        self.assertTrue(jnp.all(jnp.isfinite(gradient)))
        np.testing.assert_array_equal(gradient[~where], 0)

  @parameterized.named_parameters(*_CASES)
  def test_second_derivatives(self, loss, arrays):
    where = _random_mask(arrays[0].shape)

    def squares(x, *others):
      _, gradients = _values_and_gradients(loss, [x, *others], where)
      return sum(jnp.sum(gradient**2) for gradient in gradients)

    with_garbage = jax.grad(squares)(*_fill_masked(arrays, where, np.nan))
    expected = jax.grad(squares)(*_fill_masked(arrays, where, 0.5))
    self.assertTrue(jnp.all(jnp.isfinite(with_garbage)))
    np.testing.assert_array_equal(with_garbage, expected)
    np.testing.assert_array_equal(with_garbage[~where], 0)

  @parameterized.named_parameters(*_CASES)
  def test_transformed(self, loss, arrays):
    """Under jit the numbers are the same, in half precision they are finite."""
    where = _random_mask(arrays[0].shape)
    arrays = _fill_masked(arrays, where, np.nan)
    values, gradients = _values_and_gradients(loss, arrays, where)
    compiled = jax.jit(lambda *x: _values_and_gradients(loss, x[:-1], x[-1]))
    jax.tree.map(
      _assert_close,
      compiled(*arrays, where),
      (values, gradients),
    )
    half = _fill_masked(arrays, where, np.nan, jnp.bfloat16)
    for x in jax.tree.leaves(_values_and_gradients(loss, half, where)):
      self.assertTrue(jnp.all(jnp.isfinite(x)))

  @parameterized.named_parameters(*_CASES)
  def test_compaction(self, loss, arrays):
    """A masked loss is the loss of an array without the masked elements."""
    where = np.ones(arrays[0].shape, bool)
    where[..., 3:] = False
    # All labels name a class that is left.
    arrays = [x % 3 if x.dtype.kind == "i" else x for x in arrays]
    values = loss(*_fill_masked(arrays, where, np.nan), where=where)
    unmasked = [x[..., :3] if x.shape == where.shape else x for x in arrays]
    full_mask = np.ones(unmasked[0].shape, bool)
    expected = loss(*_fill_masked(unmasked, full_mask, np.nan))
    if values.shape == where.shape:
      np.testing.assert_array_equal(values[..., 3:], 0)
      values = values[..., :3]
    _assert_close(values, expected)

  @parameterized.named_parameters(*_CASES)
  def test_axis(self, loss, arrays):
    """A loss over another axis is the loss with that axis moved to the end."""
    where = _random_mask(arrays[0].shape)
    arrays = _fill_masked(arrays, where, np.nan)
    expected = loss(*arrays, where=where)
    if "dice" in self.id():  # The axes are those of the pixels.
      axis, moved = tuple(range(1, where.ndim)), arrays
      if "binary" not in self.id():
        axis = axis[:-1]
    else:
      axis, where = where.ndim - 2, where.swapaxes(-1, -2)
      moved = [
        x.swapaxes(-1, -2) if x.ndim == where.ndim else x for x in arrays
      ]
      if _is_elementwise(loss, arrays):
        clean = [jnp.where(where, x, 0.5) for x in moved]
        _assert_close(loss(*clean, axis=axis), loss(*clean).sum(axis), atol=0)
        expected = expected.sum(-1)
      elif expected.shape == arrays[0].shape:
        expected = expected.swapaxes(-1, -2)
    actual = loss(*moved, axis=axis, where=where)
    _assert_close(actual, expected)

  @parameterized.named_parameters(*_CASES)
  def test_mask_of_examples(self, loss, arrays):
    """A mask of examples is a mask that is constant along the axis."""
    shape = arrays[0].shape
    where = _random_mask(shape)[..., 0]
    arrays = _fill_masked(arrays, np.ones(shape, bool), np.nan)
    kwargs = {}
    if "binary_dice" in self.id():
      where = where[..., None]  # All axes but the first are those of pixels.
    elif _is_elementwise(loss, arrays):
      kwargs = {"axis": -1}
      with self.assertRaisesRegex(ValueError, "`where` has shape"):
        loss(*arrays, where=where)
    expanded_mask = np.broadcast_to(where[..., None], (*where.shape, shape[-1]))
    expected = loss(*arrays, where=expanded_mask.reshape(shape), **kwargs)
    actual = loss(*arrays, where=where, **kwargs)
    _assert_close(actual, expected)

  @parameterized.named_parameters(*_CASES)
  def test_nothing_included(self, loss, arrays):
    where = np.zeros(arrays[0].shape, bool)
    arrays = _fill_masked(arrays, where, np.nan)
    for empty_mask in (where, False):
      result = _values_and_gradients(loss, arrays, empty_mask)
      jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), result)

  @parameterized.named_parameters(*_CASES)
  def test_everything_included(self, loss, arrays):
    where = np.ones(arrays[0].shape, bool)
    arrays = _fill_masked(arrays, where, np.nan)
    for full_mask in (where, True):
      _assert_close(loss(*arrays, where=full_mask), loss(*arrays))

  @parameterized.named_parameters(*_CASES)
  def test_wrong_mask(self, loss, arrays):
    shape = arrays[0].shape
    arrays = _fill_masked(arrays, np.ones(shape, bool), np.nan)
    with self.assertRaisesRegex(TypeError, "`where` must be boolean"):
      loss(*arrays, where=np.ones(shape))
    with self.assertRaisesRegex(ValueError, "`where` has shape"):
      loss(*arrays, where=np.ones((7, *shape[1:]), bool))


class WeightsTest(parameterized.TestCase):
  """A loss whose weights and exponents are arrays."""

  def test_garbage(self):
    def loss(logits, labels, weights, exponents, where):
      return losses.sigmoid_focal_loss(
        logits, labels, alpha=weights, gamma=exponents, where=where
      )

    rng = np.random.default_rng(0)
    arrays = rng.uniform(0.1, 0.9, (4, 4, 6, 5))
    where = _random_mask((4, 6, 5))
    expected = _values_and_gradients(
      loss, _fill_masked(arrays, where, 0.5), where
    )
    self.assertTrue(np.all(expected[1][3][where] < 0))
    actual = _values_and_gradients(
      loss, _fill_masked(arrays, where, np.nan), where
    )
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    for gradient in actual[1]:
      np.testing.assert_array_equal(gradient[~where], 0)


class IntegerLabelsTest(parameterized.TestCase):
  """Integer labels give the results of the same labels as one-hot vectors."""

  def test_one_hot(self):
    rng = np.random.default_rng(0)
    where = _random_mask((4, 6, 5))
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
