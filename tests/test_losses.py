"""What is particular to a loss: hand-worked numbers, labels, extremes."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import (
  BY_NAME,
  DTYPES,
  SHAPE,
  assert_all_close,
  assert_allclose,
  assert_close,
  assert_equal,
  each_case,
  largest,
  masks,
  row_masks,
)
from jax.experimental import jet

import optax_masking as optax

NAN = float("nan")


class HandWorkedTest(parameterized.TestCase):
  """Each example has one element too many, and it is masked."""

  @parameterized.named_parameters(
    # Probabilities 1/4 and 3/4. -(log 1/4 + log 3/4) / 2 = log(16 / 3) / 2.
    (
      "softmax_cross_entropy",
      "softmax_cross_entropy",
      ([0.0, math.log(3), NAN], [0.5, 0.5, NAN]),
      math.log(16 / 3) / 2,
    ),
    (
      "safe_softmax_cross_entropy",
      "safe_softmax_cross_entropy",
      ([0.0, math.log(3), NAN], [0.5, 0.5, NAN]),
      math.log(16 / 3) / 2,
    ),
    # And 2 (1/2 (1 - 1/4) + 1/2 (1 - 3/4)) = 1.
    (
      "poly_loss_cross_entropy",
      "poly_loss_cross_entropy",
      ([0.0, math.log(3), NAN], [0.5, 0.5, NAN]),
      math.log(16 / 3) / 2 + 1,
    ),
    (
      "ranking_softmax_loss",
      "ranking_softmax_loss",
      ([0.0, math.log(3), NAN], [0.5, 0.5, NAN]),
      math.log(16 / 3) / 2,
    ),
    # max(1, 1.5 + 1) - 1.
    (
      "multiclass_hinge_loss",
      "multiclass_hinge_loss",
      ([1.0, 1.5, NAN], 0),
      1.5,
    ),
    # max(1, 1.5) - 1.
    (
      "multiclass_perceptron_loss",
      "multiclass_perceptron_loss",
      ([1.0, 1.5, NAN], 0),
      0.5,
    ),
    # Above a threshold of 3/4 are p = (1/4, 3/4), which add up to 1.
    # 3/4 (1.5 - 1) + (1 - 1/16 - 9/16) / 2 = 6/16 + 3/16.
    (
      "multiclass_sparsemax_loss",
      "multiclass_sparsemax_loss",
      ([1.0, 1.5, NAN], 0),
      9 / 16,
    ),
    # Distances 2 and 5: 2 - 5 + 4.
    (
      "triplet_margin_loss",
      "triplet_margin_loss",
      ([0.0, 0.0, NAN], [0.0, 2.0, NAN], [3.0, 4.0, NAN], -1, 2, 4.0, 0.0),
      1.0,
    ),
    # -log 3/4.
    (
      "softmax_cross_entropy_with_integer_labels",
      "softmax_cross_entropy_with_integer_labels",
      ([0.0, math.log(3), NAN], 1),
      math.log(4 / 3),
    ),
    # 1/2 log((1/2) / (1/4)) + 1/2 log((1/2) / (3/4))
    # = 1/2 (log 2 + log 2/3) = 1/2 log 4/3.
    (
      "kl_divergence",
      "kl_divergence",
      ([math.log(0.25), math.log(0.75), NAN], [0.5, 0.5, NAN]),
      math.log(4 / 3) / 2,
    ),
    (
      "kl_divergence_with_log_targets",
      "kl_divergence_with_log_targets",
      (
        [math.log(0.25), math.log(0.75), NAN],
        [math.log(0.5), math.log(0.5), NAN],
      ),
      math.log(4 / 3) / 2,
    ),
    # 2 log(2 / 1) + 1 - 2 = 2 log 2 - 1, and 3 log(3 / 3) + 3 - 3 = 0.
    (
      "generalized_kl_divergence",
      "generalized_kl_divergence",
      ([0.0, math.log(3), NAN], [2.0, 3.0, NAN]),
      2 * math.log(2) - 1,
    ),
    # (3 * 4 + 4 * 3) / (5 * 5) = 24 / 25.
    (
      "cosine_similarity",
      "cosine_similarity",
      ([3.0, 4.0, NAN], [4.0, 3.0, NAN]),
      24 / 25,
    ),
    (
      "cosine_distance",
      "cosine_distance",
      ([3.0, 4.0, NAN], [4.0, 3.0, NAN]),
      1 / 25,
    ),
  )
  def test_reducing(self, name, arguments, expected):
    arguments = [jnp.asarray(x) for x in arguments]
    arguments = [x[None] if x.ndim else x for x in arguments]
    loss = getattr(optax.losses, name)
    if name.startswith(("multiclass", "softmax_cross_entropy_with")):
      arguments[1] = arguments[1][None]
    got = loss(*arguments, where=jnp.array([[True, True, False]]))
    assert_allclose(got, [expected] if got.ndim else expected, rtol=1e-6)

  @parameterized.parameters(
    # A logit of log 3 is a probability of 3/4.
    (
      "sigmoid_binary_cross_entropy",
      ([math.log(3), math.log(3), NAN], [1, 0, 1]),
      [math.log(4 / 3), math.log(4), 0],
    ),
    ("hinge_loss", ([0.5, 0.5, NAN], [1, -1, 0]), [0.5, 1.5, 0]),
    ("perceptron_loss", ([0.5, 0.5, NAN], [1, -1, 0]), [0, 0.5, 0]),
    # (1 - 1/2)^2 / 4, and beyond the parabola.
    ("sparsemax_loss", ([0.5, 2.0, NAN], [1, 0, 1]), [1 / 16, 2, 0]),
    ("squared_error", ([3.0, 1.0, NAN], [1.0, 2.0, NAN]), [4, 1, 0]),
    ("l2_loss", ([3.0, 1.0, NAN], [1.0, 2.0, NAN]), [2, 0.5, 0]),
    # (1/2)^2 / 2, and 3 - 1/2.
    ("huber_loss", ([1.5, -2.0, NAN], [1.0, 1.0, NAN]), [1 / 8, 2.5, 0]),
    # cosh(log 2) = (2 + 1/2) / 2.
    (
      "log_cosh",
      ([math.log(2), 1.0, NAN], [0.0, 1.0, NAN]),
      [math.log(5 / 4), 0, 0],
    ),
    # 0.7 of the label, and 0.3 for two classes.
    ("smooth_labels", ([0.0, 1.0, NAN], 0.3), [0.15, 0.85, 0]),
  )
  def test_one_number_an_element(self, name, arguments, expected):
    arguments = [jnp.asarray(x) for x in arguments]
    loss = getattr(optax.losses, name)
    got = loss(*arguments, where=jnp.array([True, True, False]))
    assert_allclose(got, expected, rtol=1e-6, atol=1e-7)

  def test_make_fenchel_young_loss(self):
    # log(1 + 3) - 2 log 3: targets need not add up to 1.
    loss = optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)
    got = loss(
      jnp.array([0.0, math.log(3), NAN]),
      jnp.array([0.5, 2.0, NAN]),
      where=jnp.array([True, True, False]),
    )
    assert_allclose(got, math.log(4 / 9), rtol=1e-5)

  def test_sigmoid_focal_loss(self):
    # A logit of log 3 is a probability of 3/4. Label 1: -(1/4)^2 log 3/4.
    # Label 0, weighted by 1 - 0.1: -0.9 (3/4)^2 log 1/4.
    got = optax.sigmoid_focal_loss(
      jnp.array([math.log(3), math.log(3), NAN]),
      jnp.array([1, 0, 1]),
      alpha=0.1,
      where=jnp.array([True, True, False]),
    )
    expected = [0.1 * math.log(4 / 3) / 16, 0.9 * 9 / 16 * math.log(4), 0]
    assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
class LabelsTest(parameterized.TestCase):
  @parameterized.product(dtype=DTYPES, axis=(-1, 0, (0, 1), (1, 0)))
  def test_integer_labels_are_one_hot_labels(self, dtype, axis):
    """With every label, in an included class and in a masked one."""
    axes = np.arange(2)[list(np.atleast_1d(axis))]
    batch = [s for a, s in enumerate(SHAPE) if a not in axes]
    classes = math.prod(SHAPE[a] for a in axes)
    logits, _ = BY_NAME["softmax_cross_entropy"].arguments(dtype)

    def integer(logits, labels, where):
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, axis=axis, where=where
      )

    def soft(logits, labels, where):
      one_hot = jax.nn.one_hot(labels, classes, dtype=dtype)
      one_hot = one_hot.reshape(batch + [SHAPE[a] for a in axes])
      one_hot = jnp.moveaxis(one_hot, range(len(batch), 2), axes)
      return optax.softmax_cross_entropy(
        logits, one_hot, axis=axis, where=where
      )

    @jax.jit
    def values_and_gradients(*arguments):
      return [
        (loss(*arguments), jax.grad(lambda *a, f=loss: f(*a).sum())(*arguments))
        for loss in (integer, soft)
      ]

    for where in masks().values():
      for first in range(classes):
        labels = (first + np.arange(math.prod(batch))) % classes
        got, expected = values_and_gradients(
          logits, labels.reshape(batch), where
        )
        for a, b in zip(got, expected, strict=True):
          assert_close(a, b, dtype)

  def test_own_class_masked(self):
    """Such an example has no target: no loss, and no logit is trained."""
    logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    labels = jnp.array([2, 0])
    where = jnp.array([True, True, False])[None]

    def loss(logits):
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=where
      )

    # Row 2: log(1 + e).
    assert_allclose(loss(logits), [0, math.log(1 + math.e)], rtol=1e-6)
    gradient = jax.jacobian(loss)(logits)
    assert_equal(gradient[0], 0)
    self.assertTrue(jnp.all(gradient[1, 1, :2] != 0))

  def test_included_label_out_of_range(self):
    """Optax's own: NaN for what is no class, from the end if negative."""
    logits = jnp.arange(12.0).reshape(4, 3)
    labels = jnp.array([-100, 3, -1, 2**31 - 1])
    expected = upstream.softmax_cross_entropy_with_integer_labels(
      logits, labels
    )
    for where in (True, jnp.ones((4, 3), bool), jnp.ones((4, 1), bool)):
      got = optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=where
      )
      assert_equal(jnp.isnan(got), [True, True, False, True])
      assert_allclose(got[2], expected[2], rtol=1e-6)
    # A negative label looks its own class up from the end, too.
    where = jnp.array([True, True, False])[None]
    got = optax.softmax_cross_entropy_with_integer_labels(
      logits, labels, where=where
    )
    self.assertEqual(got[2], 0)

  def test_labels_of_any_integer_dtype(self):
    logits = jnp.arange(15.0).reshape(3, 5)
    where = jnp.arange(15).reshape(3, 5) % 4 != 0
    expected = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.array([1, 2, 3]), where=where
    )
    for dtype in ("int8", "uint8", "int16", "uint32"):
      labels = jnp.array([1, 2, 3], dtype)
      with jax.numpy_dtype_promotion("strict"):
        got = optax.softmax_cross_entropy_with_integer_labels(
          logits, labels, where=where
        )
      assert_close(got, expected, DTYPES[0])


@pytest.mark.slow
class BroadcastTest(parameterized.TestCase):
  """Each example has a mask of its own, whatever it shares with the others."""

  def test_labels_shared_by_a_batch(self):
    logits, labels = BY_NAME["softmax_cross_entropy"].arguments(DTYPES[0])
    where = masks()["random"]
    for shared in (labels[0], labels[:1]):
      expected = [
        upstream.softmax_cross_entropy(logits[i, kept], labels[0, kept])
        if kept.any()
        else 0
        for i, kept in enumerate(where)
      ]
      got = optax.softmax_cross_entropy(logits, shared, where=where)
      assert_close(got, expected, DTYPES[0])
      # A class that no example includes has no gradient; its label is free.
      unused = where & (np.arange(5) != 2)
      gradient = jax.grad(
        lambda y, w=unused: optax.softmax_cross_entropy(
          logits, y, where=w
        ).sum()
      )(shared.at[..., 2].set(NAN))
      assert_equal(gradient[..., 2], 0)
      self.assertTrue(jnp.all(jnp.isfinite(gradient)))

  def test_logits_shared_by_a_batch(self):
    logits, labels = BY_NAME[
      "softmax_cross_entropy_with_integer_labels"
    ].arguments(DTYPES[0])
    where = masks()["random"]
    assert_allclose(
      optax.softmax_cross_entropy_with_integer_labels(
        logits[:1], labels, where=where
      ),
      optax.softmax_cross_entropy_with_integer_labels(
        jnp.repeat(logits[:1], 4, axis=0), labels, where=where
      ),
      rtol=1e-6,
    )

  def test_one_class_mask_for_integer_labels(self):
    logits, labels = BY_NAME[
      "softmax_cross_entropy_with_integer_labels"
    ].arguments(DTYPES[0])
    classes = np.array([[True, True, False, True, True]])
    assert_close(
      optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=classes
      ),
      optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=np.broadcast_to(classes, SHAPE)
      ),
      DTYPES[0],
    )


@pytest.mark.slow
class FormulasTest(parameterized.TestCase):
  """Losses that do not call Optax under a mask."""

  @parameterized.parameters(
    ("softmax_cross_entropy", (0, 1)),
    ("softmax_cross_entropy_with_integer_labels", 0),
    ("sigmoid_binary_cross_entropy", (0, 1)),
    ("squared_error", (0, 1)),
    ("l2_loss", (0, 1)),
    ("log_cosh", (0, 1)),
  )
  def test_second_derivatives(self, name, arguments_of):
    """They are Optax's where nothing is masked, those of labels among them."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 2, 3))
    if BY_NAME[name].has_classes:
      y = np.array([1, 2])
    x, y = jnp.asarray(x), jnp.asarray(y)

    def second(loss, **kwargs):
      """Forward over reverse, and reverse over reverse."""

      def total(x, y):
        return jnp.sum(loss(x, y, **kwargs) ** 2)

      gradient = jax.grad(total, arguments_of)
      return jax.jit(
        lambda x, y: [
          jacobian(gradient, arguments_of)(x, y)
          for jacobian in (jax.jacfwd, jax.jacrev)
        ]
      )(x, y)

    expected = second(getattr(upstream.losses, name))
    for where in (True, np.ones((2, 1), bool), np.ones((2, 3), bool)):
      got = second(getattr(optax.losses, name), where=where)
      assert_all_close(got, expected, DTYPES[0], roundings=64)

  def test_own_class_masked(self):
    """An example without its label is masked, whatever is left of it."""
    logits = jnp.array([[NAN, 1.0, 2.0], [0.0, 0.0, NAN]])
    where = np.array([[True, False, True], [True, True, False]])
    loss, gradient = jax.value_and_grad(
      lambda x: jnp.sum(
        optax.softmax_cross_entropy_with_integer_labels(
          x, jnp.array([1, 0]), where=where
        )
      )
    )(logits)
    assert_allclose(loss, math.log(2), rtol=1e-6)
    assert_allclose(gradient, [[0, 0, 0], [-0.5, 0.5, 0]], rtol=1e-6)


@pytest.mark.slow
class ConfidentTest(parameterized.TestCase):
  """Small derivatives, of what is certain: none is a difference of large ones.

  Errors are relative to each number.
  """

  @parameterized.product(
    dtype=DTYPES, label=(0.0, 0.25, 1.0), mask=("element", "row")
  )
  def test_sigmoid_binary_cross_entropy(self, dtype, label, mask):
    sizes = [1, 4, 8] if dtype == "float16" else [1, 10, 20, 40]
    logits = jnp.asarray([*sizes, *np.negative(sizes)], dtype)[:, None]
    logits = jnp.concatenate([logits, jnp.full_like(logits, NAN)], 1)
    where = np.array([[True, False]])
    if mask == "row":
      logits, where = logits.T, where.T
    labels = jnp.full_like(logits, label)
    x = np.where(where, np.asarray(logits, "float64"), 0)
    e = np.exp(-np.abs(x))
    p = np.where(x < 0, e, 1) / (1 + e)
    not_p = np.where(x < 0, 1, e) / (1 + e)
    slope = np.where(where, (1 - label) * p - label * not_p, 0)

    def total(x, y):
      losses = optax.sigmoid_binary_cross_entropy(x, y, where=where)
      return jnp.sum(losses.astype("float32" if dtype != "float64" else dtype))

    def curvature(x):
      ones = jnp.ones_like(x)
      return jax.jvp(jax.grad(total), (x, labels), (ones, 0 * labels))[1]

    @jax.jit
    def derivatives(x):
      third = jax.grad(lambda x: jnp.sum(curvature(x)))
      return jax.grad(total)(x, labels), curvature(x), third(x)

    # The derivative of p (1 - p) is p (1 - p) (1 - 2 p).
    exact = slope, p * not_p * where, p * not_p * (not_p - p) * where
    for got, right in zip(derivatives(logits), exact, strict=True):
      assert_close(got, right, dtype, roundings=8)


def with_garbage(case):
  """Of the floating arguments: sums of losses under masks, and garbage."""
  row = row_masks(case.shape)["some rows masked"]
  for where in (masks(case.shape)["random"], row, False):
    arguments = case.garbled(case.arguments(DTYPES[0]), where)

    def total(*floats, arguments=arguments, where=where):
      given = case.with_floats(arguments, floats)
      return jnp.sum(case.loss(*given, where=where))

    yield total, [arguments[p] for p in case.floating]


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_operations(case, dtype):
  """With `jax_disable_jit` each is run, and looked at, by itself."""
  for total, x in with_garbage(case):
    of = tuple(range(len(x)))
    with jax.disable_jit(), jax.debug_nans(True):
      value, gradient = jax.value_and_grad(total, of)(*x)
    for got in (value, *gradient):
      assert got.dtype == dtype and np.all(np.isfinite(got))


@pytest.mark.slow
class OperationsTest(parameterized.TestCase):
  """With `jax_disable_jit` each operation is run, and looked at, by itself."""

  @parameterized.parameters(
    "softmax_cross_entropy_with_integer_labels",
    "sigmoid_binary_cross_entropy",
    "safe_softmax_cross_entropy",
    "cosine_similarity",
  )
  def test_debug_nans_in_second_derivatives(self, name):
    """Of the formulas, a fill of each kind, and what masks by itself."""
    for total, x in with_garbage(BY_NAME[name]):
      with jax.disable_jit(), jax.debug_nans(True):
        got = jax.hessian(total)(*x)
      assert np.all(np.isfinite(got))

  @parameterized.parameters(
    "softmax_cross_entropy_with_integer_labels", "squared_error", "dice_loss"
  )
  def test_included_nan(self, name):
    """It is found, and no garbage before it."""
    case = BY_NAME[name]
    x, *others = case.arguments(DTYPES[0])
    x = x.at[0, 0].set(NAN).at[1].set(NAN)
    where = row_masks(case.shape)["no row masked"].copy()
    where[1] = False
    for included in (True, False):
      where[0, 0] = included
      with jax.disable_jit(), jax.debug_nans(True):
        if included:
          with self.assertRaises(FloatingPointError):
            case.loss(x, *others, where=where)
        else:
          case.loss(x, *others, where=where)

  def test_no_program_is_kept(self):
    """After the search a call is the cheap program again."""
    labels, where = jnp.ones((3, 7)), np.ones((3, 7), bool)

    def program():
      loss = functools.partial(optax.smooth_labels, alpha=0.1, where=where)
      return str(jax.make_jaxpr(loss)(labels))

    with jax.debug_nans(True):
      searching = program()
    cheap = program()
    self.assertIn("reduce_or", searching)
    self.assertNotIn("reduce_or", cheap)


@pytest.mark.slow
class TaylorTest(parameterized.TestCase):
  """The Taylor mode of JAX, for the losses of which it is promised."""

  @parameterized.parameters(
    *(
      (name, masked)
      for name in ("make_fenchel_young_loss", "sparsemax_loss")
      for masked in ("random", "row")
    ),
  )
  def test_derivatives(self, name, masked):
    """They are those of forward mode, taken twice."""
    case = BY_NAME[name]
    where = masks(case.shape)["random"]
    if masked == "row":
      where = row_masks(case.shape)["some rows masked"]
    x, *others = case.arguments(DTYPES[0])
    x = jnp.where(where, x, NAN)
    rng = np.random.default_rng(0)
    direction = jnp.asarray(rng.normal(size=x.shape), x.dtype)

    def total(x):
      return jnp.sum(case.loss(x, *others, where=where))

    def slope(x):
      return jax.jvp(total, (x,), (direction,))[1]

    @jax.jit
    def derivatives(x):
      value, series = jet.jet(total, (x,), ([direction, 0 * direction],))
      second = jax.jvp(slope, (x,), (direction,))[1]
      return (value, *series), (total(x), slope(x), second)

    got, expected = derivatives(x)
    # Second derivatives along a direction are sums of much larger terms.
    assert_all_close(got, expected, DTYPES[0], roundings=256)

  @parameterized.parameters(
    ("squared_error", "row"),
    ("hinge_loss", "row"),
    ("kl_divergence", "row"),
    ("multiclass_hinge_loss", "random"),
    ("dice_loss", "row"),
  )
  def test_not_promised(self, name, masked):
    """If these pass, the documentation is to be changed."""
    case = BY_NAME[name]
    where = masks(case.shape)["random"]
    if masked == "row":
      where = row_masks(case.shape)["some rows masked"]
    x, *others = case.arguments(DTYPES[0])

    def total(x, loss=case.loss, **kwargs):
      return jnp.sum(loss(x, *others, **kwargs))

    jet.jet(lambda x: total(x, case.original), (x,), ([x],))
    with self.assertRaises((KeyError, jax.errors.UnexpectedTracerError)):
      jet.jet(lambda x: total(x, where=where), (x,), ([x],))


@pytest.mark.slow
class ExtremesTest(parameterized.TestCase):
  @parameterized.parameters(1e20, 1e38)
  def test_sparsemax_of_large_scores(self, largest):
    scores = np.array([[1, -1, 1 / largest, 0]], "float32") * largest
    where = np.array([[True] * 4 + [False]])
    masked = np.concatenate([scores, [[np.nan]]], -1).astype("float32")
    for label in range(4):

      def total(x, loss, label=label, **keywords):
        return loss(x, jnp.array([label]), **keywords).sum()

      got = jax.value_and_grad(total)(
        masked, optax.losses.multiclass_sparsemax_loss, where=where
      )
      value, gradient = jax.value_and_grad(total)(
        scores, upstream.losses.multiclass_sparsemax_loss
      )
      assert_close(got[0], value, "float32")
      assert_equal(got[1][:, 4], 0)
      assert_close(got[1][:, :4], gradient, "float32")

  @parameterized.parameters([(dtype,) for dtype in DTYPES])
  def test_logits(self, dtype):
    """Any finite logits next to a masked class, as without that class."""
    largest = float(jnp.finfo(dtype).max)
    for a, b in (
      (largest, largest / 2),
      (largest, 0.0),
      (0.0, -largest),
      (-largest, -largest),
      (-largest, -largest / 2),
      (1e4, 1e4),
    ):
      kept = jnp.array([a, b], dtype)
      for garbage in (NAN, largest, -largest, 0.0):
        logits = jnp.array([a, garbage, b], dtype)
        labels = jnp.array([0.25, NAN, 0.75], dtype)
        where = jnp.array([True, False, True])
        with jax.debug_nans(True), jax.debug_infs(True):
          got = jax.value_and_grad(optax.softmax_cross_entropy)(
            logits, labels, where=where
          )
        expected = jax.value_and_grad(upstream.softmax_cross_entropy)(
          kept, jnp.array([0.25, 0.75], dtype)
        )
        assert_close(got[0], expected[0], dtype)
        assert_close(got[1][where], expected[1], dtype)
        with jax.debug_nans(True), jax.debug_infs(True):
          got = optax.softmax_cross_entropy_with_integer_labels(
            logits, np.array(2), where=where
          )
        exact = np.logaddexp(float(kept[0]) - float(kept[1]), 0.0)
        assert_close(got, exact, dtype)

  @parameterized.product(
    dtype=DTYPES, where=(True, [True], [[True, True, True]])
  )
  def test_least_logits(self, dtype, where):
    """All at the least finite number, as a mask of another kind leaves them."""
    least = jnp.full((1, 3), jnp.finfo(dtype).min, dtype)
    with jax.debug_nans(True), jax.debug_infs(True):
      for loss, labels in (
        (optax.softmax_cross_entropy_with_integer_labels, jnp.array([1])),
        (optax.softmax_cross_entropy, jnp.array([[0, 1, 0]], dtype)),
      ):
        assert_close(loss(least, labels, where=where), [math.log(3)], dtype)
        gradient = jax.grad(
          lambda x, loss=loss, labels=labels: jnp.sum(
            loss(x, labels, where=where)
          )
        )(least)
        assert_close(gradient, [[1 / 3, -2 / 3, 1 / 3]], dtype)

  def test_one_class(self):
    """Logits of one class are certain of it, for however many labels."""
    logits = jnp.array([[5.0], [7.0]])
    labels = jnp.array([[0.2, 0.3, NAN], [1.0, 0.0, 0.0]])
    where = ~jnp.isnan(labels)
    for loss in (optax.softmax_cross_entropy, optax.safe_softmax_cross_entropy):
      assert_equal(loss(logits, labels, where=where), [0, 0])
      gradient = jax.grad(
        lambda y, loss=loss: jnp.sum(loss(logits, y, where=where))
      )(labels)
      assert_equal(gradient, np.zeros((2, 3)))

  def test_large_equal_logits(self):
    """Three logits of 1e8: log 3, where Optax rounds the loss away."""
    for garbage in (NAN, 0.0):
      got = optax.softmax_cross_entropy_with_integer_labels(
        jnp.array([1e8, 1e8, 1e8, garbage], "float32"),
        jnp.array(0),
        where=jnp.array([True, True, True, False]),
      )
      assert_allclose(got, math.log(3), rtol=1e-6)

  def test_infinite_logits(self):
    """Included infinities come out as in Optax, NaN and all."""
    where = jnp.array([True, False, True, True])
    for row in (
      [np.inf, 0.0, 0.0, 1.0],
      [-np.inf, 0.0, 2.0, 1.0],
      [-np.inf, 0.0, -np.inf, -np.inf],
      [-np.inf, 0.0, -np.inf, np.inf],
      [np.inf, 0.0, np.inf, np.inf],
      [-np.inf, 0.0, NAN, 1.0],
      [float(jnp.finfo("float32").min), 0.0, -np.inf, -np.inf],
    ):
      logits = jnp.array(row)
      for label, labels in ((0, [1.0, 0, 0, 0]), (1, [0, 0, 1.0, 0])):
        expected = upstream.softmax_cross_entropy_with_integer_labels(
          logits[where], jnp.array(label)
        )
        got = optax.softmax_cross_entropy_with_integer_labels(
          logits, jnp.array(label + (label > 0)), where=where
        )
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        labels = jnp.array(labels)
        for derivative in (lambda f: f, jax.grad):
          np.testing.assert_allclose(
            derivative(optax.softmax_cross_entropy)(
              logits, labels, where=where
            )[where if derivative is jax.grad else ...],
            derivative(upstream.softmax_cross_entropy)(
              logits[where], labels[where]
            ),
            rtol=1e-6,
          )

  def test_long_empty_slices(self):
    """No sum over the fill overflows in half precision."""
    x = jnp.zeros((2, 2**17), "float16").at[:, 0].set(16)
    nothing = jnp.zeros((2, 1), bool)
    for where in (nothing, jnp.broadcast_to(nothing, x.shape)):
      for loss in (
        optax.cosine_distance,
        optax.kl_divergence,
        optax.generalized_kl_divergence,
        optax.softmax_cross_entropy,
        lambda x, y, where: optax.softmax_cross_entropy_with_integer_labels(
          x, jnp.zeros(2, int), where=where
        ),
      ):
        with jax.debug_nans(True), jax.debug_infs(True):
          value, gradient = jax.jit(
            jax.value_and_grad(
              lambda x, loss=loss, where=where: loss(x, x, where=where).sum()
            )
          )(x)
        self.assertEqual(value, 0)
        assert_equal(gradient, 0)


@pytest.mark.slow
class ParametersTest(parameterized.TestCase):
  """Arrays that parametrize a loss are masked with the data."""

  def test_parameter_of_each_example(self):
    """An array without axes is no number: under `vmap` it may be garbage."""
    where = np.array([True, False, True, False])
    garbage = jnp.where(where, 1.0, jnp.nan)
    x, y = BY_NAME["huber_loss"].arguments(DTYPES[0])
    y = jax.nn.sigmoid(y)
    for loss, parameter in (
      (optax.huber_loss, "delta"),
      (optax.cosine_similarity, "epsilon"),
      (optax.sigmoid_focal_loss, "gamma"),
    ):

      def total(values, loss=loss, parameter=parameter):
        each = jax.vmap(
          lambda x, y, v, w: loss(x, y, where=w, **{parameter: v})
        )
        return each(x, y, values, where).sum()

      assert_equal(jax.grad(total)(garbage)[~where], 0)

  @parameterized.parameters("alpha", "gamma")
  def test_sigmoid_focal_loss(self, name):
    logits, labels = BY_NAME["sigmoid_focal_loss"].arguments(DTYPES[0])
    where = masks()["random"] & (np.arange(5) != 2)
    parameter = np.linspace(0.1, 0.9, 5)

    def total(logits, parameter):
      return optax.sigmoid_focal_loss(
        logits, labels, where=where, **{name: parameter}
      ).sum()

    def dropped(logits, parameter):
      parameter = jnp.broadcast_to(parameter, SHAPE)[where]
      return upstream.losses.sigmoid_focal_loss(
        logits[where], labels[where], **{name: parameter}
      ).sum()

    clean = jnp.asarray(parameter)
    garbage = clean.at[2].set(NAN)  # Of a class that is masked everywhere.
    padded = jnp.where(where, logits, NAN)
    with jax.debug_nans(True):
      got = jax.grad(total, (0, 1))(padded, garbage)
    expected = jax.grad(dropped, (0, 1))(logits, clean)
    for a, b in zip(got, expected, strict=True):
      assert_allclose(a, b, rtol=1e-5)
    self.assertEqual(got[1][2], 0)
    # And a scalar that is differentiated.
    got = jax.grad(total, 1)(padded, 0.3)
    expected = jax.grad(dropped, 1)(logits, 0.3)
    assert_allclose(got, expected, rtol=1e-5)

  @parameterized.parameters(
    # A loss, its parameter with an entry an element or an example, and more.
    ("huber_loss", "delta", (1, 5)),
    ("huber_loss", "delta", (4, 5)),
    ("smooth_labels", "alpha", (1, 5)),
    ("smooth_labels", "alpha", (4, 1)),
    ("poly_loss_cross_entropy", "epsilon", (4,)),
    ("triplet_margin_loss", "margin", (4,)),
    ("triplet_margin_loss", "eps", (4,)),
  )
  def test_arrays(self, name, parameter, shape):
    """Garbage where all is masked that it meets, and exact gradients."""
    case = BY_NAME[name]
    arguments = case.arguments(DTYPES[0])
    if name == "smooth_labels":
      arguments = arguments[:1]
    where = masks()["random"] & (np.arange(5) != 2)
    where[1] = False
    per_example = len(shape) == 1
    clean = jnp.linspace(0.1, 0.9, int(np.prod(shape))).reshape(shape)
    needed = where.any(-1) if per_example else where
    axes = tuple(a for a, s in enumerate(shape) if s == 1)
    needed = needed.any(axes, keepdims=True)
    self.assertFalse(needed.all())

    def total(p, *arguments):
      return jnp.sum(
        getattr(optax.losses, name)(*arguments, where=where, **{parameter: p})
      )

    def dropped(p, *arguments):
      result = 0
      for i, kept in enumerate(where):
        if kept.any():
          row = p[i] if per_example else jnp.broadcast_to(p, SHAPE)[i, kept]
          result += getattr(upstream.losses, name)(
            *(x[i, kept] for x in arguments), **{parameter: row}
          ).sum()
      return result

    garbage = [jnp.where(where, x, NAN) for x in arguments]
    poisoned = jnp.where(needed, clean, NAN)
    with jax.debug_nans(True):
      got = jax.jit(jax.value_and_grad(total))(poisoned, *garbage)
    expected = jax.jit(jax.value_and_grad(dropped))(clean, *arguments)
    for a, b in zip(got, expected, strict=True):
      assert_allclose(a, b, rtol=1e-4)
    assert_equal(got[1][~needed], 0)
    # And one number for all, differentiated.
    assert_allclose(
      jax.jit(jax.grad(total))(jnp.asarray(0.3), *garbage),
      jax.jit(jax.grad(dropped))(jnp.full(shape, 0.3), *arguments).sum(),
      rtol=1e-4,
    )

  def test_epsilon(self):
    """A least norm for each vector, one of them of a masked one."""
    a = jnp.array([[3.0, 4.0, NAN], [0.0, 0.0, NAN], [1.0, 1.0, 1.0]])
    b = jnp.array([[4.0, 3.0, NAN], [2.0, 1.0, NAN], [1.0, 1.0, 1.0]])
    where = jnp.array([[True, True, False]] * 2 + [[False] * 3])
    epsilon = jnp.array([[0.0], [0.5], [NAN]])
    for name, expected in (
      ("cosine_similarity", [24 / 25, 0, 0]),
      ("cosine_distance", [1 / 25, 1, 0]),
    ):
      loss = getattr(optax, name)
      with jax.debug_nans(True):
        got, gradients = jax.value_and_grad(
          lambda a, b, e, loss=loss: loss(a, b, epsilon=e, where=where).sum(),
          (0, 1, 2),
        )(a, b, epsilon)
        assert_allclose(
          loss(a, b, epsilon=epsilon, where=where), expected, atol=1e-6
        )
      self.assertTrue(all(jnp.all(jnp.isfinite(g)) for g in gradients))
      self.assertEqual(gradients[2][2], 0)
      assert_allclose(got, sum(expected), rtol=1e-6)


@pytest.mark.slow
class HardLabelsTest(parameterized.TestCase):
  @parameterized.parameters("float32", "int32", "bool")
  def test_sigmoid_focal_loss(self, dtype):
    """Labels of 0 and 1, as they mostly are: value, gradient and Hessian."""
    logits, soft = BY_NAME["sigmoid_focal_loss"].arguments(DTYPES[0])
    labels = (soft > 0.5).astype(dtype)
    where = masks()["random"]

    def total(logits):
      return optax.sigmoid_focal_loss(logits, labels, where=where).sum()

    def dropped(logits):
      return upstream.losses.sigmoid_focal_loss(logits, labels[where]).sum()

    def derivatives(f):
      return jax.jit(lambda x: (f(x), jax.grad(f)(x), jax.hessian(f)(x)))

    got = derivatives(total)(jnp.where(where, logits, NAN))
    expected = derivatives(dropped)(logits[where])
    for g, e, inside in zip(
      got,
      expected,
      ((), (where,), np.ix_(*[np.flatnonzero(where)] * 2)),
      strict=True,
    ):
      if len(inside) == 2:
        g = g.reshape(logits.size, logits.size)
      assert_close(g[inside], e, DTYPES[0])
      assert_equal(g.at[inside].set(0), 0)  # What is masked has no part.


@pytest.mark.slow
class NoTargetsTest(parameterized.TestCase):
  @parameterized.parameters(
    "squared_error", "l2_loss", "huber_loss", "log_cosh"
  )
  def test_none(self, name):
    """Targets of 0, with a mask too."""
    x, _ = BY_NAME[name].arguments(DTYPES[0])
    where = masks()["random"]
    loss = getattr(optax.losses, name)
    garbage = jnp.where(where, x, NAN)
    expected = jnp.where(where, getattr(upstream, name)(x), 0)
    for targets in ((), (None,)):
      assert_close(loss(garbage, *targets, where=where), expected, DTYPES[0])
    assert_close(
      loss(garbage, targets=None, axis=0, where=where),
      expected.sum(0),
      DTYPES[0],
    )

  def test_python_scalar(self):
    """It is data: in float16 its square is infinite, but not if masked."""
    x = jnp.array([400.0, NAN], "float16")
    where = jnp.array([True, False])
    with jax.debug_infs(True):
      assert_equal(optax.huber_loss(x, 400.0, delta=1e3, where=where), 0)

  @parameterized.parameters("squared_error", "l2_loss", "perceptron_loss")
  def test_no_broadcasting(self, name):
    """Optax refuses it, and so it stays under a mask."""
    x = jnp.ones(SHAPE)
    for targets in (x[0], x[:1], x[:, :1], jnp.asarray(1.0)):
      with self.assertRaises(ValueError) as theirs:
        getattr(upstream.losses, name)(x, targets)
      for where in (True, masks()["random"]):
        with self.assertRaises(ValueError) as ours:
          getattr(optax.losses, name)(x, targets, where=where)
        self.assertEqual(str(ours.exception), str(theirs.exception))

  def test_broadcasting(self):
    """The others broadcast."""
    for name in ("huber_loss", "log_cosh", "hinge_loss", "sparsemax_loss"):
      x, y = BY_NAME[name].arguments(DTYPES[0])
      where = masks()["random"]
      loss = getattr(optax.losses, name)
      expected = jnp.where(where, getattr(upstream.losses, name)(x, y[0]), 0)
      assert_close(loss(x, y[0], where=where), expected, DTYPES[0])


@pytest.mark.slow
class SafeSoftmaxTest(parameterized.TestCase):
  """0 log 0 = 0 in what is included, next to garbage in what is not."""

  LOGITS = ((-np.inf, 1.0, 2.0, NAN), (0.5, -np.inf, NAN, 1.0))
  LABELS = ((0.0, 0.25, 0.75, NAN), (0.5, 0.0, NAN, 0.5))

  def test_impossible_classes(self):
    x, y = jnp.array(self.LOGITS), jnp.array(self.LABELS)
    where = ~jnp.isnan(x)

    def got(x):
      return optax.safe_softmax_cross_entropy(x, y, where=where)

    def expected(x):
      return jnp.stack(
        [
          upstream.safe_softmax_cross_entropy(a[kept], b[kept])
          for a, b, kept in zip(x, y, where, strict=True)
        ]
      )

    self.assertTrue(jnp.all(jnp.isfinite(got(x))))
    assert_allclose(got(x), expected(x), rtol=1e-6)
    gradient = jax.grad(lambda x: got(x).sum())(x)
    assert_allclose(
      gradient, jax.grad(lambda x: expected(x).sum())(x), rtol=1e-6
    )
    assert_equal(gradient[~where], 0)
    # In forward mode Optax has NaN: 0, the tangent of the labels, times the
    # logarithm of 0. It does not get out of the example.
    tangent = jnp.ones_like(x)
    got_nan, optax_nan = (
      jnp.isnan(jax.jvp(loss, (x,), (tangent,))[1]) for loss in (got, expected)
    )
    assert not (got_nan & ~optax_nan).any()


@functools.cache
def without_second_class(name):
  """Value and gradient of a loss that masks its second class, and Optax's."""
  where = jnp.array([[True, False, True, True]])
  return [
    jax.jit(jax.value_and_grad(lambda x, y, f=f: f(x[None], y[None])[0]))
    for f in (
      functools.partial(getattr(optax.losses, name), where=where),
      getattr(upstream.losses, name),
    )
  ]


@pytest.mark.slow
class ScoresTest(parameterized.TestCase):
  """Maxima and projections of scores of any size."""

  @parameterized.product(
    dtype=DTYPES,
    name=(
      "multiclass_hinge_loss",
      "multiclass_perceptron_loss",
      "multiclass_sparsemax_loss",
    ),
    top=(0.0, 3.0, 1e4, -1e4, "max", "min"),
  )
  def test_sizes(self, dtype, name, top):
    info = jnp.finfo(dtype)
    top = {"max": float(info.max) / 8, "min": float(info.min) / 8}.get(top, top)
    scores = jnp.asarray([top, top * 1.25 - 0.5, top * 0.75 - 1], dtype)
    exact = scores.astype("float64" if DTYPES == ("float64",) else "float32")
    got, expected = without_second_class(name)
    for garbage in (NAN, float(info.max)):
      masked = np.insert(scores, 1, garbage)
      for label, position in enumerate((0, 2, 3)):
        with jax.debug_nans(True), jax.debug_infs(True):
          value, gradient = got(masked, np.array(position))
        right, slope = expected(exact, np.array(label))
        size = largest(scores)  # The loss is a difference of scores.
        assert_close(value, right, dtype, terms=size)
        assert_close(gradient[np.array([0, 2, 3])], slope, dtype)

  @parameterized.product(
    dtype=DTYPES, name=("multiclass_hinge_loss", "multiclass_perceptron_loss")
  )
  def test_least_scores(self, dtype, name):
    """No share of the gradient is lost to a masked score."""
    scores = jnp.full(3, jnp.finfo(dtype).min, dtype)
    got, expected = without_second_class(name)
    with jax.debug_nans(True), jax.debug_infs(True):
      value, gradient = got(np.insert(scores, 1, NAN), np.array(2))
    # In float16 Optax loses the margin, which float32 has room for.
    wide = jnp.promote_types(dtype, "float32")
    right, slope = expected(scores.astype(wide), np.array(1))
    assert_close(value, right, dtype)
    assert_close(gradient, np.insert(slope, 1, 0), dtype)

  @parameterized.parameters(
    # Of two scores far apart the upper has all of the probability: the loss is
    # 0 for its label, and their difference for the other.
    (0, 120_000.0, [-1.0, 1.0]),
    (1, 0.0, [0.0, 0.0]),
  )
  def test_sparsemax_of_distant_scores(self, label, loss, gradient):
    """Their difference is more than float16 has, unlike the loss."""
    if jax.config.jax_enable_x64:
      self.skipTest("Optax's projection then has no gradient in float32.")
    for garbage in (NAN, -6e4, 6e4):
      scores = jnp.array([[-6e4, 6e4, garbage]], "float16")
      with jax.debug_nans(True), jax.debug_infs(True):
        got = jax.value_and_grad(
          lambda x: optax.losses.multiclass_sparsemax_loss(
            x, np.array([label]), where=np.array([[True, True, False]])
          )[0]
        )(scores)
      assert_allclose(got[0], loss, rtol=1e-6)
      assert_equal(got[1], [[*gradient, 0]])

  @parameterized.parameters([(dtype,) for dtype in DTYPES])
  def test_sparsemax_of_many_masked_classes(self, dtype):
    """In a sum over them no digit of the others is lost."""
    scores = jnp.asarray([1.0, 1.5, 1.25], dtype)
    masked = jnp.full((1, 4000), NAN, dtype).at[0, 2000:2003].set(scores)
    got = optax.losses.multiclass_sparsemax_loss(
      masked, jnp.array([2000]), where=~jnp.isnan(masked)
    )
    # 1 + 3/2 + 5/4 - 3 t = 1 at t = 11/12: p = (1, 7, 4) / 12 of the scores.
    # (7/12) (1/2) + (4/12) (1/4) + (1 - 66/144) / 2 = 54/144 + 39/144.
    assert_close(got, [93 / 144], dtype)

  @parameterized.parameters(
    "multiclass_hinge_loss", "multiclass_perceptron_loss"
  )
  def test_minus_infinity(self, name):
    """NaN or infinity, as in Optax when it is compiled."""
    where = jnp.array([True, False, True])
    original = jax.jit(getattr(upstream.losses, name))
    for scores in (
      [-np.inf, 2.0, -np.inf],
      [-np.inf, 2.0, 1.0],
      [NAN, 2.0, 1.0],
    ):
      scores = jnp.array(scores)
      for label, position in enumerate((0, 2)):
        np.testing.assert_array_equal(
          getattr(optax.losses, name)(scores, jnp.array(position), where=where),
          original(scores[where], jnp.array(label)),
        )

  def test_any_batch_rank(self):
    case = BY_NAME["multiclass_sparsemax_loss"]
    x, y = case.arguments(DTYPES[0], (2, 3, 5))
    loss = optax.losses.multiclass_sparsemax_loss
    for where in (None, masks((2, 3, 5))["random"]):
      expected = [
        [
          loss(x[i, j], y[i, j], where=None if where is None else where[i, j])
          for j in range(3)
        ]
        for i in range(2)
      ]
      assert_allclose(loss(x, y, where=where), expected, rtol=1e-6)
    assert_allclose(
      loss(x[0], y[0]), upstream.losses.multiclass_sparsemax_loss(x[0], y[0])
    )

  @parameterized.parameters(((5,), (5,)), ((5,), (1,)), ((3, 5), ()))
  def test_sparsemax_labels_of_wrong_rank(self, *shapes):
    """They are refused as Optax refuses them, not read as a batch of one."""
    scores, labels = (np.zeros(shape, "float32") for shape in shapes)
    labels = labels.astype(int)
    losses = (upstream.losses, optax.losses)
    errors = []
    for loss in (module.multiclass_sparsemax_loss for module in losses):
      with self.assertRaises(Exception) as caught:
        loss(jnp.asarray(scores), jnp.asarray(labels))
      errors.append(caught.exception)
    self.assertEqual(type(errors[0]), type(errors[1]))
    self.assertEqual(str(errors[0]), str(errors[1]))


def sparsemax_conjugate(scores):
  """The maximum over the simplex of a product, less half the squared norm."""
  p = upstream.projections.projection_simplex(scores)
  return p @ scores - p @ p / 2


@pytest.mark.slow
class FenchelYoungTest(parameterized.TestCase):
  @parameterized.product(
    max_fun=(jax.nn.logsumexp, sparsemax_conjugate, jnp.max),
    scale_and_shift=((1.0, 0.0), (100.0, 0.0), (1.0, 1e3), (1.0, -1e3)),
  )
  def test_max_functions(self, max_fun, scale_and_shift):
    """Targets need not add up to 1, so the scores may not be shifted."""
    x, y = BY_NAME["make_fenchel_young_loss"].arguments(DTYPES[0])
    scale, shift = scale_and_shift
    x = x * scale + shift
    loss = optax.losses.make_fenchel_young_loss(max_fun)
    original = upstream.losses.make_fenchel_young_loss(max_fun)
    for kind in ("random", "random, sparse"):
      where = masks()[kind]
      garbage = [jnp.where(where, a, NAN) for a in (x, y)]

      def dropped(x, y, where=where):
        rows = np.flatnonzero(where.any(-1))
        return sum(original(x[i, where[i]], y[i, where[i]]) for i in rows)

      got = jax.jit(
        jax.value_and_grad(
          lambda x, y, where=where: loss(x, y, where=where).sum(), (0, 1)
        )
      )(*garbage)
      expected = jax.jit(jax.value_and_grad(dropped, (0, 1)))(x, y)
      size = float(abs(x).max())
      assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4 * size)
      assert_allclose(got[1][0], expected[1][0], rtol=1e-4, atol=1e-5 * size)
      assert_allclose(got[1][1], expected[1][1], rtol=1e-5)
      for gradient in got[1]:
        assert_equal(gradient[~where], 0)


@pytest.mark.slow
class SmoothLabelsTest(parameterized.TestCase):
  @parameterized.parameters(-1, 0, None, ((0, 1),))
  def test_axis(self, axis):
    y, _ = BY_NAME["smooth_labels"].arguments(DTYPES[0])
    where = masks()["random"]
    got = optax.smooth_labels(
      jnp.where(where, y, NAN), 0.3, axis=axis, where=where
    )
    count = np.maximum(where.sum(axis, keepdims=True), 1)
    assert_close(got, np.where(where, 0.7 * y + 0.3 / count, 0), DTYPES[0])
    assert_close(
      optax.smooth_labels(y, 0.3, axis=axis, where=True),
      optax.smooth_labels(y, 0.3, axis=axis),
      DTYPES[0],
    )

  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_dtype(self, dtype):
    """Optax's, which the count of a mask does not change."""
    y = jnp.ones(SHAPE, dtype)
    for alpha in (0.3, jnp.asarray(0.3, dtype), np.float32(0.3)):
      expected = optax.smooth_labels(y, alpha).dtype
      for where in (True, masks()["random"]):
        self.assertEqual(
          optax.smooth_labels(y, alpha, where=where).dtype, expected
        )

  def test_with_the_loss(self):
    """What it is for: the two under one mask."""
    where = masks()["random"]
    logits, _ = BY_NAME["softmax_cross_entropy"].arguments(DTYPES[0])
    labels = jnp.eye(5)[jnp.array([0, 2, 4, 1])]
    got = optax.softmax_cross_entropy(
      logits, optax.smooth_labels(labels, 0.1, where=where), where=where
    )
    for i, kept in enumerate(where):
      expected = upstream.softmax_cross_entropy(
        logits[i, kept], upstream.smooth_labels(labels[i, kept], 0.1)
      )
      assert_allclose(got[i], expected if kept.any() else 0, rtol=1e-5)


class DerivativesTest(parameterized.TestCase):
  """Of losses whose derivatives are not JAX's, where these are hard to get."""

  @parameterized.product(
    scale=(1e-10, 1e-4, 3e9, 1e12),
    loss=(optax.cosine_similarity, optax.cosine_distance),
  )
  def test_cosines_of_long_and_short_vectors(self, scale, loss):
    """A scale divides the gradient: no square of a norm is lost."""
    x, y = jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])
    where = np.ones((1, 2), bool)
    slope = jax.grad(lambda x, y: loss(x, y, where=where)[0])
    got = scale * slope(scale * x, scale * y)
    assert_allclose(got, slope(x, y), rtol=1e-5)

  @parameterized.parameters("kl_divergence", "generalized_kl_divergence")
  def test_divergence_at_a_target_of_zero(self, name):
    """In forward mode it is finite, as in Optax."""
    arguments = jnp.log(jnp.array([0.3, 0.7])), jnp.array([0.0, 1.0])
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    masked = functools.partial(loss, where=np.ones(2, bool))
    got = jax.jacfwd(masked, (0, 1))(*arguments)
    assert_all_close(got, jax.jacfwd(original, (0, 1))(*arguments), "float32")

  @parameterized.parameters("hinge_loss", "perceptron_loss")
  def test_kinks_and_nan_of_a_margin(self, name):
    """Gradients and mixed derivatives, where a maximum has two slopes."""
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    outputs = jnp.array([1.0, 0.0, -1.0, 2.0, 0.0, NAN, 3.0])
    targets = jnp.array([1.0, 1.0, -1.0, 0.5, 0.0, 1.0, 0.0])

    def derivatives(loss):
      total = lambda x, y: jnp.sum(loss(x, y))  # noqa: E731
      by_outputs = jax.grad(total)
      finite = outputs[:5], targets[:5]
      return (
        jax.grad(total, (0, 1))(outputs, targets),
        jax.jacfwd(by_outputs, (0, 1))(*finite),
        jax.jacrev(jax.grad(total, 1), (0, 1))(*finite),
      )

    jax.tree.map(
      np.testing.assert_array_equal,
      derivatives(functools.partial(loss, where=True)),
      derivatives(original),
    )

  @parameterized.product(
    name=("hinge_loss", "perceptron_loss"), dtype=("bool", "uint8", "int32")
  )
  def test_targets_that_are_not_floating(self, name, dtype):
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    outputs, targets = jnp.array([0.5, -2.0, 3.0]), jnp.array([1, 1, 0], dtype)
    got = jax.grad(lambda x: jnp.sum(loss(x, targets, where=True)))(outputs)
    expected = jax.grad(lambda x: jnp.sum(original(x, targets)))(outputs)
    np.testing.assert_array_equal(got, expected)

  def test_small_scores_of_float16(self):
    """Half of each is rounded to the same number in float16."""
    scores = (
      jnp.array([[1, 2, 3, 0]], "float16") * np.finfo("float16").tiny / 1024
    )
    labels = np.array([3])
    where = np.array([[True, True, True, True]])
    got = jax.grad(
      lambda x: jnp.sum(
        optax.losses.multiclass_perceptron_loss(x, labels, where=where)
      )
    )(scores)
    np.testing.assert_array_equal(got, [[0, 0, 1, -1]])

  @parameterized.parameters(
    "multiclass_hinge_loss", "multiclass_perceptron_loss"
  )
  def test_labels_that_name_no_class(self, name):
    """A one-hot vector of -1 has no class, which a mask may then hide."""
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    scores = jnp.array([[0.5, -1.0, 2.0], [3.0, 1.0, 9.0], [0.0, 4.0, 1.0]])
    labels = np.array([-1, 7, -1])
    where = np.array([[True, True, False]] * 3)
    slope = jax.value_and_grad(lambda x, **k: jnp.sum(loss(x, labels, **k)))
    value, gradient = slope(scores, where=where)
    exact, other = jax.value_and_grad(lambda x: jnp.sum(original(x, labels)))(
      scores[:, :2]
    )
    np.testing.assert_array_equal(value, exact)
    np.testing.assert_array_equal(gradient[:, :2], other)
    np.testing.assert_array_equal(gradient[:, 2], 0)

  @parameterized.product(
    name=("multiclass_hinge_loss", "multiclass_perceptron_loss"),
    masked_class=(False, True),
  )
  def test_margins_of_minus_infinity(self, name, masked_class):
    """The gradient is that of the scores alone, as Optax has it under jit."""
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    scores = np.full((3, 3), -np.inf, "float32")
    scores[2] = [0.5, -np.inf, 1.0]
    labels = np.array([0, -1, 2])
    expected = jax.jit(
      jax.value_and_grad(lambda x: jnp.sum(original(x, labels)))
    )(scores)
    where = np.ones((3, 3), bool)
    if masked_class:
      scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=np.nan)
      where = np.pad(where, ((0, 0), (0, 1)))
    value, gradient = jax.value_and_grad(
      lambda x: jnp.sum(loss(x, labels, where=where))
    )(scores)
    np.testing.assert_array_equal(value, expected[0])
    np.testing.assert_array_equal(gradient[:, :3], expected[1])
    np.testing.assert_array_equal(gradient[:, 3:], 0)

  @parameterized.parameters(([0, 1, 2, 3],), ([-1, -4, 5, 100],))
  def test_sparsemax(self, labels):
    """Also of labels that Optax reads as an index from the end, or cuts off."""
    if max(labels) > 3 and not hasattr(jax, "shard_map"):
      self.skipTest("An older JAX drops these from the derivative.")
    labels = np.array(labels)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))

    def masked(scores):
      return optax.losses.multiclass_sparsemax_loss(scores, labels, where=True)

    def unmasked(scores):
      return upstream.losses.multiclass_sparsemax_loss(scores, labels)

    for derive in (jax.jacfwd, jax.jacrev, jax.hessian):
      got, expected = derive(masked)(scores), derive(unmasked)(scores)
      assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    infinite = scores.at[0].set(jnp.array([-jnp.inf, 0.2, 0.1, -5.0]))
    got, expected = (
      jax.grad(lambda x, f=f: jnp.sum(f(x)))(infinite)
      for f in (masked, unmasked)
    )
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(got).any() == (labels[0] == 0)

  def test_included_nan_of_another_class(self):
    scores = jnp.array([[0.2, NAN, 0.0]])
    tangent = jnp.array([[1.0, 2.0, 3.0]])
    for name in ("multiclass_hinge_loss", "multiclass_perceptron_loss"):
      loss, original = (getattr(m.losses, name) for m in (optax, upstream))
      masked = functools.partial(
        loss, labels=np.array([0]), where=np.ones((1, 3), bool)
      )
      unmasked = functools.partial(original, labels=np.array([0]))
      for got, expected in zip(
        jax.jvp(masked, (scores,), (tangent,)),
        jax.jvp(unmasked, (scores,), (tangent,)),
        strict=True,
      ):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))

  def test_dtypes_of_parts(self):
    """A cotangent is not rounded to the dtype of another argument."""
    log_p = jnp.log(jnp.array([0.3, 0.7]))
    targets = jnp.array([0.25, 0.75], "bfloat16")
    got = jax.grad(
      lambda x: optax.kl_divergence(x, targets, where=np.ones(2, bool)) / 3
    )(log_p)
    assert_allclose(got, [-0.25 / 3, -0.25], rtol=1e-6)
    labels = jnp.array([[0.3, 0.35, 0.35]], "bfloat16")
    weights = jnp.array([[1.0, 2.0, 3.0]])
    where = np.ones((1, 3), bool)
    got = jax.grad(
      lambda a: jnp.sum(weights * optax.smooth_labels(labels, a, where=where))
    )(0.1)
    exact = np.sum(
      np.asarray(weights) * (1 / 3 - np.asarray(labels, "float64"))
    )
    assert_allclose(got, exact, rtol=1e-4)


class DeprecationTest(parameterized.TestCase):
  def test_convex_kl_divergence(self):
    """The same warning as Optax's, on the line of the caller."""
    arguments = (jnp.zeros(3), jnp.array([2.0, 1.0, NAN]))
    where = jnp.array([True, True, False])
    recorded = []
    for module in (upstream, optax):
      with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.convex_kl_divergence(*arguments)
      (warning,) = caught
      recorded.append((warning.category, str(warning.message)))
      self.assertEqual(warning.filename, __file__)
    self.assertEqual(*recorded)
    with self.assertWarns(DeprecationWarning):
      ours, theirs = (
        jax.make_jaxpr(module.convex_kl_divergence)(*arguments)
        for module in (upstream, optax)
      )
    self.assertEqual(str(ours), str(theirs))
    with self.assertWarns(DeprecationWarning):
      got = optax.convex_kl_divergence(*arguments, where=where)
    # As in HandWorkedTest: 2 log 2 + 1 - 2, and 0.
    assert_allclose(got, 2 * math.log(2) - 1, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
