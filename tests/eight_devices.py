"""Losses and reductions on up to eight devices.

Run by `test_processes.py` in a process of their own, since JAX has to start
with so many:

    DEVICES=8 python -m pytest tests/eight_devices.py
"""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import microbatches
import numpy as np
import padded_model
import pytest
from absl.testing import absltest, parameterized
from cases import BY_NAME, NAMED, assert_all_close, masks, row_masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_transforms import shard_map

import optax_masking
from optax_masking.reductions import RunningMean, masked_count, masked_mean

# One loss of each mechanism: number fills, functions as fills, the batch, and
# formulas. The long recursion of CTC is left to the night.
FEW = {
  "kl_divergence",
  "multiclass_hinge_loss",
  "ntxent",
  "softmax_cross_entropy_with_integer_labels",
}
OTHERS = [(name, case) for name, case in NAMED if name not in FEW]

EXAMPLES = 32
CLASSES = 24

# These have sums for each class or pixel, compare all with all, sort or scan:
# the devices exchange more than a number an example, in Optax too.
EXCHANGING = {
  "ctc_loss",
  "ctc_loss_with_forward_probs",
  "dice_loss",
  "multiclass_generalized_dice_loss",
  "multiclass_sparsemax_loss",
  "ntxent",
}


def data(case):
  """Arguments with sizes that eight devices can divide, and two masks."""
  shape = (EXAMPLES, *case.shape[1:-1], CLASSES)
  wheres = masks(shape)["random"], row_masks(shape)["some rows masked"]
  return case.arguments("float32", shape), [jnp.asarray(w) for w in wheres]


def losses_and_gradients(loss, case):
  """A function of arguments and masks: one program for all masks."""
  count = len(case.floating)

  def with_mask(arguments, where):
    def total(*floats):
      losses = loss(*floats, *arguments[count:], where)
      return jnp.sum(losses), losses

    return jax.grad(total, range(count), has_aux=True)(*arguments[:count])

  return lambda arguments, wheres: [with_mask(arguments, w) for w in wheres]


def masked(case):
  run = losses_and_gradients(lambda *x: case.loss(*x[:-1], where=x[-1]), case)
  return jax.jit(run)


def unmasked(case):
  """Optax's own."""
  run = losses_and_gradients(lambda *x: case.original(*x[:-1]), case)
  return jax.jit(lambda arguments, wheres: run(arguments, [None]))


@functools.cache
def on_one_device(case):
  return masked(case)(*data(case))


def largest_collective(text):
  """Elements of the largest array that the devices exchange."""
  collectives = re.findall(
    r"= (.+?) (?:all-|collective-|reduce-scatter|ragged-)\S*\(", text
  )
  shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(collectives))
  sizes = [math.prod(int(s) for s in x.split(",") if s) for x in shapes]
  return max(sizes, default=0)


class LossesTest(parameterized.TestCase):
  @parameterized.product(name=sorted(FEW), explicit=(False, True), axis=(0, -1))
  def test_sharded(self, name, explicit, axis):
    self.check_sharded(BY_NAME[name], explicit, axis)

  @parameterized.product(
    name_and_case=OTHERS, explicit=(False, True), axis=(0, -1)
  )
  @pytest.mark.nightly
  def test_others_sharded(self, name_and_case, explicit, axis):
    self.check_sharded(name_and_case[1], explicit, axis)

  def check_sharded(self, case, explicit, axis):
    """The same numbers, and no more is exchanged than a number an example."""
    if axis == -1 and case.elementwise:
      self.skipTest("It has no axis of classes.")
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    if explicit:
      mesh = jax.make_mesh(
        (8,), ("devices",), (jax.sharding.AxisType.Explicit,)
      )

    def put(x):
      spec = [None] * x.ndim
      if axis == 0 or (x.ndim > 1 and x.shape[-1] == CLASSES):
        spec[axis] = "devices"
      return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    given = jax.tree.map(put, data(case))
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
      try:
        program = masked(case).lower(*given).compile()
      except Exception as e:
        # On an explicit mesh the sharding of what it computes is ambiguous.
        self.assertTrue(explicit)
        self.assertIn(type(e).__name__, ("TypeError", "ShardingTypeError"))
        with self.assertRaises(type(e)) as of_optax:
          unmasked(case).lower(*given)
        self.assertEqual(str(of_optax.exception)[:40], str(e)[:40])
        self.skipTest(f"nor does Optax's loss: {e}")
      got = program(*given)
      exchanged = largest_collective(program.as_text())
      if axis == -1:  # It sums over classes, or counts them.
        self.assertGreater(exchanged, 0)
      limit = EXAMPLES
      if case.name in EXCHANGING:
        program = unmasked(case).lower(*given).compile()
        limit = max(limit, largest_collective(program.as_text()))
      self.assertLessEqual(exchanged, limit)
    self.check(got, on_one_device(case))

  @parameterized.parameters(sorted(FEW))
  def test_shard_map(self, name):
    self.check_shard_map(BY_NAME[name])

  @parameterized.named_parameters(OTHERS)
  @pytest.mark.nightly
  def test_others_shard_map(self, case):
    self.check_shard_map(case)

  def check_shard_map(self, case):
    """Each device has the losses of its examples, and asks no other."""
    parts = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), data(case))
    expected = jax.vmap(masked(case))(*parts)

    def lower(run, **options):
      def on_device(*parts):
        got = run(*jax.tree.map(lambda x: x[0], parts))
        return jax.tree.map(lambda x: x[None], got)

      mesh = Mesh(np.array(jax.devices()), ("devices",))
      specs = {"in_specs": P("devices"), "out_specs": P("devices")}
      mapped = shard_map(on_device, mesh=mesh, **specs, **options)
      return jax.jit(mapped).lower(*parts)

    try:
      program = lower(masked(case)).compile()
    except TypeError:
      # Optax begins a scan with what is the same on all devices.
      with self.assertRaisesRegex(TypeError, "scan body function carry"):
        lower(unmasked(case))
      program = lower(masked(case), check_vma=False).compile()
    self.assertEqual(largest_collective(program.as_text()), 0)
    self.check(program(*parts), expected)

  @parameterized.parameters(
    ("%a = f32[] all-reduce(%b)", 1),
    ("%a = f32[4,24]{1,0} all-gather(%b), channel_id=1", 96),
    ("%a = (f32[], f32[5]{0}) all-reduce-start(%b, %c)", 5),
    ("%a = f32[4,2]{1,0} reduce-scatter(%b)", 8),
    ("%a = (s32[7]{0}) all-to-all(%b)\n%c = f32[9] add(%d, %e)", 7),
    ("%a = f32[3]{0} collective-permute(%b)", 3),
    ("%c = f32[9] add(%d, %e)", 0),
  )
  def test_largest_collective(self, line, expected):
    self.assertEqual(largest_collective(line), expected)

  def check(self, got, expected):
    assert_all_close(got, expected, "float32", roundings=64)


class LinearTest(parameterized.TestCase):
  """The cross-entropy of a linear layer, of sharded rows and classes."""

  ROWS, FEATURES, CLASSES = 64, 6, 48
  SHARDED = (
    {"rows": "data", "classes": None},
    {"rows": ("data", "model"), "classes": None},
    {"rows": None, "classes": "model"},
    {"rows": "data", "classes": "model"},
  )

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    rows, features, classes = self.ROWS, self.FEATURES, self.CLASSES
    labels = rng.integers(0, classes, rows)
    where = rng.random((rows, classes)) < 0.7
    where[np.arange(rows), labels] = np.arange(rows) % 9 > 0
    where[:20] = False  # Nothing on some devices.
    of_rows = rng.random(rows) < 0.5
    of_rows[:20] = False
    shapes = (rows, features), (features, classes), (classes,)
    self.floats = [jnp.asarray(rng.normal(size=s), "float32") for s in shapes]
    self.labels = jnp.asarray(labels)
    self.where = {"rows": jnp.asarray(of_rows), "classes": jnp.asarray(where)}
    self.floats[0] = self.floats[0].at[:20].set(jnp.nan)

  def run_on(self, of):
    """Losses and gradients of a sum in which each loss counts otherwise."""

    def total(x, kernel, bias, labels, where):
      losses = of(x, kernel, bias, labels, where)
      return jnp.sum(losses * jnp.arange(self.ROWS)), losses

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))

  def whole(self, x, kernel, bias, labels, where, **options):
    return optax_masking.linear_softmax_cross_entropy_with_integer_labels(
      *(x, kernel, labels),
      bias=bias,
      where=where,
      block_shape=(4, 5),
      z_loss=0.1,
      label_smoothing=0.2,
      logit_soft_cap=4.0,
      **options,
    )

  def specs(self, rows, classes, kind):
    where = P(rows, classes) if kind == "classes" else P(rows)
    return P(rows, None), P(None, classes), P(classes), P(rows), where

  def mesh(self, axis_type):
    kind = getattr(jax.sharding.AxisType, axis_type)
    return jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2)

  def check(self, program, given, rows, classes):
    """The numbers of one device, and what the devices exchange."""
    got = jax.tree.map(np.asarray, program(*given))
    local = [np.asarray(x) for x in given]
    expected = self.run_on(self.whole)(*local)
    assert_all_close(got, jax.tree.map(np.asarray, expected), "float32")
    text = program.as_text()
    names = re.findall(r" ((?:all|collective|reduce|ragged)-[a-z-]+)\(", text)
    names = {n for n in names if n not in ("all-reduce", "reduce-window")}
    self.assertEqual(names, set())
    sizes = re.findall(r"= (.+?) all-reduce\(", text)
    shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(sizes))
    count = self.ROWS // {None: 1, "data": 4}.get(rows, 8)
    width = self.CLASSES // (1 if classes is None else 2)
    gradients = set()
    if rows is not None:
      gradients |= {f"{self.FEATURES},{width}", f"{width}"}
    if classes is not None:  # And numbers of rows, of a panel or of all.
      gradients |= {f"{count},{self.FEATURES}", "8", f"{count}", "1"}
    shapes = {shape.removesuffix(",1") for shape in shapes}
    self.assertLessEqual(shapes - {""}, gradients)
    self.assertNotEmpty(shapes)

  @parameterized.product(
    SHARDED, kind=("rows", "classes"), axis_type=("Auto", "Explicit")
  )
  def test_sharded(self, rows, classes, kind, axis_type):
    mesh = self.mesh(axis_type)
    specs = self.specs(rows, classes, kind)
    given = [
      jax.device_put(x, NamedSharding(mesh, spec))
      for x, spec in zip(
        (*self.floats, self.labels, self.where[kind]), specs, strict=True
      )
    ]
    is_explicit = axis_type == "Explicit"
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
      program = self.run_on(self.whole).lower(*given).compile()
      self.check(program, given, rows, classes)

  @parameterized.product(SHARDED, kind=("rows", "classes"))
  def test_shard_map(self, rows, classes, kind):
    specs = self.specs(rows, classes, kind)
    options = {} if classes is None else {"class_axis_name": classes}
    mapped = shard_map(
      functools.partial(self.whole, **options),
      mesh=self.mesh("Auto"),
      in_specs=specs,
      out_specs=P(rows),
    )
    given = *self.floats, self.labels, self.where[kind]
    program = self.run_on(mapped).lower(*given).compile()
    self.check(program, given, rows, classes)

  def test_forward_mode_and_second_derivatives(self):
    """In `shard_map`, with rows and classes sharded."""
    specs = self.specs("data", "model", "rows")
    mapped = shard_map(
      functools.partial(self.whole, class_axis_name="model"),
      mesh=self.mesh("Auto"),
      in_specs=specs,
      out_specs=P("data"),
    )

    def derivatives(of):
      def total(*floats):
        return jnp.sum(of(*floats, self.labels, self.where["rows"]) ** 2)

      moved = jax.tree.map(jnp.ones_like, self.floats)
      forward = jax.jvp(total, self.floats, moved)[1]
      gradient = jax.grad(total, (0, 1, 2))
      return forward, jax.jvp(gradient, self.floats, moved)[1]

    got, expected = (
      jax.jit(derivatives, static_argnums=0)(of) for of in (mapped, self.whole)
    )
    assert_all_close(
      jax.tree.map(np.asarray, got), expected, "float32", roundings=64
    )


def pmean(function):
  """Averages a gradient over the devices."""
  return lambda *x: jax.lax.pmean(function(*x), "devices")


class MeansTest(parameterized.TestCase):
  """Rows of which most devices have few and some have none."""

  def setUp(self):
    super().setUp()
    self.params, self.batch = padded_model.data(192, "float32")
    self.loss = functools.partial(padded_model.mean_loss, axis_name="devices")
    whole = padded_model.mean_loss
    self.value, self.gradient = jax.value_and_grad(whole)(
      self.params, self.batch
    )
    self.slope = jnp.vdot(self.gradient, self.params)

  def check(self, got, expected):
    self.assertLess(microbatches.distance(got, expected), 1e-6)

  def mesh(self, count):
    mesh = Mesh(np.array(jax.devices()[:count]), ("devices",))
    mask = padded_model.losses(self.params, self.batch)[1]
    counts = mask.reshape(count, -1).sum(1)
    if count > 2:
      self.assertEqual(counts[0], 0)
    if count > 1:
      self.assertGreater(counts[-1], 2 * counts[0])
    return mesh

  @parameterized.parameters(1, 2, 4, 8)
  def test_sharded(self, count):
    """Nothing is to be done for sharded arrays."""
    batch = jax.device_put(
      self.batch, NamedSharding(self.mesh(count), P("devices"))
    )
    value, gradient = jax.jit(jax.value_and_grad(padded_model.mean_loss))(
      self.params, batch
    )
    self.check(value, self.value)
    self.check(gradient, self.gradient)

  @parameterized.product(spec=(("devices", None), (None, "devices")))
  def test_explicit_mesh(self, spec):
    """Along rows and columns, with a mask and weights that are sharded so."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(16, 24)), rng.random((2, 16, 24))
    x, where, weights = arrays[0], arrays[1][0] < 0.3, arrays[1][1]
    where[:2] = False
    kind = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("devices",), kind)

    def run(x, where, weights):
      return [
        jax.value_and_grad(
          lambda x, axis=axis: jnp.sum(
            masked_mean(x, where, axis, weights=weights)
          )
        )(x)
        for axis in (None, 0, 1)
      ]

    expected = jax.jit(run)(x, where, weights)
    with jax.set_mesh(mesh):
      given = [jax.device_put(a, P(*spec)) for a in (x, where, weights)]
      program = jax.jit(run).lower(*given).compile()
      got = jax.tree.map(np.asarray, program(*given))
    jax.tree.map(self.check, got, expected)
    self.assertLessEqual(largest_collective(program.as_text()), 24)

  @parameterized.parameters((8, True), (2, False))
  def test_shard_map(self, count, check_vma):
    self.check_shard_map(count, check_vma)

  @parameterized.product(count=(1, 2, 4, 8), check_vma=(True, False))
  @pytest.mark.nightly
  def test_shard_map_of_counts(self, count, check_vma):
    self.check_shard_map(count, check_vma)

  def check_shard_map(self, count, check_vma):
    mesh = self.mesh(count)

    def mapped(function):
      return jax.jit(
        shard_map(
          function,
          mesh=mesh,
          in_specs=(P(), P("devices")),
          out_specs=P(),
          check_vma=check_vma,
        )
      )

    given = self.params, self.batch
    self.check(mapped(self.loss)(*given), self.value)
    inside = jax.grad(self.loss)
    self.check(mapped(pmean(inside))(*given), self.gradient)
    if check_vma:
      self.check(mapped(inside)(*given), self.gradient)
    outside = jax.grad(mapped(self.loss))
    self.check(outside(*given), self.gradient)

    def forward(params, batch):
      loss = functools.partial(self.loss, batch=batch)
      return jax.jvp(loss, (params,), (params,))[1]

    self.check(mapped(forward)(*given), self.slope)

  def test_mixed_axes(self):
    """A mesh of two axes: the mask, or all, is the same along one of them."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), "float32")
    rows = (np.arange(8) % 3 > 0)[:, None]
    expected = masked_mean(x, rows)

    def mean(x, rows):
      return masked_mean(x, rows, axis_name=("rows", "columns"))

    for specs in (
      (P("rows", "columns"), P("rows")),
      (P("rows"), P("rows")),
      (P(None, "columns"), P()),
      (P(), P()),
    ):
      run = shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P())
      self.check(jax.jit(run)(x, rows), expected)

  def test_own_parameters(self):
    """Those that a device has for itself have the gradient of its part."""
    own = jnp.stack([self.params] * 8)

    def gradient(params, batch):
      return jax.grad(self.loss)(params[0], batch)[None]

    mapped = shard_map(
      gradient,
      mesh=self.mesh(8),
      in_specs=P("devices"),
      out_specs=P("devices"),
    )
    self.check(jax.jit(mapped)(own, self.batch).sum(0), self.gradient)

  def test_running_mean(self):
    """Added up over steps on each device, and over devices at the end."""
    terms = padded_model.losses(self.params, self.batch)

    def over_steps(losses, mask, axis_name=None):
      state = RunningMean.empty()
      if axis_name is None:
        state = jax.lax.pcast(state, "devices", to="varying")
      steps = jax.tree.map(lambda x: x.reshape(3, -1), (losses, mask))
      state, _ = jax.lax.scan(
        lambda state, step: (state.update(*step, axis_name=axis_name), None),
        state,
        steps,
      )
      return state

    for run in (
      lambda *x: jax.lax.psum(over_steps(*x), "devices").mean(),
      lambda *x: over_steps(*x, axis_name="devices").mean(),
    ):
      mapped = shard_map(
        run, mesh=self.mesh(8), in_specs=P("devices"), out_specs=P()
      )
      self.check(jax.jit(mapped)(*terms), self.value)

  def test_pmap(self):
    self.check_pmap(8)

  @parameterized.parameters(1, 2, 4)
  @pytest.mark.nightly
  def test_pmap_of_counts(self, count):
    self.check_pmap(count)

  def check_pmap(self, count):
    parts = self.batch.reshape(count, -1, *self.batch.shape[1:])
    mapped = functools.partial(
      jax.pmap,
      axis_name="devices",
      in_axes=(None, 0),
      devices=jax.devices()[:count],
    )
    for function, expected in (
      (self.loss, self.value),
      (pmean(jax.grad(self.loss)), self.gradient),
    ):
      for got in mapped(function)(self.params, parts):
        self.check(got, expected)
    outside = jax.grad(lambda params: mapped(self.loss)(params, parts)[0])
    self.check(outside(self.params), self.gradient)

  @parameterized.parameters((8, 3), (1, 8))
  def test_microbatches(self, count, k):
    self.check_microbatches(count, k)

  @parameterized.product(count=(1, 2, 4, 8), k=(1, 3, 8))
  @pytest.mark.nightly
  def test_microbatches_of_counts(self, count, k):
    self.check_microbatches(count, k)

  def check_microbatches(self, count, k):
    """On each device, with its own count of all of its microbatches."""

    def accumulated(params, batch):
      own = masked_count(*padded_model.losses(params, batch))
      return microbatches.with_scan(self.loss, params, batch, own, k)

    def mean_of_means(params, batch):
      loss = padded_model.mean_loss
      return pmean(microbatches.with_mean_of_means)(loss, params, batch, k)

    right, wrong = (
      jax.jit(
        shard_map(
          function,
          mesh=self.mesh(count),
          in_specs=(P(), P("devices")),
          out_specs=P(),
        )
      )(self.params, self.batch)
      for function in (accumulated, mean_of_means)
    )
    self.check(right, self.gradient)
    if count * k > 1:
      self.assertGreater(microbatches.distance(wrong, self.gradient), 0.05)

  def test_nothing_included(self):
    """On no device."""
    mesh = self.mesh(8)
    x = jnp.full((8, 2), jnp.nan)

    def mean(x):
      return masked_mean(x, False, axis_name="devices")

    run = shard_map(
      jax.value_and_grad(mean),
      mesh=mesh,
      in_specs=P("devices"),
      out_specs=(P(), P("devices")),
    )
    value, gradient = jax.jit(run)(x)
    self.assertEqual(value, 0)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


if __name__ == "__main__":
  absltest.main()
