"""The commands `optax-masking stage` and `status`, on copies of Optax.

The copies are of the installed Optax, or of the checkout that the variable
OPTAX_CHECKOUT names.
"""

import ast
import builtins
import contextlib
import difflib
import importlib.metadata
import io
import os
import pathlib
import re
import shutil
import subprocess
import symtable
import sys
import tempfile
from unittest import mock

import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import MASKED

from optax_masking.upstream import _proposals

(COMMAND,) = importlib.metadata.entry_points(
  group="console_scripts", name="optax-masking"
)
main = COMMAND.load()

TESTS = pathlib.Path(__file__).parent
OPTAX = (
  pathlib.Path(os.environ["OPTAX_CHECKOUT"], "optax")
  if "OPTAX_CHECKOUT" in os.environ
  else pathlib.Path(upstream.__file__).parent
)
ALIAS = "convex_kl_divergence"
LOSSES = sorted({*MASKED} - {ALIAS})
ENGINE = "optax/losses/_masking.py"
STAGED_TESTS = "optax/losses/_masking_test.py"


def run(*arguments):
  """Runs the command; returns its exit status, output and errors."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = main(list(map(str, arguments)))
  return status, out.getvalue(), err.getvalue()


def source_files(root):
  """The texts of the Python files of a checkout, by path."""
  return {
    path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(root.rglob("*.py"))
    if path.is_file()
  }


def definition(text, name):
  return next(
    node
    for node in ast.parse(text).body
    if isinstance(node, ast.FunctionDef) and node.name == name
  )


def signature(node):
  """The defaults of all parameters, and the names of positional parameters."""
  args = node.args
  names = [p.arg for p in args.args]
  defaults = [None] * (len(names) - len(args.defaults)) + args.defaults
  found = dict(zip(names, defaults, strict=True))
  keywords = zip(args.kwonlyargs, args.kw_defaults, strict=True)
  found |= {p.arg: default for p, default in keywords}
  return {n: d and ast.unparse(d) for n, d in found.items()}, names


def undefined_names(text):
  """The names that functions of a module use without a definition."""
  module = symtable.symtable(text, "module", "exec")
  defined = {s.get_name() for s in module.get_symbols() if s.is_local()}
  found, todo = set(), [module]
  while todo:
    table = todo.pop()
    todo += table.get_children()
    for symbol in table.get_symbols():
      if symbol.is_global() and symbol.is_referenced():
        found.add(symbol.get_name())
  return found - defined - set(dir(builtins)) - {"__name__"}


def run_python(root, *arguments, **options):
  """Runs Python with the Optax of a folder; a failure shows the output."""
  path = os.pathsep.join([str(root), str(TESTS), str(TESTS.parent)])
  result = subprocess.run(
    [sys.executable, *arguments],
    env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=root,
    **options,
  )
  assert result.returncode == 0, result.stdout
  return result.stdout


def run_git(root, *arguments):
  command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=b"]
  subprocess.run([*command, *arguments], check=True, capture_output=True)


class StagingTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.copy()

  def copy(self):
    root = pathlib.Path(
      self.enter_context(tempfile.TemporaryDirectory())
    ).resolve()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(OPTAX, root / "optax", ignore=ignored)
    return root

  def stage(self, *names, root=None):
    root = self.root if root is None else root
    losses = [f"--loss={name}" for name in names]
    status, out, err = run("stage", root, *losses)
    self.assertEqual(status, 0, err)
    return out, err

  def edit(self, file, old, new):
    path = self.root / file
    text = path.read_text()
    self.assertEqual(text.count(old), 1, old)
    path.write_text(text.replace(old, new))

  def insert(self, file, name, line):
    """Puts a line behind the docstring of a loss."""
    lines = (self.root / file).read_text().splitlines(keepends=True)
    loss = definition("".join(lines), name)
    lines.insert(loss.body[0].end_lineno, line)
    (self.root / file).write_text("".join(lines))

  def assert_refused(self, *arguments, message):
    """Runs the command, which gives its reason and changes no file."""
    before = source_files(self.root)
    status, out, err = run(*arguments)
    self.assertEqual((status, out), (2, ""))
    self.assertRegex(err, message)
    self.assertEqual(source_files(self.root), before)
    return err


class StageTest(StagingTestCase):
  def test_one_loss(self):
    self.check_one_loss("sigmoid_focal_loss")

  @parameterized.parameters(sorted({*LOSSES} - {"sigmoid_focal_loss"}))
  @pytest.mark.slow
  def test_other_losses(self, name):
    self.check_one_loss(name)

  def check_one_loss(self, name):
    before = source_files(self.root)
    self.stage(name)
    after = source_files(self.root)
    changed = {file for file in after if after[file] != before.get(file)}
    (module,) = changed - {ENGINE, STAGED_TESTS}
    self.assertLen(changed, 3)
    self.assertIn(f"\ndef {name}(", before[module])
    self.check_licenses(after, module)
    self.check_inserted_lines(before, after, changed)
    self.check_names(name, after, module)
    self.check_kept_lines(name, before[module], after[module])
    self.check_signature_and_docstring(name, before[module], after[module])

  def check_licenses(self, after, module):
    license_of_old, license_of_engine, license_of_tests = (
      re.findall(r"(?m)^#.*$", after[file])[:14]
      for file in (module, ENGINE, STAGED_TESTS)
    )
    self.assertRegex(license_of_engine[0], r"^# Copyright 20\d\d DeepMind ")
    self.assertNotEqual(license_of_engine[0], license_of_old[0])
    self.assertEqual(license_of_engine, license_of_tests)
    self.assertEqual(license_of_engine[1:], license_of_old[1:])

  def check_inserted_lines(self, before, after, changed):
    inserted = []
    for file in changed:
      old = before.get(file, "").splitlines()
      diff = difflib.ndiff(old, after[file].splitlines())
      inserted += [line[2:] for line in diff if line[0] == "+"]
      # The oldest Python that Optax runs with.
      ast.parse(after[file], feature_version=(3, 10))
    for line in inserted:
      self.assertLessEqual(len(line), 80, line)
      self.assertNotIn("optax_masking", line)
      self.assertEqual(line, line.rstrip())
    # Inside of brackets Optax indents by 4 spaces.
    nested = "def axes_to_insert(\n    name: str,\n"
    self.assertTrue(nested in after[ENGINE])

  def check_names(self, name, after, module):
    """Every used name is defined, and the engine has no unused function."""
    self.assertEmpty(undefined_names(after[module]))
    self.assertEmpty(undefined_names(after[ENGINE]))
    used = set(re.findall(r"\b_masking\.(\w+)", after[module]))
    engine = symtable.symtable(after[ENGINE], ENGINE, "exec")
    self.assertContainsSubset(used, set(engine.get_identifiers()))
    text = after[ENGINE] + after[module]
    for function in engine.get_children():
      if function.get_name() != "_":
        uses = re.findall(rf"\b{function.get_name()}\b", text)
        self.assertGreater(len(uses), 1, function.get_name())
    called = {"ctc_loss": {"ctc_loss_with_forward_probs"}}.get(name, set())
    rows = set(re.findall(r'^ +\(?"(\w+)"', after[STAGED_TESTS], re.M))
    self.assertEqual(rows, {name} | called)
    self.assertNotIn("IntegerLabelsTest", after[STAGED_TESTS])
    if name in ("sigmoid_focal_loss", "kl_divergence"):
      self.assertNotIn("_unmasked_", after[module])
    imports = re.findall(r"(?m)^from (optax\S*) import (\w+)", after[module])
    self.assertEqual(imports, sorted(imports))

  def check_kept_lines(self, name, before, after):
    """Only the body that a wrapper replaces is lost.

    The last parameter may get a comma.
    """
    kept = iter([x.rstrip(",") for x in after.splitlines()])
    old = definition(before, name)
    lines = before.splitlines()
    if name == "ctc_loss":
      del lines[old.body[0].end_lineno : old.end_lineno]
    for line in lines:
      self.assertIn(line.rstrip(","), kept)

  def check_signature_and_docstring(self, name, before, after):
    old, new = definition(before, name), definition(after, name)
    old_defaults, old_positional = signature(old)
    new_defaults, new_positional = signature(new)
    if name != "make_fenchel_young_loss":
      self.assertContainsSubset({"axis", "where"}, new_defaults)
      self.assertEqual(new_defaults["where"], "None")
    self.assertEqual({n: new_defaults[n] for n in old_defaults}, old_defaults)
    self.assertEqual(
      list(new_defaults)[: len(old_defaults)], list(old_defaults)
    )
    self.assertEqual(new_positional, old_positional)
    lines = after.splitlines()[new.lineno : new.body[0].lineno]
    self.assertNotIn("", lines)
    docstring = ast.get_docstring(new)
    (arguments,) = re.findall(r"(?ms)^Args:\n(.*?)(?:\n\n|\Z)", docstring)
    indents = {len(x) for x in re.findall(r"(?m)^ *(?=\w+:)", arguments)}
    self.assertLen(indents, 1)
    for argument in new_defaults.keys() - old_defaults.keys():
      self.assertRegex(arguments, rf"(?m)^ *{argument}: ")
    if "where" in old_defaults:
      self.assertRegex(arguments, r"\n +It is boolean, with the rank")
    *_, note = re.findall(r"(?m)^\.\. versionchanged:: (.*)$", docstring)
    self.assertEqual(note, self.next_version())
    # The note is a directive of its own, and not the end of a paragraph.
    *_, above = docstring.partition(f".. versionchanged:: {note}")[0].split(
      "\n\n"
    )
    self.assertRegex(f"{above}.. ", r"^\.\. ")

  def next_version(self):
    """The next release; for a development version, the release it leads to."""
    text = (self.root / "optax/__init__.py").read_text()
    (version,) = re.findall(r'(?m)^__version__ = "(.*)"$', text)
    *numbers, last = version.removesuffix(".dev").split(".")
    return ".".join([*numbers, str(int(last) + (not version.endswith("dev")))])

  @pytest.mark.slow
  def test_order(self):
    """The result does not depend on which loss is staged first."""
    self.stage()
    one_by_one = self.copy()
    for name in reversed(LOSSES):
      self.stage(name, root=one_by_one)
    self.assertEqual(source_files(one_by_one), source_files(self.root))

  def test_twice(self):
    self.stage("l2_loss", "ctc_loss")
    before = source_files(self.root)
    out, err = self.stage("l2_loss", "ctc_loss")
    self.assertEqual(out, "")
    self.assertRegex(err, "l2_loss, .*ctc_loss: it is staged already")
    self.assertIn("There is nothing to change.", err)
    self.assertEqual(source_files(self.root), before)

  @pytest.mark.slow
  def test_edited(self):
    """A stage keeps the edits of a reviewer, and adds more losses."""
    self.stage("sigmoid_focal_loss")
    self.edit(STAGED_TESTS, "class MaskTest", "# A remark.\nclass MaskTest")
    self.edit(ENGINE, "Checks the dtype of a mask.", "Refuses other dtypes.")
    before = source_files(self.root)
    self.stage("sigmoid_focal_loss")
    self.assertEqual(source_files(self.root), before)

    names = ("hinge_loss", "softmax_cross_entropy", "cosine_distance")
    _, err = self.stage(*names)
    # Its formula has functions with derivative rules, some of them present.
    names += ("softmax_cross_entropy_with_integer_labels",)
    self.stage(names[-1])
    self.assertRegex(err, "_masking.py has been edited.* its own boolean")
    edited = source_files(self.root)
    other = self.copy()
    self.stage("sigmoid_focal_loss", *names, root=other)
    whole = source_files(other)
    as_staged = {
      ENGINE: ("Refuses other dtypes.", "Checks the dtype of a mask."),
      STAGED_TESTS: ("# A remark.\n", ""),
    }
    for file, (new, old) in as_staged.items():
      self.assertEqual(edited[file].count(new), 1)
      # The order of the rows and the empty lines may differ.
      got, expected = (
        sorted(filter(None, text.splitlines()))
        for text in (edited[file].replace(new, old), whole[file])
      )
      self.assertEqual(got, expected)
      self.assertEmpty(undefined_names(edited[file]))

  def test_edited_helper(self):
    """A stage keeps a helper that came with another loss and was edited."""
    self.stage("squared_error")
    file = "optax/losses/_regression.py"
    self.edit(file, "Masks a loss of the error", "Masks any loss of the error")
    self.stage("l2_loss")
    text = (self.root / file).read_text()
    self.assertEqual(text.count("def _loss_of_error("), 1)
    self.assertIn("any loss of the error", text)

  @pytest.mark.slow
  def test_lost(self):
    """A stage restores files and definitions that were removed."""
    self.stage("hinge_loss")
    whole = source_files(self.root)
    (self.root / STAGED_TESTS).unlink()
    (self.root / ENGINE).unlink()
    self.stage("hinge_loss")
    self.assertEqual(source_files(self.root), whole)
    for text in ('"""Empty."""\n\nimport jax\n', "X = 1\n"):
      (self.root / ENGINE).write_text(text)
      self.stage("hinge_loss")
      engine = (self.root / ENGINE).read_text()
      self.assertEmpty(undefined_names(engine))
      self.assertIn("def masked_inputs(", engine)
      self.assertIn(text.split("\n")[0], engine)
    (self.root / ENGINE).write_text("def\n")
    message = "_masking.py, line 1, is not Python"
    self.assert_refused("stage", self.root, message=message)

  @pytest.mark.slow
  def test_left_over(self):
    """A stage is refused if the files of an earlier, reverted one are left."""
    before = source_files(self.root)
    self.stage("hinge_loss")
    file = "optax/losses/_classification.py"
    (self.root / file).write_text(before[file])
    message = "If it is left over from an earlier stage, remove it, and optax/l"
    self.assert_refused("stage", self.root, message=message)

  def test_name_of_engine_is_taken(self):
    """A stage overwrites no file that it has not written."""
    message = "there is an optax/losses/_masking.py or a folder of its name"
    path = self.root / ENGINE
    for make, remove in (
      (path.touch, path.unlink),
      (path.mkdir, path.rmdir),
      (path.with_suffix("").mkdir, path.with_suffix("").rmdir),
      (lambda: path.symlink_to(self.root / "elsewhere.py"), path.unlink),
    ):
      make()
      self.assert_refused(
        *("stage", self.root, "--loss", "hinge_loss"), message=message
      )
      remove()
    self.assertFalse((self.root / "elsewhere.py").exists())

  @pytest.mark.slow
  def test_all_or_nothing(self):
    """If one file can't be written, all others stay as they are."""
    before = source_files(self.root)
    write = pathlib.Path.write_bytes

    def refuse(path, data):
      if path.name == "_smoothing.py":
        raise OSError(30, "Read-only file system", str(path))
      return write(path, data)

    with mock.patch.object(pathlib.Path, "write_bytes", refuse):
      status, _, err = run("stage", self.root)
    self.assertEqual(status, 2)
    self.assertRegex(err, "Nothing was changed, since .*_smoothing.py can't be")
    self.assertEqual(source_files(self.root), before)

  @parameterized.parameters(
    ("0.2.9", "0.2.10"),
    ("0.3.0.dev", "0.3.0"),
    ("0.3.0.dev20261122", "0.3.0"),
    ("1.0.0rc1", "1.0.0"),
    ("0.2.8.post1", "0.2.9"),
    ("0.2.8+local", "0.2.9"),
    ("0.3", "0.3.1"),
  )
  def test_version(self, version, release):
    path = self.root / "optax/__init__.py"
    line = f'__version__ = "{version}"'
    path.write_text(re.sub("(?m)^__version__.*", line, path.read_text()))
    self.stage("log_cosh")
    text = (self.root / "optax/losses/_regression.py").read_text()
    self.assertIn(f".. versionchanged:: {release}\n    Added ``axis``", text)

  def test_alias(self):
    """A deprecated name stages the loss that it calls."""
    self.stage(ALIAS)
    by_name = self.copy()
    self.stage("generalized_kl_divergence", root=by_name)
    self.assertEqual(source_files(by_name), source_files(self.root))
    _, err = self.stage(ALIAS)
    self.assertIn("a deprecated name: stage generalized_kl_divergence", err)

  def test_patch(self):
    """The checkout stays as it is, and `git apply` does what stage does."""
    losses = ("--loss", "sigmoid_focal_loss", "--loss", "hinge_loss")
    before = source_files(self.root)
    file = self.root / "losses.patch"
    status, out, _ = run("stage", self.root, *losses, "--patch", file)
    self.assertEqual(status, 0)
    self.assertRegex(out, rf"{ENGINE}: \+\d+ lines\n")
    self.assertNotIn("Test it", out)
    status, out, _ = run("stage", self.root, *losses, "--dry-run")
    self.assertEqual((status, out), (0, file.read_text()))
    self.assertEqual(source_files(self.root), before)

    run_git(self.root, "init")
    run_git(self.root, "apply", file)
    staged = self.copy()
    out, _ = self.stage("sigmoid_focal_loss", "hinge_loss", root=staged)
    self.assertEqual(source_files(self.root), source_files(staged))

    # A stage without a change writes no patch, and no patch replaces a module.
    file.unlink()
    status, _, err = run("stage", self.root, *losses, "--patch", file)
    self.assertEqual(status, 0)
    self.assertIn("There is nothing to change.", err)
    self.assertFalse(file.exists())
    module = self.root / "optax/losses/_regression.py"
    arguments = ("--loss", "log_cosh", "--patch", module)
    self.assert_refused(
      "stage", self.root, *arguments, message="is a file that"
    )

  @parameterized.parameters("crlf", "no newline at the end")
  def test_ends_of_lines(self, kind):
    # The last line of this module is the end of the loss.
    path = self.root / "optax/losses/_classification.py"
    text = path.read_bytes()
    text = text.replace(b"\n", b"\r\n") if kind == "crlf" else text[:-1]
    path.write_bytes(text)
    run_git(self.root, "init")
    run_git(self.root, "config", "core.autocrlf", "false")
    run_git(self.root, "add", ".")
    run_git(self.root, "commit", "-m", "As it is.")
    file = self.root / "losses.patch"
    name = "multiclass_sparsemax_loss"
    run("stage", self.root, "--loss", name, "--patch", file)
    self.stage(name)
    staged = path.read_bytes()
    if kind == "crlf":
      self.assertEqual(staged.count(b"\r\n"), staged.count(b"\n"))
    else:
      self.assertFalse(staged.endswith(b"\n"))
    run_git(self.root, "checkout", ".")
    (self.root / ENGINE).unlink()
    (self.root / STAGED_TESTS).unlink()
    run_git(self.root, "apply", file)
    self.assertEqual(path.read_bytes(), staged)

  def test_readme(self):
    """The README has the number of lines that a stage adds."""
    if "OPTAX_CHECKOUT" in os.environ or upstream.__version__ != "0.2.8":
      self.skipTest("The number is that of Optax 0.2.8.")
    text = (TESTS.parent / "README.md").read_text()
    (lines,) = re.findall(r"`sigmoid_focal_loss`\s+gets\s+(\d+)\s+lines", text)
    out, _ = self.stage("sigmoid_focal_loss")
    self.assertIn(f"_classification.py: +{lines} lines\n", out)

  def test_package_folder(self):
    """The folder `optax` stands for the checkout, too."""
    by_package = self.copy()
    self.stage("log_cosh", root=by_package / "optax")
    self.stage("log_cosh")
    self.assertEqual(source_files(by_package), source_files(self.root))

  @pytest.mark.slow
  def test_except(self):
    status, _, err = run("stage", self.root, "--except", "log_cosh")
    self.assertEqual(status, 0, err)
    others = self.copy()
    self.stage(*({*LOSSES} - {"log_cosh"}), root=others)
    self.assertEqual(source_files(others), source_files(self.root))

  @pytest.mark.slow
  def test_no_checkout(self):
    for folder in (self.root / "optax" / "losses", self.root / "nothing"):
      self.assert_refused("stage", folder, message="is no checkout of Optax")
    installed = self.root / "site-packages"
    shutil.copytree(self.root / "optax", installed / "optax")
    self.assert_refused("stage", installed, message="where Optax is installed")
    self.assert_refused(
      *("stage", self.root, "--loss", "hinge"),
      message="There is no loss hinge. Did you mean hinge_loss",
    )
    self.assert_refused(
      *("stage", self.root, "--patch", self.root / "nothing" / "x.patch"),
      message="can't be written",
    )
    self.edit("optax/losses/_ranking.py", "def ranking_softmax_loss", "d r")
    message = r"_ranking.py, line \d+: invalid syntax"
    self.assert_refused("stage", self.root, message=message)


# An audit takes long. The daily tests replace its verdicts by these.


def verdicts_without_finding(root, names):
  kept = _proposals.Verdict(("accepts",), (), False, "")
  return dict.fromkeys(names, kept)


def verdicts_with_finding(root, names):
  broken = _proposals.Verdict(("accepts",), ("empty",), False, "")
  return dict.fromkeys(names, broken)


class PlantedTest(StagingTestCase):
  """Checkouts that are not the Optax that the wrappers were tested with."""

  def test_moved(self):
    """A loss has moved to another module, and may be left in the old one."""
    old, new = "optax/losses/_smoothing.py", "optax/losses/_ranking.py"
    self.edit(
      "optax/losses/__init__.py",
      "optax.losses._smoothing",
      "optax.losses._ranking",
    )
    moved = f"smooth_labels: it has moved from {old} to {new}"
    error = self.assert_refused("stage", self.root, message=moved)
    self.assertIn("--except smooth_labels", error)
    (self.root / old).unlink()
    self.assert_refused(
      *("stage", self.root, "--loss", "smooth_labels"), message=moved
    )
    self.stage("ranking_softmax_loss")

  def test_gone(self):
    self.edit("optax/losses/_self_supervised.py", "def ntxent(", "def nt(")
    self.assert_refused("stage", self.root, message="ntxent: it is gone")

  def test_defined_again(self):
    file = "optax/losses/_regression.py"
    with (self.root / file).open("a") as module:
      module.write("\n\nlog_cosh = l2_loss\n")
    message = "log_cosh: optax/losses/_regression.py defines it more than once"
    self.assert_refused("stage", self.root, message=message)

  @parameterized.parameters(
    (
      "_regression",
      "squared_error",
      "l2_loss",
      "it calls squared_error, which",
    ),
    (
      "_classification",
      "weighted_logsoftmax",
      "safe_softmax_cross_entropy",
      "its code or",
    ),
    (
      "_regression",
      "cosine_similarity",
      "ntxent",
      "it calls cosine_similarity",
    ),
  )
  def test_called(self, module, called, name, reason):
    """A function that the loss calls has changed."""
    self.insert(f"optax/losses/{module}.py", called, "  0\n")
    self.assert_refused(
      *("stage", self.root, "--loss", name), message=f"{name}: {reason}"
    )

  def test_decorated(self):
    file = "optax/losses/_regression.py"
    self.edit(file, "def log_cosh(", "@jax.jit\ndef log_cosh(")
    message = "log_cosh: its code or its parameters have changed"
    self.assert_refused("stage", self.root, message=message)

  def test_names_taken(self):
    """A module has another object under a name that the wrapper needs."""
    file = "optax/losses/_self_supervised.py"
    arguments = ("stage", self.root, "--loss", "triplet_margin_loss")
    with (self.root / file).open("a") as module:
      module.write("\n\ndef _check_sizes(x):\n  return x\n")
    message = "triplet_margin_loss: its wrapper needs a function _check_sizes"
    self.assert_refused(*arguments, message=message)
    self.edit(file, "def _check_sizes(x)", "def _check_size(x)")
    self.edit(
      file,
      "from optax._src import utils\n",
      "from optax._src import utils\nfrom optax.transforms import _masking\n",
    )
    message = "needs `from optax.losses import _masking`, but the module has"
    self.assert_refused(*arguments, message=message)

  def test_unmasked_by_hand(self):
    with mock.patch.object(_proposals, "verdicts", verdicts_with_finding):
      self.check_unmasked_by_hand()

  @pytest.mark.nightly
  def test_unmasked_by_hand_and_audited(self):
    self.check_unmasked_by_hand()

  def check_unmasked_by_hand(self):
    """Somebody has removed the decorator of a staged loss."""
    self.stage("sigmoid_focal_loss")
    file = "optax/losses/_classification.py"
    text = (self.root / file).read_text()
    loss = definition(text, "sigmoid_focal_loss")
    lines = text.splitlines(keepends=True)
    del lines[loss.decorator_list[0].lineno - 1 : loss.lineno - 1]
    (self.root / file).write_text("".join(lines))
    self.assert_refused(
      *("stage", self.root, "--loss", "sigmoid_focal_loss"),
      message="sigmoid_focal_loss: its code .* changed"
      " .it takes `axis` and `where`",
    )

  def test_changed_default(self):
    file = "optax/losses/_classification.py"
    lines = (self.root / file).read_text().splitlines(keepends=True)
    gamma = definition("".join(lines), "sigmoid_focal_loss").args.kw_defaults[1]
    line, number = (
      gamma.lineno - 1,
      slice(gamma.col_offset, gamma.end_col_offset),
    )
    self.assertEqual(lines[line][number], "2.0")
    lines[line] = lines[line].replace("2.0", "3.0")
    (self.root / file).write_text("".join(lines))
    message = "sigmoid_focal_loss: its code or its parameters have changed"
    self.assert_refused("stage", self.root, message=message)

  def test_changed(self):
    """A stage refuses a changed body, and accepts a changed docstring."""
    file = "optax/losses/_regression.py"
    loss = definition((self.root / file).read_text(), "log_cosh")
    self.edit(file, ast.get_docstring(loss).splitlines()[0], "Log cosh.")
    as_it_was = (self.root / file).read_text()
    self.insert(file, "log_cosh", "  0\n")
    message = "log_cosh: its code or its parameters have changed"
    self.assert_refused("stage", self.root, message=message)
    (self.root / file).write_text(as_it_was)
    self.stage("log_cosh")
    self.assertIn('"""Log cosh.', (self.root / file).read_text())

  def test_comment(self):
    """A comment behind the last parameter stays there."""
    file = "optax/losses/_ranking.py"
    lines = (self.root / file).read_text().splitlines(keepends=True)
    loss = definition("".join(lines), "ranking_softmax_loss")
    line = loss.args.kwonlyargs[-1].end_lineno - 1
    lines[line] = lines[line].rstrip("\n") + "  # A note.\n"
    (self.root / file).write_text("".join(lines))
    self.stage("ranking_softmax_loss")
    (note,) = re.findall(r".*,  # A note\.\n.*", (self.root / file).read_text())
    self.assertRegex(note, r"reduce_fn: .*,  # A note\.\n    axis: ")

  def test_written_otherwise(self):
    """Unusual formatting of the same program is an error, not a traceback."""
    file = "optax/losses/_regression.py"
    arguments = ("stage", self.root, "--loss", "log_cosh")
    message = "log_cosh: its .* in a way that this command does not understand"
    text = (self.root / file).read_text()
    loss = definition(text, "log_cosh")
    end = loss.args.defaults[-1]
    lines = text.splitlines(True)
    line = lines[end.lineno - 1]
    lines[end.lineno - 1] = f"{line[: end.col_offset]}(None),\n"
    (self.root / file).write_text("".join(lines))
    self.assert_refused(*arguments, message=message)
    (self.root / file).write_text(
      text.replace("def cosine_distance(", "def  cosine_distance (")
    )
    self.assert_refused(
      *("stage", self.root, "--loss", "cosine_distance"),
      message=message.replace("log_cosh", "cosine_distance"),
    )

  def test_maskable(self):
    with mock.patch.object(_proposals, "verdicts", verdicts_with_finding):
      self.check_maskable()

  @pytest.mark.nightly
  def test_maskable_and_audited(self):
    self.check_maskable()

  def check_maskable(self):
    """The loss takes a mask by other means, and breaks the contract."""
    file = "optax/losses/_regression.py"
    text = (self.root / file).read_text()
    loss = definition(text, "squared_error")
    lines = text.splitlines(keepends=True)
    lines[loss.lineno - 1 : loss.end_lineno] = [
      "def squared_error(predictions, targets=None, axis=(), where=True):\n",
      "  targets = 0 if targets is None else targets\n",
      "  return jnp.sum((predictions - targets) ** 2 * where, axis)\n",
    ]
    (self.root / file).write_text("".join(lines))
    self.assert_refused(
      *("stage", self.root, "--loss", "squared_error", "--loss", "log_cosh"),
      message="squared_error: its code .* changed .it takes `axis` and `where`",
    )

  def test_fixed(self):
    with mock.patch.object(_proposals, "verdicts", verdicts_without_finding):
      self.check_fixed()

  @pytest.mark.nightly
  def test_fixed_and_audited(self):
    self.check_fixed()

  def check_fixed(self):
    """The loss keeps the contract by other means."""
    self.stage("hinge_loss")
    (self.root / ENGINE).rename(self.root / "optax/losses/_masks.py")
    (self.root / STAGED_TESTS).unlink()
    file = "optax/losses/_classification.py"
    self.insert(file, "hinge_loss", "  0\n")
    text = (self.root / file).read_text().replace("_masking", "_masks")
    (self.root / file).write_text(text)
    _, err = self.stage("hinge_loss", "log_cosh")
    self.assertRegex(err, "hinge_loss: Optax has fixed it.*finds nothing")
    self.assertEqual((self.root / file).read_text(), text)
    self.assertTrue((self.root / ENGINE).is_file())


def fake_verdicts(root, names):
  """Verdicts like those of an audit, guessed from the text of a checkout."""
  found = {}
  for name in names:
    (text,) = (
      text
      for file, text in source_files(root).items()
      if f"\ndef {name}(" in text and file.startswith("optax/losses/")
    )
    lines = ast.unparse(definition(text, name)).splitlines()
    if any("_masking" in line for line in lines):
      found[name] = _proposals.Verdict(("accepts",), (), False, "")
    elif name in ("cosine_distance", "softmax_cross_entropy"):
      found[name] = _proposals.Verdict(
        ("accepts",),
        ("empty",),
        True,
        "When `predictions` holds nan, the gradient of it becomes nan;",
      )
    elif name.endswith("integer_labels"):
      found[name] = _proposals.Verdict(("accepts",), ("empty",), False, "")
    else:
      found[name] = _proposals.Verdict((), ("accepts",), False, "")
  return found


class MessageTest(StagingTestCase):
  def message(self, name, *options):
    before = source_files(self.root)
    arguments = ("stage", self.root, "--message", "--loss", name, *options)
    status, out, err = run(*arguments)
    self.assertEqual(status, 0, err)
    self.assertEqual(source_files(self.root), before)
    return out

  @pytest.mark.slow
  def test_new(self):
    """The path of the checkout is not normalized."""
    (self.root / "folder").mkdir()
    self.root = self.root / "folder" / ".."
    text = self.message("sigmoid_focal_loss")
    self.assertStartsWith(text, "Add axis and where to sigmoid_focal_loss\n\n")
    self.assertIn(
      "| `sigmoid_focal_loss` | takes no `where` | no finding |", text
    )
    self.assertIn("Part of #902", text)
    self.assertNotIn("#1335", text)
    self.assertIn(f"It is in a new private module, `{ENGINE}`", text)
    self.assertNotIn("_unmasked_", text)
    self.assertNotIn("Behavior that changes", text)

  def test_staged(self):
    """Fake verdicts take the place of an audit."""
    with mock.patch.object(_proposals, "verdicts", fake_verdicts):
      self.check_staged()

  @pytest.mark.nightly
  def test_staged_and_audited(self):
    self.check_staged()
    # The message describes the checkout, not a fresh stage of the loss.
    file = "optax/losses/_regression.py"
    text = (self.root / file).read_text()
    text = text.replace("_masking.zero_unless_empty", "2.0")
    (self.root / file).write_text(text)
    self.assertRegex(
      self.message("cosine_distance", "--base=HEAD~1"),
      r"\| `cosine_distance` \| NaN gradients; breaks .* \| breaks ",
    )

  def check_staged(self):
    """The message is the same before and after the loss is staged."""
    name = "cosine_distance"
    before = self.message(name)
    self.assertStartsWith(
      before, f"Keep masked elements out of the derivatives of {name}\n\n"
    )
    self.assertRegex(
      before,
      rf"\| `{name}` \| NaN gradients; breaks .*empty.* \| no finding \|",
    )
    self.assertRegex(before, f"- `{name}`: .* the gradient .* becomes nan;")
    self.assertIn(f"- `{name}`: `_unmasked_{name}`", before)
    self.assertIn(f"- `{name}`: A vector with nothing included has", before)
    self.assertIn(f"- `{name}`: A `where` of lower rank has one entry", before)
    self.stage(name)
    arguments = ("stage", self.root, "--message", "--loss", name)
    self.assert_refused(*arguments, message="git can't read the commit HEAD")

    run_git(self.root, "init")
    staged = self.copy()
    shutil.move(self.root / "optax", staged / "staged")
    shutil.move(staged / "optax", self.root / "optax")
    run_git(self.root, "add", "optax")
    run_git(self.root, "commit", "-m", "Without it.")
    shutil.rmtree(self.root / "optax")
    shutil.move(staged / "staged", self.root / "optax")
    self.assertEqual(self.message(name), before)
    run_git(self.root, "add", "optax")
    run_git(self.root, "commit", "-m", "With it.")
    self.assert_refused(
      *arguments, message="Name a commit before it with --base"
    )
    self.assertEqual(self.message(name, "--base=HEAD~1"), before)


class StatusTest(StagingTestCase):
  def test_status(self):
    """Fake verdicts take the place of an audit."""
    with mock.patch.object(_proposals, "verdicts", fake_verdicts):
      self.check_status()

  @pytest.mark.nightly
  def test_status_of_an_audit(self):
    self.check_status()

  def check_status(self):
    self.stage("kl_divergence")
    self.edit("optax/losses/_self_supervised.py", "def ntxent(", "def nt(")
    with (self.root / "optax/losses/_self_supervised.py").open("a") as file:
      file.write("\nntxent = nt\n")
    status, out, err = run("status", self.root)
    self.assertEqual(status, 0, err)
    nan, wrong, new, nothing, unknown = (
      re.findall(r"^[ \d.]{5}([a-z]\w+)$", part, re.M)
      for part in re.split(r"\n\n", out)[1:-1]
    )
    self.assertLen({*nan, *wrong, *new, *nothing, *unknown}, len(MASKED))
    self.assertContainsSubset({"softmax_cross_entropy", "cosine_distance"}, nan)
    self.assertEqual(wrong, ["softmax_cross_entropy_with_integer_labels"])
    self.assertContainsSubset({"ctc_loss", "hinge_loss", "dice_loss"}, new)
    self.assertEqual(nothing, [ALIAS, "kl_divergence"])
    self.assertEqual(unknown, ["ntxent"])
    self.assertIn(
      "     ntxent\n             it is gone from optax/losses/_self_super", out
    )
    self.assertIn("Losses: 31. With `axis` and `where`: 10. With", out)
    self.assertIn("Without a finding: 1. Staged: 1.", out)
    self.assertIn("optax-masking stage CHECKOUT --loss cosine_distance\n", out)


@pytest.mark.slow
class StagedTest(StagingTestCase):
  """An Optax with all losses staged."""

  def setUp(self):
    super().setUp()
    self.pristine = self.copy()
    self.stage()

  def test_same_program(self):
    """Without a mask the jaxprs are those of the unchanged Optax."""
    script = (
      "import jax, optax\nfrom cases import CASES\n"
      "assert optax.__file__.startswith(PATH), optax.__file__\n"
      "for case in CASES:\n"
      "  arguments = case.arguments('float32')\n"
      "  print(case.name, jax.make_jaxpr(case.original)(*arguments))\n"
    )
    before, after = (
      run_python(root, "-c", script.replace("PATH", repr(str(root))))
      for root in (self.pristine, self.root)
    )
    for name in LOSSES:
      self.assertRegex(before, rf"(?m)^{name} ")
    self.assertEqual(before, after)

  def test_few(self):
    """For a staged loss, its new tests pass and the audit finds nothing."""
    script = (
      "import sys, pytest\nfrom optax_masking._command import main\n"
      "few = sys.argv[1:]\n"
      "status = main(['audit', '--quick', '--jobs=1', 'optax',"
      " *(f'--loss={name}' for name in few)])\n"
      "sys.exit(status or pytest.main(['-q', '-p', 'no:cacheprovider',"
      " '-W', 'ignore', 'optax/losses/_masking_test.py', '-k',"
      " ' or '.join(few)]))\n"
    )
    few = ("log_cosh",)
    out = run_python(self.root, "-c", script, *few)
    self.assertIn("optax: 1 of 1 loss clean", out)
    self.assertRegex(out, r"\b[1-9]\d* passed")

  @pytest.mark.nightly
  def test_optax(self):
    """Optax's tests of its losses and the new tests pass."""
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore")
    out = run_python(self.root, "-m", "pytest", *options, "optax/losses")
    (passed,) = re.findall(r"(\d+) passed", out)
    self.assertIn("IntegerLabelsTest", (self.root / STAGED_TESTS).read_text())
    new_tests = 9 * (len(LOSSES) + 1) + 1
    self.assertGreater(int(passed) - new_tests, 150)

  @pytest.mark.nightly
  def test_audit(self):
    script = (
      "import sys\nfrom optax_masking._command import main\n"
      "sys.exit(main(['audit', '--quick', 'optax']))"
    )
    out = run_python(self.root, "-c", script)
    self.assertIn(f"optax: {len(MASKED)} of {len(MASKED)} losses clean", out)

  def test_imports(self):
    """No module has an unused import."""
    for file, text in source_files(self.root).items():
      if not re.search(r"optax/losses/_[a-z]\w*\.py", file):
        continue
      tree = ast.parse(text)
      used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
      imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
      } - {"annotations"}  # `from __future__`.
      self.assertContainsSubset(imported, used, file)


if __name__ == "__main__":
  absltest.main()
