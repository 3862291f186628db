"""The cross-entropy of a linear layer, next to formulas of all its logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from cases import assert_all_close, assert_equal, bits
from jax.experimental import checkify

import optax_masking as optax
from optax_masking.reductions import masked_mean
from optax_masking.testing import assert_mask_safe

loss = optax.linear_softmax_cross_entropy_with_integer_labels

ROWS, FEATURES, CLASSES = 21, 5, 13
# Blocks that divide neither the rows nor the classes, that divide both, and
# one that is larger than all.
BLOCKS = ((4, 6), (8, 5), (7, 13), (64, 64), None)
EXTRAS = (
  {},
  {"z_loss": 0.3},
  {"label_smoothing": 0.2},
  {"logit_soft_cap": 1.5},
  {"z_loss": 0.1, "label_smoothing": 0.3, "logit_soft_cap": 2.0},
)
POISONS = (np.nan, np.inf, -np.inf, 3e38, 1e-40)


def data(dtype="float32", seed=0):
  """Features, kernel, bias, labels and the cotangents of the losses."""
  rng = np.random.default_rng(seed)
  shapes = ((ROWS, FEATURES), (FEATURES, CLASSES), (CLASSES,))
  floats = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
  labels = rng.integers(0, CLASSES, ROWS)
  return *floats, jnp.asarray(labels), rng.normal(size=ROWS)


def masks(labels):
  """Of each kind that the loss takes."""
  rng = np.random.default_rng(7)
  rows = rng.random(ROWS) < 0.5
  classes = rng.random(CLASSES) < 0.7
  both = (rng.random((ROWS, CLASSES)) < 0.7) & rows[:, None]
  both[np.arange(ROWS) % 3 > 0, np.asarray(labels)[np.arange(ROWS) % 3 > 0]] = (
    True
  )
  both[2], rows[2] = False, False
  return {
    "none": None,
    "rows": rows,
    "classes": classes,
    "both": both,
    "all": True,
    "nothing": False,
    "padded": np.arange(ROWS) < 9,
  }


def formula(x, kernel, bias, labels, where, cotangents, **extras):
  """Losses and gradients in float64, of each row by itself."""
  x, kernel, bias = (np.asarray(a, "float64") for a in (x, kernel, bias))
  where = True if where is None else np.asarray(where)
  if where is not True and where.shape == (ROWS,):
    where = where[:, None]
  where = np.broadcast_to(where, (ROWS, CLASSES))
  losses = np.zeros(ROWS)
  grads = [np.zeros_like(a) for a in (x, kernel, bias)]
  cap, smoothing = (
    extras.get("logit_soft_cap"),
    extras.get("label_smoothing", 0),
  )
  z_loss = extras.get("z_loss", 0)
  for i in range(ROWS):
    kept, label = np.flatnonzero(where[i]), int(labels[i])
    if label not in kept:
      continue
    raw = x[i] @ kernel[:, kept] + bias[kept]
    z = raw if cap is None else cap * np.tanh(raw / cap)
    log_s = np.logaddexp.reduce(z)
    target = (1 - smoothing) * (kept == label) + smoothing / len(kept)
    losses[i] = log_s - target @ z + z_loss * log_s**2
    slope = np.exp(z - log_s) * (1 + 2 * z_loss * log_s) - target
    if cap is not None:
      slope *= 1 - np.tanh(raw / cap) ** 2
    slope *= cotangents[i]
    grads[0][i] = kernel[:, kept] @ slope
    grads[1][:, kept] += np.outer(x[i], slope)
    grads[2][kept] += slope
  return losses, grads


@functools.partial(jax.jit, static_argnums=0)
def run(options, x, kernel, bias, labels, where, cotangents):
  """Losses and gradients."""

  def total(x, kernel, bias):
    losses = loss(x, kernel, labels, bias=bias, where=where, **dict(options))
    return jnp.sum(losses * cotangents), losses

  grads, losses = jax.grad(total, (0, 1, 2), has_aux=True)(x, kernel, bias)
  return losses, grads


def losses_and_gradients(x, kernel, bias, labels, where, cotangents, **options):
  options = tuple(options.items())
  cotangents = jnp.asarray(cotangents, "float32")
  return run(options, x, kernel, bias, labels, where, cotangents)


class FormulaTest(parameterized.TestCase):
  @parameterized.parameters(
    ("none", (4, 6)), ("rows", (7, 13)), ("both", (8, 5)), ("rows", None)
  )
  def test_blocks(self, kind, block_shape):
    self.check(kind, block_shape)

  @parameterized.product(kind=("none", "rows", "both"), block_shape=BLOCKS)
  @pytest.mark.nightly
  def test_all_blocks(self, kind, block_shape):
    self.check(kind, block_shape)

  @parameterized.parameters(*EXTRAS[1:])
  def test_extras(self, **extras):
    self.check("both", (4, 6), **extras)

  @parameterized.parameters("classes", "all", "nothing", "padded")
  def test_masks(self, kind):
    self.check(kind, (4, 6), **EXTRAS[-1])

  def check(self, kind, block_shape, **extras):
    *given, cotangents = data()
    where = masks(given[-1])[kind]
    got = losses_and_gradients(
      *given, where, cotangents, block_shape=block_shape, **extras
    )
    expected = formula(*given, where, cotangents, **extras)
    assert_all_close(got[0], expected[0], "float32")
    assert_all_close(list(got[1]), expected[1], "float32")

  @parameterized.parameters("bfloat16", "float16")
  def test_half_precision(self, dtype):
    """Sums are in float32, and only the gradients are rounded."""
    *given, cotangents = data(dtype)
    where = masks(given[-1])["rows"]
    losses, grads = losses_and_gradients(
      *given, where, cotangents, block_shape=(4, 6)
    )
    expected = formula(*given, where, cotangents)
    self.assertEqual(losses.dtype, jnp.float32)
    assert_all_close(losses, expected[0], "float32")
    self.assertEqual([g.dtype for g in grads], [jnp.dtype(dtype)] * 3)
    assert_all_close(list(grads), expected[1], dtype, roundings=4)

  def test_mixed_precision(self):
    """Features in half precision meet a kernel in float32."""
    x, kernel, bias, labels, cotangents = data()
    x = x.astype("bfloat16")
    given = x, kernel, bias, labels, None, cotangents
    losses, grads = losses_and_gradients(*given)
    assert_all_close(losses, formula(*given)[0], "float32")
    self.assertEqual(grads[1].dtype, jnp.float32)

  def test_weights(self):
    """Of each row, with a gradient of their own; masked ones may be NaN."""
    x, kernel, bias, labels, _ = data()
    where = masks(labels)["rows"]
    weights = np.random.default_rng(3).uniform(0.5, 2, ROWS)
    weights = jnp.asarray(np.where(where, weights, np.nan), "float32")

    def total(x, weights):
      losses = loss(x, kernel, labels, bias=bias, where=where, weights=weights)
      return jnp.sum(losses), losses

    grads, losses = jax.grad(total, (0, 1), has_aux=True)(x, weights)
    kept = np.where(where, weights, 0)
    plain, expected = formula(x, kernel, bias, labels, where, kept)
    assert_all_close(losses, plain * kept, "float32")
    assert_all_close(grads[0], expected[0], "float32")
    assert_all_close(grads[1], plain, "float32")

  def test_batch_axes(self):
    """Masks of lower sizes broadcast along the batch."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, FEATURES)), "float32")
    _, kernel, bias, *_ = data()
    labels = jnp.asarray(rng.integers(0, CLASSES, (2, 3, 4)))
    for shape in ((2, 1, 4), (CLASSES,), (2, 1, 1, CLASSES)):
      where = jnp.asarray(rng.random(shape) < 0.7)
      got = loss(x, kernel, labels, bias=bias, where=where, block_shape=(4, 6))
      full = where[(None,) * 3] if shape == (CLASSES,) else where
      expected = optax.softmax_cross_entropy_with_integer_labels(
        x @ kernel + bias, labels, where=full
      )
      assert_all_close(got, expected, "float32")

  def test_one_row(self):
    x, kernel, _, labels, _ = data()
    got = loss(x[0], kernel, labels[0])
    expected = optax.softmax_cross_entropy_with_integer_labels(
      x[0] @ kernel, labels[0]
    )
    assert_all_close(got, expected, "float32")
    self.assertEqual(got.shape, ())


class ContractTest(parameterized.TestCase):
  @parameterized.parameters(*POISONS)
  def test_invariance(self, poison):
    """To the bit, with labels that name no class and weights of NaN."""
    x, kernel, bias, labels, cotangents = data()
    where = masks(labels)["rows"]
    for extras in (EXTRAS[0], EXTRAS[-1]):
      clean = losses_and_gradients(
        x, kernel, bias, labels, where, cotangents, block_shape=(4, 6), **extras
      )
      x2 = jnp.where(where[:, None], x, poison)
      labels2 = jnp.where(where, labels, -(2**31))
      got = losses_and_gradients(
        *(x2, kernel, bias, labels2, where, cotangents),
        block_shape=(4, 6),
        **extras,
      )
      jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, clean
      )
      assert_equal(got[0][~where], 0)
      assert_equal(got[1][0][~where], 0)

  @parameterized.parameters(*POISONS)
  def test_kernel_of_illegal_classes(self, poison):
    """A class that no row includes may hold anything, in each derivative."""
    x, kernel, bias, labels, cotangents = data()
    classes = masks(labels)["classes"]
    for where in (classes, np.broadcast_to(classes, (ROWS, CLASSES))):
      clean = losses_and_gradients(
        x, kernel, bias, labels, where, cotangents, block_shape=(4, 6)
      )
      kernel2 = jnp.where(classes, kernel, poison)
      bias2 = jnp.where(classes, bias, poison)
      got = losses_and_gradients(
        x, kernel2, bias2, labels, where, cotangents, block_shape=(4, 6)
      )
      jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, clean
      )
      assert_equal(got[1][1][:, ~classes], 0)
      assert_equal(got[1][2][~classes], 0)

  def test_compaction(self):
    """The same as without the masked rows."""
    x, kernel, bias, labels, cotangents = data()
    where = masks(labels)["rows"]
    losses, grads = losses_and_gradients(
      x, kernel, bias, labels, where, cotangents, block_shape=(4, 6)
    )
    kept = losses_and_gradients(
      *(x[where], kernel, bias, labels[where], None, cotangents[where]),
      block_shape=(4, 6),
    )
    assert_all_close(losses[where], kept[0], "float32")
    assert_all_close(grads[0][where], kept[1][0], "float32")
    assert_all_close(grads[1:], kept[1][1:], "float32")

  def test_empty(self):
    """No rows at all, or none that is included."""
    x, kernel, bias, labels, cotangents = data()
    nothing = losses_and_gradients(
      x * np.nan, kernel, bias, labels, np.zeros(ROWS, bool), cotangents
    )
    none = losses_and_gradients(
      x[:0], kernel, bias, labels[:0], None, cotangents[:0]
    )
    self.assertEqual(none[0].shape, (0,))
    for result in jax.tree.leaves((nothing, none)):
      assert_equal(result, np.zeros(result.shape))

  def test_label_of_masked_class(self):
    x, kernel, bias, labels, cotangents = data()
    where = np.ones((ROWS, CLASSES), bool)
    where[3, labels[3]] = False
    losses, grads = losses_and_gradients(
      x.at[3].set(jnp.nan), kernel, bias, labels, where, cotangents
    )
    self.assertEqual(losses[3], 0)
    assert_equal(grads[0][3], np.zeros(FEATURES))
    self.assertTrue(np.all(np.isfinite(grads[1])))

  @parameterized.parameters((CLASSES, True), (-CLASSES - 1, True), (-1, False))
  def test_labels_out_of_range(self, label, is_nan):
    """NaN where included, as it is without blocks."""
    x, kernel, bias, labels, _ = data()
    labels = labels.at[3].set(label)
    for where in (None, jnp.arange(ROWS) < 9, np.ones((ROWS, CLASSES), bool)):
      got = loss(x, kernel, labels, bias=bias, where=where, block_shape=(4, 6))
      np.testing.assert_array_equal(
        np.isnan(got), is_nan & (np.arange(ROWS) == 3)
      )
      expected = optax.softmax_cross_entropy_with_integer_labels(
        x @ kernel + bias, labels, where=where
      )
      np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))

  @parameterized.parameters(np.nan, np.inf)
  def test_honesty(self, poison):
    """What is wrong with an included row comes out, and of no other row."""
    x, kernel, bias, labels, cotangents = data()
    where = masks(labels)["rows"]
    row = np.flatnonzero(where)[1]
    losses, grads = losses_and_gradients(
      *(x.at[row].set(poison), kernel, bias, labels, where, cotangents),
      block_shape=(4, 6),
    )
    wrong = np.arange(ROWS) == row
    np.testing.assert_array_equal(~np.isfinite(losses), wrong)
    np.testing.assert_array_equal(~np.isfinite(grads[0]).all(-1), wrong)
    self.assertFalse(np.isfinite(grads[1]).any())

  @parameterized.parameters("jax_debug_nans", "jax_debug_infs")
  def test_debug_tools(self, flag):
    """They find nothing in garbage that is masked."""
    x, kernel, bias, labels, cotangents = data()
    wheres = masks(labels)
    with jax.enable_checks(False):
      jax.config.update(flag, True)
      try:
        for kind in ("rows", "both", "nothing"):
          where = wheres[kind]
          rows = (
            np.broadcast_to(where, (ROWS,))
            if kind != "both"
            else (where.any(-1))
          )
          poisoned = np.where(rows[:, None], x, np.nan)
          losses_and_gradients(
            *(poisoned, kernel, bias, labels, where, cotangents),
            block_shape=(4, 6),
            **EXTRAS[-1],
          )
      finally:
        jax.config.update(flag, False)

  def test_checkify(self):
    *given, cotangents = data()
    where = masks(given[-1])["both"]
    given[0] = jnp.where(where.any(-1)[:, None], given[0], jnp.nan)
    checked = checkify.checkify(
      functools.partial(losses_and_gradients, block_shape=(4, 6), **EXTRAS[-1]),
      errors=checkify.nan_checks,
    )
    error, _ = checked(*given, where, cotangents)
    self.assertIsNone(error.get())

  def test_guard(self):
    """The checks of anyone's loss, with kernel and bias shared."""
    self.check_guard(
      derivatives=("value", "vjp"),
      masks=("given", "none"),
      transforms=("jit",),
      samples=4,
    )

  @pytest.mark.nightly
  def test_guard_of_all(self):
    self.check_guard()

  def check_guard(self, **options):
    x, kernel, bias, labels, _ = data()

    def rows(features, kernel, bias, labels, where):
      return loss(
        features, kernel, labels, bias=bias, where=where, block_shape=(4, 6)
      )

    where = jnp.asarray(masks(labels)["rows"])
    report = assert_mask_safe(
      *(rows, x[:7], kernel, bias, labels[:7]),
      where=where[:7],
      axes={"kernel": None, "bias": None},
      **options,
    )
    self.assertEmpty(report.findings)


class TransformsTest(parameterized.TestCase):
  def unfused(self, x, kernel, bias, labels, where):
    return optax.softmax_cross_entropy_with_integer_labels(
      x @ kernel + bias, labels, where=where
    )

  def fused(self, x, kernel, bias, labels, where):
    return loss(x, kernel, labels, bias=bias, where=where, block_shape=(4, 6))

  def both(self, function):
    """The results of the two losses."""
    return function(self.fused), function(self.unfused)

  def test_forward_mode_and_second_derivatives(self):
    self.check_derivatives("both")

  @pytest.mark.nightly
  def test_derivatives_with_masked_rows(self):
    self.check_derivatives("rows")

  def check_derivatives(self, kind):
    x, kernel, bias, labels, cotangents = data()
    where = masks(labels)[kind]
    x = jnp.where(np.reshape(where, (ROWS, -1)).any(-1)[:, None], x, 1e30)

    def derivatives(of):
      def total(*floating):
        losses = of(*floating, labels, where)
        return jnp.sum(jnp.sin(losses) * cotangents)

      given = (x, kernel, bias)
      moved = jax.tree.map(jnp.cos, given)

      def forward(*floating):
        return jax.jvp(total, floating, moved)[1]

      def slope(*floating):
        grads = jax.grad(total, (0, 1, 2))(*floating)
        return sum(jnp.vdot(g, t) for g, t in zip(grads, moved, strict=True))

      return (
        jax.jvp(forward, given, moved),
        jax.jvp(jax.grad(total, (0, 1, 2)), given, moved)[1],
        jax.grad(slope, (0, 1, 2))(*given),
      )

    got, expected = self.both(
      lambda of: jax.jit(derivatives, static_argnums=0)(of)
    )
    assert_all_close(got, expected, "float32", roundings=64)

  @pytest.mark.nightly
  def test_hessian_of_features(self):
    x, kernel, bias, labels, _ = data()
    x, labels = x[:5], labels[:5]
    where = jnp.array([True, False, True, True, False])
    got, expected = self.both(
      lambda of: jax.hessian(
        lambda x: jnp.sum(of(x, kernel, bias, labels, where))
      )(x)
    )
    assert_all_close(got, expected, "float32", roundings=64)

  @pytest.mark.slow
  def test_vmap(self):
    self.check_vmap(0, None)

  @parameterized.parameters((None, 0), (0, 0))
  @pytest.mark.nightly
  def test_vmap_of_layers(self, x_axis, kernel_axis):
    self.check_vmap(x_axis, kernel_axis)

  def check_vmap(self, x_axis, kernel_axis):
    """Mapped over rows or kernels, with masks of uneven counts."""
    x, kernel, bias, labels, cotangents = data()
    wheres = jnp.stack([jnp.arange(ROWS) < n for n in (2, 17, 0)])
    if x_axis == 0:
      x = jnp.stack([x, 2 * x, -x])
    if kernel_axis == 0:
      kernel = jnp.stack([kernel, 2 * kernel, -kernel])
    axes = (x_axis, kernel_axis, None, None, 0)

    def mapped(of):
      def total(x, kernel, where):
        return jnp.sum(of(x, kernel, bias, labels, where) * cotangents)

      def summed(x, kernel):
        losses = jax.vmap(of, axes)(x, kernel, bias, labels, wheres)
        return jnp.sum(losses * cotangents)

      inside = jax.vmap(jax.grad(total, (0, 1)), (*axes[:2], 0))
      return (
        jax.vmap(of, axes)(x, kernel, bias, labels, wheres),
        inside(x, kernel, wheres),
        jax.grad(summed, (0, 1))(x, kernel),
      )

    got, expected = self.both(lambda of: jax.jit(mapped, static_argnums=0)(of))
    assert_all_close(got, expected, "float32", roundings=32)

  def test_scan_and_checkpoint(self):
    x, kernel, bias, labels, _ = data()
    where = jnp.asarray(masks(labels)["rows"])

    def scanned(of):
      @jax.checkpoint
      def step(total, row):
        x, label, where = row
        return total + of(x[None], kernel, bias, label[None], where[None])[
          0
        ], ()

      return lambda x: jax.lax.scan(step, 0.0, (x, labels, where))[0]

    got, expected = self.both(lambda of: jax.value_and_grad(scanned(of))(x))
    assert_all_close(got, expected, "float32")

  def test_masks_of_classes_with_64_bits(self):
    rng = np.random.default_rng(0)
    features, kernel = rng.normal(size=(6, 3)), rng.normal(size=(3, 5))
    labels, where = rng.integers(0, 5, 6), rng.random((6, 5)) < 0.7
    if not hasattr(jax, "enable_x64"):
      self.skipTest("This JAX has another name for it.")
    with jax.enable_x64(True):
      got = optax.linear_softmax_cross_entropy_with_integer_labels(
        features, kernel, labels, where=where
      )
      expected = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(features @ kernel), labels, where=where
      )
    np.testing.assert_allclose(got, expected, rtol=1e-12)


class CostsTest(parameterized.TestCase):
  def temporaries(self, rows, classes, dtype="float32", of=loss):
    def mean(x, kernel, labels, where):
      return masked_mean(of(x, kernel, labels, where=where), where)

    shapes = (
      jax.ShapeDtypeStruct((rows, 64), dtype),
      jax.ShapeDtypeStruct((64, classes), dtype),
      jax.ShapeDtypeStruct((rows,), "int32"),
      jax.ShapeDtypeStruct((rows,), bool),
    )
    program = jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*shapes).compile()
    return program.memory_analysis().temp_size_in_bytes

  def test_temporaries(self):
    """They grow neither with rows nor with classes."""
    self.check_temporaries("float32", 8)

  @pytest.mark.nightly
  def test_temporaries_in_half_precision(self):
    """The gradient of the kernel has a copy in float32."""
    self.check_temporaries("bfloat16", 8 + 4 * 64)

  def check_temporaries(self, dtype, most_a_class):
    least = self.temporaries(2**16, 2**14, dtype)
    self.assertLess(least, 10 * 4 * 2**21)
    more_rows = self.temporaries(2**18, 2**14, dtype)
    self.assertLess((more_rows - least) / (2**18 - 2**16), 64)
    more_classes = self.temporaries(2**16, 2**17, dtype)
    a_class = (more_classes - least) / (2**17 - 2**14)
    self.assertLess(a_class, most_a_class)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"features": [[1, 2]]}, TypeError, "`features` must be an array"),
    ({"features": jnp.ones((4, 2), int)}, TypeError, "`features` .* floating"),
    ({"kernel": jnp.ones((3, 5))}, ValueError, r"`kernel` .* \(2, V\)"),
    ({"kernel": jnp.ones(2)}, ValueError, r"`kernel` has shape \(2,\)"),
    ({"labels": jnp.ones(4)}, TypeError, "`labels` must be integers"),
    ({"labels": jnp.ones(3, int)}, ValueError, r"shape \(4,\)"),
    ({"bias": jnp.ones(4)}, ValueError, r"`bias` .* \(5,\)"),
    ({"where": jnp.ones(4)}, TypeError, "`where` must be boolean"),
    ({"where": jnp.ones(3, bool)}, ValueError, r"`where` has shape \(3,\)"),
    ({"where": jnp.ones((2, 4, 5), bool)}, ValueError, "`where` has shape"),
    ({"weights": jnp.ones(4, bool)}, TypeError, "Pass a mask as `where`"),
    ({"weights": jnp.ones(5)}, ValueError, "`weights` has shape"),
    ({"z_loss": -1.0}, ValueError, "`z_loss` must be at least 0"),
    ({"z_loss": "1"}, TypeError, "`z_loss` must be a number"),
    ({"label_smoothing": 1.5}, ValueError, "at most 1"),
    ({"logit_soft_cap": 0.0}, ValueError, "must be positive"),
    ({"block_shape": (0, 3)}, ValueError, "two positive integers"),
    ({"block_shape": 3}, ValueError, "two positive integers"),
  )
  def test_refused(self, wrong, error, message):
    given = {
      "features": jnp.ones((4, 2)),
      "kernel": jnp.ones((2, 5)),
      "labels": jnp.zeros(4, int),
    }
    with self.assertRaisesRegex(error, message):
      loss(**(given | wrong))

  def test_ambiguous_mask(self):
    """As many rows as classes: a mask of one axis may be of either."""
    given = jnp.ones((5, 2)), jnp.ones((2, 5)), jnp.zeros(5, int)
    with self.assertRaisesRegex(ValueError, "in two ways"):
      loss(*given, where=jnp.ones(5, bool))
    self.assertEqual(loss(*given, where=jnp.ones((5, 1), bool)).shape, (5,))

  def test_traced_number(self):
    given = jnp.ones((5, 2)), jnp.ones((2, 5)), jnp.zeros(5, int)
    with self.assertRaisesRegex(TypeError, "known when the loss is traced"):
      jax.jit(lambda c: loss(*given, z_loss=c))(1.0)


if __name__ == "__main__":
  absltest.main()
