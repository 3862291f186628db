"""The eight clauses of the mask contract, for every masked loss."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
from absl.testing import absltest, parameterized
from cases import (
  DTYPES,
  INDEX_POISONS,
  NAMED,
  SLICED,
  Case,
  all_masks,
  assert_close,
  assert_equal,
  float_poisons,
  masks,
  row_masks,
)
from jax.experimental import checkify

NAMED_BY_DTYPE = [
  (f"{name}_{dtype}", case, dtype)
  for dtype in DTYPES
  for name, case in NAMED
  # It is one output of `ctc_loss_with_forward_probs`.
  if name != "ctc_loss" or dtype == DTYPES[0]
]
# bfloat16 has the range of float32, and so the same extremes.
NAMED_BY_RANGE = [each for each in NAMED_BY_DTYPE if each[2] != "bfloat16"]
HALF_PRECISION = [each for each in NAMED_BY_DTYPE if each[2] != DTYPES[0]]


def call(case, floats, arguments, where):
  """Calls a loss with its floating arguments replaced."""
  arguments = list(arguments)
  for position, x in zip(case.floating(), floats, strict=True):
    arguments[position] = x
  return case.loss(*arguments, where=where)


def directions(case, arguments, seed=3):
  """A tangent for each floating argument, without zeros."""
  rng = np.random.default_rng(seed)
  return [
    jnp.asarray(rng.uniform(0.5, 1.5, size=arguments[p].shape)).astype(
      arguments[p].dtype
    )
    for p in case.floating()
  ]


@functools.cache
def program(case: Case):
  """Compiles a loss with all its first and second derivatives."""

  def run(arguments, where, tangents):
    floats = [arguments[p] for p in case.floating()]

    def total(floats):
      loss = call(case, floats, arguments, where)
      return jnp.sum(
        loss * jnp.linspace(0.5, 1.5, loss.size).reshape(loss.shape)
      )

    results = {
      "value": call(case, floats, arguments, where),
      "vjp": jax.grad(total)(floats),
      "jvp": jax.jvp(
        lambda floats: call(case, floats, arguments, where),
        (floats,),
        (tangents,),
      )[1],
      "Hessian, forward over reverse": jax.jacfwd(jax.grad(total))(floats),
    }
    if floats[0].dtype.itemsize > 2:  # To save time.
      results["Hessian, reverse over reverse"] = jax.jacrev(jax.grad(total))(
        floats
      )
    return results

  return jax.jit(run)


def derivatives(case, arguments, where, tangents=None):
  if tangents is None:
    tangents = directions(case, arguments)
  return jax.device_get(program(case)(arguments, where, tangents))


def assert_same_bits(got, expected, message):
  def check(path, a, b):
    np.testing.assert_array_equal(
      a.view(f"u{a.dtype.itemsize}"),
      b.view(f"u{b.dtype.itemsize}"),
      err_msg=f"{message}: {jax.tree_util.keystr(path)}",
      strict=True,
    )

  jax.tree_util.tree_map_with_path(check, got, expected)


def poisonings(case, arguments, where, dtype):
  """Every way of putting one poison into what a mask masks."""
  for position, x in enumerate(arguments):
    is_integer = position not in case.floating()
    for poison in INDEX_POISONS if is_integer else float_poisons(dtype):
      poisoned = list(arguments)
      poisoned[position] = jnp.where(case.masked(position, where), poison, x)
      yield f"{poison} in argument {position}", tuple(poisoned)


def in_float32(x):
  """Half precision in float32, in which some losses of ours are computed."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  return x.astype(jnp.promote_types(x.dtype, "float32"))


def compacted(case, arguments, where, axis):
  """The value and the gradients without the masked elements.

  They are Optax's, slice by slice, or those of a formula of the whole.
  """
  if case.rounds or case.whole is not None:
    arguments = [in_float32(x) for x in arguments]
  if case.whole is not None:

    def total(*arguments):
      value = case.whole(*arguments, where)
      return jnp.sum(value), value

    gradients, value = jax.grad(total, case.floating(), has_aux=True)(
      *arguments
    )
    return np.asarray(value), gradients
  axes = [
    a % where.ndim for a in (axis if isinstance(axis, tuple) else (axis,))
  ]
  order = [a for a in range(where.ndim) if a not in axes] + axes
  batch = [where.shape[a] for a in order[: where.ndim - len(axes)]]

  def sliced(x):
    x = np.transpose(np.asarray(x), order) if x.shape == where.shape else x
    return np.reshape(x, (int(np.prod(batch)), -1))

  mask, data = sliced(where), [sliced(x) for x in arguments]
  values = np.zeros(len(mask), data[0].dtype)
  gradients = [np.zeros_like(data[p]) for p in case.floating()]
  for i, kept in enumerate(mask):
    row = [x[i] for x in data]
    for position, x in enumerate(row):
      if not case.is_index(position):
        row[position] = x[kept]
      else:
        (label,) = x
        kept = kept & kept[label]  # If not, nothing is left of the example.
        row[position] = np.sum(kept[:label])
    if not kept.any():
      continue
    value, gradient = _value_and_gradient(case)(*(x[None] for x in row))
    values[i] = np.asarray(value)
    for into, g in zip(gradients, gradient, strict=True):
      into[i, kept] = np.asarray(g[0])

  def unsliced(x):
    x = x.reshape([where.shape[a] for a in order])
    return np.transpose(x, np.argsort(order))

  return values.reshape(batch), [unsliced(g) for g in gradients]


@functools.cache
def _value_and_gradient(case):
  def total(*row):
    return jnp.sum(case.original(*row))

  return jax.jit(jax.value_and_grad(total, case.floating()))


class ContractTest(chex.TestCase):
  @parameterized.named_parameters(NAMED_BY_DTYPE)
  def test_invariance(self, case, dtype):
    """Clause 1: what a masked element holds changes no bit."""
    arguments = case.arguments(dtype)
    for kind, where in all_masks(case, dtype).items():
      clean = derivatives(case, arguments, where)
      chex.assert_tree_all_finite(clean)
      for what, poisoned in poisonings(
        case, arguments, np.broadcast_to(where, case.shape), dtype
      ):
        assert_same_bits(
          derivatives(case, poisoned, where), clean, f"{kind}, {what}"
        )

  @parameterized.named_parameters(NAMED_BY_DTYPE)
  def test_zero_gradient(self, case, dtype):
    """Clause 2: derivatives with respect to masked elements are exactly 0."""
    arguments = case.arguments(dtype)
    for kind, where in all_masks(case, dtype).items():
      masked = ~np.broadcast_to(where, case.shape)
      tangents = [jnp.where(masked, t, 0) for t in directions(case, arguments)]
      got = derivatives(case, arguments, where, tangents)
      assert_equal(got["jvp"], 0, kind)
      for gradient in got["vjp"]:
        assert_equal(gradient[masked], 0, kind)
      for name, hessian in got.items():
        for row in hessian if name.startswith("Hessian") else ():
          for block in row:
            assert_equal(block[masked], 0, f"{kind}: {name}")
            assert_equal(
              block[(slice(None),) * masked.ndim + (masked,)],
              0,
              f"{kind}: {name}",
            )

  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(NAMED)
  def test_compaction(self, case):
    """Clauses 3 and 4: the loss of the data without the masked elements."""
    self.check_compaction(case, DTYPES[0])

  @chex.variants(with_jit=True)
  @parameterized.named_parameters(HALF_PRECISION or NAMED_BY_DTYPE[:1])
  def test_compaction_in_half_precision(self, case, dtype):
    self.check_compaction(case, dtype)

  def check_compaction(self, case, dtype):
    arguments = case.arguments(dtype)
    loss = self.variant(
      lambda arguments, where: case.loss(*arguments, where=where)
    )
    gradients = self.variant(
      jax.grad(
        lambda floats, arguments, where: jnp.sum(
          call(case, floats, arguments, where)
        )
      )
    )
    floats = [arguments[p] for p in case.floating()]
    for kind, where in all_masks(case, dtype).items():
      value, gradient = compacted(
        case, arguments, np.broadcast_to(where, case.shape), case.axis
      )
      got = loss(arguments, where)
      self.assertEqual(got.dtype, case.original(*arguments).dtype)
      assert_close(got, value, dtype, kind)
      for g, expected in zip(
        gradients(floats, arguments, where), gradient, strict=True
      ):
        assert_close(g, expected, dtype, kind)

  @parameterized.product(
    case=[case for _, case in SLICED],
    shape_and_axis=(
      ((3,), 0),
      ((3, 2), 0),
      ((2, 3, 2), 1),
      ((2, 3, 2), (0, 2)),
      ((2, 3, 2), (2, 0)),
      ((2, 3, 2), (-1, -2, -3)),
      ((2, 1), -1),
    ),
  )
  def test_compaction_along_any_axis(self, case, shape_and_axis):
    shape, axis = shape_and_axis
    arguments = case.arguments(DTYPES[0], shape, axis)
    for kind, where in masks(shape).items():
      expected, _ = compacted(case, arguments, where, axis)
      got = case.loss(*arguments, axis=axis, where=where)
      assert_close(got, expected, DTYPES[0], kind)

  @parameterized.named_parameters(SLICED)
  def test_formula(self, case):
    """Clause 3, against the definition in float64."""
    arguments = case.arguments("float32")
    rows = [
      np.asarray(x, "float64" if p in case.floating() else "int")
      for p, x in enumerate(arguments)
    ]
    for kind, where in masks().items():
      got = case.loss(*arguments, axis=-1, where=where)
      for i, kept in enumerate(where):
        row = [x[i, kept] if x.ndim > 1 else x[i] for x in rows]
        if case.has_index:
          kept = kept & kept[row[-1]]
          row = [*(x[i, kept] for x in rows[:-1]), np.sum(kept[: row[-1]])]
        expected = np.sum(case.formula(*row)) if kept.any() else 0.0
        assert_close(got[i], expected, "float32", kind)

  @parameterized.named_parameters(NAMED)
  def test_empty(self, case):
    """Clause 4: a slice with nothing included is exactly 0."""
    arguments = case.arguments(DTYPES[0])
    assert_equal(case.loss(*arguments, where=False), 0)
    for where in (
      row_masks(case.shape)["all rows masked"],
      np.zeros(case.shape, bool),
    ):
      got = derivatives(case, arguments, where)
      jax.tree.map(lambda x: assert_equal(x, 0), got)

  @parameterized.named_parameters(NAMED)
  def test_identity(self, case):
    """Clause 5: without a mask, Optax's own program."""
    arguments = case.arguments(DTYPES[0])
    native = (
      "axis"
      in inspect.signature(getattr(upstream.losses, case.name)).parameters
      and not case.whole
    )
    for axis in (-1, 0, (0, 1)) if native else (None,):
      kwargs: dict[str, Any] = {"axis": axis} if native else {}
      if case.has_index and native:
        arguments = case.arguments(DTYPES[0], axis=axis)
      for explicit in ({}, {"where": None}):
        ours = jax.make_jaxpr(
          functools.partial(case.loss, **kwargs, **explicit)
        )(*arguments)
        theirs = jax.make_jaxpr(functools.partial(case.original, **kwargs))(
          *arguments
        )
        self.assertEqual(str(ours), str(theirs))

  @parameterized.named_parameters(NAMED_BY_DTYPE)
  def test_everything_included(self, case, dtype):
    """Clause 5: a mask that masks nothing gives Optax's numbers."""
    arguments = case.arguments(dtype)
    expected = case.original(*arguments)
    assert_close(
      case.loss(*arguments, where=masks(case.shape)["nothing masked"]),
      expected,
      dtype,
    )
    for where in (True, row_masks(case.shape)["no row masked"]):
      assert_close(case.loss(*arguments, where=where), expected, dtype)

  @parameterized.named_parameters(NAMED_BY_RANGE)
  def test_honesty(self, case, dtype):
    """Clause 6: NaN and inf in an included element come out as in Optax."""
    where = masks(case.shape)["one element"]
    for position in case.floating():
      for poison in (np.nan, np.inf, -np.inf):
        arguments = list(case.arguments(dtype))
        first = (0,) * arguments[position].ndim
        arguments[position] = arguments[position].at[first].set(poison)
        if case.whole is not None and not np.isnan(poison):
          # What is made of infinity is Optax's, and not that of a formula.
          where = np.ones(case.shape, bool)
          value = np.asarray(case.original(*arguments))
        else:
          value, gradients = compacted(case, arguments, where, case.axis)
        result = derivatives(case, arguments, where)
        if np.isnan(poison):
          self.assertTrue(np.any(np.isnan(value)))
          for got, expected in zip(result["vjp"], gradients, strict=True):
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        got = result["value"]
        np.testing.assert_array_equal(np.isnan(got), np.isnan(value))
        np.testing.assert_array_equal(np.isposinf(got), np.isposinf(value))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(value))
        finite = np.isfinite(value)
        assert_close(got[finite], value[finite], dtype)


class TangentsTest(parameterized.TestCase):
  @parameterized.named_parameters(NAMED)
  def test_of_masked_elements(self, case):
    """A NaN in the tangent of what is masked goes no further, either."""
    first, *others = case.arguments(DTYPES[0])

    @jax.jit
    def derivatives(where, tangent):
      def loss(x):
        return case.loss(x, *others, where=where)

      gradient = jax.grad(lambda x: jnp.sum(loss(x)))
      return [jax.jvp(f, (first,), (tangent,))[1] for f in (loss, gradient)]

    for where in (
      masks(case.shape)["random"],
      row_masks(case.shape)["some rows masked"],
    ):
      masked = case.masked(0, np.broadcast_to(where, case.shape))
      tangents = [jnp.where(masked, x, first * 0 + 1) for x in (0.0, jnp.nan)]
      expected, got = (derivatives(where, tangent) for tangent in tangents)
      for a, b in zip(got, expected, strict=True):
        assert_equal(a, b)


class CleanArithmeticTest(parameterized.TestCase):
  """Clause 7: no NaN or inf is computed because of a mask."""

  @parameterized.named_parameters(NAMED_BY_RANGE)
  def test_debug_nans_and_infs(self, case, dtype):
    """Operation by operation, with garbage in what is masked."""
    clean = case.arguments(dtype)
    # Scaled, as a loss in half precision is, and as a weighted one may be.
    gradient = jax.grad(
      lambda floats, arguments, where: jnp.sum(
        128 * call(case, floats, arguments, where)
      )
    )
    for where in all_masks(case, dtype).values():
      kept = np.broadcast_to(where, case.shape)
      arguments = [
        jnp.where(
          case.masked(position, kept),
          jnp.nan if position in case.floating() else -100,
          x,
        )
        for position, x in enumerate(clean)
      ]
      floats = [arguments[p] for p in case.floating()]
      with jax.debug_nans(True), jax.debug_infs(True):
        case.loss(*arguments, where=where)
        gradient(floats, arguments, where)
        if not kept.all():  # The tools are on, and look.
          with self.assertRaises(FloatingPointError):
            case.original(*arguments)

  @parameterized.named_parameters(NAMED)
  def test_checkify(self, case):
    """Inside of compiled code too, and in second derivatives."""
    arguments = case.arguments(DTYPES[0])
    run = jax.jit(
      checkify.checkify(program(case).__wrapped__, checkify.nan_checks)
    )
    for where in masks(case.shape).values():
      error, _ = run(arguments, where, directions(case, arguments))
      error.throw()


if __name__ == "__main__":
  absltest.main()
