"""The commands `optax-masking stage` and `status`, on copies of Optax.

The copies are of the installed Optax, or of the checkout that the variable
OPTAX_CHECKOUT names.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import unittest
import warnings
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest
from optax.losses import _classification

from optax_masking.losses._table import ROWS
from optax_masking.upstream import _checks, _proposals
from optax_masking.upstream._changes import PROPOSALS, RANK_RULE, change_of
from optax_masking.upstream._checkout import Checkout

(COMMAND,) = importlib.metadata.entry_points(
  group="console_scripts", name="optax-masking"
)
main = COMMAND.load()

OPTAX = pathlib.Path(
  os.environ.get("OPTAX_CHECKOUT", pathlib.Path(upstream.__file__).parents[1])
)
LOSSES = [
  name
  for proposal in PROPOSALS
  for name in proposal.losses
  if not change_of(name).obstacle
]
# One of each way to stage a loss.
KINDS = (
  "ctc_loss_with_forward_probs",
  "kl_divergence",
  "cosine_distance",
  "softmax_cross_entropy",
  "hinge_loss",
  "smooth_labels",
)
each_loss = pytest.mark.parametrize(
  "name",
  [
    n if n in KINDS else pytest.param(n, marks=pytest.mark.nightly)
    for n in LOSSES
  ],
)


@pytest.fixture(scope="module")
def pristine():
  return Checkout.at(OPTAX)


@pytest.fixture
def root(tmp_path):
  """A git checkout of Optax, clean."""
  root = tmp_path / "checkout"
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(OPTAX / "optax", root / "optax", ignore=ignored)
  git(root, "init", "--quiet")
  git(root, "add", "optax")
  git(root, "commit", "--quiet", "--message", "Optax")
  return root


def git(root, *arguments):
  command = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=b"]
  done = subprocess.run([*command, *arguments], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.fixture
def run(capsys):
  """Runs the command; returns its exit status, output and errors."""

  def run(*arguments):
    status = main(list(map(str, arguments)))
    return status, *capsys.readouterr()

  return run


@contextlib.contextmanager
def in_place(checkout):
  """Puts the modules of a checkout in the place of those of Optax."""
  with contextlib.ExitStack() as stack:
    for name in sorted(checkout.texts):
      if name.endswith("_test"):
        continue
      module = types.ModuleType(f"optax.losses.{name}")
      exec(compile(checkout.texts[name], f"{name}.py", "exec"), vars(module))
      put = mock.patch.object
      stack.enter_context(put(upstream.losses, name, module))
      for loss in ROWS:
        if loss in vars(module) and checkout.module_of(loss) == name:
          for place in (upstream, upstream.losses):
            if loss in vars(place):
              new = getattr(module, loss)
              stack.enter_context(put(place, loss, new))
    yield


def failures(checkout, name, *, own=False):
  """Runs the staged test of a loss, or Optax's own tests of it.

  Returns:
    The number of tests, and the output of those that fail.
  """
  module = checkout.module_of(name)
  with in_place(checkout):
    tests = types.ModuleType("staged_tests")
    sys.modules["staged_tests"] = tests
    text = checkout.texts[f"{module}_test"]
    exec(compile(text, f"{module}_test.py", "exec"), vars(tests))
    suite = unittest.TestLoader().loadTestsFromModule(tests)
    found = list(each_test(suite))
    staged = [t for t in found if re.search(r"test_(masked|padded)", str(t))]
    named = [
      type(t)
      for t in found
      if t not in staged
      and name in ast.unparse(classes(text)[type(t).__name__])
    ]
    if own:
      staged = [t for t in found if type(t) in named and t not in staged]
    result = unittest.TestResult()
    with warnings.catch_warnings():
      if own:
        warnings.simplefilter("ignore")  # Of float64, which they have.
      unittest.TestSuite(staged).run(result)
  messages = [text for _, text in (*result.failures, *result.errors)]
  return len(staged), messages


def each_test(suite):
  for test in suite:
    if isinstance(test, unittest.TestSuite):
      yield from each_test(test)
    elif not isinstance(test, doctest.DocTestCase):
      yield test


def classes(text):
  body = ast.parse(text).body
  return {node.name: node for node in body if isinstance(node, ast.ClassDef)}


def source(checkout, name):
  return ast.get_source_segment(
    checkout.texts[checkout.module_of(name)], checkout.function(name)
  )


def without_fills(checkout, name):
  """A checkout in which a loss has no more selects of the mask."""
  code = source(checkout, name)
  select = r"(\w+) = jnp\.where\((?:where|some|jnp.expand_dims.*0), .*"
  broken = re.sub(select, r"\1 = \1", code)
  assert broken != code
  module = checkout.module_of(name)
  text = checkout.texts[module].replace(code, broken)
  return checkout._with(module, text)


@each_loss
def test_staged(name, pristine):
  """The contract holds, and the staged test notices when a fill is gone."""
  staged = pristine.staged([name])
  with in_place(pristine):
    assert _checks.verdict(name) != "no finding"
    program = _checks.program(name)
  with in_place(staged):
    assert _checks.verdict(name) == "no finding"
    if name == "ctc_loss_with_forward_probs":
      assert "select_n" in _checks.program(name)
    else:
      assert _checks.program(name) == program
  count, messages = failures(staged, name)
  assert count and not messages, messages
  if name not in ("l2_loss", "binary_dice_loss"):  # These have no fill.
    count, messages = failures(without_fills(staged, name), name)
    assert messages


@each_loss
@pytest.mark.slow
def test_tests_of_optax(name, pristine):
  count, messages = failures(pristine.staged([name]), name, own=True)
  assert count and not messages, messages


@pytest.mark.nightly
def test_all_tests_of_optax(pristine):
  staged = pristine.staged(LOSSES).with_rank_rule(RANK_RULE.losses)
  with _proposals.copied(staged) as root:
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-q", "optax/losses"],
      cwd=root,
      env=os.environ | {"PYTHONPATH": str(root)},
      capture_output=True,
      text=True,
    )
  assert done.returncode == 0, done.stdout


@pytest.mark.nightly
def test_audit(pristine):
  """The full-rank contract, and with the rank rule all of it."""
  staged = pristine.staged(LOSSES).with_rank_rule(RANK_RULE.losses)
  script = "from optax_masking._command import main; main()"
  losses = [n for n in LOSSES if not n.startswith(("ctc", "ranking"))]
  options = [f"--loss={name}" for name in losses]
  command = ["-c", script, "audit", "--quick", "optax", *options]
  assert ", 0 findings," in _proposals._run(staged, command)


@pytest.mark.parametrize("name", LOSSES)
def test_diff_is_small(name, pristine):
  """At most 25 lines for fills that are numbers, 40 for others, 60 for some."""
  needs = change_of(name).needs or "sigmoid_focal_loss"  # With the helper.
  before = pristine.staged(["sigmoid_focal_loss", needs])
  if name == "sigmoid_focal_loss":
    before = pristine.staged(["hinge_loss"])
  changed = before.staged([name]).changed(before)
  (file,) = (file for file in changed if not file.endswith("_test.py"))
  added = np.subtract(*(len(text.splitlines()) for text in changed[file][::-1]))
  large = re.search("dice|ntxent|multiclass_sparsemax", name)
  assert added <= (25 if change_of(name).fills else 60 if large else 40)
  for old, new in changed.values():
    lines = set(new.splitlines()) - set(old.splitlines())
    assert not [n for n in lines if n != n.rstrip()]
    assert not [n for n in lines if len(n) > 80 and "noqa" not in n]


def test_quotes_and_helper(pristine):
  after = pristine.staged(LOSSES)
  for file, (old, new) in after.changed(pristine).items():
    lines = [n for n in new.splitlines() if n not in old.splitlines()]
    quotes = re.findall(r"(?<!\")\"(?!\")", "\n".join(lines))
    single = old.count("'") > old.count('"')
    if single:
      assert not quotes, (file, lines)
  helper = after.function("canonicalize_where")
  assert helper.end_lineno - helper.lineno < 20
  text = after.texts["_classification"]
  assert text.count("def canonicalize_where(") == 1


@pytest.mark.parametrize("name", ["hinge_loss", "squared_error"])
def test_rule_of_new_where(name, pristine):
  x = jnp.ones((2, 3))
  with in_place(pristine.staged([name])):
    loss = getattr(upstream.losses, name)
    assert loss(x, x, axis=-1, where=jnp.array([True, False])).shape == (2,)
    assert loss(x, x, where=True).shape == (2, 3)
    with pytest.raises(TypeError, match="boolean"):
      loss(x, x, where=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
      loss(x, x, axis=-1, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
      loss(x, x, where=jnp.ones((4, 3), bool))


def test_lower_rank_keeps_its_meaning(pristine):
  """A mask of classes is what it was, and one of examples with the rule."""
  x = jnp.log(jnp.array([[0.2, 0.8], [0.6, 0.4]]))
  mask = jnp.array([True, False])
  with in_place(pristine):
    before = upstream.kl_divergence(x, jnp.exp(x[::-1]), where=mask)
    example = upstream.kl_divergence(x, jnp.exp(x[::-1]), where=mask[:, None])
  staged = pristine.staged(["kl_divergence"])
  with in_place(staged):
    after = upstream.kl_divergence(x, jnp.exp(x[::-1]), where=mask)
  np.testing.assert_array_equal(before, after)
  with in_place(staged.with_rank_rule(["kl_divergence"])):
    after = upstream.kl_divergence(x, jnp.exp(x[::-1]), where=mask)
  np.testing.assert_array_equal(example, after)


def test_stage_edits_files_and_patch_takes_it_back(root, run, tmp_path):
  patch = tmp_path / "kl.patch"
  options = ("stage", root, "--loss", "kl_divergence")
  assert run(*options, "--patch", patch)[0] == 0
  assert git(root, "status", "--porcelain") == ""
  status, out, _ = run(*options)
  assert status == 0
  assert "optax/losses/_classification.py" in out
  written = git(root, "diff")
  assert "+    targets = jnp.where(where, targets, 1)" in written
  git(root, "apply", "-R", patch)
  assert git(root, "status", "--porcelain") == ""
  git(root, "apply", patch)
  assert git(root, "diff") == written
  status, _, err = run(*options)
  assert (status, err) == (0, "There is nothing to change.\n")


def test_patch_does_not_overwrite(root, run, tmp_path):
  patch = tmp_path / "kl.patch"
  patch.write_text("mine")
  status, _, err = run(
    "stage", root, "--loss", "kl_divergence", "--patch", patch
  )
  assert status == 2
  assert "exists" in err
  assert patch.read_text() == "mine"


def test_uncommitted_changes_are_not_edited(root, run):
  file = root / "optax" / "losses" / "_classification.py"
  file.write_text(file.read_text() + "# Mine.\n")
  text = file.read_text()
  options = ("stage", root, "--loss", "kl_divergence")
  status, _, err = run(*options)
  assert status == 2
  assert "_classification.py" in err
  assert file.read_text() == text
  assert run("stage", root, "--all", "--branches", "--force")[0] == 2
  assert run(*options, "--force")[0] == 0
  assert file.read_text().endswith("# Mine.\n")
  assert "jnp.where(where, targets, 1)" in file.read_text()


@pytest.mark.parametrize(
  "options",
  [
    ("--loss", "kl_divergance"),
    ("--all", "--except", "kl_divergance"),
  ],
)
def test_unknown_name(root, run, options):
  status, _, err = run("stage", root, *options)
  assert status == 2
  assert "There is no loss kl_divergance. Did you mean kl_divergence" in err
  assert git(root, "status", "--porcelain") == ""


def test_wrong_options(root, run):
  for options in (
    ("--loss", "hinge_loss", "--except", "log_cosh"),
    ("--loss", "hinge_loss", "--branches"),
    ("--loss", "hinge_loss", "--loss", "kl_divergence", "--message"),
  ):
    assert run("stage", root, *options)[0] == 2, options
  assert run("stage", OPTAX, "--loss", "hinge_loss", "--dry-run")[0] == 0
  assert run("stage", root / "optax" / "losses", "--all")[0] == 2
  if "OPTAX_CHECKOUT" not in os.environ:
    status, _, err = run("stage", OPTAX, "--loss", "hinge_loss")
    assert status == 2
    assert "installed" in err


def test_except(root, run):
  status, out, err = run(
    "stage", root, "--all", "--except", "hinge_loss", "--dry-run"
  )
  assert status == 0
  assert "make_fenchel_young_loss can't be staged: its `max_fun`" in err
  assert "(_classification.perceptron_loss, axis=-1)" in out
  assert "(_classification.hinge_loss, axis=-1)" not in out


def test_changed_loss_is_refused(root, run):
  file = root / "optax" / "losses" / "_regression.py"
  file.write_text(file.read_text().replace("errors**2", "errors**4"))
  for name in ("squared_error", "l2_loss"):
    status, _, err = run("stage", root, "--force", "--loss", name)
    assert status == 2
    assert f"{name} can't be staged" in err
    assert "its code has changed, to" in err
  assert run("stage", root, "--loss", "cosine_distance", "--dry-run")[0] == 0


def test_libcst_is_optional(root, run):
  names = ["libcst", *(n for n in sys.modules if ".upstream._" in n)]
  hidden = dict.fromkeys(names[:1])
  kept = {n: m for n, m in sys.modules.items() if n not in names}
  with mock.patch.dict(sys.modules, kept | hidden, clear=True):
    upstream_package = importlib.import_module("optax_masking.upstream")
    parts = {n: vars(upstream_package).pop(n, None) for n in ("_checkout",)}
    status, _, err = run("stage", root, "--all", "--dry-run")
    vars(upstream_package).update(parts)
  assert status == 2
  assert "pip install 'optax_masking[upstream]'" in err


def test_rank_rule(root, run):
  status, _, err = run("stage", root, "--rank-rule")
  assert status == 2
  assert "stage softmax_cross_entropy first" in err
  options = [f"--loss={name}" for name in RANK_RULE.losses]
  assert run("stage", root, *options)[0] == 0
  status, out, _ = run("stage", root, "--rank-rule", "--dry-run")
  assert status == 0
  assert out.count("+def canonicalize_where(") == 1
  calls = re.findall(r"^\+    where = .*canonicalize_where\(", out, re.M)
  assert len(calls) == len(RANK_RULE.losses)
  assert out.count("+  def test_mask_has_one_entry_per_example(") == 3


def test_left_out_with_those_that_call_it(root, run):
  options = ("--all", "--except", "squared_error", "--dry-run")
  status, out, _ = run("stage", root, *options)
  assert status == 0
  assert "_regression.huber_loss, axis" in out
  assert "squared_error(predictions" not in out


def test_integer_mask_is_refused(pristine):
  loss = "softmax_cross_entropy_with_integer_labels"
  with in_place(pristine.staged([loss])), pytest.raises(TypeError, match="int"):
    upstream.softmax_cross_entropy_with_integer_labels(
      jnp.zeros((1, 2)), jnp.array([0]), where=jnp.array([[2, 1]])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "words"),
  [
    (("--loss", "ctc_loss"), ("padded frames", "nan", "to the bit")),
    (
      ("--loss", "hinge_loss"),
      ("Add where to the binary losses", "TypeError", "#902"),
    ),
    (("--rank-rule",), ("one entry a slice", "`where[None]`")),
  ],
)
def test_message(root, run, options, words):
  if options == ("--rank-rule",):
    run("stage", root, *(f"--loss={name}" for name in RANK_RULE.losses))
    git(root, "commit", "--quiet", "--all", "--message", "Repairs")
  status, out, err = run("stage", root, *options, "--message")
  assert status == 0, err
  assert len(out.splitlines()) <= 30
  for word in words:
    assert word in out
  assert git(root, "status", "--porcelain") == ""


@pytest.mark.slow
@pytest.mark.nightly
def test_branches(root, run):
  """Each branch has one commit more than the one that it is on."""
  with mock.patch.dict(
    os.environ,
    {
      f"GIT_{who}_{what}": "a@b"
      for who in ("AUTHOR", "COMMITTER")
      for what in ("NAME", "EMAIL")
    },
  ):
    status, out, err = run("stage", root, "--all", "--branches")
  assert status == 0, err
  made = [line.partition(" on ") for line in out.splitlines()]
  assert len(made) == len(PROPOSALS)
  for branch, _, base in made:
    assert git(root, "rev-parse", f"{branch}^") == git(
      root, "rev-parse", base or "HEAD"
    )
    message = git(root, "log", "-1", "--format=%B", branch)
    assert len(message.splitlines()) <= 30
  assert git(root, "status", "--porcelain") == ""
  status, _, err = run("stage", root, "--all", "--branches")
  assert status == 2
  assert "masks/cosine" in err
  git(root, "checkout", "--quiet", "masks/multiclass-sparsemax")
  staged = Checkout.at(root)
  chain = [n for p in PROPOSALS if not p.alone for n in p.losses]
  assert all(staged.is_staged(n) for n in chain if n in LOSSES)


@pytest.mark.nightly
def test_status(root, run):
  status, out, _ = run("status", root)
  assert status == 0
  order = re.findall(r"^ ?\d+\. (.*?):", out, re.M)
  assert order == [p.name for p in (*PROPOSALS, RANK_RULE)]
  assert "kl_divergence: NaN gradients -> no finding" in out
  assert "hinge_loss: takes no `where` -> no finding" in out
  assert "optax-masking stage CHECKOUT --rank-rule" in out


def test_optax_is_as_it_was():
  """No test leaves a staged module in the place of Optax's own."""
  assert upstream.losses._classification is _classification
