"""CTC: frames, classes and paddings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import (
  DTYPES,
  assert_all_close,
  assert_allclose,
  assert_close,
  assert_equal,
)

import optax_masking as optax

NAN = float("nan")
RNG = np.random.default_rng(11)
LOGITS = RNG.normal(size=(3, 6, 5)).astype("float32") * 2
FRAMES = np.array([6, 5, 3])
LOGIT_PADDINGS = (np.arange(6) >= FRAMES[:, None]).astype("float32")
LABELS = np.array([[1, 2, 2], [3, 1, 0], [4, 0, 0]])
LABEL_PADDINGS = np.array([[0.0, 0, 0], [0, 0, 1], [0, 1, 1]])
PADDINGS = (LABELS, LABEL_PADDINGS)
NOT_PADDED = LOGIT_PADDINGS == 0
# As many frames out of the middle of each sequence as there are of padding.
KEPT = np.array(
  [[1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1], [0, 1, 0, 0, 1, 0]], bool
)


class HandWorkedTest(parameterized.TestCase):
  def test_uniform(self):
    """Of the 4 paths of 2 frames, 3 are of the label 1: 11, 01 and 10."""
    logits = jnp.array([[[0.0, 0.0], [NAN, NAN], [0.0, 0.0]]])
    where = jnp.array([[True, False, True]])
    got = optax.ctc_loss(
      logits,
      jnp.zeros((1, 3)),
      jnp.array([[1]]),
      jnp.zeros((1, 1)),
      where=where,
    )
    assert_allclose(got, [math.log(4 / 3)], rtol=1e-6)

  def test_forward_probabilities(self):
    """After frame 1 both are 1/2; after frame 2, 11 and 01 end in the label."""
    logits = jnp.array([[[0.0, 0.0], [NAN, NAN], [0.0, 0.0]]])
    where = jnp.array([[True, False, True]])
    _, blank, label = optax.ctc_loss_with_forward_probs(
      logits,
      jnp.zeros((1, 3)),
      jnp.array([[1]]),
      jnp.zeros((1, 1)),
      where=where,
    )
    assert_allclose(jnp.exp(label[:, 0, 0]), [1 / 2, 1 / 2, 1 / 2], rtol=1e-6)
    assert_allclose(jnp.exp(blank[:, 0, 0]), [1 / 2, 1 / 2, 1 / 4], rtol=1e-6)
    # In Optax the last frame has the label followed by nothing in it, too.
    assert_allclose(jnp.exp(blank[-1, 0, 1]), 3 / 4, rtol=1e-6)


@pytest.mark.slow
class FramesTest(parameterized.TestCase):
  def test_mask_is_padding(self):
    """All three outputs are those of Optax with the frames as padding."""
    got = optax.ctc_loss_with_forward_probs(
      jnp.where(KEPT[..., None], LOGITS, NAN),
      jnp.where(KEPT, LOGIT_PADDINGS * 0, NAN),
      *PADDINGS,
      where=KEPT,
    )
    expected = upstream.ctc_loss_with_forward_probs(
      LOGITS, 1.0 - KEPT, *PADDINGS
    )
    for a, b in zip(got, expected, strict=True):
      assert_allclose(a, b, rtol=1e-5)

  def test_dropped_frames(self):
    for i, kept in enumerate(KEPT & NOT_PADDED):
      got = optax.ctc_loss(LOGITS, LOGIT_PADDINGS, *PADDINGS, where=KEPT)[i]
      n = int((1 - LABEL_PADDINGS[i]).sum())
      expected = upstream.ctc_loss(
        LOGITS[i : i + 1, kept],
        np.zeros((1, kept.sum())),
        LABELS[i : i + 1, :n],
        np.zeros((1, n)),
      )
      assert_allclose(got, expected[0], rtol=1e-5)

  @parameterized.parameters(True, ((3, 6),), ((3, 6, 5),), ((1, 1),))
  def test_garbage_in_padding(self, shape):
    """Any mask, one that masks nothing included, protects from it."""
    where = True if shape is True else np.ones(shape, bool)
    garbage = jnp.where(NOT_PADDED[..., None], LOGITS, NAN)

    def total(logits, loss, **kwargs):
      return loss(logits, LOGIT_PADDINGS, *PADDINGS, **kwargs).sum()

    with jax.debug_nans(True), jax.debug_infs(True):
      got = jax.jit(
        jax.value_and_grad(lambda x: total(x, optax.ctc_loss, where=where))
      )(garbage)
    expected = jax.jit(
      jax.value_and_grad(lambda x: total(x, upstream.ctc_loss))
    )(LOGITS)
    assert_allclose(got[0], expected[0], rtol=1e-6)
    assert_all_close(got[1], expected[1], "float32", roundings=64)
    assert_equal(got[1][~NOT_PADDED], 0)
    self.assertTrue(jnp.isnan(total(garbage, optax.ctc_loss)))  # As in Optax.

  @parameterized.parameters("int32", "bool", "bfloat16", "float32")
  def test_dtypes_of_paddings(self, dtype):
    got = optax.ctc_loss(
      LOGITS,
      LOGIT_PADDINGS.astype(dtype),
      LABELS,
      LABEL_PADDINGS.astype(dtype),
      where=True,
    )
    expected = upstream.ctc_loss(LOGITS, LOGIT_PADDINGS, *PADDINGS)
    assert_allclose(got, expected, rtol=1e-6)

  def test_gradient_of_paddings(self):
    """0 where a frame is masked, whatever is there."""
    gradient = jax.grad(
      lambda p: optax.ctc_loss(LOGITS, p, *PADDINGS, where=KEPT).sum()
    )(jnp.where(KEPT, LOGIT_PADDINGS, NAN))
    assert_equal(gradient[~KEPT], 0)
    self.assertTrue(jnp.all(jnp.isfinite(gradient)))

  def test_padding_alone(self):
    """A sequence of it has nothing included, in the mask or else."""
    paddings = np.where([[True], [False], [False]], 1, LOGIT_PADDINGS)
    got = optax.ctc_loss(LOGITS, paddings, *PADDINGS, where=True)
    expected = upstream.ctc_loss(LOGITS, paddings, *PADDINGS)
    self.assertGreater(expected[0], 9e4)
    assert_allclose(got, expected * np.array([0, 1, 1]), rtol=1e-6)

  @parameterized.parameters(-1e4, -1e5, -1e7)
  def test_log_epsilon(self, log_epsilon):
    got = optax.ctc_loss(
      LOGITS, LOGIT_PADDINGS, *PADDINGS, log_epsilon=log_epsilon, where=KEPT
    )
    expected = upstream.ctc_loss(
      LOGITS, 1.0 - (KEPT & NOT_PADDED), *PADDINGS, log_epsilon=log_epsilon
    )
    assert_allclose(got, expected, rtol=1e-5)

  def test_nothing_included(self):
    where = np.array([[True], [False], [True]])
    got, *log_probs = optax.ctc_loss_with_forward_probs(
      jnp.where(where[..., None], LOGITS, NAN),
      LOGIT_PADDINGS,
      *PADDINGS,
      where=where,
    )
    expected = upstream.ctc_loss(LOGITS, LOGIT_PADDINGS, *PADDINGS)
    assert_allclose(got, np.where(where[:, 0], expected, 0), rtol=1e-6)
    self.assertTrue(all(jnp.all(jnp.isfinite(x)) for x in log_probs))


@pytest.mark.slow
class LabelsTest(parameterized.TestCase):
  def test_padding_holds_any_integer(self):
    """Also the last label, with which Optax compares it."""
    padding = LABEL_PADDINGS == 1
    expected = optax.ctc_loss_with_forward_probs(
      LOGITS, LOGIT_PADDINGS, *PADDINGS, where=KEPT
    )
    theirs = upstream.ctc_loss(LOGITS, 1.0 - (KEPT & NOT_PADDED), *PADDINGS)
    assert_allclose(expected[0], theirs, rtol=1e-5)
    for garbage in (-100, -1, 1, 2, 3, 4, 5, 2**31 - 1):
      got = optax.ctc_loss_with_forward_probs(
        LOGITS,
        LOGIT_PADDINGS,
        np.where(padding, garbage, LABELS),
        LABEL_PADDINGS,
        where=KEPT,
      )
      jax.tree.map(assert_equal, got, expected)

  def test_another_blank(self):
    order = [3, 1, 2, 0, 4]
    got = optax.ctc_loss(
      LOGITS[..., order],
      LOGIT_PADDINGS,
      np.argsort(order)[LABELS],
      LABEL_PADDINGS,
      blank_id=3,
      where=KEPT,
    )
    expected = upstream.ctc_loss(LOGITS, 1.0 - (KEPT & NOT_PADDED), *PADDINGS)
    assert_allclose(got, expected, rtol=1e-5)

  def test_label_in_no_frame(self):
    """The sequence has no target; it is masked as a whole."""
    where = np.ones(LOGITS.shape, bool)
    where[0, :, 2] = False  # A label of sequence 0.
    where[1, :4, 3] = False  # One of sequence 1, but for a frame too late.

    def losses(logits):
      return optax.ctc_loss(logits, LOGIT_PADDINGS, *PADDINGS, where=where)

    gradient = jax.jacrev(losses)(jnp.asarray(LOGITS))
    self.assertEqual(losses(LOGITS)[0], 0)
    assert_equal(gradient[0], 0)
    # 3 and 1 have no alignment if 3 may be in the last frame only, as in Optax
    # for labels that have none.
    assert_close(losses(LOGITS)[1] / 1e5, 1, "bfloat16")


@pytest.mark.slow
class ClassesTest(parameterized.TestCase):
  def test_class_masked_everywhere(self):
    """As if there were four classes."""
    where = np.array([True, True, True, True, False])[None, None]
    labels = np.minimum(LABELS, 3)
    got = optax.ctc_loss(
      jnp.where(where, LOGITS, NAN),
      LOGIT_PADDINGS,
      labels,
      LABEL_PADDINGS,
      where=where,
    )
    expected = upstream.ctc_loss(
      LOGITS[..., :4], LOGIT_PADDINGS, labels, LABEL_PADDINGS
    )
    assert_allclose(got, expected, rtol=1e-5)

  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_confident_logits(self, dtype):
    """A masked class is less likely than what is all but impossible."""
    # The label is all but impossible in frame 1, and masked in frame 2.
    logits = jnp.array([[[0.0, -300.0], [0.0, 0.0]]], dtype)
    where = jnp.array([[[True, True], [True, False]]])
    got = optax.ctc_loss(
      logits,
      jnp.zeros((1, 2)),
      jnp.array([[1]]),
      jnp.zeros((1, 1)),
      where=where,
    )
    assert_close(got, [300.0], dtype)

  def test_axis(self):
    """Classes along any axis, and along two: flat indices of their classes."""
    expected = upstream.ctc_loss(LOGITS, 1.0 - (KEPT & NOT_PADDED), *PADDINGS)
    unmasked = upstream.ctc_loss(LOGITS, LOGIT_PADDINGS, *PADDINGS)
    loss = functools.partial(
      optax.ctc_loss,
      logit_paddings=LOGIT_PADDINGS,
      labels=LABELS,
      label_paddings=LABEL_PADDINGS,
    )
    moved = np.moveaxis(LOGITS, -1, 1)
    assert_allclose(loss(moved, axis=1, where=KEPT), expected, rtol=1e-5)
    assert_allclose(loss(moved, axis=1), unmasked, rtol=1e-6)
    where = np.moveaxis(np.broadcast_to(KEPT[..., None], LOGITS.shape), -1, 1)
    assert_allclose(loss(moved, axis=1, where=where), expected, rtol=1e-5)
    square = np.pad(
      LOGITS, ((0, 0), (0, 0), (0, 1)), constant_values=-1e4
    ).reshape(3, 6, 2, 3)
    assert_allclose(loss(square, axis=(2, 3)), unmasked, rtol=1e-5)
    where = (np.arange(6) < 5).reshape(1, 1, 2, 3)
    assert_allclose(
      loss(np.where(where, square, NAN), axis=(2, 3), where=where),
      unmasked,
      rtol=1e-5,
    )


@pytest.mark.slow
class CostsTest(parameterized.TestCase):
  """What costs more than the stand-in for minus infinity, as documented."""

  @parameterized.parameters(6e4, 1.2e5, 3e5)
  def test_label(self, cost):
    """Unlikely in each frame: log(2) for the choice of one of the two."""
    logits = np.zeros((1, 2, 2)) - np.array([0.0, cost])
    loss, gradient = self.loss_and_gradient(logits, True)
    assert_allclose(loss, min(cost, 1e5) - np.log(2), rtol=1e-6)
    expected = [[0.5, -0.5]] * 2 if cost < 1e5 else np.zeros((2, 2))
    assert_allclose(gradient[0], expected, rtol=1e-2)

  @parameterized.parameters(6e4, 1.2e5, 3e5)
  def test_masked_class(self, cost):
    """The label is masked in the first frame, and unlikely in the second."""
    logits = np.array([[[0.0, NAN], [0.0, -cost]]])
    where = ~np.isnan(logits)
    loss, gradient = self.loss_and_gradient(logits, where)
    assert_allclose(loss, min(cost, 1e5), rtol=2e-5)
    self.assertEqual(gradient[0, 0, 1], 0)
    assert_allclose(gradient[0, 1, 1], -1 if cost < 1e5 else 0, rtol=1e-6)

  @staticmethod
  def loss_and_gradient(logits, where):
    return jax.value_and_grad(
      lambda x: jnp.sum(
        optax.ctc_loss(
          x,
          np.zeros((1, 2)),
          np.array([[1]]),
          np.zeros((1, 1)),
          where=where,
        )
      )
    )(jnp.asarray(logits, DTYPES[0]))


@pytest.mark.slow
class ArgumentsTest(parameterized.TestCase):
  def test_what_optax_refuses(self):
    for arguments in (
      (LOGITS[0], LOGIT_PADDINGS, *PADDINGS),
      (LOGITS, LOGIT_PADDINGS[:, :-1], *PADDINGS),
      (LOGITS, LOGIT_PADDINGS, LABELS, LABEL_PADDINGS[:, :-1]),
      (LOGITS, LOGIT_PADDINGS, LABELS[:2], LABEL_PADDINGS[:2]),
      (LOGITS, LOGIT_PADDINGS, LABELS[0], LABEL_PADDINGS[0]),
    ):
      for name in ("ctc_loss", "ctc_loss_with_forward_probs"):
        with self.assertRaises(Exception) as theirs:
          getattr(upstream, name)(*arguments)
        with self.assertRaises(type(theirs.exception)) as ours:
          getattr(optax, name)(*arguments, where=True)
        self.assertEqual(str(ours.exception), str(theirs.exception))

  def test_masks_of_other_shapes(self):
    with self.assertRaisesRegex(ValueError, r"where\[..., None, None\]"):
      optax.ctc_loss(LOGITS, LOGIT_PADDINGS, *PADDINGS, where=np.ones(3, bool))


if __name__ == "__main__":
  absltest.main()
