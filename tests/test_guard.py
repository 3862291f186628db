"""The checks of `optax_masking.testing`: they find faults, and only faults."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import planted_faults
import planted_steps
import pytest
from absl.testing import absltest, parameterized

import optax_masking as optax
from optax_masking import testing

PREDICTIONS, TARGETS = planted_faults.PAIR
ELEMENTS = planted_faults.ELEMENTS

# Options for faults that show in gradients, under any transformation.
GRADIENTS = {"derivatives": ("value", "vjp"), "transforms": ("jit",)}


def check(row, **options):
  return testing.check_mask_safe(
    row.loss, *row.args, where=row.where, **{**row.options, **options}
  )


def check_briefly(row):
  """A check that takes a second, of what the row does not leave out."""
  return check(row, **{**planted_steps.BRIEF, **row.options})


def select_after(predictions, targets, where):
  """Wrong: the gradient is 0 divided by a masked element."""
  return jnp.where(where, targets * jnp.log(predictions), 0)


def masked_square(predictions, targets, where=None):
  """Correct."""
  where = True if where is None else where
  return jnp.where(where, predictions - targets, 0) ** 2


# One fault for each clause with options that are enough to find it, and correct
# losses of integer labels and in half precision.
QUICK_FAULTS: dict[str, dict] = {
  "multiply_by_mask": GRADIENTS,
  "weights_without_gradient": GRADIENTS,
  "gradient_of_labels": GRADIENTS,
  "mean_over_all": GRADIENTS,
  "epsilon_in_denominator": GRADIENTS,
  "entropy_of_nothing": GRADIENTS,
  "fill_as_label_logit": GRADIENTS,
  "take_and_select": GRADIENTS,
  "mask_that_does_not_broadcast": GRADIENTS,
  "nan_to_num_of_input": GRADIENTS,
  "count_over_vmap": {**GRADIENTS, "transforms": ("jit", "vmap")},
  "second_derivative_by_hand": {"transforms": ("jit",)},
}
QUICK_CORRECT = ("cross_entropy_of_integer_labels", "sum_in_float32")

# One loss of each kind of training code: short checks of all take minutes.
BRIEF_FAULTS = (
  "rectangle_of_tokens",
  "marked_labels_over_all_tokens",
  "missing_targets_selected_at_the_end",
  "inputs_not_masked",
  "smoothness_of_neighbours",
  "dropout_without_masked_targets",
)
BRIEF_CORRECT = (
  "mean_of_a_column",
  "mean_of_tokens",
  "mask_of_tokens_with_an_axis_of_one",
  "channels_first",
  "without_the_first_token",
  "weights_of_marked_labels",
  "loop_up_to_the_last_step",
  "mask_first",
  "keyword_only_mask",
  "positional_only_mask_in_the_middle",
  "partial_with_a_mask_in_the_middle",
  "next_token_of_each_sequence",
  "attention_with_infinite_fill",
  "largest_error",
  "nanmean_of_rows",
  "step_of_a_dataclass",
  "mask_beside_the_batch",
  "step_with_a_float_mask",
  "parameters_by_another_name",
  "loss_of_each_token",
  "step_with_a_loss_inside",
  "step_with_marked_labels",
  "loss_of_marked_labels",
  "step_with_lengths",
  "step_with_missing_targets",
  "step_with_an_embedding",
)


def named_rows(rows, names=None):
  return [(row.name, row) for row in rows if not names or row.name in names]


@pytest.mark.slow
class PlantedFaultsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    named_rows(planted_faults.FAULTS, QUICK_FAULTS)
  )
  def test_fault(self, row):
    self.check_fault(row, **QUICK_FAULTS[row.name])

  @parameterized.named_parameters(
    named_rows(planted_faults.FAULTS + planted_steps.FAULTS)
  )
  @pytest.mark.nightly
  def test_fault_in_full(self, row):
    self.check_fault(row)

  @parameterized.named_parameters(
    named_rows(planted_steps.FAULTS, BRIEF_FAULTS)
  )
  def test_fault_of_a_step(self, row):
    self.check_found(row, check_briefly(row))

  def check_fault(self, row, **options):
    self.check_found(row, check(row, **options))

  def check_found(self, row, report):
    """Each fault is found, with its clause and its argument."""
    found = [f for f in report.findings if f.clause in row.clauses]
    self.assertTrue(found, f"{row.clauses} kept: {report.clauses}\n{report}")
    message = str(report)
    self.assertRegex(message, "|".join(f"\n{c}: " for c in row.clauses))
    if row.argument is not None:
      named = [f.argument for f in found] + [f.wrt for f in found]
      whole = [str(name).split("[")[0] for name in named]
      self.assertIn(row.argument, named + whole, message)
      self.assertIn(f"`{row.argument}", message)

  @parameterized.named_parameters(
    named_rows(planted_faults.CORRECT, QUICK_CORRECT)
  )
  def test_correct(self, row):
    self.check_correct(row)

  @parameterized.named_parameters(
    named_rows(
      planted_faults.CORRECT,
      {row.name for row in planted_faults.CORRECT} - {*QUICK_CORRECT},
    )
  )
  @pytest.mark.nightly
  def test_other_correct(self, row):
    self.check_correct(row)

  @parameterized.named_parameters(named_rows(planted_steps.CORRECT))
  @pytest.mark.nightly
  def test_correct_step_in_full(self, row):
    self.check_correct(row)

  @parameterized.named_parameters(
    named_rows(planted_steps.CORRECT, BRIEF_CORRECT)
  )
  def test_correct_step(self, row):
    self.check_kept(row, check_briefly(row))

  def check_correct(self, row):
    self.check_kept(row, check(row))

  def check_kept(self, row, report):
    """Nothing is found where nothing is wrong."""
    self.assertTrue(report.ok, report)
    for clause in {"accepts", "invariance", "zero_gradient", "empty"} - {
      *row.untried
    }:
      self.assertEqual(report.clauses[clause], "kept", clause)
    self.assertContainsSubset(row.untried, report.untried)
    self.assertIn(row.note, " ".join(report.notes))

  def test_few(self):
    """The quick faults break each clause."""
    faults = {row.name: row.clauses for row in planted_faults.FAULTS}
    clauses = {faults[name][0] for name in QUICK_FAULTS}
    self.assertEqual(clauses, {*testing.CLAUSES})

  def test_as_many_are_correct(self):
    """Alarms at right losses are looked for as much as faults are."""
    faults = planted_faults.FAULTS + planted_steps.FAULTS
    right = planted_faults.CORRECT + planted_steps.CORRECT
    self.assertGreaterEqual(len(right), len(faults))
    names = [row.name for row in (*faults, *right)]
    self.assertLen({*names}, len(names))
    ranks = {np.ndim(row.where) for row in right if hasattr(row.where, "ndim")}
    self.assertContainsSubset({1, 2, 3, 4}, ranks)


class AlignTest(parameterized.TestCase):
  """Which axes of an array a mask has, and whether it masks the array."""

  @parameterized.parameters(
    ((4, 5, 7), (4, 5), (0, 1, None), True),
    ((4, 5), (4, 5), (0, 1), True),
    ((4,), (4, 5), (0,), True),
    ((5,), (4, 5), (1,), False),
    ((1,), (4, 5), (0,), False),
    ((7, 4, 5), (4, 5), (None, 0, 1), True),
    ((5, 4, 7), (4, 5), (1, 0, None), True),
    ((3, 2, 3), (2, 3), (None, 0, 1), True),
    ((4, 5, 7), (4, 5, 1), (0, 1, 2), True),
    ((1, 5), (4, 5), (0, 1), False),
    ((7, 6), (4, 5), (None, None), False),
    ((4, 6), (4, 5), (0, None), True),
    ((), (4, 5), (), False),
    ((3, 2), (), (None, None), True),
    ((1, 7), (1,), (0, None), True),
  )
  def test_align(self, shape, mask, axes, maskable):
    from optax_masking.testing._problem import align

    self.assertEqual(align(shape, mask), (axes, maskable))


class FindingTest(parameterized.TestCase):
  def test_all_attributes(self):
    """The finding of a fault in one element has all attributes."""

    def sum_of_squares(predictions, targets, where):
      # Only the element [1, 2] of the predictions gets through its mask.
      kept = jnp.where(where, predictions - targets, 0)
      leak = 0 * jnp.log(predictions[1, 2])
      return jnp.sum(kept**2) + leak

    where = np.ones((4, 5), bool)
    where[1, 2] = False
    values = np.abs(PREDICTIONS) + 0.1
    report = testing.check_mask_safe(
      sum_of_squares, values, TARGETS, where=where, masks=("given",)
    )
    finding = report.findings[0]
    self.assertEqual(finding.clause, "invariance")
    self.assertEqual(finding.argument, "predictions")
    self.assertEqual(finding.element, (1, 2))
    self.assertEqual(finding.mask, "as given")
    self.assertEqual(finding.where, where.tolist())
    self.assertEqual(finding.poison, "nan")
    self.assertEqual(finding.derivative, "value")
    self.assertEqual(finding.transform, "jit")
    self.assertEqual(finding.dtype, "float32")
    self.assertEqual(finding.got, "nan")
    clean = sum_of_squares(values, TARGETS, where)
    self.assertAlmostEqual(float(finding.expected), float(clean), places=4)
    self.assertEqual(finding.primitive, "log")
    self.assertRegex(finding.source, r"test_guard\.py:\d+ in \S*sum_of_squares")
    self.assertEqual(finding.code, "leak = 0 * jnp.log(predictions[1, 2])")
    message = str(report)
    for part in (
      "sum_of_squares breaks",
      "`predictions` holds nan at [1, 2]",
      "`log` at",
      "skip=(",
      f"{report.cases:,} cases",
    ):
      self.assertIn(part, message)
    with self.assertRaises(AssertionError) as raised:
      testing.assert_mask_safe(
        sum_of_squares, values, TARGETS, where=where, masks=("given",)
      )
    without_time = [
      re.sub(r"in [\d.]+ s\b", "", text)
      for text in (str(raised.exception), message)
    ]
    self.assertEqual(*without_time)

  @pytest.mark.slow
  def test_source_of_an_operation_in_a_library(self):
    def mean_distance(predictions, targets, where):
      return jnp.mean(jax.nn.relu(optax.log_cosh(predictions, targets)) * where)

    report = testing.check_mask_safe(
      mean_distance, PREDICTIONS, TARGETS, where=ELEMENTS, derivatives=("vjp",)
    )
    sources = [f.source for f in report.findings if f.poison == "nan"]
    self.assertTrue(sources)
    for source in sources:
      self.assertRegex(source, r"^\S*test_guard\.py:\d+ in \S*mean_distance")

  @pytest.mark.slow
  def test_a_compiled_loss_is_traced(self):
    report = testing.check_mask_safe(
      jax.jit(select_after),
      *map(np.abs, (PREDICTIONS, TARGETS)),
      where=ELEMENTS,
      **GRADIENTS,
    )
    sources = {f.source for f in report.findings if f.poison}
    self.assertLen(sources, 1)
    self.assertRegex(sources.pop(), r"test_guard\.py:\d+ in select_after")

  @pytest.mark.slow
  def test_the_same_finding_has_the_same_key(self):
    def keys(seed):
      x, y = (np.abs(planted_faults.normal(seed + i, 4, 5)) for i in (0, 1))
      report = testing.check_mask_safe(
        select_after, x, y, where=ELEMENTS, **GRADIENTS
      )
      return {f.key for f in report.findings}

    first, second = keys(1), keys(5)
    self.assertNotEmpty(first)
    self.assertEqual(first, second)

  @pytest.mark.slow
  def test_report_as_data(self):
    report = testing.check_mask_safe(
      select_after,
      *map(np.abs, (PREDICTIONS, TARGETS)),
      where=ELEMENTS,
      **GRADIENTS,
    )
    data = report.to_dict()
    self.assertFalse(data["ok"])
    self.assertEqual(data["clauses"]["zero_gradient"], "broken")
    self.assertEqual(data["clauses"]["compaction"], "kept")
    fields = {f.name for f in dataclasses.fields(testing.Finding)}
    for finding in data["findings"]:
      self.assertEqual(finding.keys(), fields | {"key"})


@pytest.mark.slow
class NotesTest(parameterized.TestCase):
  """What a report says of what is no finding, or of a fault that is common."""

  def test_untried_clauses(self):
    """A clause that can't be tried is a failure in a strict check alone."""
    rows = {row.name: row for row in planted_steps.CORRECT}
    report = check_briefly(rows["dropout"])
    self.assertTrue(report.ok)
    self.assertIn("random numbers", report.untried["compaction"])
    self.assertIn("1 could not be tried", str(report))
    row = rows["dropout"]
    with self.assertRaisesRegex(AssertionError, "compaction: .*random numbers"):
      testing.assert_mask_safe(
        row.loss,
        *row.args,
        where=row.where,
        strict=True,
        **planted_steps.BRIEF,
      )

  def test_gradients_that_are_nan_without_a_mask(self):
    """They are a note, and a failure in a strict check."""

    def cosine(predictions, targets, where):
      p, t = (jnp.where(where[:, None], x, 1) for x in (predictions, targets))
      norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(t, axis=-1)
      return jnp.where(where, jnp.sum(p * t, -1) / jnp.maximum(norms, 0.01), 0)

    predictions = np.array(PREDICTIONS)
    predictions[2] = 0  # Its norm has no gradient.
    arguments = (cosine, predictions, TARGETS)
    options = {"where": planted_faults.EXAMPLES, **GRADIENTS}
    report = testing.assert_mask_safe(*arguments, **options)
    (note,) = report.notes
    self.assertRegex(note, r"gradient.*`predictions` at \[2, 0\] is nan")
    self.assertIn("The mask is not at fault.", note)
    with self.assertRaisesRegex(AssertionError, "Note: With everything"):
      testing.assert_mask_safe(*arguments, strict=True, **options)

  def test_denominator(self):
    """A broken compaction names the denominator that was used."""
    (row,) = (r for r in planted_steps.FAULTS if r.name == "mean_of_all_tokens")
    report = check(row, masks=("given",), **GRADIENTS)
    self.assertEqual({f.clause for f in report.findings}, {"compaction"})
    message = " ".join(str(report).split())
    self.assertIn(
      "as if the loss were divided by the number of all elements, 12, and not"
      " of the included ones, 6.",
      message,
    )

  def test_masks_of_padding(self):
    """The report on a loss for padded sequences proposes their masks."""
    (row,) = (r for r in planted_steps.CORRECT if r.name == "next_token")
    report = testing.check_mask_safe(
      row.loss, *row.args, where=row.where, **planted_steps.BRIEF
    )
    self.assertFalse(report.ok)
    self.assertIn("masks=('given', 'padded')", " ".join(report.notes))
    report = check(row, **GRADIENTS)
    self.assertTrue(report.ok)
    self.assertEmpty(report.notes)

  def test_inverted_masks(self):
    """The report on a loss of paddings proposes their inverse."""
    (row,) = (r for r in planted_steps.CORRECT if r.name == "mean_of_tokens")

    def of_paddings(predictions, targets, padding):
      return row.loss(predictions, targets, ~padding)

    options = planted_steps.BRIEF
    report = testing.check_mask_safe(
      of_paddings,
      *row.args,
      where=~row.where,
      where_name="padding",
      **options,
    )
    self.assertFalse(report.ok)
    self.assertIn("say so: inverted_where=True.", " ".join(report.notes))
    for transform in ("eager", "jit", "vmap"):
      report = testing.assert_mask_safe(
        of_paddings,
        *row.args,
        where=~row.where,
        where_name="padding",
        inverted_where=True,
        **{**options, "transforms": (transform,)},
      )
      self.assertEmpty(report.notes)
    numbers = (~row.where).astype("float32")
    testing.assert_mask_safe(
      lambda p, t, padding: row.loss(p, t, padding == 0),
      *row.args,
      padding=numbers,
      where="padding",
      numeric_where=True,
      inverted_where=True,
      **options,
    )

  def test_arrays_that_the_mask_does_not_mask(self):
    rows = {row.name: row for row in planted_steps.CORRECT}
    row = rows["gains_of_as_many_features"]
    (note,) = check(row, **GRADIENTS).notes
    self.assertIn("masks nothing of `gains`", note)
    row = dataclasses.replace(row, options={"axes": {"gains": None}})
    self.assertEmpty(check(row, **GRADIENTS).notes)


@pytest.mark.slow
class OptionsTest(parameterized.TestCase):
  def test_skip(self):
    report = testing.check_mask_safe(
      select_after,
      *map(np.abs, (PREDICTIONS, TARGETS)),
      where=ELEMENTS,
      skip=("zero_gradient",),
      **GRADIENTS,
    )
    self.assertNotIn("zero_gradient", report.clauses)
    self.assertTrue(report.ok)

  def test_fewer_derivatives(self):
    """A fault in a gradient is not found in values."""
    for derivatives in (("value",), ("value", "jvp")):
      report = testing.check_mask_safe(
        select_after,
        *map(np.abs, (PREDICTIONS, TARGETS)),
        where=ELEMENTS,
        derivatives=derivatives,
      )
      self.assertTrue(report.ok, report)

  @parameterized.parameters("eager", "jit", "vmap")
  def test_one_transformation(self, transform):
    report = testing.check_mask_safe(
      select_after,
      *map(np.abs, (PREDICTIONS, TARGETS)),
      where=ELEMENTS,
      transforms=(transform,),
      derivatives=("value", "vjp"),
      samples=2,
    )
    self.assertEqual(report.clauses["zero_gradient"], "broken")

  def test_dtypes(self):
    def overflows_in_float16(predictions, targets, where):
      large = jnp.where(where, predictions - targets, 1e6)
      return jnp.where(where, large, 0 * large)

    seen = []
    for dtype in ("float64", "float32", "bfloat16", "float16"):
      report = testing.check_mask_safe(
        overflows_in_float16,
        PREDICTIONS,
        TARGETS,
        where=ELEMENTS,
        dtypes=(dtype,),
        **GRADIENTS,
      )
      seen.append({f.dtype for f in report.findings})
    self.assertEqual(seen, [set(), set(), set(), {"float16"}])

  def test_masks_and_samples(self):
    def cases(**options):
      return testing.assert_mask_safe(
        masked_square,
        PREDICTIONS,
        TARGETS,
        where=ELEMENTS,
        **GRADIENTS,
        **options,
      ).cases

    self.assertLess(cases(samples=2), cases(samples=8))
    self.assertLess(cases(masks=("given",)), cases(masks=("given", "none")))

  def test_reference(self):
    """Without a mask the loss has to be the same program as its reference."""

    def masked_or_plain(predictions, targets, where=None):
      if where is None:
        return (predictions - targets) ** 2
      return masked_square(predictions, targets, where)

    def other(predictions, targets):
      return jnp.square(targets - predictions)

    def twice(predictions, targets):
      return 2 * (predictions - targets) ** 2

    options = {"where": ELEMENTS, "skip": (), **GRADIENTS}
    for reference, expected in (
      (functools.partial(masked_or_plain, where=None), []),
      (other, ["identity"]),
      (twice, ["compaction", "identity"]),
    ):
      report = testing.check_mask_safe(
        masked_or_plain, PREDICTIONS, TARGETS, reference=reference, **options
      )
      clauses = sorted({f.clause for f in report.findings})
      self.assertEqual(clauses, expected)

  def test_axes(self):
    """With `axes` an array with one entry a class is masked."""

    def weighted(predictions, weights, where):
      kept = jnp.where(where, predictions, 0)
      return jnp.sum(weights * kept**2, -1)

    weights = planted_faults.uniform(3, 5)
    arguments = {"where": ELEMENTS, "skip": ("compaction",), **GRADIENTS}
    testing.assert_mask_safe(weighted, PREDICTIONS, weights, **arguments)
    report = testing.check_mask_safe(
      weighted, PREDICTIONS, weights, axes={"weights": (1,)}, **arguments
    )
    self.assertIn("weights", {f.argument for f in report.findings})

  def test_axes_of_where(self):
    """A mask of the second axis, which is as long as the first."""

    def of_features(predictions, where):
      return jnp.sum(jnp.where(where, predictions, 0) ** 2, -1)

    square, where = PREDICTIONS[:, :4], np.array([True, False, True, True])
    options = {"where": where, **GRADIENTS}
    report = testing.check_mask_safe(of_features, square, **options)
    self.assertFalse(report.ok)
    testing.assert_mask_safe(
      of_features,
      square,
      axes={"predictions": (None, 0), "return": (None,)},
      **options,
    )

  def test_padding_need_not_be_clean(self):
    """Data with NaN and labels out of range where they are masked."""
    logits = np.where(ELEMENTS, planted_faults.LOGITS, np.nan)
    labels = np.where(ELEMENTS.any(-1), planted_faults.INDEX, -100)
    kept = ELEMENTS.any(-1)
    logits[kept] = planted_faults.LOGITS[kept]
    testing.assert_mask_safe(
      optax.softmax_cross_entropy_with_integer_labels,
      logits,
      labels,
      where=kept,
      **GRADIENTS,
    )

  def test_debugging_flags_of_the_caller_are_ignored(self):
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
      testing.assert_mask_safe(
        masked_square, PREDICTIONS, TARGETS, where=ELEMENTS, samples=2
      )

  def test_large_data(self):
    """For a batch of usual size the check tries some elements."""
    x, y = (planted_faults.normal(i, 64, 512) for i in (0, 1))
    where = planted_faults.uniform(2, 64) < 0.7
    report = testing.assert_mask_safe(
      optax.cosine_distance, x, y, where=where, samples=2, **GRADIENTS
    )
    self.assertTrue(report.ok)


@pytest.mark.slow
class ArgumentsTest(parameterized.TestCase):
  """Losses of many kinds of arguments and results."""

  options = GRADIENTS

  def clauses(self, loss, *args, where=ELEMENTS, **options):
    report = testing.check_mask_safe(
      loss, *args, where=where, **{**self.options, **options}
    )
    return [k for k, v in report.clauses.items() if v == "broken"]

  def test_backward_pass_by_hand(self):
    """A custom_vjp has no forward mode: a note, and other checks go on."""

    @jax.custom_vjp
    def square(x):
      return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, t: (2 * x * t,))

    def right(predictions, targets, where):
      return square(jnp.where(where, predictions - targets, 0))

    def wrong(predictions, targets, where):
      return jnp.where(where, square(predictions - targets), 0)

    options = {"where": ELEMENTS}
    report = testing.check_mask_safe(right, PREDICTIONS, TARGETS, **options)
    self.assertTrue(report.ok)
    self.assertIn("The jvp can't be computed", str(report))
    self.assertIn("derivatives=('value', 'vjp', 'hessian')", str(report))
    with self.assertRaisesRegex(AssertionError, "see the notes"):
      testing.assert_mask_safe(
        right, PREDICTIONS, TARGETS, strict=True, **options
      )
    report = testing.check_mask_safe(wrong, PREDICTIONS, TARGETS, **options)
    self.assertEqual(report.clauses["zero_gradient"], "broken")
    testing.assert_mask_safe(
      right, PREDICTIONS, TARGETS, derivatives=("value", "vjp"), **options
    )

  @parameterized.parameters(False, True)
  def test_result_with_axes_of_one(self, keepdims):
    def mean_of_all(predictions, where):
      kept = jnp.where(where, predictions, 0) ** 2
      return jnp.mean(kept, -1, keepdims=keepdims)

    self.assertEqual(self.clauses(mean_of_all, PREDICTIONS), ["compaction"])

  def test_mean_over_masked_steps(self):
    """The mask has an axis of size 1 at the end."""

    def mean_of_steps(predictions, where):
      kept = jnp.where(where, predictions, 0) ** 2
      return jnp.mean(jnp.sum(kept, -1), -1)

    x, where = planted_faults.normal(1, 2, 3, 4), np.eye(2, 3)[..., None] > 0
    self.assertEqual(
      self.clauses(mean_of_steps, x, where=where), ["compaction"]
    )

  def test_mean_over_masked_examples(self):
    """Another axis of the program has the number of examples by chance."""

    def of_differences(predictions, where):
      kept = jnp.where(where[:, None], predictions, 0)
      return jnp.mean(jnp.sum(jnp.diff(kept) ** 2, -1))

    self.assertEqual(
      self.clauses(of_differences, PREDICTIONS, where=planted_faults.EXAMPLES),
      ["compaction"],
    )

  def test_result_of_the_last_axis(self):
    def over_examples(predictions, where):
      return jnp.mean(jnp.where(where, predictions, 0) ** 2, 0)

    self.assertIn("compaction", self.clauses(over_examples, PREDICTIONS))

  def test_numbers(self):
    """Data without an axis, as for a loss that is meant for vmap."""

    def weighted(prediction, where):
      return prediction**2 * where

    number, where = np.float32(2), np.array(True)
    found = self.clauses(weighted, number, where=where, transforms=("eager",))
    self.assertIn("zero_gradient", found)

  def test_parameters_are_no_data(self):
    def linear(x, parameters, labels, where):
      logits = jnp.where(where[:, None], x, 0) @ parameters["w"]
      log_p = jax.nn.log_softmax(logits + parameters["b"])
      labels = jnp.where(where, labels, 0)[:, None]
      chosen = jnp.take_along_axis(log_p, labels, -1)[:, 0]
      return jnp.where(where, -chosen, 0)

    parameters = {
      "w": planted_faults.normal(1, 3, 6),
      "b": planted_faults.normal(2, 6),
    }
    self.assertEqual(
      self.clauses(
        linear,
        planted_faults.VECTORS,
        parameters,
        planted_faults.INDEX,
        where=planted_faults.EXAMPLES,
      ),
      [],
    )

  def test_a_loss_that_cannot_be_traced(self):
    def cleaned(predictions, where):
      if bool(where.any()):  # None has no such method.
        return jnp.where(where, jnp.nan_to_num(predictions), 0) ** 2
      return jnp.zeros_like(predictions)

    self.assertEqual(
      self.clauses(cleaned, PREDICTIONS, transforms=("eager",), samples=2),
      ["honesty"],
    )

  def test_a_comparison_that_nan_fails_hides_nothing(self):
    def hinge(scores, where):
      margins = 1 - jnp.where(where, scores, 1)
      return jnp.where(margins > 0, margins, 0)

    self.assertEqual(self.clauses(hinge, PREDICTIONS), [])

  @parameterized.parameters(np.asarray, jnp.asarray)
  def test_kinds_of_arrays(self, convert):
    """A loss by itself has arrays of JAX, which can do more than NumPy's."""
    seen = []

    def record(predictions, labels, where):
      given = (predictions, labels, where)
      if not any(isinstance(x, jax.core.Tracer) for x in given):
        seen.append([isinstance(x, jax.Array) for x in given])
      return jnp.where(where, predictions, 0) * (labels[:, None] > 0)

    arrays = map(convert, (PREDICTIONS, planted_faults.INDEX))
    found = self.clauses(
      record, *arrays, where=convert(ELEMENTS), transforms=("eager", "jit")
    )
    self.assertEqual(found, [])
    self.assertEqual(seen[0], [True] * 3)
    for each in seen:
      self.assertTrue(all(each))

  def test_axes_of_the_result(self):
    def moved(predictions, where):
      kept = jnp.where(where, predictions, 0)
      return jnp.sum(kept**2, -1)[None]

    for axes in ((None, 0), None):
      self.assertEqual(
        self.clauses(moved, PREDICTIONS, axes={"return": axes}), []
      )

  def test_what_is_no_data_is_passed_on(self):
    def noisy(predictions, key, where, *, kind):
      assert kind == "normal"
      noise = jax.random.normal(key, (), predictions.dtype)
      return jnp.where(where, predictions + noise, 0) ** 2

    key = jax.random.key(0)
    self.assertEqual(self.clauses(noisy, PREDICTIONS, key, kind="normal"), [])

  def test_a_leak_for_concrete_arrays_alone(self):
    def unless_traced(predictions, where):
      if isinstance(predictions, jax.core.Tracer):
        return jnp.where(where, predictions, 0)
      return predictions * 1.0

    found = self.clauses(
      unless_traced, PREDICTIONS, transforms=("eager", "jit")
    )
    self.assertIn("invariance", found)

  def test_a_nan_inside_of_a_loop(self):
    def in_order(predictions, where):
      def step(total, row):
        x, kept = row
        mean = jnp.sum(jnp.where(kept, x, 0)) / jnp.sum(kept)
        return total, jnp.where(jnp.any(kept), mean, 0)

      return jax.lax.scan(step, 0.0, (predictions, where))[1]

    report = testing.check_mask_safe(
      in_order, PREDICTIONS, where=ELEMENTS, **self.options
    )
    self.assertEqual(report.clauses["clean_arithmetic"], "broken")
    (code,) = {f.code for f in report.findings}
    self.assertStartsWith(code, "mean = ")

  def test_a_label_out_of_range_is_at_fault(self):
    def with_nan(logits, labels, where):
      log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0))
      chosen = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
      return jnp.where(where, -chosen, 0)

    report = testing.check_mask_safe(
      with_nan,
      planted_faults.LOGITS,
      planted_faults.INDEX,
      where=planted_faults.EXAMPLES,
      **self.options,
    )
    (finding,) = report.findings
    self.assertEqual(finding.argument, "labels")
    self.assertEqual(finding.poison, "-100")
    self.assertEqual(finding.primitive, "gather")

  def test_without_reverse_mode(self):
    """A loss with values alone is compared by its values."""

    def count_up(predictions, where):
      total = jnp.sum(jnp.where(where, predictions, 0) ** 2, -1)
      shares = total / predictions.shape[-1]
      return jax.lax.while_loop(
        lambda s: jnp.all(s < 0), lambda s: s + 1, shares
      )

    found = self.clauses(count_up, PREDICTIONS, derivatives=("value",))
    self.assertEqual(found, ["compaction"])


@pytest.mark.nightly
class AllOfArgumentsTest(ArgumentsTest):
  """With all derivatives and transformations."""

  options: dict = {}  # noqa: RUF012

  def test_cancelling_derivatives(self):
    """Derivatives that are 0 up to rounding are no finding."""
    for seed in range(3):
      x, y = (planted_faults.normal(seed + i, 2, 4, 5) for i in (0, 10))
      where = planted_faults.uniform(seed, 4, 5) < 0.7
      self.assertEqual(
        self.clauses(
          optax.cosine_distance,
          x,
          y,
          where=np.stack([where, ~where]),
          samples=4,
        ),
        [],
      )


class UsageTest(parameterized.TestCase):
  def check_raises(self, error, text, loss=masked_square, args=None, **options):
    with self.assertRaisesRegex(error, text):
      testing.check_mask_safe(
        loss,
        *((PREDICTIONS, TARGETS) if args is None else args),
        **{"where": ELEMENTS, **options},
      )

  def test_where(self):
    self.check_raises(
      TypeError, "int64.*where != 0", where=ELEMENTS.astype(int)
    )
    self.check_raises(ValueError, r"shape \(3,\)", where=np.ones(3, bool))

  def test_arguments(self):
    self.check_raises(ValueError, "no array", args=([1.0], [2.0]))
    empty = np.zeros((0, 5), "float32")
    self.check_raises(
      ValueError, r"\(0, 5\)", args=(empty, empty), where=empty == 0
    )
    self.check_raises(
      ValueError, "predictions int32", args=(np.ones(3, "int32"),)
    )
    large = np.zeros((2048, 512), "float32")
    self.check_raises(
      ValueError, "2,097,152 numbers", args=(large, large), where=large == 0
    )
    broken = np.where(ELEMENTS, np.nan, PREDICTIONS)
    self.check_raises(
      ValueError, "`predictions`.*included", args=(broken, TARGETS)
    )

  def test_results(self):
    self.check_raises(
      TypeError, "tuple", lambda p, t, where: (masked_square(p, t, where), 1)
    )
    self.check_raises(TypeError, "int32", lambda p, t, where: jnp.sum(where))

  @parameterized.parameters(
    ({"skip": ("nothing",)}, ValueError, "`skip` has 'nothing'.*invariance"),
    ({"skip": "empty"}, TypeError, r"skip=\('empty',\)"),
    ({"skip": ("accepts",)}, ValueError, "`skip` has 'accepts'"),
    ({"derivatives": ("third",)}, ValueError, "'third'.*hessian"),
    ({"transforms": ("pmap",)}, ValueError, "'pmap'.*vmap"),
    ({"masks": ("some",)}, ValueError, "'some'.*rows"),
    ({"dtypes": ("int32",)}, ValueError, "int32.*floating"),
    ({"samples": 0}, ValueError, "`samples`.*0"),
    ({"masks": ()}, ValueError, "`masks` is empty"),
    ({"dtypes": "float16"}, TypeError, r"dtypes=\('float16',\)"),
    ({"axes": {"targets": (0, 0)}}, ValueError, "twice for `targets`"),
    ({"axes": {"weights": (0,)}}, ValueError, "weights.*predictions, targets"),
    (
      {"axes": {"targets": (0,)}},
      ValueError,
      "has 1 entries, but the array has shape",
    ),
    ({"axes": {"targets": (0, 2)}}, ValueError, "has 2 for `targets`"),
    ({"axes": {"where": (0,)}}, ValueError, "where"),
    ({"derivative": ("value",)}, TypeError, "mean `derivatives`.*has_aux"),
  )
  def test_options(self, options, error, text):
    self.check_raises(error, text, **options)

  @parameterized.parameters(
    (
      {"where": "batch['weights']"},
      TypeError,
      r"`batch\['weights'\]` must be boolean, but has dtype float32",
    ),
    (
      {"where": lambda batch: batch["weights"]},
      TypeError,
      r"`where\(\.\.\.\)` must be boolean, but has dtype float32",
    ),
    (
      {"where": "batch['weights']", "numeric_where": True},
      ValueError,
      r"`batch\['weights'\]` may have zeros and ones, but has 0\.5",
    ),
    (
      {"where": "batch['msk']"},
      ValueError,
      r"batch\['msk'\].*params\['w'\], batch\['mask'\], batch\['weights'\]",
    ),
    (
      {"where": lambda lengths: lengths > 0},
      ValueError,
      "function of lengths, but the arguments of step are params, batch",
    ),
    (
      {"where": "batch['mask']", "axes": {"batch['z']": None}},
      ValueError,
      r"batch\['z'\].*params\['w'\], batch\['weights'\], batch\['x'\]",
    ),
  )
  def test_steps(self, options, error, text):
    """Errors name the arrays as the caller does."""

    def step(params, batch):
      kept = jnp.where(batch["mask"][:, None], batch["x"], 0)
      return jnp.sum(jnp.square(kept @ params["w"]))

    batch = {
      "x": planted_faults.VECTORS,
      "mask": planted_faults.EXAMPLES,
      "weights": np.array([1, 0, 0.5, 1], "float32"),
    }
    params = {"w": planted_faults.normal(1, 3)}
    self.check_raises(error, text, step, (params, batch), **options)

  def test_masks_by_name(self):
    """The error about a dtype has the name of the parameter."""

    def loss(predictions, mask):
      return jnp.where(mask, predictions, 0)

    self.check_raises(
      TypeError,
      "`mask` must be boolean, but has dtype float32.*`mask != 0`",
      loss,
      (PREDICTIONS,),
      where=ELEMENTS.astype("float32"),
      where_name="mask",
    )

  def test_a_loss_that_raises_is_a_finding(self):
    def no_mask(predictions, targets):
      return predictions - targets

    report = testing.check_mask_safe(
      no_mask, PREDICTIONS, TARGETS, where=ELEMENTS
    )
    self.assertEqual([f.clause for f in report.findings], ["accepts"])
    self.assertIn("has no argument `where`", str(report))
    self.assertNotIn("skip=", str(report))
    self.assertIn("does not run", report.clauses["invariance"])


if __name__ == "__main__":
  absltest.main()
