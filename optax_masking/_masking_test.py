"""Tests that what `where` leaves out has no effect on a loss."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from optax import losses

_RNG = np.random.default_rng(0)
_LOGITS, _OTHERS, _THIRDS = _RNG.normal(size=(3, 4, 6, 5))
_LABELS = _RNG.uniform(0.1, 0.9, size=(4, 6, 5))
_PROBABILITIES = _LABELS / _LABELS.sum(-1, keepdims=True)
_SIGNS = _RNG.choice([-1.0, 1.0], size=(4, 6, 5))
_CLASSES = _RNG.integers(0, 3, size=(4, 6))
_EMBEDDINGS = _LOGITS.reshape(24, 5)
_VIEWS = np.arange(24) // 2
_SENTENCES = np.array([[1, 2], [2, 1], [1, 1], [2, 2]])


def _ctc(logits, **kwargs):
  return losses.ctc_loss(
    logits, np.zeros((4, 6)), _SENTENCES, np.zeros((4, 2)), **kwargs
  )


def _ctc_with_forward_probs(logits, **kwargs):
  return losses.ctc_loss_with_forward_probs(
    logits, np.zeros((4, 6)), _SENTENCES, np.zeros((4, 2)), **kwargs
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


def _smooth(labels, **kwargs):
  return losses.smooth_labels(labels, 0.2, **kwargs)


# The name of a loss, a function of its arrays, and the arrays.
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


def _filled(arrays, where, garbage):
  return [
    jnp.where(where, x, garbage).astype(jnp.float32)
    if x.shape == where.shape
    else jnp.asarray(x)
    for x in arrays
  ]


def _values_and_gradients(loss, arrays, where):
  floats = [i for i, x in enumerate(arrays) if x.dtype == jnp.float32]

  def total(*arrays):
    values = loss(*arrays, where=where)
    return jnp.sum(values), values

  gradients, values = jax.grad(total, floats, has_aux=True)(*arrays)
  return values, gradients


class MaskTest(parameterized.TestCase):
  """Of every loss that takes `where`."""

  @parameterized.named_parameters(*_CASES)
  def test_garbage(self, loss, arrays):
    """It changes no value and no gradient, and has a gradient of 0."""
    where = _masked_at_random(arrays[0].shape)
    expected = _values_and_gradients(loss, _filled(arrays, where, 0.5), where)
    for garbage in (np.nan, np.inf, -np.inf, np.finfo(np.float32).max):
      garbled = _filled(arrays, where, garbage)
      values, gradients = _values_and_gradients(loss, garbled, where)
      jax.tree.map(np.testing.assert_array_equal, (values, gradients), expected)
      for gradient in gradients:
        self.assertTrue(jnp.all(jnp.isfinite(gradient)))
        np.testing.assert_array_equal(gradient[~where], 0)

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
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)

  @parameterized.named_parameters(*_CASES)
  def test_nothing_included(self, loss, arrays):
    where = np.zeros(arrays[0].shape, bool)
    result = _values_and_gradients(loss, _filled(arrays, where, np.nan), where)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), result)

  @parameterized.named_parameters(*_CASES)
  def test_everything_included(self, loss, arrays):
    where = np.ones(arrays[0].shape, bool)
    arrays = _filled(arrays, where, np.nan)
    np.testing.assert_allclose(
      loss(*arrays, where=where), loss(*arrays), rtol=1e-5, atol=1e-6
    )

  @parameterized.named_parameters(*_CASES)
  def test_wrong_mask(self, loss, arrays):
    shape = arrays[0].shape
    arrays = _filled(arrays, np.ones(shape, bool), np.nan)
    with self.assertRaisesRegex(TypeError, "`where` must be boolean"):
      loss(*arrays, where=np.ones(shape))
    with self.assertRaisesRegex(ValueError, "`where` has shape"):
      loss(*arrays, where=np.ones((7, *shape[1:]), bool))


if __name__ == "__main__":
  absltest.main()
