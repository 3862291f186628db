"""Tests that what `where` leaves out has no effect on a loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from optax import losses

_RNG = np.random.default_rng(0)
_LOGITS = _RNG.normal(size=(4, 6, 5))
_OTHERS = _RNG.normal(size=(4, 6, 5))
_THIRDS = _RNG.normal(size=(4, 6, 5))
_LABELS = _RNG.uniform(0.1, 0.9, size=(4, 6, 5))
_PROBABILITIES = _LABELS / _LABELS.sum(-1, keepdims=True)
_SIGNS = _RNG.choice([-1.0, 1.0], size=(4, 6, 5))
_CLASSES = _RNG.integers(0, 3, size=(4, 6))
_EMBEDDINGS = _LOGITS.reshape(24, 5)
_VIEWS = np.arange(24) // 2
_SENTENCES = np.array([[1, 2], [2, 1], [1, 1], [2, 2]])
_WORD_PADDINGS = np.array([[0, 0], [0, 0], [0, 1], [0, 0]])
_FRAME_PADDINGS = np.array([[0] * 6, [0] * 6, [0] * 5 + [1], [0] * 6])


def _ctc(logits, **kwargs):
  return losses.ctc_loss(
    logits, _FRAME_PADDINGS, _SENTENCES, _WORD_PADDINGS, **kwargs
  )


def _ctc_with_forward_probs(logits, **kwargs):
  return losses.ctc_loss_with_forward_probs(
    logits, _FRAME_PADDINGS, _SENTENCES, _WORD_PADDINGS, **kwargs
  )[0]


def _fenchel_young(scores, targets, **kwargs):
  loss = losses.make_fenchel_young_loss(jax.nn.logsumexp)
  return loss(scores, targets, **kwargs)


def _ntxent(embeddings, **kwargs):
  return losses.ntxent(embeddings, _VIEWS, **kwargs)


def _ranking(logits, labels, weights, **kwargs):
  return losses.ranking_softmax_loss(
    logits, labels, weights=weights, reduce_fn=None, **kwargs
  )


def _sigmoid_focal(logits, labels, weights, exponents, **kwargs):
  return losses.sigmoid_focal_loss(
    logits, labels, alpha=weights, gamma=exponents, **kwargs
  )


def _smooth(labels, **kwargs):
  return losses.smooth_labels(labels, 0.2, **kwargs)


# A name that begins with that of a loss, a function of arrays, and the arrays.
_CASES = (
  ("binary_dice_loss", losses.binary_dice_loss, (_LOGITS, _LABELS)),
  ("cosine_distance", losses.cosine_distance, (_LOGITS, _OTHERS)),
  ("cosine_similarity", losses.cosine_similarity, (_LOGITS, _OTHERS)),
  ("ctc_loss", _ctc, (_LOGITS,)),
  ("ctc_loss_with_forward_probs", _ctc_with_forward_probs, (_LOGITS,)),
  ("dice_loss", losses.dice_loss, (_LOGITS, _LABELS)),
  (
    "generalized_kl_divergence",
    losses.generalized_kl_divergence,
    (_LOGITS, _LABELS),
  ),
  ("hinge_loss", losses.hinge_loss, (_LOGITS, _SIGNS)),
  ("huber_loss", losses.huber_loss, (_LOGITS, _OTHERS)),
  ("kl_divergence", losses.kl_divergence, (_OTHERS, _PROBABILITIES)),
  (
    "kl_divergence_with_log_targets",
    losses.kl_divergence_with_log_targets,
    (_LOGITS, _OTHERS),
  ),
  ("l2_loss", losses.l2_loss, (_LOGITS, _OTHERS)),
  ("log_cosh", losses.log_cosh, (_LOGITS, _OTHERS)),
  ("make_fenchel_young_loss", _fenchel_young, (_LOGITS, _LABELS)),
  (
    "multiclass_generalized_dice_loss",
    losses.multiclass_generalized_dice_loss,
    (_LOGITS, _LABELS),
  ),
  (
    "multiclass_hinge_loss",
    losses.multiclass_hinge_loss,
    (_LOGITS, _CLASSES),
  ),
  (
    "multiclass_perceptron_loss",
    losses.multiclass_perceptron_loss,
    (_LOGITS, _CLASSES),
  ),
  (
    "multiclass_sparsemax_loss",
    losses.multiclass_sparsemax_loss,
    (_LOGITS, _CLASSES),
  ),
  ("ntxent", _ntxent, (_EMBEDDINGS,)),
  ("perceptron_loss", losses.perceptron_loss, (_LOGITS, _SIGNS)),
  (
    "poly_loss_cross_entropy",
    losses.poly_loss_cross_entropy,
    (_LOGITS, _LABELS),
  ),
  ("ranking_softmax_loss", _ranking, (_LOGITS, _LABELS, _LABELS)),
  (
    "safe_softmax_cross_entropy",
    losses.safe_softmax_cross_entropy,
    (_LOGITS, _LABELS),
  ),
  (
    "sigmoid_binary_cross_entropy",
    losses.sigmoid_binary_cross_entropy,
    (_LOGITS, _LABELS),
  ),
  ("sigmoid_focal_loss", losses.sigmoid_focal_loss, (_LOGITS, _LABELS)),
  (
    "sigmoid_focal_loss__of_weights",
    _sigmoid_focal,
    (_LOGITS, _LABELS, _LABELS, 1 + _LABELS),
  ),
  ("smooth_labels", _smooth, (_LABELS,)),
  ("softmax_cross_entropy", losses.softmax_cross_entropy, (_LOGITS, _LABELS)),
  (
    "softmax_cross_entropy_with_integer_labels",
    losses.softmax_cross_entropy_with_integer_labels,
    (_LOGITS, _CLASSES),
  ),
  ("sparsemax_loss", losses.sparsemax_loss, (_LOGITS, _LABELS)),
  ("squared_error", losses.squared_error, (_LOGITS, _OTHERS)),
  (
    "triplet_margin_loss",
    losses.triplet_margin_loss,
    (_LOGITS, _OTHERS, _THIRDS),
  ),
)


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


class IntegerLabelsTest(parameterized.TestCase):
  """Integer labels, and the same labels one-hot."""

  def test_one_hot(self):
    where = _masked_at_random(_LOGITS.shape)
    logits = jnp.where(where, _LOGITS, np.nan).astype(jnp.float32)
    one_hot = jax.nn.one_hot(_CLASSES, 5)
    self.assertFalse(np.all(jnp.sum(where * one_hot, -1)))

    def of_integers(logits):
      return losses.softmax_cross_entropy_with_integer_labels(
        logits, _CLASSES, where=where
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
