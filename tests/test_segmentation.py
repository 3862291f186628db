"""The Dice losses: pixels, classes and options."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import assert_allclose, assert_equal

import optax_masking as optax

NAN = float("nan")
SHAPE = (2, 3, 2, 4)  # Images, rows, columns, classes.
RNG = np.random.default_rng(5)
LOGITS = RNG.normal(size=SHAPE).astype("float32")
PROBABILITIES = np.asarray(jax.nn.softmax(LOGITS))
TARGETS = np.eye(4, dtype="float32")[RNG.integers(0, 4, size=SHAPE[:3])]
# The same number of pixels of each image, for the others to be dropped.
PIXELS = np.array([[[1, 0], [1, 1], [0, 1]], [[0, 0], [1, 1], [1, 1]]], bool)


def dropped(x):
  return x[PIXELS].reshape(2, 4, -1)


class HandWorkedTest(parameterized.TestCase):
  """Three pixels of two classes, and one that is masked; smoothing of 1."""

  PREDICTIONS = np.array([[[1, 0], [1, 0], [1, 0], [NAN, NAN]]], "float32")
  TARGETS = np.array([[[1, 0], [1, 0], [0, 1], [NAN, NAN]]], "float32")
  WHERE = np.array([[True, True, True, False]])

  def test_dice_loss(self):
    got = optax.losses.dice_loss(
      self.PREDICTIONS,
      self.TARGETS,
      apply_softmax=False,
      reduction="none",
      where=self.WHERE,
    )
    # Class 0: 2 pixels of both, 3 predicted, 2 true: 1 - 3 / (2 + 1/2 + 1).
    # Class 1: none of both, none predicted, 1 true: 1 - 1 / (1/2 + 1).
    assert_allclose(got, [[1 / 7, 1 / 3]], rtol=1e-6)

  def test_multiclass_generalized_dice_loss(self):
    got = optax.losses.multiclass_generalized_dice_loss(
      self.PREDICTIONS, self.TARGETS, apply_softmax=False, where=self.WHERE
    )
    # Frequencies 2 and 1: weights of 1/4 and 1, so 2/5 and 8/5.
    assert_allclose(got, (2 / 5 / 7 + 8 / 5 / 3) / 2, rtol=1e-5)

  def test_binary_dice_loss(self):
    # Logits so large that the probabilities are 1 and 0. One of both, one
    # predicted, two true: 1 - 2 / (1 + 1/2 + 1).
    got = optax.losses.binary_dice_loss(
      np.array([[100, -100, NAN]], "float32"),
      np.array([[1, 1, 0]], "float32"),
      where=np.array([[True, True, False]]),
    )
    assert_allclose(got, [1 / 5], rtol=1e-6)


@pytest.mark.slow
class PixelsTest(parameterized.TestCase):
  """A mask of pixels gives Optax's loss of the pixels that are left."""

  @parameterized.product(
    options=(
      {},
      {"class_weights": np.array([0.5, 1.0, 2.0, 3.0], "float32")},
      {"smooth": 0.1, "alpha": 0.3, "beta": 0.7},
      {"smooth": np.array([0.5, 1.0, 2.0, 3.0], "float32")},
      {"ignore_background": True},
      {"reduction": "sum"},
      {"reduction": "none"},
      {"reduction": "none", "ignore_background": True},
    ),
    apply_softmax=(True, False),
  )
  def test_dice_loss(self, options, apply_softmax):
    x = LOGITS if apply_softmax else PROBABILITIES
    options = options | {"apply_softmax": apply_softmax}

    def expected(x, t):
      return upstream.losses.dice_loss(dropped(x), dropped(t), **options)

    def got(x, t):
      return optax.losses.dice_loss(x, t, where=PIXELS, **options)

    garbage = [np.where(PIXELS[..., None], a, NAN) for a in (x, TARGETS)]
    for loss in (got, jax.jit(got)):
      assert_allclose(loss(*garbage), expected(x, TARGETS), rtol=1e-5)
    for a, b in zip(
      jax.jit(jax.grad(lambda *x: jnp.sum(got(*x)), (0, 1)))(*garbage),
      jax.grad(lambda *x: jnp.sum(expected(*x)), (0, 1))(
        *map(jnp.asarray, (x, TARGETS))
      ),
      strict=True,
    ):
      assert_allclose(a, b, rtol=1e-4)

  @parameterized.product(
    options=({}, {"ignore_background": True}, {"smooth": 0.1}),
    apply_softmax=(True, False),
  )
  def test_multiclass_generalized_dice_loss(self, options, apply_softmax):
    x = LOGITS if apply_softmax else PROBABILITIES
    options = options | {"apply_softmax": apply_softmax}
    loss = functools.partial(
      optax.losses.multiclass_generalized_dice_loss, where=PIXELS, **options
    )
    garbage = [np.where(PIXELS[..., None], a, NAN) for a in (x, TARGETS)]
    expected = upstream.losses.multiclass_generalized_dice_loss(
      dropped(x), dropped(TARGETS), **options
    )
    for f in (loss, jax.jit(loss)):
      assert_allclose(f(*garbage), expected, rtol=1e-5)

  @parameterized.parameters(((),), ((1,),))
  def test_binary_dice_loss(self, channel):
    """With an axis for the one class, and without; so too the mask."""
    x, t = LOGITS[..., 0], TARGETS[..., 0]
    expected = upstream.losses.binary_dice_loss(dropped(x), dropped(t))
    garbage = [
      np.where(PIXELS, a, NAN).reshape(*a.shape, *channel) for a in (x, t)
    ]
    for where in (PIXELS, PIXELS[..., None]):
      got = optax.losses.binary_dice_loss(*garbage, where=where)
      assert_allclose(got, expected, rtol=1e-6)

  def test_binary_probabilities(self):
    """They need not be 1, as Optax has it, and give what logits give."""
    x, t = LOGITS[..., 0], TARGETS[..., 0]
    loss = functools.partial(
      optax.losses.binary_dice_loss, apply_sigmoid=False, where=PIXELS
    )
    expected = optax.losses.binary_dice_loss(x, t, where=PIXELS)
    for f in (loss, jax.jit(loss)):
      assert_allclose(f(np.asarray(jax.nn.sigmoid(x)), t), expected, rtol=1e-6)

  def test_predictions_without_the_axis_of_one_class(self):
    x, t = LOGITS[..., 0], TARGETS[..., :1]
    for a, b in ((x, t), (x[..., None], t[..., 0])):
      got = optax.losses.dice_loss(a, b, where=PIXELS)
      expected = optax.losses.binary_dice_loss(x, t[..., 0], where=PIXELS)
      assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
class ClassesTest(parameterized.TestCase):
  @parameterized.product(
    apply_softmax=(True, False), reduction=("mean", "sum", "none")
  )
  def test_class_masked_everywhere(self, apply_softmax, reduction):
    """As if there were three classes: in the mean, too."""
    where = np.array([True, True, False, True])
    x, t = LOGITS[..., where], TARGETS[..., where]
    if not apply_softmax:  # Of the three, for Optax to accept them.
      x = np.asarray(jax.nn.softmax(x))
    whole = np.full(SHAPE, NAN, "float32")
    whole[..., where] = x
    options = {"apply_softmax": apply_softmax, "reduction": reduction}
    got = optax.losses.dice_loss(
      whole, TARGETS, where=where[None, None, None], **options
    )
    expected = np.asarray(upstream.losses.dice_loss(x, t, **options))
    if reduction == "none":
      expected = np.insert(expected, 2, 0, axis=-1)
    assert_allclose(got, expected, rtol=1e-5)

  def test_generalized(self):
    where = np.array([True, True, False, True])
    loss = optax.losses.multiclass_generalized_dice_loss
    got = loss(LOGITS, TARGETS, where=where[None, None, None])
    expected = upstream.losses.multiclass_generalized_dice_loss(
      LOGITS[..., where], TARGETS[..., where]
    )
    assert_allclose(got, expected, rtol=1e-5)

  def test_class_of_one_image(self):
    """It counts in the mean of the other image alone."""
    where = np.ones(SHAPE, bool)
    where[0, ..., 1] = False
    per_class = optax.losses.dice_loss(
      PROBABILITIES, TARGETS, apply_softmax=False, reduction="none", where=where
    )
    self.assertEqual(per_class[0, 1], 0)
    mean = optax.losses.dice_loss(
      PROBABILITIES, TARGETS, apply_softmax=False, where=where
    )
    assert_allclose(mean, per_class.sum(-1) / np.array([3, 4]), rtol=1e-6)


@pytest.mark.slow
class EmptyTest(parameterized.TestCase):
  @parameterized.parameters(
    "dice_loss", "multiclass_generalized_dice_loss", "binary_dice_loss"
  )
  def test_no_smoothing(self, name):
    """0 / 0 is not computed."""
    where = np.array([True, False])[:, None, None, None]
    loss = getattr(optax.losses, name)
    x, t = LOGITS, TARGETS
    if name == "binary_dice_loss":
      x, t, where = x[..., 0], t[..., 0], where[..., 0]

    def total(x, where):
      return jnp.sum(loss(x, t, smooth=0.0, where=where))

    with jax.debug_nans(True), jax.debug_infs(True):
      value, gradient = jax.value_and_grad(total)(x, where)
      self.assertGreater(value, 0)
      assert_equal(gradient[1], 0)
      value, gradient = jax.value_and_grad(total)(x, where & False)
    self.assertEqual(value, 0)
    assert_equal(gradient, 0)

  def test_parameters_of_an_empty_class(self):
    """NaN for a class that is masked does not get out."""
    where = np.array([True, True, False, True])[None, None, None]
    clean = {
      "class_weights": np.array([0.5, 1.0, 2.0, 3.0], "float32"),
      "smooth": np.array([0.5, 1.0, 2.0, 3.0], "float32"),
      "alpha": np.array([0.5, 0.6, 0.7, 0.8], "float32"),
      "beta": np.array([0.4, 0.3, 0.2, 0.1], "float32"),
    }

    def total(options):
      return optax.losses.dice_loss(
        LOGITS, TARGETS, where=where, **options
      ).sum()

    garbage = {
      name: np.where([True, True, False, True], x, NAN)
      for name, x in clean.items()
    }
    with jax.debug_nans(True):
      got = jax.value_and_grad(total)(garbage)
    expected = jax.value_and_grad(total)(clean)
    jax.tree.map(assert_equal, got, expected)
    for gradient in got[1].values():
      self.assertEqual(gradient[2], 0)


@pytest.mark.slow
class ArgumentsTest(parameterized.TestCase):
  @parameterized.parameters(1, -2, ((1, 2),), ((-3, -2),), ((0, 1, 2),))
  def test_axis(self, axis):
    for where in (PIXELS, True):
      per_pixel = np.broadcast_to(
        np.reshape(where, np.shape(where) or (1, 1, 1)), SHAPE[:3]
      )
      got = optax.losses.dice_loss(
        LOGITS, TARGETS, axis=axis, reduction="none", where=where
      )
      p, t = (
        PROBABILITIES * per_pixel[..., None],
        TARGETS * per_pixel[..., None],
      )
      p, t, i = (a.sum(axis) for a in (p, t, p * t))
      assert_allclose(got, 1 - 2 * (i + 1) / (p + t + 2), rtol=1e-4)

  def test_axis_of_the_others(self):
    """Optax has none: rows and columns by themselves, and by default both."""
    x, t = LOGITS[..., 0], TARGETS[..., 0]
    binary = optax.losses.binary_dice_loss
    generalized = optax.losses.multiclass_generalized_dice_loss
    for where in (None, True):
      for axis in ((1, 2), (-1, -2)):
        assert_allclose(
          binary(x, t, axis=axis, where=where), binary(x, t), rtol=1e-6
        )
      for axis in ((1, 2), (-3, -2)):
        assert_allclose(
          generalized(LOGITS, TARGETS, axis=axis, where=where),
          generalized(LOGITS, TARGETS),
          rtol=1e-6,
        )
      self.assertEqual(binary(x, t, axis=-1, where=where).shape, (2, 3))

  def test_axis_of_the_classes(self):
    """It is none of the pixels."""
    for where in (None, True):
      for name, x, t in (
        ("multiclass_generalized_dice_loss", LOGITS, TARGETS),
        ("binary_dice_loss", LOGITS[..., :1], TARGETS[..., :1]),
      ):
        for axis in (-1, 3, (1, -1)):
          with self.assertRaisesRegex(ValueError, "names the class axis"):
            getattr(optax.losses, name)(x, t, axis=axis, where=where)

  def test_integer_predictions(self):
    x = np.rint(LOGITS * 3)
    for where in (True, np.ones(SHAPE, bool)):
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # Optax's softmax.
        got = optax.losses.dice_loss(x.astype("int32"), TARGETS, where=where)
      assert_allclose(got, upstream.losses.dice_loss(x, TARGETS), rtol=1e-5)

  def test_what_optax_refuses(self):
    for name, arguments, options in (
      ("dice_loss", (LOGITS, TARGETS[:1]), {}),
      ("dice_loss", (LOGITS, TARGETS), {"reduction": "median"}),
      ("dice_loss", (LOGITS, TARGETS), {"axis": 7}),
      ("dice_loss", (LOGITS, TARGETS), {"axis": (1, 1)}),
      ("dice_loss", (LOGITS, TARGETS), {"class_weights": np.ones((1, 4))}),
      ("multiclass_generalized_dice_loss", (LOGITS, TARGETS[..., 0]), {}),
      ("binary_dice_loss", (LOGITS[..., 0], TARGETS[:1, ..., 0]), {}),
    ):
      with self.assertRaises(Exception) as theirs:
        getattr(upstream.losses, name)(*arguments, **options)
      with self.assertRaises(type(theirs.exception)) as ours:
        getattr(optax.losses, name)(*arguments, **options, where=True)
      self.assertEqual(str(ours.exception), str(theirs.exception))

  def test_no_probabilities(self):
    """Refused as in Optax, where they are included and known."""
    wrong = PROBABILITIES.copy()
    wrong[0, 0, 1] *= 2  # Of a pixel that is masked.
    loss = functools.partial(
      optax.losses.dice_loss, targets=TARGETS, apply_softmax=False
    )
    loss(wrong, where=PIXELS)
    with self.assertRaisesRegex(TypeError, "`where` must be boolean"):
      loss(wrong, where=PIXELS.astype(int))
    wrong[0, 0, 0] *= 2
    with self.assertRaisesRegex(ValueError, "the sums are between 1.* and 2.0"):
      loss(wrong, where=PIXELS)
    with self.assertRaisesRegex(ValueError, "the sums are between 1.* and 2.0"):
      jax.grad(lambda x: loss(x, where=PIXELS).sum())(wrong)

  def test_masks_of_other_shapes(self):
    loss = optax.losses.dice_loss
    for where, fix in (
      (np.ones(2, bool), r"Did you mean where\[..., None, None, None\]"),
      (np.ones((2, 3), bool), r"Did you mean where\[..., None, None\]"),
    ):
      with self.assertRaisesRegex(ValueError, fix):
        loss(LOGITS, TARGETS, where=where)
    with self.assertRaisesRegex(TypeError, "Pass `mask != 0`"):
      loss(LOGITS, TARGETS, where=np.ones(SHAPE))
    assert_equal(
      loss(LOGITS, TARGETS, where=PIXELS.tolist()),
      loss(LOGITS, TARGETS, where=PIXELS),
    )


if __name__ == "__main__":
  absltest.main()
