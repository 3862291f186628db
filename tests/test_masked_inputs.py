"""The decorator alone, on losses of one's own."""

import functools
import inspect
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from cases import assert_allclose, assert_close, assert_equal, masks

import optax_masking as optax

WHERE = masks()["random"]
X = np.random.default_rng(0).normal(size=WHERE.shape).astype("float32")
Y = np.random.default_rng(1).normal(size=WHERE.shape).astype("float32")


@optax.masked_inputs(predictions=0.0, targets=0.0)
def absolute_error(predictions, targets, *, scale=1.0):
  """Knows nothing of axes and masks."""
  return scale * jnp.abs(predictions - targets)


@optax.masked_inputs(predictions=0.0, targets=0.0)
def total_error(predictions, targets, axis=-1, where=None):
  """Knows both, as a loss of Optax does."""
  del where
  return jnp.sum(jnp.abs(predictions - targets), axis)


class DecoratorTest(parameterized.TestCase):
  def test_own_loss(self):
    x, y = np.where(WHERE, X, np.nan), np.where(WHERE, Y, np.inf)
    expected = np.where(WHERE, np.abs(X - Y), 0)
    assert_equal(absolute_error(x, y, scale=2.0, where=WHERE), 2 * expected)
    for loss in (absolute_error, total_error):
      assert_allclose(
        loss(x, y, axis=0, where=WHERE), expected.sum(0), rtol=1e-6
      )
      gradient = jax.grad(
        lambda x, loss=loss: loss(x, y, axis=0, where=WHERE).sum()
      )
      assert_equal(gradient(x), np.where(WHERE, np.sign(X - Y), 0))

  def test_signature(self):
    """What is added comes last, and what is written out stays."""
    self.assertEqual(
      str(inspect.signature(absolute_error)),
      "(predictions, targets, *, scale=1.0, axis=(), where=None)",
    )
    self.assertEqual(
      str(inspect.signature(total_error)),
      "(predictions, targets, axis=-1, where=None)",
    )
    self.assertEqual(absolute_error.__doc__, "Knows nothing of axes and masks.")
    self.assertEqual(absolute_error.__name__, "absolute_error")

  def test_no_mask_is_the_undecorated_loss(self):
    for loss in (absolute_error, total_error):
      self.assertEqual(
        str(jax.make_jaxpr(loss)(X, Y)),
        str(jax.make_jaxpr(loss.__wrapped__)(X, Y)),
      )

  def test_where_is_passed_on(self):
    """A loss that declares `where` gets it, in the shape of the data."""

    @optax.masked_inputs(x=0.0)
    def mean(x, axis=-1, where=None):
      count = x.shape[axis] if where is None else where.sum(axis)
      return x.sum(axis) / jnp.maximum(count, 1)

    rows = np.array([True, False, True, False])
    for where in (rows, rows[:, None], list(rows)):
      assert_allclose(
        mean(np.where(rows[:, None], X, np.nan), where=where),
        np.where(rows, X.mean(-1), 0),
        rtol=1e-6,
      )
    assert_allclose(mean(X, where=True), X.mean(-1), rtol=1e-6)
    assert_allclose(mean(X, where=WHERE), X.mean(-1, where=WHERE), rtol=1e-6)

  def test_python_scalars(self):
    """A scalar is data like an array of them, and takes no part in dtypes."""
    x = jnp.asarray(X, "bfloat16")
    for loss in (total_error, absolute_error):
      for y in (0.5, 2, True):
        got = loss(x, y, axis=-1, where=WHERE)
        self.assertEqual(got.dtype, "bfloat16")
        full = jnp.full(X.shape, y, "bfloat16")
        expected = loss(x, full, axis=-1, where=WHERE)
        assert_close(got, expected, "bfloat16")
    logits = jnp.array([1.0, 2.0, 3.0])
    for where, expected in (
      ([True, True, False], np.log(1 + np.e) - 1),
      ([True, False, True], 0.0),  # The class of the label is masked.
    ):
      got = optax.softmax_cross_entropy_with_integer_labels(
        logits, 1, where=where
      )
      assert_allclose(got, expected, rtol=1e-6)

  def test_none(self):
    """Optax's regression losses take None for targets of 0."""

    @optax.masked_inputs(x=0.0, y=0.0)
    def loss(x, y=None):
      return jnp.abs(x if y is None else x - y)

    for y in (None, 1.0):
      assert_equal(loss(X, y, where=WHERE), np.where(WHERE, loss(X, y), 0))

  def test_dtypes_are_kept(self):
    """A fill is of the kind of what it fills, whatever it is written as."""
    seen = {}

    @optax.masked_inputs(f=0.5, i=0.5, b=0.5)
    def loss(f, i, b):
      seen.update(f=f, i=i, b=b)
      return f + i + b

    for dtype in ("float32", "bfloat16", "float16"):
      for integer in ("int8", "uint32"):
        arguments = (jnp.asarray(X, dtype), jnp.asarray(X, integer), Y > 0)
        expected = loss(*arguments).dtype
        self.assertEqual(loss(*arguments, where=WHERE).dtype, expected)
        self.assertEqual(
          [seen[k].dtype for k in "fib"], [dtype, integer, "bool"]
        )
    above = optax.masked_inputs(x=0.0)(lambda x: x > 0)
    self.assertEqual(above(X, where=WHERE).dtype, "bool")
    weak = jax.make_jaxpr(lambda: loss(jnp.asarray(1.0), 0, 0, where=True))()
    self.assertTrue(weak.out_avals[0].weak_type)

  def test_argument_broadcast_along_a_reduced_axis(self):
    """A normalized argument is not blown up: its norm would change."""
    a = jnp.asarray(X[:, :1])
    for where in (True, np.ones(X.shape, bool)):
      assert_allclose(
        optax.cosine_similarity(a, Y, where=where),
        optax.cosine_similarity(a, Y),
        rtol=1e-6,
      )
    gradient = jax.grad(
      lambda a: optax.cosine_similarity(a, Y, where=WHERE * 0 > 0).sum()
    )
    assert_equal(gradient(a * jnp.nan), 0)

  def test_axis_of_an_argument_of_lower_rank(self):
    """Counted from the start, an axis of `targets` is another of the data."""
    with self.assertRaisesWithLiteralMatch(
      ValueError,
      "`axis` 0 is not the same in `targets`, of shape (5,), as in the data, of"
      " shape (4, 5). Count it from the end, or give `targets` 2 axes.",
    ):
      optax.cosine_similarity(X, Y[0], axis=0, where=WHERE)
    assert_allclose(
      optax.cosine_similarity(X, Y[0], axis=-1, where=WHERE),
      optax.cosine_similarity(X, np.stack([Y[0]] * 4), where=WHERE),
      rtol=1e-6,
    )

  def test_fills_are_checked(self):
    def loss(predictions, *more, axis=(), **others):
      raise NotImplementedError

    for name in ("target", "more", "others", "axis"):
      with self.assertRaisesWithLiteralMatch(
        TypeError,
        f"There is no parameter {name!r} to fill; the parameters are"
        " ['predictions'].",
      ):
        optax.masked_inputs(**{"predictions": 0.0, name: 0.0})(loss)
    with self.assertRaisesWithLiteralMatch(
      TypeError,
      "Name a fill for each array argument of the loss, as in"
      " @masked_inputs(predictions=0.0).",
    ):
      optax.masked_inputs()(loss)
    for unnamed in (loss, 0.0):
      with self.assertRaisesWithLiteralMatch(
        TypeError,
        f"masked_inputs takes fills by name, not {unnamed!r}. To decorate a"
        " loss write @masked_inputs(predictions=0.0, targets=0.0), for"
        " example.",
      ):
        optax.masked_inputs(unnamed)
    for fill in (None, optax.fills.PerExample(None)):
      with self.assertRaisesWithLiteralMatch(
        TypeError,
        "The fill of `predictions` must be a number, a `PerExample` or a"
        " function, not None.",
      ):
        optax.masked_inputs(predictions=fill)(loss)
    for number in (jnp.nan, np.float32("inf"), -float("inf")):
      for fill in (number, optax.fills.PerExample(number)):
        with self.assertRaisesWithLiteralMatch(
          ValueError,
          f"The fill of `predictions` must be finite, not {number!r}: the"
          " derivative of a loss would be NaN.",
        ):
          optax.masked_inputs(predictions=fill)(loss)

  def test_loss_that_reads_values(self):
    """It can't be traced to see whether it broadcasts, and need not be."""

    @optax.masked_inputs(x=0.0, y=0.0)
    def loss(x, y):
      if float(jnp.max(y)) > 1e6:
        raise OverflowError
      return jnp.abs(x - y)

    assert_equal(
      loss(X, Y[0], where=WHERE), np.where(WHERE, np.abs(X - Y[0]), 0)
    )
    with self.assertRaisesRegex(ValueError, r"`where` has shape \(7,\)"):
      loss(X, Y, where=np.ones(7, bool))

  def test_shapes_that_a_loss_refuses(self):
    """A fill broadcasts; a loss that does not is asked before."""

    @optax.masked_inputs(x=0.0, y=0.0)
    def loss(x, y):
      if x.shape != y.shape:
        raise ValueError(f"refused: {x.shape} and {y.shape}")
      return jnp.abs(x - y)

    with self.assertRaisesWithLiteralMatch(
      ValueError, "refused: (4, 5) and (5,)"
    ):
      loss(X, Y[0], where=WHERE)
    with self.assertRaisesRegex(ValueError, "inconsistent size"):
      optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)(
        X, Y[:, :1], where=WHERE
      )

  def test_without_a_mask_nothing_is_refused(self):
    @optax.masked_inputs(x=0.0)
    def loss(x):
      return jnp.abs(jnp.asarray(x))

    assert_equal(loss([1.0, -2.0], axis=-1), 3)

  def test_axis_that_is_an_array(self):
    for where in (None, True):
      with self.assertRaisesRegex(TypeError, "`axis` must be an int, a tuple"):
        optax.hinge_loss(X, Y, axis=np.array([0, 1]), where=where)

  def test_labels_of_the_wrong_rank(self):
    @optax.masked_inputs(scores=0.0, labels=optax.fills.PerExample(0))
    def loss(scores, labels, axis=-1):
      return jnp.sum(scores, axis)

    with self.assertRaisesWithLiteralMatch(
      ValueError,
      "An array with one entry an example has shape (4, 5), but must have the"
      " rank of (4, 5) without the axes (1,).",
    ):
      loss(X, np.ones(X.shape, int), where=WHERE)

  def test_parameters_stay_scalars(self):
    """A default is not blown up to the size of the data."""

    @optax.masked_inputs(x=0.0, scale=1.0)
    def loss(x, *, scale=2.0):
      self.assertIsInstance(scale, float)
      return scale * x

    assert_equal(loss(X, where=WHERE), np.where(WHERE, 2 * X, 0))
    assert_equal(loss(X, scale=3.0, where=WHERE), np.where(WHERE, 3 * X, 0))

  def test_lists_are_refused(self):
    """Else their garbage would not be masked."""

    @optax.masked_inputs(x=0.0, y=0.0)
    def loss(x, y):
      return jnp.abs(x - jnp.asarray(y))

    with self.assertRaisesWithLiteralMatch(
      TypeError, "`y` must be an array, not list. Pass jnp.asarray(y)."
    ):
      loss(jnp.ones(2), [0.0, np.nan], where=jnp.array([True, False]))

  def test_an_axis_is_summed_once(self):
    """By the decorator, if the default is to reduce nothing."""

    @optax.masked_inputs(x=0.0)
    def loss(x, *, axis=()):
      return jnp.sum(jnp.abs(x), axis)

    for where in (None, True):
      for axis in (0, -1, (0, 1), None, (), []):
        assert_allclose(
          loss(X, axis=axis, where=where),
          np.abs(X).sum(tuple(axis) if axis == [] else axis),
          rtol=1e-6,
        )

  def test_misspelt_keyword(self):
    """Python's own error, with the name of the function."""
    for axis in ((), -1):
      for where in (None, WHERE):
        with self.assertRaisesRegex(
          TypeError, r"absolute_error\(\) got an .* argument 'axs'"
        ):
          absolute_error(X, Y, axis=axis, where=where, axs=1)

  def test_masked_twice(self):
    """A masked loss may be masked again."""
    again = optax.masked_inputs(logits=0.0, labels=0.5)(
      optax.sigmoid_focal_loss
    )
    for axis in ((), 0):
      assert_close(
        again(X, abs(Y) % 1, axis=axis, where=WHERE),
        optax.sigmoid_focal_loss(X, abs(Y) % 1, axis=axis, where=WHERE),
        "float32",
      )

  @parameterized.parameters(
    (lambda x: jnp.sum(x), r"\(\)", r"\(4, 5\)"),
    (lambda x: jnp.sum(x, -1), r"\(4,\)", r"\(4, 5\)"),
    (lambda x, axis=-1: x[:3], r"\(3, 5\)", r"\(4,\)"),
    (lambda x, axis=-1: jnp.mean(x), r"\(\)", r"\(4,\)"),
  )
  def test_loss_of_the_wrong_shape(self, loss, got, expected):
    """A mean over a batch can't be masked from outside: no guess is made."""
    rule = "reduces the `axis` that it declares, and no other."
    if "axis" not in inspect.signature(loss).parameters:
      rule = "that reduces an axis declares it in its signature: `axis=-1`."
    with self.assertRaisesRegex(
      ValueError,
      f"The loss returned the shape {got} for data of shape .4, 5., not"
      f" {expected}. A loss {rule} One that returns another shape makes a"
      " `Mask` in its body.",
    ):
      optax.masked_inputs(x=0.0)(loss)(X, where=WHERE)

  def test_floating_fills_refuse_integers(self):
    loss = optax.masked_inputs(x=optax.fills.below_maximum)(
      lambda x, axis=-1: jnp.max(x, axis)
    )
    with self.assertRaisesWithLiteralMatch(
      TypeError, "`x` must be floating, but has dtype int32."
    ):
      loss(X.astype("int32"), where=WHERE)

  def test_own_softmax_loss(self):
    """A fill for logits serves any function that a shift does not change."""

    @optax.masked_inputs(logits=optax.fills.below_maximum)
    def negative_entropy(logits, axis=-1):
      log_p = jax.nn.log_softmax(logits, axis)
      return jnp.sum(jnp.exp(log_p) * log_p, axis)

    got = negative_entropy(np.where(WHERE, X, np.nan), where=WHERE)
    for i, row in enumerate(WHERE):
      expected = negative_entropy(X[i, row]) if row.any() else 0
      assert_allclose(got[i], expected, rtol=1e-5)

  def test_partial(self):
    def error(x, y, power):
      return jnp.abs(x - y) ** power

    loss = optax.masked_inputs(x=0.0, y=0.0)(functools.partial(error, power=2))
    assert_equal(loss(X, Y, where=WHERE), np.where(WHERE, loss(X, Y), 0))

  def test_overhead_without_a_mask(self):
    """Not the microseconds of binding arguments to a signature."""
    for loss in (absolute_error, total_error):
      loss(X, Y)  # JAX binds some when it compiles.
    with mock.patch.object(inspect.Signature, "bind") as bind:
      for loss in (absolute_error, total_error):
        loss(X, Y)
        loss(X, Y, where=None)
      bind.assert_not_called()
      bind.side_effect = RuntimeError("called")
      with self.assertRaisesRegex(RuntimeError, "called"):
        total_error(X, Y, where=WHERE)


if __name__ == "__main__":
  absltest.main()
