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

import optax as upstream
import pytest
from absl.testing import absltest, parameterized
from cases import MASKED

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
  """The exit status of the command, and what it prints."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = main(list(map(str, arguments)))
  return status, out.getvalue(), err.getvalue()


def content(root):
  """The texts of a checkout, by file."""
  return {
    path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted(root.rglob("*.py"))
  }


def definition(text, name):
  return next(
    node
    for node in ast.parse(text).body
    if isinstance(node, ast.FunctionDef) and node.name == name
  )


def signature(node):
  """Each parameter, with its kind and default."""
  a = node.args
  names = [p.arg for p in a.args]
  defaults = [None] * (len(names) - len(a.defaults)) + a.defaults
  found = dict(zip(names, defaults, strict=True))
  found |= {p.arg: d for p, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)}
  return {n: d and ast.unparse(d) for n, d in found.items()}, names


def undefined(text):
  """The names that functions of a module use, and nothing defines."""
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


def python(root, *arguments, **options):
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


def git(root, *arguments):
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
    losses = shutil.ignore_patterns("__pycache__")
    shutil.copytree(OPTAX, root / "optax", ignore=losses)
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
    """With the reason, and without a change."""
    before = content(self.root)
    status, out, err = run(*arguments)
    self.assertEqual((status, out), (2, ""))
    self.assertRegex(err, message)
    self.assertEqual(content(self.root), before)
    return err


class StageTest(StagingTestCase):
  @parameterized.parameters(*LOSSES)
  def test_one_loss(self, name):
    before = content(self.root)
    self.stage(name)
    after = content(self.root)
    changed = {file for file in after if after[file] != before.get(file)}
    (module,) = changed - {ENGINE, STAGED_TESTS}
    self.assertLen(changed, 3)
    self.assertEqual(module, f"optax/{self.module_of(name)}")

    license_of_old, license_of_engine, license_of_tests = (
      re.findall(r"(?m)^#.*$", after[file])[:14]
      for file in (module, ENGINE, STAGED_TESTS)
    )
    self.assertRegex(license_of_engine[0], r"^# Copyright 20\d\d DeepMind ")
    self.assertNotEqual(license_of_engine[0], license_of_old[0])
    self.assertEqual(license_of_engine, license_of_tests)
    self.assertEqual(license_of_engine[1:], license_of_old[1:])

    inserted = []
    for file in changed:
      old = before.get(file, "").splitlines()
      diff = difflib.ndiff(old, after[file].splitlines())
      inserted += [line[2:] for line in diff if line[0] == "+"]
      # The oldest Python that Optax runs with.
      ast.parse(after[file], feature_version=(3, 10))
    for line in inserted:
      self.assertLessEqual(len(line), 80)
      self.assertNotIn("optax_masking", line)
      self.assertEqual(line, line.rstrip())
    # Inside of brackets Optax indents by 4 spaces.
    nested = "def canonicalize_where(\n    where: Where,\n"
    self.assertTrue(nested in after[ENGINE])

    self.assertEmpty(undefined(after[module]))
    self.assertEmpty(undefined(after[ENGINE]))
    used = set(re.findall(r"\b_masking\.(\w+)", after[module]))
    engine = symtable.symtable(after[ENGINE], ENGINE, "exec")
    self.assertContainsSubset(used, set(engine.get_identifiers()))

    # Nothing that this loss does not need.
    text = after[ENGINE] + after[module]
    for function in engine.get_children():
      if function.get_name() != "_":
        uses = re.findall(rf"\b{function.get_name()}\b", text)
        self.assertGreater(len(uses), 1, function.get_name())
    rows = set(re.findall(r'"(\w+)"', after[STAGED_TESTS])) & {*LOSSES}
    called = {"ctc_loss": {"ctc_loss_with_forward_probs"}}.get(name, set())
    self.assertEqual(rows, {name} | called)
    if name == "sigmoid_focal_loss":
      self.assertNotIn("_unmasked_", after[module])
    imports = re.findall(r"(?m)^from (optax\S*) import (\w+)", after[module])
    self.assertEqual(imports, sorted(imports))

    # No line is lost, but for the body that another takes the place of. A
    # parameter that was the last may get a comma.
    kept = iter([x.rstrip(",") for x in after[module].splitlines()])
    old = definition(before[module], name)
    lines = before[module].splitlines()
    if name == "ctc_loss":
      del lines[old.body[0].end_lineno : old.end_lineno]
    for line in lines:
      self.assertIn(line.rstrip(","), kept)

    new = definition(after[module], name)
    (has, positional), (had, old_positional) = signature(new), signature(old)
    if name != "make_fenchel_young_loss":
      self.assertContainsSubset({"axis", "where"}, has)
      self.assertEqual(has["where"], "None")
    self.assertEqual({n: has[n] for n in had}, had)
    self.assertEqual(list(has)[: len(had)], list(had))
    self.assertEqual(positional, old_positional)
    docstring = ast.get_docstring(new)
    for argument in has.keys() - had.keys():
      self.assertRegex(docstring, rf"(?m)^  {argument}: ")
    *_, note = re.findall(r"(?m)^\.\. versionchanged:: (.*)$", docstring)
    self.assertEqual(note, self.next_version())
    # Which is a directive of its own, and not the end of a paragraph.
    *_, above = docstring.partition(f".. versionchanged:: {note}")[0].split(
      "\n\n"
    )
    self.assertRegex(f"{above}.. ", r"^\.\. ")

  def next_version(self):
    """The release that follows, or that a version of development is for."""
    text = (self.root / "optax/__init__.py").read_text()
    (version,) = re.findall(r'(?m)^__version__ = "(.*)"$', text)
    *numbers, last = version.removesuffix(".dev").split(".")
    return ".".join([*numbers, str(int(last) + (not version.endswith("dev")))])

  def module_of(self, name):
    module = sys.modules[getattr(upstream.losses, name).__module__]
    return f"losses/{module.__name__.rpartition('.')[2]}.py"

  @pytest.mark.slow
  def test_order(self):
    """Whatever is staged first, the result is the same."""
    self.stage()
    one_by_one = self.copy()
    for name in reversed(LOSSES):
      self.stage(name, root=one_by_one)
    self.assertEqual(content(one_by_one), content(self.root))

  def test_twice(self):
    self.stage("l2_loss", "ctc_loss")
    before = content(self.root)
    out, err = self.stage("l2_loss", "ctc_loss")
    self.assertEqual(out, "There is nothing to change.\n")
    self.assertIn("l2_loss: it is staged already", err)
    self.assertEqual(content(self.root), before)
    # And not what somebody has added to it since.
    self.edit(STAGED_TESTS, "class MaskTest", "# A remark.\nclass MaskTest")
    before = content(self.root)
    self.stage("l2_loss")
    self.assertEqual(content(self.root), before)
    self.assert_refused(
      *("stage", self.root, "--loss", "hinge_loss"),
      message="optax/losses/_masking_test.py is there, and is not what",
    )

  def test_alias(self):
    """A deprecated name needs nothing, once what it calls is staged."""
    self.stage(ALIAS)
    by_name = self.copy()
    self.stage("generalized_kl_divergence", root=by_name)
    self.assertEqual(content(by_name), content(self.root))
    _, err = self.stage(ALIAS)
    self.assertIn("which it calls", err)

  def test_patch(self):
    """The checkout stays as it is, and `git apply` does what stage does."""
    losses = ("--loss", "sigmoid_focal_loss", "--loss", "hinge_loss")
    before = content(self.root)
    file = self.root / "losses.patch"
    status, out, _ = run("stage", self.root, *losses, "--patch", file)
    self.assertEqual(status, 0)
    self.assertIn(f"{ENGINE}: new, ", out)
    self.assertNotIn("Test it", out)
    status, out, _ = run("stage", self.root, *losses, "--dry-run")
    self.assertEqual((status, out), (0, file.read_text()))
    self.assertEqual(content(self.root), before)

    git(self.root, "init")
    git(self.root, "apply", file)
    staged = self.copy()
    self.stage("sigmoid_focal_loss", "hinge_loss", root=staged)
    self.assertEqual(content(self.root), content(staged))

  def test_package_folder(self):
    """The checkout may be named by its package."""
    by_package = self.copy()
    self.stage("log_cosh", root=by_package / "optax")
    self.stage("log_cosh")
    self.assertEqual(content(by_package), content(self.root))

  def test_no_checkout(self):
    for folder in (self.root / "optax" / "losses", self.root / "nothing"):
      self.assert_refused("stage", folder, message="is no checkout of Optax")
    installed = self.root / "site-packages"
    shutil.copytree(self.root / "optax", installed / "optax")
    self.assert_refused("stage", installed, message="where Optax is installed")
    self.assert_refused(
      *("stage", self.root, "--loss", "hinge"),
      message="There is no loss hinge. There are .*hinge_loss",
    )
    self.assert_refused(
      *("stage", self.root, "--patch", self.root / "nothing" / "x.patch"),
      message="can't be written",
    )
    self.edit("optax/losses/_ranking.py", "def ranking_softmax_loss", "d r")
    self.assert_refused("stage", self.root, message="_ranking.py: invalid synt")


class PlantedTest(StagingTestCase):
  """What is not the Optax that the wrappers were tested with."""

  def test_moved(self):
    text = (self.root / "optax/losses/_smoothing.py").read_text()
    with (self.root / "optax/losses/_ranking.py").open("a") as file:
      file.write("\n\n" + text[text.index("def smooth_labels") :])
    (self.root / "optax/losses/_smoothing.py").unlink()
    moved = "smooth_labels: it has moved to optax/losses/_ranking.py"
    error = self.assert_refused("stage", self.root, message=moved)
    self.assertIn("with --loss, without it", error)
    self.assert_refused(
      *("stage", self.root, "--loss", "smooth_labels"), message=moved
    )
    self.stage("ranking_softmax_loss")

  def test_gone(self):
    self.edit("optax/losses/_self_supervised.py", "def ntxent(", "def nt(")
    self.assert_refused("stage", self.root, message="ntxent: it is gone")

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
    message = "sigmoid_focal_loss: its body or its parameters have changed"
    self.assert_refused("stage", self.root, message=message)

  def test_changed(self):
    """Its body; not its docstring."""
    file = "optax/losses/_regression.py"
    loss = definition((self.root / file).read_text(), "log_cosh")
    self.edit(file, ast.get_docstring(loss).splitlines()[0], "Log cosh.")
    as_it_was = (self.root / file).read_text()
    self.insert(file, "log_cosh", "  0\n")
    message = "log_cosh: its body or its parameters have changed"
    self.assert_refused("stage", self.root, message=message)
    (self.root / file).write_text(as_it_was)
    self.stage("log_cosh")
    self.assertIn('"""Log cosh.', (self.root / file).read_text())

  @pytest.mark.slow
  def test_maskable(self):
    """One that takes a mask by other means, and doesn't keep the contract."""
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
      *("stage", self.root, "--loss", "squared_error", "--loss", "huber_loss"),
      message="squared_error: its body .* changed .it takes `axis` and `where`",
    )

  @pytest.mark.slow
  def test_fixed(self):
    """One that keeps the contract by other means."""
    self.stage("hinge_loss")
    (self.root / ENGINE).rename(self.root / "optax/losses/_masks.py")
    (self.root / STAGED_TESTS).unlink()
    file = "optax/losses/_classification.py"
    self.insert(file, "hinge_loss", "  0\n")
    text = (self.root / file).read_text().replace("_masking", "_masks")
    (self.root / file).write_text(text)
    _, err = self.stage("hinge_loss", "huber_loss")
    self.assertRegex(err, "hinge_loss: Optax has fixed it.*finds nothing")
    self.assertEqual((self.root / file).read_text(), text)
    self.assertTrue((self.root / ENGINE).is_file())


@pytest.mark.slow
class MessageTest(StagingTestCase):
  def message(self, *names):
    losses = [f"--loss={name}" for name in names]
    before = content(self.root)
    status, out, err = run("stage", self.root, "--message", *losses)
    self.assertEqual(status, 0, err)
    self.assertEqual(content(self.root), before)
    return out

  def test_new(self):
    text = self.message("sigmoid_focal_loss")
    self.assertStartsWith(
      text, "Add axis and where arguments to sigmoid_focal_loss\n\n"
    )
    self.assertIn(
      "| `sigmoid_focal_loss` | takes no `where` | nothing is found |", text
    )
    self.assertIn("Part of #902", text)
    self.assertNotIn("#1335", text)
    self.assertIn(f"- `{ENGINE}`: new, ", text)
    self.assertNotIn("_unmasked_", text)

  def test_staged(self):
    """It is the same before and after the loss is staged, in a repository."""
    before = self.message("kl_divergence")
    self.assertRegex(
      before,
      r"\| `kl_divergence` \| NaN gradients; breaks .*zero_gradient.* \|"
      r" nothing is found \|",
    )
    self.assertRegex(before, "- `kl_divergence`: .* gradient .* is nan, not 0")
    self.assertIn("_unmasked_kl_divergence", before)
    self.stage("kl_divergence")
    arguments = ("stage", self.root, "--message", "--loss", "kl_divergence")
    self.assert_refused(*arguments, message="is no git repository")
    git(self.root, "init")
    git(self.root, "add", "optax")
    git(self.root, "commit", "-m", "With the loss.")
    self.assert_refused(*arguments, message="already in the last commit")
    shutil.rmtree(self.root / "optax")
    shutil.copytree(self.copy() / "optax", self.root / "optax")
    git(self.root, "add", "optax")
    git(self.root, "commit", "-m", "Without it.")
    self.stage("kl_divergence")
    self.assertEqual(self.message("kl_divergence"), before)


@pytest.mark.slow
class StatusTest(StagingTestCase):
  def test_status(self):
    self.stage("kl_divergence")
    self.edit("optax/losses/_self_supervised.py", "def ntxent(", "def nt(")
    with (self.root / "optax/losses/_self_supervised.py").open("a") as file:
      file.write("\nntxent = nt\n")
    status, out, err = run("status", self.root)
    self.assertEqual(status, 0, err)
    nan, wrong, new, nothing, unknown = (
      re.findall(r"^[ \d.]{5}([a-z]\w+)$", part, re.M)
      for part in re.split(r"\n\n", out)[1:]
    )
    self.assertLen({*nan, *wrong, *new, *nothing, *unknown}, len(MASKED))
    self.assertContainsSubset({"softmax_cross_entropy", "cosine_distance"}, nan)
    self.assertEqual(wrong, ["softmax_cross_entropy_with_integer_labels"])
    self.assertContainsSubset({"ctc_loss", "hinge_loss", "dice_loss"}, new)
    self.assertEqual(nothing, [ALIAS, "kl_divergence"])
    self.assertEqual(unknown, ["ntxent"])
    self.assertIn("     ntxent\n             it is gone, and was in", out)
    self.assertIn("Losses: 31. With `axis` and `where`: 10. With", out)
    self.assertIn("Without a finding: 1. Staged: 1.", out)


@pytest.mark.slow
class StagedTest(StagingTestCase):
  """An Optax with all the losses."""

  def setUp(self):
    super().setUp()
    self.pristine = self.copy()
    self.stage()

  def test_same_program(self):
    """Without a mask the jaxprs are what they were."""
    script = (
      "import jax, optax\nfrom cases import CASES\n"
      "assert optax.__file__.startswith(PATH), optax.__file__\n"
      "for case in CASES:\n"
      "  arguments = case.arguments('float32')\n"
      "  print(case.name, jax.make_jaxpr(case.original)(*arguments))\n"
    )
    before, after = (
      python(root, "-c", script.replace("PATH", repr(str(root))))
      for root in (self.pristine, self.root)
    )
    for name in LOSSES:
      self.assertRegex(before, rf"(?m)^{name} ")
    self.assertEqual(before, after)

  def test_optax(self):
    """Optax's tests of its losses pass, and those that came with the losses."""
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore")
    out = python(self.root, "-m", "pytest", *options, "optax/losses")
    (passed,) = re.findall(r"(\d+) passed", out)
    staged = (self.root / STAGED_TESTS).read_text().count("  def test_")
    self.assertGreater(int(passed) - staged * len(LOSSES), 150)

  def test_audit(self):
    script = (
      "import sys\nfrom optax_masking._command import main\n"
      "sys.exit(main(['audit', '--quick', 'optax']))"
    )
    out = python(self.root, "-c", script)
    self.assertIn(f"optax: {len(MASKED)} of {len(MASKED)} losses clean", out)

  def test_linter(self):
    """The staged files compile, and import nothing that they don't use."""
    for file in (ENGINE, STAGED_TESTS):
      tree = ast.parse((self.root / file).read_text())
      used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
      imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
      }
      self.assertContainsSubset(imported, used)


if __name__ == "__main__":
  absltest.main()
