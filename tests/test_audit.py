"""The command `optax-masking audit`, and its findings in Optax."""

import functools
import importlib.metadata
import io
import json
import os
import pathlib
import sys
import tempfile
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import MASKED

(COMMAND,) = importlib.metadata.entry_points(
  group="console_scripts", name="optax-masking"
)
main = COMMAND.load()

LOSSES = """
  import numpy as np
  import jax.numpy as jnp
  from optax_masking.testing import MaskCase

  def wrong(predictions, targets, where):
    return jnp.where(where, targets * jnp.log(predictions), 0)

  def right(predictions, targets, mask):
    return jnp.sum(jnp.where(mask, predictions - targets, 0) ** 2)

  def labelled(scores, *, labels, where):
    chosen = jnp.take_along_axis(scores, labels[:, None] % 5, -1)[:, 0]
    return jnp.where(where, chosen, 0)

  def of_three_axes(volume, where):
    x, y, z = volume.shape
    return jnp.where(where, volume, 0)

  def without_mask(predictions):
    return predictions

  X = np.linspace(0.2, 0.8, 12, dtype="float32").reshape(2, 3, 2)
  cases = [
    MaskCase(of_three_axes, X, where=X > 0.5),
    MaskCase(wrong, X, X, where=X > 0.5, name="left out",
             skip=("zero_gradient",)),
    MaskCase(of_three_axes, X, where=X > 0.6, name="left out"),
  ]
  unusable = [MaskCase(wrong, X, X, where=X)]

  def made():
    return cases[0]

  def raising():
    raise RuntimeError("at the start")

  number = 3
"""


def run(*arguments):
  """Runs the command; returns its status, output and errors."""
  output, errors = io.StringIO(), io.StringIO()
  with redirect_stdout(output), redirect_stderr(errors):
    try:
      status = main(list(arguments))
    except SystemExit as exit_:
      status = exit_.code
  return status, output.getvalue(), errors.getvalue()


def findings(*arguments):
  """The findings of a target, by loss."""
  _, output, errors = run("audit", "--format", "json", *arguments)
  (losses,) = json.loads(output)["targets"].values()
  assert "error" not in errors, errors
  return {name: report["findings"] for name, report in losses.items()}


@functools.cache
def audit_of_optax(name, *options):
  return findings(*options, "optax", "--loss", name)[name]


class AuditTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    )
    (self.folder / "some_losses.py").write_text(textwrap.dedent(LOSSES))
    before = os.getcwd()
    os.chdir(self.folder)
    self.addCleanup(os.chdir, before)
    self.enter_context(mock.patch.object(sys, "path", list(sys.path)))
    self.addCleanup(sys.modules.pop, "some_losses", None)

  def audit(self, *arguments):
    return run("audit", "--quick", *arguments)

  @pytest.mark.slow
  def test_status(self):
    status, output, _ = self.audit("some_losses:right")
    self.assertEqual(status, 0, output)
    status, output, _ = self.audit("some_losses:wrong")
    self.assertEqual(status, 1)
    self.assertIn("zero_gradient", output)

  @parameterized.parameters(
    ("nothing", "is no target"),
    ("missing_module:loss", "missing_module"),
    ("some_losses:nothing", "nothing"),
    ("some_losses:number", "is int"),
    ("some_losses:of_three_axes", "MaskCase"),
    ("some_losses:without_mask", "where_name="),
    ("some_losses:unusable", "where != 0"),
    ("some_losses:raising", "RuntimeError: at the start"),
  )
  def test_wrong_target(self, target, text):
    status, output, errors = self.audit(target)
    self.assertEqual((status, output), (2, ""))
    self.assertIn(text, errors)
    self.assertIn("usage:", errors)

  @parameterized.parameters(
    (("--format", "pdf", "optax"), "invalid choice"),
    (("--loss", "nothing", "optax"), "softmax_cross_entropy"),
    (("--update-baseline", "optax"), "--baseline"),
    (("--baseline", "missing.json", "optax"), "--update-baseline"),
    (("--baseline", "some_losses.py", "optax"), "no baseline"),
    (("--output", "missing/file", "optax"), "no folder"),
    (("--also", "html", "optax"), "FORMAT=FILE"),
    (("--jobs", "0", "optax"), "--jobs"),
  )
  def test_wrong_usage(self, arguments, text):
    status, output, errors = self.audit(*arguments)
    self.assertEqual((status, output), (2, ""))
    self.assertIn(text, errors)

  @parameterized.parameters(("--format", "html"), ("--also", "html=page.html"))
  def test_page_without_jinja(self, *arguments):
    """The command refuses it before the audit starts."""
    with mock.patch.dict(sys.modules, {"jinja2": None}):
      status, output, errors = self.audit(*arguments, "some_losses:wrong")
    self.assertEqual((status, output), (2, ""))
    self.assertEqual(
      errors,
      f"optax-masking audit: error: {' '.join(arguments)} needs Jinja2:"
      " pip install 'optax_masking[report]'\n",
    )
    self.assertFalse(os.path.exists("page.html"))

  @parameterized.parameters(
    ("some_losses:labelled", "labelled"), ("some_losses:made", "of_three_axes")
  )
  @pytest.mark.slow
  def test_targets_of_ones_own(self, target, name):
    status, output, _ = self.audit(target)
    self.assertIn(f"{name} ", output)
    self.assertEqual(status, 0, output)

  @pytest.mark.slow
  def test_cases(self):
    status, output, _ = self.audit("some_losses:cases", "--format", "json")
    (losses,) = json.loads(output)["targets"].values()
    self.assertEqual(list(losses), ["of_three_axes", "left out", "left out#2"])
    self.assertNotIn("zero_gradient", losses["left out"]["clauses"])
    self.assertEqual(status, 0, output)

  @pytest.mark.slow
  def test_baseline(self):
    arguments = ("some_losses:wrong", "--baseline", "known.json")
    status, *_ = self.audit(*arguments, "--update-baseline")
    self.assertEqual(status, 0)
    known = json.loads(pathlib.Path("known.json").read_text())
    self.assertTrue(known["findings"])

    status, output, _ = self.audit(*arguments)
    self.assertEqual(status, 0, output)

    # One is new.
    first, *others = known["findings"]
    changed = {**known, "findings": others}
    pathlib.Path("known.json").write_text(json.dumps(changed))
    status, output, _ = self.audit(*arguments, "--format", "json")
    self.assertEqual(status, 1)
    self.assertEqual(json.loads(output)["new"], [first])

    # A baseline of a quick audit is not one of a full audit.
    status, _, errors = run("audit", *arguments)
    self.assertEqual(status, 2)
    self.assertIn("--quick", errors)

    # The findings of other losses stay as they are.
    status, *_ = self.audit(
      "some_losses:right", *arguments[1:], "--update-base"
    )
    self.assertEqual(status, 0)
    self.assertEqual(
      json.loads(pathlib.Path("known.json").read_text()), changed
    )

    # One is gone, and one is of a loss that was not checked.
    gone = "some_losses:wrong/wrong/empty/-/value/-/float32"
    elsewhere = "optax/kl_divergence/empty/-/value/-/float32"
    changed = {**known, "findings": [*known["findings"], gone, elsewhere]}
    pathlib.Path("known.json").write_text(json.dumps(changed))
    status, output, _ = self.audit(*arguments, "--format", "json")
    self.assertEqual(status, 0)
    self.assertEqual(json.loads(output)["gone"], [gone])
    _, output, _ = self.audit(*arguments)
    self.assertIn(gone, output.replace("\n", ""))

  @pytest.mark.slow
  def test_formats_and_files(self):
    also = [f"--also={f}={f}.out" for f in ("markdown", "github", "html")]
    status, output, _ = self.audit(
      "some_losses:wrong", "--output", "text.out", *also
    )
    self.assertEqual((status, output), (1, ""))
    for file, text in (
      ("text", "zero_gradient"),
      ("markdown", "| :-- |"),
      ("github", "::error file=some_losses.py,line="),
      ("html", "<!doctype html>"),
    ):
      content = pathlib.Path(f"{file}.out").read_text(encoding="utf-8")
      self.assertIn(text, content)
      self.assertNotIn("\x1b", content)

  @pytest.mark.slow
  def test_progress(self):
    """On a terminal the progress is one line, which is erased in the end."""
    errors = io.StringIO()
    errors.isatty = lambda: True  # type: ignore[method-assign]
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
      main(["audit", "--quick", "some_losses:cases"])
    progress = errors.getvalue()
    self.assertIn("[0/3] some_losses:cases of_three_axes", progress)
    self.assertIn("[3/3]", progress)
    self.assertNotIn("\n", progress)
    self.assertTrue(progress.endswith("\r\x1b[K"))

  @pytest.mark.slow
  def test_output_that_has_no_unicode(self):
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")) as output:
      main(["audit", "--quick", "some_losses:wrong"])
      output.flush()
    self.assertIn(b"zero_gradient", raw.getvalue())


@pytest.mark.slow
class OptaxTest(parameterized.TestCase):
  """A quick audit finds the known faults of Optax."""

  options: tuple[str, ...] = ("--quick",)

  def setUp(self):
    super().setUp()
    if not upstream.__version__.startswith("0.2.8"):
      self.skipTest("known of Optax 0.2.8")

  def found(self, name, **facts):
    """Whether there is a finding with some of its attributes."""
    return any(
      all(
        finding[k] in v if isinstance(v, tuple) else finding[k] == v
        for k, v in facts.items()
      )
      for finding in self.of_optax(name)
    )

  def of_optax(self, name):
    return audit_of_optax(name, *self.options)

  def test_softmax(self):
    """Gradients of labels on clean data, and a mask of the wrong axis."""
    name = "softmax_cross_entropy"
    self.check_gradient_of_labels(name)
    self.assertTrue(self.found(name, clause="compaction", derivative="value"))

  def check_gradient_of_labels(self, name):
    self.assertTrue(
      self.found(
        name, clause="zero_gradient", wrt="labels", poison=None, got="nan"
      )
    )

  def test_targets(self):
    self.check_targets("kl_divergence")

  def check_targets(self, name):
    self.assertTrue(
      self.found(name, clause="zero_gradient", argument="targets", got="nan")
    )

  def test_log_targets(self):
    for argument in ("log_predictions", "log_targets"):
      self.assertTrue(
        self.found(
          "kl_divergence_with_log_targets",
          clause="zero_gradient",
          argument=argument,
          got="nan",
        )
      )

  def test_cosine(self):
    self.check_cosine("cosine_distance")

  def check_cosine(self, name):
    self.assertTrue(
      self.found(name, clause="invariance", derivative="vjp", got="nan"),
      "garbage makes the unmasked gradients NaN",
    )
    self.assertTrue(self.found(name, clause="clean_arithmetic"))
    self.assertTrue(self.found(name, clause="zero_gradient", got="nan"))

  def test_cosine_of_an_empty_row(self):
    self.assertTrue(
      self.found("cosine_distance", clause="empty", derivative="value")
    )

  def test_masked_label(self):
    name = "softmax_cross_entropy_with_integer_labels"
    self.assertTrue(self.found(name, clause="masked_label", argument="labels"))
    self.assertTrue(self.found(name, clause="zero_gradient", wrt="logits"))

  def test_smooth_labels(self):
    self.assertTrue(self.found("smooth_labels", clause="empty"))
    self.assertTrue(self.found("smooth_labels", clause="clean_arithmetic"))

  @pytest.mark.nightly
  def test_masks_of_examples(self):
    """A quick audit leaves out masks of examples."""
    self.check_masks_of_examples("kl_divergence")

  def check_masks_of_examples(self, name):
    found = audit_of_optax(name)
    clauses = {finding["clause"] for finding in found}
    self.assertIn("accepts", clauses, "if B is not C")
    self.assertIn(
      ("compaction", "value"),
      {(finding["clause"], finding["derivative"]) for finding in found},
      "if B is C",
    )

  def test_losses_without_mask(self):
    self.assertTrue(self.found("squared_error", clause="accepts"))


@pytest.mark.nightly
class FullOptaxTest(OptaxTest):
  options = ()

  def test_other_losses(self):
    self.check_gradient_of_labels("poly_loss_cross_entropy")
    self.check_targets("generalized_kl_divergence")
    self.check_cosine("cosine_similarity")

  @parameterized.parameters(
    "kl_divergence_with_log_targets",
    "generalized_kl_divergence",
    "cosine_similarity",
    "cosine_distance",
  )
  def test_masks_of_examples_in(self, name):
    self.check_masks_of_examples(name)


# Losses of three mechanisms with a fast audit: number fills, functions as fills
# and formulas with labels.
QUICK_LOSSES = (
  "kl_divergence",
  "safe_softmax_cross_entropy",
  "softmax_cross_entropy_with_integer_labels",
)


@pytest.mark.filterwarnings("ignore:The function convex_kl_divergence")
class OwnTest(parameterized.TestCase):
  """The audit finds nothing in the losses of this package."""

  def check(self, name):
    (found,) = findings("--quick", "optax_masking", "--loss", name).values()
    self.assertEqual(found, [])

  @parameterized.parameters(*QUICK_LOSSES)
  @pytest.mark.slow
  def test_nothing_is_found(self, name):
    self.check(name)

  @parameterized.parameters(sorted({*MASKED} - {*QUICK_LOSSES}))
  @pytest.mark.nightly
  def test_nothing_is_found_in_others(self, name):
    self.check(name)

  def test_every_loss_is_audited(self):
    _, _, errors = run("audit", "optax_masking", "--loss", "nothing")
    for name in MASKED:
      self.assertIn(name, errors)


if __name__ == "__main__":
  absltest.main()
