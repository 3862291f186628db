"""What the documentation says is so."""

import ast
import doctest
import importlib.metadata
import inspect
import pathlib
import pydoc
import re
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import optax as upstream
import pytest
from cases import MASKED

import optax_masking as optax
import optax_masking.testing

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Of which the docstrings are read in the quick subset, too.
QUICK = ("cosine_distance", "squared_error", "masked_inputs", "masked_sum")


@pytest.fixture(autouse=True)
def _print_options():
  """Gives back what an example sets."""
  with jnp.printoptions():
    yield


def run_examples(text, name):
  test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
  assert test.examples
  runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
  runner.run(test)
  assert runner.failures == 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX is too old.")
def test_readme():
  """Every block of Python runs, in order, and prints what it says."""
  blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  assert len(blocks) >= 3
  run_examples("\n".join(blocks), "README.md")


@pytest.mark.slow
def test_linear_cross_entropy():
  text = (ROOT / "docs" / "linear_cross_entropy.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  run_examples("\n".join(blocks), "linear_cross_entropy.md")


@pytest.mark.slow
def test_readme_file_of_tests(tmp_path):
  """The one to be copied passes, and fails if its loss forgets the mask."""
  (text,) = re.findall(r"```python\n(# test_masks.py\n.*?)```", README, re.S)
  masked = "jnp.where(where, predictions - targets, 0)"
  assert masked in text
  wrong = text.replace(masked, "predictions - targets")
  (tmp_path / "test_masks.py").write_text(text)
  (tmp_path / "test_wrong.py").write_text(wrong)
  command = [sys.executable, "-m", "pytest", "-rA", "--tb=line"]
  result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  passed, failed = (
    re.findall(rf"(?m)^{outcome} (\w+)\.py::", result.stdout)
    for outcome in ("PASSED", "FAILED")
  )
  assert passed == ["test_masks"], result.stdout
  assert failed == ["test_wrong"], result.stdout
  assert result.stdout.count("mean_squared_error breaks") >= 1


def test_every_test_is_one():
  """None is inside of another function, where pytest does not look."""
  for file in sorted((ROOT / "tests").glob("*.py")):
    functions = (
      node
      for node in ast.walk(ast.parse(file.read_text()))
      if isinstance(node, ast.FunctionDef)
    )
    hidden = [
      inner.name
      for function in functions
      for inner in ast.walk(function)
      if isinstance(inner, ast.FunctionDef | ast.ClassDef)
      and inner is not function
      and inner.name.lower().startswith("test")
    ]
    assert not hidden, (file.name, hidden)


def test_workflows():
  """The files that they name are there."""
  for file in (ROOT / ".github").rglob("*.yml"):
    for path in re.findall(r"[ ./](\.github/[\w./-]+)", file.read_text()):
      assert (ROOT / path).exists(), path


def test_readme_begins_with_the_point():
  """What it is, and NaN becoming finite, in ten lines."""
  top = "\n".join(README.splitlines()[:10])
  assert "[-1. nan]" in top
  assert "[-1.  0.]" in top


def test_list_of_losses(capsys):
  """Each masked loss with its default axis, as the command prints it."""
  (command,) = importlib.metadata.entry_points(
    group="console_scripts", name="optax-masking"
  )
  assert command.load()(["losses"]) == 0
  rows = re.findall(
    r"^\| `(losses\.)?(\w+)` \| `(\S+)` \| [^|]+ \| [^|]+ \|$",
    capsys.readouterr().out,
    re.MULTILINE,
  )
  assert sorted(name for _, name, _ in rows) == MASKED
  axes = {name: axis for _, name, axis in rows}
  for name, axis in (
    ("softmax_cross_entropy", "-1"),
    ("sigmoid_focal_loss", "()"),
    ("make_fenchel_young_loss", "-1"),
    ("dice_loss", "None"),
  ):
    assert axes[name] == axis
  for inside, name, _ in rows:
    assert (inside == "") == (name in vars(upstream)), name


def test_changelog_names_each_loss():
  changelog = (ROOT / "CHANGELOG.md").read_text()
  for name in MASKED:
    assert f"`{name}`" in changelog


def test_readme_links():
  """Links within the project lead somewhere."""
  for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
      assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (
      *MASKED,
      "masked_inputs",
      "linear_softmax_cross_entropy_with_integer_labels",
      "patch",
      "assert_mask_safe",
      "check_mask_safe",
      "masked_sum",
      "masked_count",
      "masked_mean",
    )
  ],
)
@pytest.mark.filterwarnings("ignore:The function convex_kl_divergence")
def test_docstring(name):
  """It has the sections of Optax's format, and its example runs."""
  homes = (optax.losses, optax, optax_masking.testing, optax.reductions)
  function = next(getattr(h, name) for h in homes if name in vars(h))
  doc = inspect.getdoc(function)
  for section in ("Args:", "Returns:", "Examples:"):
    assert f"\n{section}\n" in doc
  documented = re.findall(
    r"^  \*{0,2}(\w+): ", doc.split("\nReturns:")[0], re.M
  )
  assert documented == list(inspect.signature(function).parameters)
  run_examples(doc, name)


def test_help_has_names_of_types():
  """Not the unions that they stand for; which tools still find."""
  described = [getattr(optax.losses, name) for name in MASKED]
  described += [optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)]
  for module in (optax.fills, optax.reductions):
    described += [getattr(module, name) for name in module.__all__]
  for function in (*described, optax.masked_inputs, optax.Mask):
    assert "jaxlib" not in pydoc.render_doc(function), function
    assert typing.get_type_hints(function) or inspect.isclass(function)
  assert "__match_args__" not in pydoc.render_doc(optax.Mask)


@pytest.mark.parametrize(
  "described", [optax.Mask, optax.reductions.RunningMean]
)
def test_docstring_of_class(described):
  run_examples(inspect.getdoc(described), described.__name__)
