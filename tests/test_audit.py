"""The command `optax-masking audit`, and its findings in Optax."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

import numpy as np
import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import MASKED

from optax_masking.testing import (
  CLAUSES,
  Finding,
  MaskCase,
  Report,
  _api,
  _audit,
)
from optax_masking.testing._find import Loss

(COMMAND,) = importlib.metadata.entry_points(
  group="console_scripts", name="optax-masking"
)
main = COMMAND.load()
X = np.linspace(-1, 1, 6, dtype="float32").reshape(2, 3)

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

  def of_five_axes(volume, where):
    a, b, c, d, e = volume.shape
    return jnp.where(where, volume, 0)

  def of_tokens(logits, labels, mask):
    batch, time, classes = logits.shape
    chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.where(mask, chosen, 0)

  def of_images(image, target, mask):
    batch, height, width, channels = image.shape
    return jnp.sum(jnp.where(mask[..., None], image - target, 0) ** 2)

  def of_one_axis(values, where):
    (size,) = values.shape
    return jnp.where(where, values, 0)

  def of_soft_labels(logits, labels, mask):
    return jnp.where(mask, jnp.sum(logits * labels, -1), 0)

  def in_float32(predictions, targets, where):
    if predictions.dtype != jnp.float32:
      raise TypeError("float32, please")
    return jnp.where(where, predictions - targets, 0)

  def loss_fn(params, batch):
    return jnp.sum(params["w"] * batch["x"])

  def with_a_model(params, x, mask):
    return jnp.sum(params["w"] * x, where=mask)

  def with_aux(x, where):
    return jnp.sum(x, where=where), {}

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
    ("optax.losses", "Did you mean optax?"),
    ("Optax-Masking", "Did you mean optax_masking?"),
    ("optax.kl_divergence", "Did you mean optax --loss kl_divergence?"),
    ("some_losses.right", "Did you mean some_losses:right?"),
    ("some_losses:rigt", "Did you mean right?"),
    ("missing_module:loss", "missing_module"),
    ("some_losses:nothing", "nothing"),
    ("some_losses:number", "is int"),
    ("some_losses:of_five_axes", "MaskCase"),
    ("some_losses:without_mask", "where_name="),
    ("some_losses:unusable", "where != 0"),
    ("some_losses:raising", "RuntimeError: at the start"),
    (
      "some_losses:loss_fn",
      "MaskCase(loss_fn, params, batch, where=\"batch['mask']\")",
    ),
    (
      "some_losses:with_a_model",
      "MaskCase(with_a_model, params, x, where=mask,",
    ),
    ("some_losses:with_aux", "has_aux=True"),
  )
  def test_wrong_target(self, target, text):
    status, output, errors = self.audit(target)
    self.assertEqual((status, output), (2, ""))
    self.assertIn(text, errors)
    self.assertNotIn("usage:", errors)
    self.assertLen(errors.splitlines(), 2)
    self.assertEndsWith(errors, "\nsee optax-masking audit --help\n")

  @parameterized.parameters(
    (("--format", "pdf", "optax"), "invalid choice"),
    (("--loss", "nothing", "optax"), "softmax_cross_entropy"),
    (("--update-baseline", "optax"), "--baseline"),
    (("--baseline", "missing.json", "optax"), "--update-baseline"),
    (("--baseline", "some_losses.py", "optax"), "no baseline"),
    (("--baseline", ".", "optax"), "is a folder"),
    (("--baseline", ".", "--update-baseline", "optax"), "is a folder"),
    (("--output", "missing/file", "optax"), "no folder"),
    (("--output", ".", "optax"), "is a folder"),
    (("--also", "json=.", "optax"), "is a folder"),
    (("--loss", "kl_divergense", "optax"), "Did you mean kl_divergence?"),
    (("--also", "html", "optax"), "FORMAT=FILE"),
    (("--jobs", "0", "optax"), "--jobs"),
  )
  def test_wrong_usage(self, arguments, text):
    status, output, errors = self.audit(*arguments)
    self.assertEqual((status, output), (2, ""))
    self.assertIn(text, errors)

  @parameterized.parameters(
    ("[1, null]", "list, not an object"),
    ("null", "NoneType"),
    ("{}", "`schema`"),
    ('{"schema": 1}', "`quick`"),
    ('{"schema": 1, "quick": 1, "findings": []}', "`quick`"),
    ('{"schema": 1, "quick": true, "findings": {}}', "`findings`"),
    ('{"schema": 1, "quick": true, "findings": ["a", null]}', "null"),
    ("{", "JSONDecodeError"),
  )
  def test_malformed_baseline(self, content, text):
    """Is refused before the audit, which would replace it."""
    pathlib.Path("known.json").write_text(content)
    for update in ((), ("--update-baseline",)):
      status, output, errors = self.audit(
        "--baseline", "known.json", *update, "some_losses:nothing"
      )
      self.assertEqual((status, output), (2, ""))
      self.assertIn("known.json is no baseline", errors)
      self.assertIn(text, errors)
    self.assertEqual(pathlib.Path("known.json").read_text(), content)

  def test_no_command(self):
    status, output, errors = run()
    self.assertEqual((status, errors), (0, ""))
    self.assertStartsWith(output, "usage: optax-masking")
    self.assertIn("audit", output)

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


def fake_report(case, clauses=None, **options):
  """The report of a check that finds nothing."""
  del options
  clauses = clauses or dict.fromkeys(CLAUSES, "kept")
  return Report(case.name, (), clauses, 1, 0.0, f"data of {case.name}")


class FakeAuditTest(parameterized.TestCase):
  """The command, with a check that takes no time."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.enter_context(contextlib.chdir(folder))
    pathlib.Path("some_losses.py").write_text(textwrap.dedent(LOSSES))
    self.enter_context(mock.patch.object(sys, "path", list(sys.path)))
    self.addCleanup(sys.modules.pop, "some_losses", None)
    self.check = self.enter_context(
      mock.patch.object(_audit, "check_case", side_effect=fake_report)
    )

  def audit(self, *arguments):
    return run("audit", "--jobs=1", *arguments)

  def settings(self, text):
    pathlib.Path("pyproject.toml").write_text(f"[tool.optax-masking]\n{text}")

  def test_settings(self):
    """They are those of pyproject.toml, if there is no TARGET."""
    self.settings(
      'targets = ["some_losses:cases"]\nquick = true\nformat = "json"\n'
      'loss = ["left out"]\nalso = ["text=text.out"]\njobs = 1\n'
    )
    status, output, _ = self.audit()
    self.assertEqual(status, 0)
    read = json.loads(output)
    self.assertEqual(list(read["targets"]["some_losses:cases"]), ["left out"])
    self.assertTrue(read["quick"])
    self.assertIn("left out", pathlib.Path("text.out").read_text())

    _, output, _ = self.audit("--no-quick", "--format", "markdown")
    self.assertStartsWith(output, "## Mask contract: audit\n")
    status, output, _ = self.audit("some_losses:made")
    self.assertStartsWith(output, "Audit of the mask contract")

  def test_baseline_of_settings(self):
    pathlib.Path("known.json").write_text('{"schema": 1, "quick": true}')
    self.settings('baseline = "known.json"\nquick = true\n')
    status, _, errors = self.audit()
    self.assertEqual(status, 2)
    self.assertIn("known.json is no baseline", errors)

  @parameterized.parameters(
    ("target = ['optax']", "`target`"),
    ("targets = 'optax'", "`targets` of [tool.optax-masking] must be a list"),
    ("targets = [1]", "`targets`"),
    ("quick = 'yes'", "`quick`"),
    ("jobs = true", "`jobs`"),
    ("format = 'pdf'", "`format`"),
    ("baseline = 3", "`baseline`"),
    ("quick = ", "pyproject.toml can't be read"),
  )
  def test_wrong_settings(self, text, message):
    self.settings(text)
    status, output, errors = self.audit()
    self.assertEqual((status, output), (2, ""))
    self.assertIn(message, errors)

  @parameterized.parameters(
    ("of_tokens", "(3, 5, 7), (3, 5)", (3, 5)),
    ("of_images", "(3, 5, 7, 2), (3, 5, 7, 2)", (3, 5, 7)),
    ("of_one_axis", "(7,)", (7,)),
    ("of_soft_labels", "(3, 5, 7), (3, 5, 7)", (3, 5)),
    ("wrong", "(5, 7), (5, 7)", (5, 7)),
    ("of_three_axes", "(3, 5, 7)", (3, 5, 7)),
  )
  def test_guessed_shapes(self, name, shapes, mask_shape):
    self.audit(f"some_losses:{name}")
    for (case,), _ in self.check.call_args_list:
      self.assertEqual(", ".join(str(x.shape) for x in case.args), shapes)
      self.assertEqual(case.where.shape, mask_shape)
    dtypes = [
      case.options["dtypes"] for (case,), _ in self.check.call_args_list
    ]
    self.assertEqual(dtypes, [("float32",), ("float16",), ("bfloat16",)])

  def test_a_wrong_axis_is_no_guess(self):
    """Labels of sequences fit there, along the wrong axis."""
    self.audit("some_losses:labelled")
    ((case,), _), *_ = self.check.call_args_list
    self.assertEqual(case.options["labels"].shape, case.args[0].shape[:1])

  def test_dtypes_in_which_a_loss_does_not_run(self):
    _, output, _ = self.audit("some_losses:in_float32", "--format", "json")
    ((loss,),) = (x.values() for x in json.loads(output)["targets"].values())
    self.assertEqual(
      loss["data"],
      "data of in_float32; not in float16: TypeError: float32, please; not in"
      " bfloat16: TypeError: float32, please",
    )
    self.assertEqual(self.check.call_count, 1)
    _, output, _ = self.audit(
      "some_losses:in_float32", "--quick", "--format", "json"
    )
    self.assertNotIn("float16", output)

  @parameterized.parameters("ctc_loss", "ctc_loss_with_forward_probs")
  def test_adapters_do_not_hide_that_there_is_no_where(self, name):
    if "where" in inspect.signature(getattr(upstream, name)).parameters:
      self.skipTest("this Optax has it")
    status, output, _ = self.audit("optax", "optax_masking", "--loss", name)
    self.assertEqual(status, 1)
    self.assertIn("optax: 0 of 1 loss clean, 1 without `where`", output)
    self.assertIn("optax_masking: 1 of 1 loss clean, 0 findings", output)

  def test_versions_are_those_of_what_was_imported(self):
    with mock.patch.multiple(
      upstream, __version__="9.8.7", __file__="/a/checkout/optax/__init__.py"
    ):
      _, output, _ = self.audit("some_losses:made", "--format", "json")
    self.assertEqual(
      json.loads(output)["versions"]["optax"], "9.8.7 (/a/checkout/optax)"
    )

  @parameterized.parameters("text", "markdown")
  def test_ascii(self, format_):
    """Kept, broken and not tried are told apart without Unicode."""
    clauses = {c: "kept" for c in CLAUSES} | {"honesty": "not shown"}

    def report(case, **options):
      return dataclasses.replace(
        fake_report(case, {**clauses, "empty": "broken"}),
        findings=(Finding("empty", "It is 1."),),
      )

    self.check.side_effect = report
    raw = io.BytesIO()
    with redirect_stdout(io.TextIOWrapper(raw, encoding="ascii")) as output:
      main(["audit", "--jobs=1", f"--format={format_}", "some_losses:made"])
      output.flush()
    written = raw.getvalue().decode()
    row = {
      "text": "of_three_axes  + + + + x + + - + +",
      "markdown": " | ".join("++++x++-++"),
    }[format_]
    self.assertIn(row, written)
    self.assertRegex(written, r"\+ kept,? +x broken,? +- not tried")
    self.assertNotIn("?", written)

  def test_a_quick_audit_narrows_the_options_of_a_case(self):
    case = MaskCase(
      abs, X, where=X > 0, derivatives=("value", "jvp"), samples=3, strict=True
    )
    with mock.patch.object(_api, "check_mask_safe") as check:
      check.return_value = fake_report(case)
      _api_check = _api.check_case
      with mock.patch.object(_audit, "check_case", _api_check):
        _audit.check_loss(Loss("target", "abs", (case,)), quick=True)
    _, options = check.call_args
    self.assertEqual(options["derivatives"], ("value",))
    self.assertEqual(options["samples"], 3)
    self.assertEqual(options["transforms"], ("eager", "jit"))
    self.assertIs(options["strict"], True)

  def test_a_strict_case_fails_without_a_finding(self):
    self.check.side_effect = lambda case: dataclasses.replace(
      fake_report(case, {"empty": "there is nothing to try it on"}), strict=True
    )
    status, output, _ = self.audit("some_losses:made")
    self.assertEqual(status, 1)
    self.assertIn("0 of 1 loss clean", output)

  def test_cases_are_merged(self):
    reports = [
      Report("a", (), {"empty": empty}, 1, 1.0, "x", notes)
      for empty, notes in (
        ("does not apply: no", ("one",)),
        ("not now", ("one", "two")),
      )
    ]
    merged = _audit.merge_reports("a", reports, 3.0)
    self.assertEqual(merged.clauses, {"empty": "not now"})
    self.assertEqual(merged.notes, ("one", "two"))


SLOW_LOSSES = """
  import os, pathlib, time
  import numpy as np
  from optax_masking.testing import MaskCase

  def slow(x, where):
    pathlib.Path(f"pid{os.getpid()}").touch()
    time.sleep(600)

  X = np.ones(3, "float32")
  cases = [MaskCase(slow, X, where=X > 0) for _ in range(5)]
"""


@pytest.mark.slow
class InterruptTest(parameterized.TestCase):
  @parameterized.parameters(2, 1)
  def test_interrupt(self, jobs):
    """Ctrl-C ends the command and its processes at once."""
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (folder / "slow_losses.py").write_text(textwrap.dedent(SLOW_LOSSES))
    command = [sys.executable, "-c", "from optax_masking._command import main;"]
    command[-1] += "raise SystemExit(main())"
    # A terminal sends Ctrl-C to the process and to those that it has started.
    process = subprocess.Popen(
      [*command, "audit", f"--jobs={jobs}", "slow_losses:cases"],
      cwd=folder,
      env={
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.addCleanup(process.kill)
    deadline = time.monotonic() + 180
    while len(pids := list(folder.glob("pid*"))) < jobs:
      self.assertIsNone(process.poll())
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.1)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    self.assertLess(time.monotonic() - start, 10)
    self.assertEqual(process.returncode, 130)
    self.assertEqual(output, "")
    self.assertNotIn("Traceback", errors)
    self.assertIn("interrupted", errors)
    for pid in pids:
      with self.assertRaises(ProcessLookupError):
        os.kill(int(pid.name.removeprefix("pid")), 0)


def test_pre_commit_hook():
  """It runs the command that is installed, without the names of files."""
  file = pathlib.Path(__file__).parents[1] / ".pre-commit-hooks.yaml"
  if not file.exists():
    pytest.skip("the hook is no part of a copy of the tests")
  text = file.read_text()
  assert text.count("- id: ") == 1
  hook = dict(re.findall(r"(?m)^(?:- |  )(\w+): (.+)$", text))
  assert len(hook) == len(text.splitlines())
  assert hook["id"] == "optax-masking-audit"
  assert hook["entry"] == f"{COMMAND.name} audit"
  assert hook["language"] == "python"
  assert hook["pass_filenames"] == "false"
  assert "additional_dependencies" not in hook


def test_actions_are_pinned():
  """By a commit: a tag can be moved to other code."""
  files = pathlib.Path(__file__).parents[1].glob(".github/**/*.yml")
  uses = [x for f in files for x in re.findall(r"uses: (.+)", f.read_text())]
  assert uses
  for action in uses:
    assert re.fullmatch(r"\./.+|[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action)


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
