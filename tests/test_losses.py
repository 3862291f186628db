"""What is particular to a loss: hand-worked numbers, labels, extremes."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
from absl.testing import absltest, parameterized
from cases import (
  CASES,
  DTYPES,
  SHAPE,
  assert_allclose,
  assert_close,
  assert_equal,
  masks,
  tolerance,
)

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
    got = getattr(optax, name)(*arguments, where=jnp.array([True, True, False]))
    assert_allclose(got, expected, rtol=1e-6)

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


class LabelsTest(parameterized.TestCase):
  @parameterized.product(dtype=DTYPES, axis=(-1, 0, (0, 1), (1, 0)))
  def test_integer_labels_are_one_hot_labels(self, dtype, axis):
    """With every label, in an included class and in a masked one."""
    axes = np.arange(2)[list(np.atleast_1d(axis))]
    batch = [s for a, s in enumerate(SHAPE) if a not in axes]
    classes = math.prod(SHAPE[a] for a in axes)
    (logits,) = (c.arguments(dtype)[0] for c in CASES if c.has_index)

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
          assert_allclose(
            a.astype("float32"),
            b.astype("float32"),
            **tolerance(dtype),
          )

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


class BroadcastTest(parameterized.TestCase):
  """Each example has a mask of its own, whatever it shares with the others."""

  def test_labels_shared_by_a_batch(self):
    logits, labels = CASES[0].arguments(DTYPES[0])
    where = masks()["random"]
    for shared in (labels[0], labels[:1]):
      expected = [
        upstream.softmax_cross_entropy(logits[i, kept], labels[0, kept])
        if kept.any()
        else 0
        for i, kept in enumerate(where)
      ]
      got = optax.softmax_cross_entropy(logits, shared, where=where)
      assert_allclose(got, expected, **tolerance(DTYPES[0]))
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
    logits, labels = CASES[1].arguments(DTYPES[0])
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
    logits, labels = CASES[1].arguments(DTYPES[0])
    classes = np.array([[True, True, False, True, True]])
    assert_equal(
      optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=classes
      ),
      optax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=np.broadcast_to(classes, SHAPE)
      ),
    )


class ExtremesTest(parameterized.TestCase):
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
        assert_equal(got[0], expected[0])
        assert_equal(got[1][where], expected[1])
        with jax.debug_nans(True), jax.debug_infs(True):
          got = optax.softmax_cross_entropy_with_integer_labels(
            logits, np.array(2), where=where
          )
        exact = np.logaddexp(float(kept[0]) - float(kept[1]), 0.0)
        assert_allclose(float(got), exact, **tolerance(dtype))

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
          value, gradient = jax.value_and_grad(
            lambda x, loss=loss, where=where: loss(x, x, where=where).sum()
          )(x)
        self.assertEqual(value, 0)
        assert_equal(gradient, 0)


class ParametersTest(parameterized.TestCase):
  """Arrays that parametrize a loss are masked with the data."""

  @parameterized.parameters("alpha", "gamma")
  def test_sigmoid_focal_loss(self, name):
    logits, labels = CASES[-1].arguments(DTYPES[0])
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
      assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    self.assertEqual(got[1][2], 0)
    # And a scalar that is differentiated.
    got = jax.grad(total, 1)(padded, 0.3)
    expected = jax.grad(dropped, 1)(logits, 0.3)
    assert_allclose(got, expected, rtol=1e-5)

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


class HardLabelsTest(parameterized.TestCase):
  @parameterized.parameters("float32", "int32", "bool")
  def test_sigmoid_focal_loss(self, dtype):
    """Labels of 0 and 1, as they mostly are: value, gradient and Hessian."""
    logits, soft = CASES[-1].arguments(DTYPES[0])
    labels = (soft > 0.5).astype(dtype)
    where = masks()["random"]

    def total(logits):
      return optax.sigmoid_focal_loss(logits, labels, where=where).sum()

    def dropped(logits):
      return upstream.losses.sigmoid_focal_loss(logits, labels[where]).sum()

    garbage = jnp.where(where, logits, NAN)
    got = total(garbage), jax.grad(total)(garbage), jax.hessian(total)(garbage)
    kept = logits[where]
    expected = (
      dropped(kept),
      jax.grad(dropped)(kept),
      jax.hessian(dropped)(kept),
    )
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
      got = optax.convex_kl_divergence(*arguments, where=where)
    # As in HandWorkedTest: 2 log 2 + 1 - 2, and 0.
    assert_allclose(got, 2 * math.log(2) - 1, rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
