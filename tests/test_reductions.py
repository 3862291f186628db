"""Sums and means of what is included, next to those of what is left of it."""

import functools
import pickle
from unittest import mock

import jax
import jax.numpy as jnp
import microbatches
import numpy as np
import optax as upstream
import padded_model
import pytest
from absl.testing import absltest, parameterized
from cases import (
  BY_NAME,
  DTYPES,
  NAMED,
  assert_all_close,
  assert_allclose,
  assert_close,
  assert_equal,
  float_poisons,
  largest,
)
from test_transforms import shard_map

import optax_masking as optax
from optax_masking import reductions
from optax_masking.reductions import (
  RunningMean,
  masked_count,
  masked_mean,
  masked_sum,
)
from optax_masking.testing import assert_mask_safe

DTYPE = DTYPES[0]
HALF = ("bfloat16", "float16")
# One loss of each kind of result: an element, an example, the batch.
FEW = ("hinge_loss", "ntxent", "softmax_cross_entropy_with_integer_labels")
SHAPE = (2, 3, 4)


def data(dtype=DTYPE):
  """Values, a mask with an empty slice along each axis, and weights."""
  rng = np.random.default_rng(0)
  where = rng.random(SHAPE) < 0.6
  where[0, 1], where[0, :, 2], where[:, 2, 3] = False, False, False
  x, w = rng.normal(size=SHAPE), rng.uniform(0.5, 2, SHAPE)
  return jnp.asarray(x, dtype), where, jnp.asarray(w, dtype)


def reference(x, where, weights, axis):
  """Sums, counts, means and the gradients of the means, slice by slice.

  By their formulas, of the included elements alone, in float64.
  """
  x, weights = (np.asarray(a, "float64") for a in (x, weights))
  axes = range(x.ndim) if axis is None else np.atleast_1d(axis).astype(int)
  axes = [a % x.ndim for a in axes]
  batch = [a for a in range(x.ndim) if a not in axes]
  total, count, mean = (np.zeros([x.shape[a] for a in batch]) for _ in range(3))
  of_x, of_weights = np.zeros(x.shape), np.zeros(x.shape)
  positions = np.indices(x.shape)
  for index in np.ndindex(*total.shape):
    kept = where.copy()
    for a, i in zip(batch, index, strict=True):
      kept &= positions[a] == i
    if kept.any():
      v, w = x[kept], weights[kept]
      total[index], count[index] = v @ w, w.sum()
      mean[index] = v @ w / w.sum()
      of_x[kept] = w / w.sum()
      of_weights[kept] = (v - mean[index]) / w.sum()
  return total, count, mean, of_x, of_weights


class MaskTest(parameterized.TestCase):
  """The contract."""

  @parameterized.product(
    axis=(None, 0, -1, (0, 2), (0, 1, 2), ()), weighted=(False, True)
  )
  def test_compaction(self, axis, weighted):
    self.check_compaction(axis, weighted, DTYPE)

  @parameterized.product(
    axis=(None, (0, 2)), weighted=(False, True), dtype=HALF
  )
  @pytest.mark.slow
  def test_compaction_in_half_precision(self, axis, weighted, dtype):
    self.check_compaction(axis, weighted, dtype)

  @parameterized.product(
    axis=(0, -1, (0, 1, 2), ()), weighted=(False, True), dtype=HALF
  )
  @pytest.mark.nightly
  def test_compaction_of_other_axes(self, axis, weighted, dtype):
    self.check_compaction(axis, weighted, dtype)

  def check_compaction(self, axis, weighted, dtype):
    """What is masked, whatever it is, might as well not be there."""
    x, where, weights = data(dtype)
    if not weighted:
      weights = jnp.ones_like(weights)
    *values, of_x, of_weights = reference(x, where, weights, axis)
    axes = axis if axis is None else tuple(np.atleast_1d(axis).astype(int))
    empty = ~where.any(axes)

    @jax.jit
    def run(x, weights):
      given = {"weights": weights} if weighted else {}

      def mean(x, weights):
        given = {"weights": weights} if weighted else {}
        return jnp.sum(masked_mean(x, where, axis, **given))

      return (
        masked_sum(x, where, axis, **given),
        masked_count(x, where, axis, **given),
        masked_mean(x, where, axis, **given),
      ), jax.grad(mean, (0, 1))(x, weights)

    for poison in float_poisons(dtype):
      got, gradients = run(*(jnp.where(where, a, poison) for a in (x, weights)))
      for number, expected in zip(got, values, strict=True):
        assert_close(number, expected, dtype, terms=largest(x))
        assert_equal(np.asarray(number)[empty], 0)
      assert_close(gradients[0], of_x, dtype)
      if weighted:
        terms = largest(x / weights)  # Each is of x less the mean.
        assert_close(gradients[1], of_weights, dtype, terms=terms)
      for gradient in gradients:
        assert_equal(np.asarray(gradient)[~where], 0)

  @pytest.mark.slow
  def test_guard(self):
    self.check_guard(masked_mean, -1)

  @parameterized.product(
    function=(masked_sum, masked_mean), axis=(None, -1, (0, 1))
  )
  @pytest.mark.nightly
  def test_guard_of_others(self, function, axis):
    self.check_guard(function, axis)

  def check_guard(self, function, axis):
    """Invariance, zero gradients, Hessians and clean arithmetic, for anyone."""
    x, where, weights = data()
    reduced = functools.partial(function, axis=axis)
    assert_mask_safe(reduced, x[0], where=where[0])

    def weighted(values, weights, where):
      return reduced(values, where, weights=weights)

    assert_mask_safe(weighted, x[0], abs(weights[0]), where=where[0])

  def test_debug_nans(self):
    """Nothing left, and with weights of 0."""
    x, where, weights = data()
    with jax.debug_nans(True), jax.debug_infs(True):
      for w in (None, weights, 0 * weights):
        for mask in (where, where & False):
          total = functools.partial(masked_mean, where=mask, weights=w)
          assert_equal(jnp.isfinite(jax.grad(total)(x)), True)

  @pytest.mark.slow
  def test_debug_nans_of_garbage(self):
    """It is selected before anything else is done with it."""
    rows = np.array([False, True, True])
    garbage = jnp.where(rows, 1.0, jnp.nan)
    of_rows = jnp.where(rows[:, None], jnp.ones((3, 4)), jnp.nan)
    ones, nan = jnp.ones((3, 4)), jnp.array(jnp.nan)
    with jax.debug_nans(True):
      for x in (of_rows, np.asarray(of_rows)):
        assert_equal(masked_mean(x, rows[:, None]), 1)
        assert_equal(masked_mean(x, rows, -1), rows)
        assert_equal(masked_count(x), 12)
      slope = jax.grad(masked_mean)(of_rows, rows[:, None])
      assert_equal(slope, np.repeat(rows[:, None], 4, 1) / 8)
      assert_equal(masked_mean(ones, rows, -1, weights=garbage), rows)
      slope = jax.grad(
        lambda w: jnp.sum(masked_sum(ones, rows, -1, weights=w))
      )(garbage)
      assert_equal(slope, 4 * rows)
      assert_equal(masked_mean(ones, False, weights=nan), 0)

  @pytest.mark.slow
  def test_second_derivatives(self):
    """With respect to weights: -(x_i + x_j - 2 m) / W^2."""
    x, where, weights = data()
    m = masked_mean(x, where, weights=weights)
    w = masked_count(x, where, weights=weights)
    both = where.ravel()[:, None] & where.ravel()
    expected = -(x.ravel()[:, None] + x.ravel() - 2 * m) / w**2 * both
    for hessian in (
      lambda f: jax.jacfwd(jax.grad(f)),
      lambda f: jax.jacrev(jax.grad(f)),
    ):
      got = jax.jit(
        hessian(
          lambda w: masked_mean(
            jnp.where(where, x, jnp.nan), where, weights=w.reshape(SHAPE)
          )
        )
      )(weights.ravel())
      assert_all_close(got, expected, DTYPE)
      assert_equal(np.asarray(got)[~both], 0)

  @parameterized.product(dtype=DTYPES, axis=(None, 1, (0, -1)))
  def test_without_mask(self, dtype, axis):
    x, _, _ = data(dtype)
    for where in (None, True, np.ones(SHAPE, bool)):
      assert_close(masked_sum(x, where, axis), jnp.sum(x, axis), dtype)
      assert_close(masked_mean(x, where, axis), jnp.mean(x, axis), dtype)
      self.assertEqual(masked_mean(x, where, axis).dtype, dtype)
      got = masked_count(x, where, axis)
      assert_equal(got, x.size // jnp.sum(x, axis).size)

  @parameterized.parameters((0,), (3, 0), (0, 3))
  def test_no_elements(self, *shape):
    x = jnp.zeros(shape)
    for where in (None, np.zeros(shape, bool)):
      for axis in (None, 0, -1):
        expected = jnp.zeros_like(jnp.sum(x, axis))
        for function in (masked_sum, masked_count, masked_mean):
          assert_equal(function(x, where, axis), expected)
      assert_equal(jax.grad(masked_mean)(x, where), x)

  @pytest.mark.slow
  def test_row_masks(self):
    """Size 1, or no axis, where the mask is the same along the data."""
    x, where, weights = data()
    rows, row_weights = where[..., :1], weights[..., :1]
    full = np.broadcast_to(rows, SHAPE)
    for function in (masked_sum, masked_count, masked_mean):
      for axis in (None, -1, (1, 2)):
        expected = function(
          x, full, axis, weights=jnp.broadcast_to(row_weights, SHAPE)
        )
        got = function(x, rows, axis, weights=row_weights)
        assert_close(got, expected, DTYPE)
      got = function(x, rows[..., 0], -1, weights=row_weights[..., 0])
      expected = function(x, full, -1, weights=row_weights)
      assert_close(got, expected, DTYPE)

  def test_honesty(self):
    """NaN that is included comes out, by a weight of 0 too."""
    x, where, weights = data()
    x = x.at[1, 0, 0].set(jnp.nan)
    where[1, 0, 0] = True
    for function in (masked_sum, masked_mean):
      for w in (None, weights, weights.at[1, 0, 0].set(0), 0 * weights):
        got = function(x, where, (1, 2), weights=w)
        np.testing.assert_array_equal(jnp.isnan(got), [False, True])
    weights = weights.at[1, 0, 0].set(jnp.nan)
    got = masked_mean(jnp.zeros(SHAPE), where, (1, 2), weights=weights)
    np.testing.assert_array_equal(jnp.isnan(got), [False, True])

  @parameterized.parameters(*FEW)
  @pytest.mark.slow
  def test_of_few_losses(self, name):
    self.check_of_loss(BY_NAME[name])

  @parameterized.named_parameters(
    (name, case) for name, case in NAMED if name not in FEW
  )
  @pytest.mark.nightly
  def test_of_losses(self, case):
    self.check_of_loss(case)

  def check_of_loss(self, case):
    """The mean of the losses of rows, of which some are garbage."""
    arguments = case.arguments(DTYPE)
    where = np.ones(case.shape, bool)
    where[1::2] = False
    rows = where.any(tuple(range(1, where.ndim)))
    count = len(case.floating)

    def mean(*floats):
      loss = case.loss(*floats, *arguments[count:], where=where)
      mask = where if loss.shape == where.shape else rows
      return masked_mean(loss, mask if loss.ndim else True)

    def mean_of_kept(*floats):
      # Of which rows can't be taken out one by one.
      if not case.slices or case.keeps_shape:
        loss = case.loss(*floats, *arguments[count:], where=where)
        return loss[rows].mean() if loss.ndim else loss
      return case.original(
        *(x[rows] for x in (*floats, *arguments[count:]))
      ).mean()

    garbage = [jnp.where(where, x, jnp.nan) for x in arguments[:count]]
    for run in (lambda f: f, lambda f: jax.grad(f, range(count))):
      expected = run(mean_of_kept)(*arguments[:count])
      got = run(mean)(*garbage)
      jax.tree.map(lambda a, b: assert_close(a, b, DTYPE), got, expected)


class DtypesTest(parameterized.TestCase):
  @parameterized.parameters("bfloat16", "float16")
  def test_half_precision(self, dtype):
    """A count of ones in 16 bits ends at 256, or 2,048."""
    ones = jnp.ones(4096, dtype)
    self.assertEqual(masked_sum(ones, True).dtype, dtype)
    assert_equal(masked_sum(ones, True), 4096)
    assert_equal(masked_count(ones, True, weights=ones), 4096)
    assert_equal(masked_mean(ones, True, weights=ones), 1)
    large = jnp.full(4096, 3e4, dtype)  # The sum is beyond float16.
    assert_equal(masked_mean(large, np.arange(4096) > 9), large[0])
    assert_equal(jax.grad(masked_mean)(ones, True), 1 / 4096)

  @parameterized.parameters("bfloat16", "float16")
  def test_gradient_of_weights(self, dtype):
    """Of values that are nearly equal, a difference of nearly equal parts."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + rng.normal(size=8), dtype)
    for scale in (1.0, 1e-3):
      w = jnp.asarray(scale * rng.uniform(0.5, 2, size=8), dtype)
      got = jax.grad(lambda w: masked_mean(x, weights=w))(w)
      v, u = (np.asarray(a, "float64") for a in (x, w))
      expected = (v - v @ u / u.sum()) / u.sum()
      self.assertLess(microbatches.distance(got, jnp.array(expected)), 0.01)

  def test_small_weights(self):
    """The square of their sum is 0 in float32."""
    x = jnp.array([0.0, 1.0, 2.0])
    got = jax.grad(lambda w: masked_mean(x, weights=w))(jnp.full(3, 1e-25))
    assert_allclose(got, np.array([-1, 0, 1]) / 3e-25, rtol=1e-6, atol=1e18)

  def test_dtypes(self):
    floating = jnp.asarray(1.0).dtype
    integer = jnp.asarray(1).dtype
    for values, total, mean in (
      (jnp.array([True, False, True]), integer, floating),
      (jnp.array([100, 100, 1], "int8"), integer, floating),
      (jnp.array([1.0, 2, 3], "bfloat16"), "bfloat16", "bfloat16"),
      ([1.0, 2.0, 3.0], floating, floating),
    ):
      where = [True, True, False]
      expected = np.asarray(values, "float64")[:2]
      for function, dtype, number in (
        (masked_sum, total, expected.sum()),
        (masked_mean, mean, expected.mean()),
        (masked_count, integer, 2),
      ):
        got = function(values, where)
        self.assertEqual(got.dtype, dtype)
        assert_equal(got, number)
    assert_equal(masked_count([1.0, 2.0]), 2)
    with jax.numpy_dtype_promotion("strict"):
      x = jnp.ones(3, "bfloat16")
      two = jnp.arange(3)[2]  # Of a dtype that is not weak.
      got = masked_mean(x, weights=jnp.ones(3, "float32"), denominator=two)
      self.assertEqual(got.dtype, "bfloat16")
      assert_equal(got, 1.5)
      for dtype in ("float32", "bfloat16"):
        got = masked_sum(jnp.arange(3), weights=jnp.full(3, 0.5, dtype))
        self.assertEqual(got.dtype, "float32")
        assert_equal(got, 1.5)

  def test_many_elements(self):
    """More than the default integer counts."""
    with mock.patch.object(reductions, "_most", return_value=3):
      x = jnp.ones((2, 4))
      for where in (None, True, np.ones((2, 1), bool)):
        assert_equal(masked_mean(x, where), 1)
        with self.assertRaisesRegex(OverflowError, "8 elements .* holds, 3"):
          masked_count(x, where)
      assert_equal(masked_count(x, axis=0), 2)
    shape = jax.ShapeDtypeStruct((2**16, 2**15), "float32")
    jaxpr = jax.make_jaxpr(lambda x, w: (masked_mean(x), masked_mean(x, w)))(
      shape, jax.ShapeDtypeStruct(shape.shape, bool)
    )
    self.assertIn("2147483648.0", str(jaxpr))
    self.assertRegex(str(jaxpr), r"f32\[\] = reduce_sum")
    self.assertNotRegex(str(jaxpr), r"i(32|64)\[\] = reduce_sum")


class DenominatorTest(parameterized.TestCase):
  def test_given(self):
    x, where, weights = data()
    expected = reference(x, where, weights, (1, 2))[0]
    large = 3_000_000_000  # More than an integer of JAX holds.
    got = masked_mean(x, where, (1, 2), weights=weights, denominator=large)
    assert_allclose(got, expected / large, rtol=1e-5)
    for denominator in (7, 7.0, jnp.array([7.0, 7.0]), np.array([7], "int8")):
      got = masked_mean(
        x, where, (1, 2), weights=weights, denominator=denominator
      )
      assert_close(got, expected / 7, DTYPE)

  def test_zero(self):
    """0 / 0 is 0, with a gradient of 0; 1 / 0 is not."""
    x = jnp.ones(2)
    for where, expected in ((False, 0), (True, np.inf)):
      got = masked_mean(x, where, denominator=0)
      np.testing.assert_array_equal(got, expected)
    zeros = jnp.zeros(2)
    for values, where in ((x, False), (zeros, True)):
      slope = jax.grad(masked_mean)(values, where, denominator=0)
      assert_equal(slope, 0)
    for values in (x, zeros):
      for slope in jax.grad(lambda x, w: masked_mean(x, weights=w), (0, 1))(
        values, zeros
      ):
        assert_equal(slope, 0)

  def test_derivative(self):
    """Of s / d: -s / d^2."""
    got = jax.grad(lambda d: masked_mean(jnp.ones(3), denominator=d))(2.0)
    assert_equal(got, -3 / 4)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    (TypeError, "`where` must be boolean", {"where": np.ones(SHAPE)}),
    (
      TypeError,
      "`weights` must be floating .* dtype bool. Pass a mask as `where`",
      {"weights": np.ones(SHAPE, bool)},
    ),
    (
      ValueError,
      r"`weights` has shape \(2,\), .*weights\[..., None, None\]",
      {"weights": np.ones(2)},
    ),
    (ValueError, "not be negative, but -1", {"weights": -1}),
    (ValueError, "out of range", {"axis": 3}),
    (ValueError, "repeated", {"axis": (0, -3)}),
    (ValueError, r"where\[..., None, None\]", {"where": np.ones(2, bool)}),
    (TypeError, "axis.*int", {"axis": "rows"}),
  )
  def test_arguments(self, error, message, given):
    x, _, _ = data()
    for function in (masked_sum, masked_count, masked_mean):
      with self.assertRaisesRegex(error, message):
        function(x, **given)

  def test_ambiguous(self):
    """One entry a row, and an entry a column as NumPy has it."""
    for given in ({"where": np.ones(3, bool)}, {"weights": np.ones(3)}):
      with self.assertRaisesRegex(ValueError, "fits data .* in two ways"):
        masked_mean(jnp.ones((3, 3)), axis=-1, **given)

  def test_masked_weights(self):
    """What is masked is not looked at; nor is what is traced."""
    x = jnp.ones(2)
    weights = jnp.array([-1.0, 2.0])
    where = np.array([False, True])
    assert_equal(masked_mean(x, where, weights=weights), 1)
    got = jax.jit(lambda w: masked_sum(x, weights=w))(weights)
    assert_equal(got, 1)

  def test_known_weights(self):
    """Of a closure, for which the check must not become a part of `jit`."""
    x = jnp.ones(2)
    for w in (jnp.array([1.0, 2.0]), np.array([1.0, 2.0])):
      run = lambda x, w=w: masked_mean(x, weights=w)  # noqa: E731
      for transform in (jax.jit, jax.grad, lambda f: jax.jit(jax.grad(f))):
        self.assertTrue(jnp.isfinite(transform(run)(x)).all())
      jax.lax.scan(lambda c, x, run=run: (c + run(x), None), 0.0, x[None])

  def test_axis_name(self):
    """Of no map, or misspelt."""
    x = jnp.ones((1, 3))
    mean = functools.partial(masked_mean, axis_name="rows")
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("row",))
    specs = jax.sharding.PartitionSpec("row"), jax.sharding.PartitionSpec()
    for call in (
      mean,
      jax.jit(mean),
      jax.vmap(mean, axis_name="row"),
      shard_map(mean, mesh=mesh, in_specs=specs[0], out_specs=specs[1]),
    ):
      with self.assertRaisesRegex(NameError, "'rows' names no mapped axis"):
        call(x)

  def test_count_of_a_mask(self):
    with self.assertRaisesRegex(TypeError, r"masked_count\(mask, mask\)"):
      masked_count(np.array([True, False]))
    assert_equal(masked_count(np.array([True, False]), where=True), 2)

  def test_denominator(self):
    with self.assertRaisesRegex(ValueError, r"shape \(3,\), .* to \(2,\)"):
      masked_mean(jnp.ones((2, 3)), axis=1, denominator=jnp.ones(3))
    with self.assertRaisesRegex(TypeError, "`denominator` .* bool"):
      masked_mean(jnp.ones((2, 3)), denominator=True)


class MappedAxisTest(parameterized.TestCase):
  """By `vmap`; devices are in `eight_devices.py`."""

  def setUp(self):
    super().setUp()
    self.x, where, self.weights = (a.reshape(6, 4) for a in data())
    self.where = where
    self.assertIn(0, where.sum(1))

  @parameterized.parameters(True, False)
  def test_whole(self, weighted):
    """Each row gets the sum, the count and the mean of all."""
    weights = self.weights if weighted else None
    for function in (masked_sum, masked_count, masked_mean):
      got = jax.vmap(
        lambda x, w, weights, function=function: function(
          x, w, weights=weights, axis_name="rows"
        ),
        axis_name="rows",
      )(self.x, self.where, weights)
      expected = function(self.x, self.where, weights=weights)
      assert_close(got, jnp.full(6, expected), DTYPE)
      got = jax.vmap(
        functools.partial(function, axis_name="rows"), axis_name="rows"
      )(self.x)
      assert_close(got, jnp.full(6, function(self.x)), DTYPE)

  def test_two_axes(self):
    x, where, _ = data()
    run = functools.partial(masked_mean, axis_name=("a", "b"))
    got = jax.vmap(jax.vmap(run, axis_name="a"), axis_name="b")(x, where)
    assert_close(got, jnp.full((2, 3), masked_mean(x, where)), DTYPE)

  @pytest.mark.slow
  def test_derivatives(self):
    """From outside, in forward mode, and averaged inside."""
    x, where = self.x, self.where

    def loss(scale, x, where, axis_name=None):
      values = jnp.where(where, jnp.sin(scale * x), jnp.nan)
      return masked_mean(
        values, where, weights=jnp.exp(scale) + 0 * where, axis_name=axis_name
      )

    mapped = functools.partial(loss, axis_name="rows")
    over_rows = functools.partial(
      jax.vmap, in_axes=(None, 0, 0), axis_name="rows"
    )
    expected = jax.jit(jax.grad(loss))(0.7, x, where)
    second = jax.jit(jax.hessian(loss))(0.7, x, where)

    def averaged(scale, x, where):
      return jax.lax.pmean(jax.grad(mapped)(scale, x, where), "rows")

    def forward(scale, x, where):
      return jax.jvp(lambda s: mapped(s, x, where), (scale,), (1.0,))[1]

    for inside in (averaged, forward):
      got = jax.jit(over_rows(inside))(0.7, x, where)
      assert_close(got, jnp.full(6, expected), DTYPE)
      got = jax.jit(jax.jacfwd(over_rows(inside)))(0.7, x, where)
      assert_close(got, jnp.full(6, second), DTYPE, roundings=64)
    for take in (lambda out: out[3], jnp.mean):
      outside = lambda s, take=take: take(over_rows(mapped)(s, x, where))  # noqa: E731
      assert_close(jax.jit(jax.grad(outside))(0.7), expected, DTYPE)
      assert_close(jax.jit(jax.jacfwd(outside))(0.7), expected, DTYPE)

  def test_denominator(self):
    """Each gives its part of what to divide by."""
    expected = masked_sum(self.x, self.where) / (6 * 100)
    for part in (100, np.int8(100), jnp.bfloat16(100), jnp.array([100])[0]):
      got = jax.vmap(
        functools.partial(masked_mean, denominator=part, axis_name="rows"),
        axis_name="rows",
      )(self.x, self.where)
      assert_close(got, jnp.full(6, expected), DTYPE)


@pytest.mark.slow
class MicrobatchesTest(parameterized.TestCase):
  """The ways of the example, for a small model."""

  @parameterized.parameters(1, 3, 8)
  def test_gradients(self, k):
    params, batch = padded_model.data(24, DTYPE)

    def summed(params, batch):
      terms = padded_model.losses(params, batch)
      return masked_sum(*terms), masked_count(*terms)

    loss = padded_model.mean_loss
    expected = jax.jit(jax.grad(loss))(params, batch)
    self.assertGreater(jnp.linalg.norm(expected), 0.1)
    count = masked_count(*padded_model.losses(params, batch))

    @jax.jit
    def all_ways(params, batch, count):
      given = (loss, params, batch)
      return (
        microbatches.with_scan(*given, count, k),
        microbatches.with_microbatching(*given, count, k),
        microbatches.with_multi_steps(*given, count, k),
        microbatches.with_sums(summed, params, batch, k),
        microbatches.with_mean_of_means(*given, k),
      )

    *right, wrong = all_ways(params, batch, count)
    for got in right:
      self.assertLess(microbatches.distance(got, expected), 1e-6)
    if k > 1:
      self.assertGreater(microbatches.distance(wrong, expected), 0.05)

  def test_nothing_included(self):
    """In no microbatch."""

    def loss(params, batch, count):
      return masked_mean(params + batch, False, denominator=count)

    batch = jnp.full((8, 2), jnp.nan)
    params = jnp.ones(())
    count = masked_count(batch, False)
    got = microbatches.with_scan(loss, params, batch, count, 4)
    assert_equal(got, 0)


class RunningMeanTest(parameterized.TestCase):
  @pytest.mark.slow
  def test_steps(self):
    """Of uneven steps, one of which is empty: the mean of all."""
    x, where, weights = (a.reshape(6, 4) for a in data())
    garbage = jnp.where(where, x, jnp.nan)
    expected = reference(x, where, weights, None)[2]
    parts = [
      RunningMean.empty().update(*row[:2], weights=row[2])
      for row in zip(garbage, where, weights, strict=True)
    ]

    def step(state, row):
      return state.update(row[0], row[1], weights=row[2]), state.mean()

    scanned, means = jax.lax.scan(
      step, RunningMean.empty(), (garbage, where, weights)
    )
    assert_equal(means[0], 0)  # Before the first.
    empty = RunningMean.empty()
    left = functools.reduce(RunningMean.merge, parts, empty)
    right = functools.reduce(lambda a, b: b.merge(a), parts[::-1], empty)
    for state in (scanned, left, right):
      assert_close(state.mean(), expected, "float32")
    mapped = jax.vmap(
      lambda *row: jax.lax.psum(empty.update(*row[:2], weights=row[2]), "rows"),
      axis_name="rows",
    )(garbage, where, weights)
    assert_close(mapped.mean(), np.full(6, expected), "float32")
    mapped = jax.vmap(
      lambda *row: empty.update(
        *row[:2], weights=row[2], axis_name="rows"
      ).mean(),
      axis_name="rows",
    )(garbage, where, weights)
    assert_close(mapped, np.full(6, expected), "float32")

  def test_of_columns(self):
    x, where, _ = data()
    ones = np.ones(SHAPE)
    expected = reference(x, where, ones, (0, 1))[2]
    state = RunningMean.empty((4,))
    for row, mask in zip(x, where, strict=True):
      state = state.update(row, mask, axis=0)
    assert_close(state.mean(), expected, "float32")
    with self.assertRaisesRegex(ValueError, r"RunningMean.empty\(\(3,\)\)"):
      state.update(x[0], axis=1)

  def test_large_sums(self):
    """Beyond 2^24 float32 has no odd numbers; the rest has them."""

    @jax.jit
    def thousand_steps(state):
      return jax.lax.fori_loop(
        0, 1000, lambda _, state: state.update(jnp.full(3, 0.25)), state
      )

    large = jnp.float32(2.0**31)
    many = thousand_steps(RunningMean.empty()._replace(denominator=large))
    much = thousand_steps(RunningMean.empty()._replace(numerator=large))
    few = thousand_steps(RunningMean.empty())
    for state, denominator, numerator in (
      (many, 2**31 + 3000, 750),
      (much, 3000, 2**31 + 750),
      (few.merge(many), 2**31 + 6000, 1500),
      (much.merge(few), 6000, 2**31 + 1500),
      (many.merge(many), 2**32 + 6000, 1500),
      (much.merge(much), 6000, 2**32 + 1500),
    ):
      for total, rest, expected in (
        (state.numerator, state.numerator_rest, numerator),
        (state.denominator, state.denominator_rest, denominator),
      ):
        self.assertEqual(float(total) + float(rest), expected)
      expected = np.float32(numerator) / np.float32(denominator)
      assert_allclose(state.mean(), expected, rtol=1e-7)

  @pytest.mark.slow
  def test_many_steps(self):
    """The rest does not end at 2^24, either."""
    many = jax.jit(
      lambda state, x: jax.lax.fori_loop(
        0, 2**26, lambda _, state: state.update(x), state
      )
    )
    state = many(many(RunningMean.empty(), 1.0), 0.0)
    self.assertEqual(float(state.denominator), 2**27)
    assert_equal(state.mean(), 0.5)

  def test_rests(self):
    """They are a part of what is divided."""
    one = jnp.float32(1)
    assert_equal(RunningMean(one, one, one, one * 0).mean(), 2)
    assert_equal(RunningMean(one, one, one * 0, one).mean(), 0.5)

  def test_merge_of_shapes(self):
    with self.assertRaisesRegex(ValueError, r"shape \(\) .* shape \(3,\)"):
      RunningMean.empty().merge(RunningMean.empty((3,)))

  def test_denominator(self):
    state = RunningMean.empty()
    for _ in range(2):
      state = state.update(jnp.array([1.0, 2.0]), denominator=1)
    assert_equal(state.mean(), 3)

  def test_checkpoint(self):
    """A tree of arrays, made anew from what was written down."""
    state = RunningMean.empty().update(jnp.arange(3), [True, False, True])
    leaves, structure = jax.tree.flatten(state)
    self.assertLen(leaves, 4)
    for copy in (
      jax.tree.unflatten(structure, [np.asarray(x) for x in leaves]),
      pickle.loads(pickle.dumps(state)),
    ):
      self.assertIsInstance(copy, RunningMean)
      assert_equal(copy.update(jnp.array([4.0])).mean(), 2)

  def test_what_comes_out(self):
    """NaN that was included stays, and infinity is not made NaN of."""
    state = RunningMean.empty().update(jnp.array([jnp.inf, 1.0]))
    self.assertEqual(state.update(jnp.array([1.0])).mean(), np.inf)
    state = state.update(jnp.array([jnp.nan]))
    self.assertTrue(jnp.isnan(state.mean()))

  def test_dtypes(self):
    state = RunningMean.empty()
    for x in (jnp.array([True, False]), jnp.ones(2, "bfloat16")):
      state = state.update(x)
      self.assertEqual({leaf.dtype for leaf in state}, {jnp.dtype("float32")})
    assert_equal(state.mean(), 0.75)
    with self.assertRaisesRegex(TypeError, "float32 or float64, not bfloat16"):
      RunningMean.empty(dtype="bfloat16")
    with self.assertRaisesRegex(TypeError, "must be real, .* complex"):
      state.update(jnp.array([1j]))
    if jax.config.jax_enable_x64:  # Too large for the state, but not their sum.
      x = jnp.array([1e39, 2.0, -1e39, 2.0])
      assert_equal(RunningMean.empty().update(x[::2]).mean(), 0)
      assert_equal(RunningMean.empty(dtype="float64").update(x[1::2]).mean(), 2)


class OptaxTest(absltest.TestCase):
  def test_names(self):
    self.assertFalse(hasattr(upstream, "reductions"))
    self.assertIs(optax.reductions.masked_mean, masked_mean)


if __name__ == "__main__":
  absltest.main()
