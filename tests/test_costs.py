"""What a mask costs, by the counters of the compiler.

They are the same in every run, but not on every machine or in every version:
the limits are those of CPUs. `python -m benchmarks` prints them, with times.
"""

import functools
import inspect
import pathlib
import re
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import (
  AS_USERS_DO,
  DTYPES,
  assert_all_close,
  assert_allclose,
  assert_close,
  each_case,
  row_masks,
)

import optax_masking as optax
from benchmarks.cases import make_case
from benchmarks.counters import counters_of, residual_bytes, scanned_temporaries

INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"
BINARY = "sigmoid_binary_cross_entropy"
CLASSES_LAST = ((4096, 512), -1)
CLASSES_SECOND = ((8, 19, 128, 128), 1)


def arguments_of(name, dtype, shape, axis, mask):
  """Shapes and dtypes, which are all that a program depends on."""
  logits = jax.ShapeDtypeStruct(shape, dtype)
  rows = np.delete(shape, axis).tolist()
  labels = logits
  if name == INTEGER:
    labels = jax.ShapeDtypeStruct(rows, "int32")
  mask_shape = rows
  if mask == "full":
    mask_shape = shape
  elif name == BINARY:
    mask_shape = np.expand_dims(np.empty(rows), axis).shape
  return logits, labels, jax.ShapeDtypeStruct(mask_shape, "bool")


def losses_of(name, axis):
  keywords = {} if name == BINARY else {"axis": axis}
  loss = functools.partial(getattr(optax, name), **keywords)
  original = functools.partial(getattr(upstream, name), **keywords)
  return (
    lambda logits, labels, where: loss(logits, labels, where=where),
    lambda logits, labels, where: original(logits, labels),
  )


def counters(function, *arguments):
  program = jax.jit(function, compiler_options=AS_USERS_DO)
  return counters_of(program.lower(*arguments).compile())


def value_and_grad(loss):
  return jax.value_and_grad(
    lambda *arguments: jnp.sum(loss(*arguments), dtype="float32")
  )


on_this_compiler = unittest.skipIf(
  jax.default_backend() != "cpu"
  or jax.__version_info__[:2] != (0, 10)
  or jax.config.jax_enable_x64,
  "A compiler of another platform, version or precision counts otherwise.",
)


@pytest.mark.slow
@on_this_compiler
class CountersTest(parameterized.TestCase):
  @parameterized.parameters(
    # The limit of bytes is relative to Optax without a mask, that of
    # temporaries to the bytes of the logits.
    (INTEGER, "float32", "row", CLASSES_LAST, 1.00, 0.02),
    (INTEGER, "bfloat16", "row", CLASSES_LAST, 0.70, 2.02),
    (INTEGER, "float32", "full", CLASSES_LAST, 1.42, 0.02),
    (INTEGER, "bfloat16", "full", CLASSES_LAST, 1.16, 2.02),
    (INTEGER, "float32", "row", CLASSES_SECOND, 0.84, 0.30),
    (INTEGER, "float32", "full", CLASSES_SECOND, 1.19, 0.40),
    (SOFT, "float32", "row", CLASSES_LAST, 1.00, 0.02),
    (SOFT, "bfloat16", "row", CLASSES_LAST, 0.80, 4.05),
    (BINARY, "float32", "row", CLASSES_LAST, 0.80, 3.00),
    (BINARY, "float32", "full", CLASSES_LAST, 0.80, 3.00),
  )
  def test_value_and_grad(self, name, dtype, mask, where, bytes_, temporaries):
    arguments = arguments_of(name, dtype, *where, mask)
    n = arguments[0].size * arguments[0].dtype.itemsize
    loss, original = losses_of(name, where[1])
    got = counters(value_and_grad(loss), *arguments)
    floor = counters(value_and_grad(original), *arguments)
    self.assertLessEqual(got["bytes"], bytes_ * floor["bytes"])
    self.assertLessEqual(got["temporaries"], temporaries * n)
    self.assertEqual(got["scatter"], 0)
    self.assertEqual(got["transpose"], 0)

  @parameterized.parameters(
    (INTEGER, "row", 1.01, 0.1),
    (INTEGER, "full", 1.26, 0.55),
    (SOFT, "row", 2.02, 0.2),
    (BINARY, "full", 3.26, 0.1),
  )
  def test_memory(self, name, mask, kept_limit, scan_limit):
    """What waits for the backward pass, and what a loop allocates for it."""
    arguments = arguments_of(name, "float32", *CLASSES_LAST, mask)
    n = arguments[0].size * arguments[0].dtype.itemsize
    loss, _ = losses_of(name, -1)
    self.assertLessEqual(residual_bytes(loss, *arguments), kept_limit * n)
    scan = scanned_temporaries(loss, arguments)
    self.assertLessEqual(scan, scan_limit * n)

  def test_forward(self):
    """A mask of examples adds nothing, with probabilities little, to a loss."""
    for name in (INTEGER, SOFT):
      arguments = arguments_of(name, "float32", *CLASSES_LAST, "row")
      loss, original = losses_of(name, -1)
      got = counters(loss, *arguments)
      floor = counters(original, *arguments)
      limit = {INTEGER: 1.01, SOFT: 2.05}[name]
      self.assertLessEqual(got["bytes"], limit * floor["bytes"])


def documented():
  """The columns of `docs/costs.md` for CPUs: row mask / full mask."""
  path = pathlib.Path(__file__).parents[1] / "docs/costs.md"
  ratio = r"([\d.]+) / ([\d.]+)"
  for line in path.read_text().splitlines():
    if row := re.match(rf"\| `(\w+)` \| {ratio} \| (?:{ratio}|—)", line):
      name, *ratios = row.groups()
      yield name, "float32", ratios[:2]
      if ratios[2]:
        yield pytest.param(
          name, "bfloat16", ratios[2:], marks=pytest.mark.nightly
        )


@pytest.mark.slow
@on_this_compiler
@pytest.mark.parametrize(("name", "dtype", "expected"), [*documented()])
def test_documented_ratios(name, dtype, expected):
  case = make_case(name, dtype, *CLASSES_LAST)
  loss, original = case.of(optax), case.of(upstream)

  def masked(*arguments):
    return loss(*arguments[:-1], where=arguments[-1])

  floor = counters(value_and_grad(original), *case.arguments)["bytes"]
  for kind, ratio in zip(("row", "full"), expected, strict=True):
    arguments = *case.arguments, case.mask(kind, 0.5)
    got = counters(value_and_grad(masked), *arguments)["bytes"] / floor
    assert_allclose(got, float(ratio), rtol=0.02, atol=0.005)


@pytest.mark.slow
class PlatformsTest(parameterized.TestCase):
  @parameterized.parameters("row", "full")
  def test_accelerators(self, mask):
    """On a GPU nothing is gathered or scattered."""
    arguments = arguments_of(INTEGER, "bfloat16", *CLASSES_LAST, mask)
    loss, _ = losses_of(INTEGER, -1)
    run = jax.jit(value_and_grad(loss))
    for platform, gathers in (("cuda", False), ("cpu", True)):
      exported = jax.export.export(run, platforms=[platform])(*arguments)
      text = exported.mlir_module()
      self.assertEqual("stablehlo.gather" in text, gathers)
      self.assertNotIn("stablehlo.scatter", text)

  @parameterized.product(
    name=(INTEGER, SOFT), mask=("row", "full"), kind=("Auto", "Explicit")
  )
  def test_sharded_classes(self, name, mask, kind):
    """No device gathers the classes of others."""
    if not hasattr(jax, "set_mesh"):
      self.skipTest("This JAX has no explicit meshes.")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 32)).astype("float32")
    labels = rng.integers(0, 32, 6)
    if name == SOFT:
      labels = np.eye(32, dtype="float32")[labels]
    where = rng.random((6, 32) if mask == "full" else 6) < 0.8
    run = value_and_grad(losses_of(name, -1)[0])
    expected = run(logits, labels, where)
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((2,), ("classes",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
      arguments = [
        jax.device_put(
          x, jax.P(None, "classes") if x.ndim == 2 else jax.P(None)
        )
        for x in (logits, labels, where)
      ]
      program = jax.jit(run).lower(*arguments).compile()
      got = program(*arguments)
    collectives = re.findall(
      r"= (\S+) (all-|collective-|reduce-scatter)(\S*)\(", program.as_text()
    )
    self.assertNotEmpty(collectives)
    for shape, *operation in collectives:
      self.assertStartsWith("".join(operation), "all-reduce")
      self.assertNotIn("32", shape.replace("f32", ""))
      self.assertNotIn("16", shape)
    for a, b in zip(got, expected, strict=True):
      assert_close(a, b, "float32")


@pytest.mark.slow
class PrecisionTest(parameterized.TestCase):
  @parameterized.product(name=(INTEGER, SOFT, BINARY), mask=("row", "full"))
  def test_half_precision(self, name, mask):
    """Nearer to float64 than Optax with its own mask, or with filled data."""
    if jax.config.jax_enable_x64:
      self.skipTest("It is about 16 bits.")
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(64, 100)), "bfloat16")
    labels = jnp.asarray(rng.integers(0, 100, 64))
    if name != INTEGER:
      labels = jax.nn.softmax(jnp.asarray(rng.normal(size=(64, 100))))
      labels = labels.astype("bfloat16")
    where = rng.random((64, 1) if mask == "row" else (64, 100)) < 0.8
    if name == INTEGER:  # Of those that have a label left.
      where = where | (np.arange(100) == labels[:, None])
    x = np.asarray(logits, "float64")
    y = np.asarray(labels, "float64")
    if name == BINARY:
      each = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
      exact = np.where(where, each, 0)
      slope = np.where(where, 1 / (1 + np.exp(-x)) - y, 0)
      original = lambda x: jnp.where(  # noqa: E731
        where, upstream.sigmoid_binary_cross_entropy(x, labels), 0
      )
    else:
      if name == INTEGER:
        y = np.eye(100)[labels]
      e = np.where(where, np.exp(x), 0)
      p = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
      y = np.where(where, y, 0)
      log_p = np.log(np.where(p > 0, p, 1))
      exact = -(y * log_p).sum(-1)
      slope = p * y.sum(-1, keepdims=True) - y
      original = lambda x: getattr(upstream, name)(  # noqa: E731
        x, labels, where=jnp.broadcast_to(where, x.shape)
      )
    masked = functools.partial(getattr(optax, name), labels=labels, where=where)
    errors = []
    for loss in (masked, original):
      value, gradient = jax.jit(
        lambda x, loss=loss: (loss(x), jax.grad(lambda x: loss(x).sum())(x))
      )(logits)
      value, gradient = (np.asarray(a, "float64") for a in (value, gradient))
      errors.append(
        [np.mean(np.abs(value - exact)), np.mean(np.abs(gradient - slope))]
      )
    (value, gradient), (value_of_optax, gradient_of_optax) = errors
    self.assertLessEqual(value, 1.01 * value_of_optax)
    self.assertLessEqual(gradient, 1.01 * gradient_of_optax)


COMPILED = []  # An event for each program that has been compiled.
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *_, **__: (
    COMPILED.append(event)
    if event.endswith("backend_compile_duration")
    else None
  )
)


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_recompilation(case, dtype):
  """Outside of `jit` too, only the first call of a shape compiles."""
  arguments = case.arguments(dtype)
  backwards = [jnp.flip(x) for x in arguments]
  first, *others = row_masks(case.shape).values()

  def run(arguments, where):
    def total(x):
      return jnp.sum(case.loss(x, *arguments[1:], where=where))

    # JAX compiles the backward pass of a scan each time, also of Optax's.
    if case.compacts:
      jax.grad(total)(arguments[0])
    return total(arguments[0])

  run(arguments, first)
  COMPILED.clear()
  for where in others:
    run(arguments, where)
    run(backwards, where)
  assert not COMPILED
  jax.jit(lambda x: x)(arguments[0])  # The list is not always empty.
  assert COMPILED


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_integers(case, dtype):
  """An integer where the default is a float is no constant of the program."""
  arguments = case.arguments(dtype)
  where = np.ones(case.shape, bool)
  for parameter in inspect.signature(
    getattr(optax.losses, case.name)
  ).parameters.values():
    if isinstance(parameter.default, float):
      case.loss(*arguments, where=where, **{parameter.name: 1})
      COMPILED.clear()
      case.loss(*arguments, where=where, **{parameter.name: 2})
      assert not COMPILED, parameter


@pytest.mark.slow
class EagerTest(parameterized.TestCase):
  @parameterized.parameters(
    ("smooth_labels", "alpha"),
    ("sigmoid_focal_loss", "alpha"),
    ("sigmoid_focal_loss", "gamma"),
    ("log_cosh", "targets"),
    ("poly_loss_cross_entropy", "epsilon"),
    ("triplet_margin_loss", "margin"),
    ("cosine_similarity", "epsilon"),
    ("cosine_distance", "epsilon"),
  )
  def test_python_numbers(self, name, parameter):
    """A number in the place of an array is no constant of the program."""
    x = jnp.arange(20.0).reshape(4, 5) / 10 + 0.1
    loss, original = (getattr(m.losses, name) for m in (optax, upstream))
    data = (x, jnp.flip(x), x[::-1])
    data = data[: {"smooth_labels": 1, "triplet_margin_loss": 3}.get(name, 2)]
    if parameter == "targets":
      data = data[:1]
    for first, *others in ((0.25, 0.5), (1, 2, 3), (True, 1), (1, True)):
      loss(*data, where=x > 0, **{parameter: first})
      for number in others:
        COMPILED.clear()
        got = loss(*data, where=x > 0, **{parameter: number})
        if type(number) is type(first):
          self.assertEmpty(COMPILED)
        expected = original(*data, **{parameter: number})
        self.assertEqual(got.dtype, expected.dtype)
        assert_all_close(got, expected, DTYPES[0])
    if parameter == "alpha":
      return  # It is at most 1.
    for number in (2**40, -(2**40)):  # It may be more than an input holds.
      try:
        expected = original(*data, **{parameter: number})
      except OverflowError:
        with self.assertRaises(OverflowError):
          loss(*data, where=x > 0, **{parameter: number})
      else:
        got = loss(*data, where=x > 0, **{parameter: number})
        assert_allclose(got, expected, rtol=1e-5)

  def test_functions(self):
    """A function is used at each call, though it can't be compiled once."""
    x = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    for scale in (1.0, 2.0):
      got = optax.losses.ranking_softmax_loss(
        x, x, where=True, reduce_fn=lambda a, where, s=scale: s * jnp.sum(a)
      )
      whole = optax.losses.ranking_softmax_loss(
        x, x, where=True, reduce_fn=jnp.sum
      )
      assert_close(got, scale * whole, DTYPES[0])


if __name__ == "__main__":
  absltest.main()
