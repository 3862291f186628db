"""What the documentation says is so."""

import ast
import doctest
import importlib.metadata
import importlib.util
import inspect
import operator
import pathlib
import pydoc
import re
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import optax as upstream
import pytest
from cases import MASKED

import optax_masking as optax
import optax_masking.testing

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
PAGES = {
  path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
  for path in (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("api/*.md")),
  )
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXECUTED = [name for name, text in PAGES.items() if ">>> " in text]
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


def scripts(text):
  """The blocks of Python that are files: each begins with its name."""
  blocks = (block for block in BLOCK.findall(text) if ">>> " not in block)
  return {re.match(r"# (\w+\.py)\n", block)[1]: block for block in blocks}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX is too old.")
@pytest.mark.parametrize("page", EXECUTED)
def test_page(page):
  """Every block of Python runs, in order, and prints what it says."""
  blocks = [block for block in BLOCK.findall(PAGES[page]) if ">>> " in block]
  examples = sum(block.count(">>> ") for block in blocks)
  assert examples == PAGES[page].count(">>> ")  # None is outside of a block.
  run_examples("\n".join(blocks), page)


def test_pages_with_snippets():
  assert {"README.md", "docs/recipes.md", "docs/guard.md"} <= set(EXECUTED)


@pytest.mark.slow
def test_program_that_patches(tmp_path):
  (tmp_path / "main.py").write_text(
    scripts(PAGES["docs/getting_started.md"])["main.py"]
  )
  subprocess.run([sys.executable, tmp_path / "main.py"], check=True)


@pytest.mark.slow
def test_file_of_tests(tmp_path):
  """The one to be copied passes, and fails if its loss forgets the mask."""
  text = scripts(PAGES["docs/guard.md"])["test_masks.py"]
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


@pytest.mark.parametrize("page", ["README.md", "docs/getting_started.md"])
def test_lines_for_ruff(page, tmp_path):
  """They refuse each import that undoes the swap, and no other."""
  if importlib.util.find_spec("ruff") is None:
    pytest.skip("ruff is not installed.")
  (settings,) = re.findall(r"```toml\n(.*?)```", PAGES[page], re.DOTALL)
  assert settings.count("\n") == 4
  (tmp_path / "pyproject.toml").write_text(settings)
  refused = [
    "import optax",
    "import optax.contrib",
    "from optax import losses",
    "from optax.losses import kl_divergence",
  ]
  accepted = [
    "import optax_masking",
    "import optax_masking as optax",
    "import optax_masking.contrib",
    "from optax_masking.losses import kl_divergence",
  ]
  file = tmp_path / "program.py"
  file.write_text("\n".join([*refused, *accepted, ""]))
  command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select"]
  result = subprocess.run(
    [*command, "TID251", "--output-format", "concise", file],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  lines = re.findall(r"program\.py:(\d+):\d+: TID251", result.stdout)
  assert lines == ["1", "2", "3", "4"], result.stdout


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


def test_readme_is_short():
  assert len(README.split()) <= 700


def test_lines_of_pages():
  """At most 90 characters, but for tables, output, commands and links."""
  for page, text in PAGES.items():
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in prose.splitlines():
      long = len(line) > 90 and not line.startswith(("|", "[", "Optax, with"))
      assert not long, (page, line)


def test_readme_links_each_recipe():
  recipes = re.findall(r"^## (.*)$", PAGES["docs/recipes.md"], re.MULTILINE)
  linked = re.findall(r"\]\(docs/recipes\.md#([\w-]+)\)", README)
  assert linked == [anchor(recipe) for recipe in recipes]


def test_examples_are_linked():
  for example in (ROOT / "examples").glob("*.py"):
    text = PAGES["docs/examples.md"]
    assert f"python examples/{example.name}" in text
    assert f"`examples/{example.name}`" in text


def public_names():
  """Those that this package defines, but for the losses."""
  yield from ("masked_inputs", "Mask", "patch")
  yield from (f"fills.{name}" for name in optax.fills.__all__)
  yield from (f"reductions.{name}" for name in optax.reductions.__all__)
  yield from (
    f"testing.{name}"
    for name in vars(optax_masking.testing)
    if not name.startswith("_")
    and not inspect.ismodule(getattr(optax_masking.testing, name))
  )


@pytest.mark.parametrize("name", list(public_names()))
def test_reference(name):
  """It describes each public name, and each public method of a class."""
  text = "".join(t for n, t in PAGES.items() if n.startswith("docs/api/"))
  described = {
    *re.findall(r"^.. (?:\w+:)?\w+:: optax_masking\.(.*)$", text, re.MULTILINE)
  }
  for module, members in re.findall(
    r"^.. automodule:: optax_masking\.(\w+)\n   :members: (.*)$", text, re.M
  ):
    described |= {f"{module}.{member}" for member in members.split(", ")}
  assert name in described
  home = operator.attrgetter(name)(optax_masking)
  if inspect.isclass(home):
    options = re.search(
      rf"^.. autoclass:: optax_masking\.{name}\n   :members: (.*)$", text, re.M
    )
    given = set(options[1].split(", ")) if options else set()
    methods = {
      n
      for n, member in vars(home).items()
      if not n.startswith("_")
      and isinstance(
        member, types.FunctionType | classmethod | property | staticmethod
      )
    }
    assert methods <= given, methods - given


@pytest.fixture(scope="module")
def generated():
  """The module that makes parts of the pages."""
  spec = importlib.util.spec_from_file_location(
    "generated", DOCS / "generated.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_generated_losses(generated):
  table, reference = (
    generated.table_of_losses(),
    generated.reference_of_losses(),
  )
  for name in MASKED:
    assert table.count(f"(#optax_masking.losses.{name})") == 1
    line = rf"^\.\. autofunction:: optax_masking\.losses\.{name}$"
    assert len(re.findall(line, reference, re.MULTILINE)) == 1


def test_generated_help(generated):
  text = generated.help_of_commands()
  assert text.count("usage: optax-masking") == text.count("## optax-masking")
  assert "--update-baseline" in text


def test_generated_audit(generated):
  """A clause that is broken, kept, not tried, or does not apply."""
  finding = {
    "clause": "empty",
    "message": "The value of `x` is [nan], *not* 0.",
  }
  accepted = {"accepts": "kept", "empty": "broken", "honesty": "kept"}
  reasons = {"identity": "no time", "masked_label": "does not apply: no class"}
  page = generated.optax_today(
    {
      "versions": {"optax": "1.2", "jax": "3.4"},
      "targets": {
        "optax": {
          "some_loss": {
            "ok": False,
            "clauses": accepted | reasons,
            "findings": [finding],
          },
          "other": {"ok": False, "clauses": {"accepts": "broken"}},
        }
      },
    }
  )
  assert "Of the 2 losses of Optax 1.2" in page
  assert (
    "| [`some_loss`](#today-some-loss) | · | · | · | ✗ |   | · | ✓ | · | · |"
    in page
  )
  assert "The other 1 have no `where`:\n`other`." in page
  assert r"- **empty.** The value of `x` is \[nan\], \*not\* 0." in page


def test_placeholder_for_audit(generated):
  assert "The table is missing" in generated.optax_today(None)


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


def anchor(heading):
  """That of a heading, for GitHub and for Sphinx; they differ in some."""
  text = heading.replace("`", "").lower()
  of_github = re.sub(r"[^\w -]", "", text).replace(" ", "-")
  of_sphinx = re.sub(r"[^a-z0-9]+", "-", text).strip("-")
  return of_github if of_github == of_sphinx else None


def anchors(text):
  prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  return [anchor(h) for h in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]


@pytest.mark.parametrize("page", list(PAGES))
def test_links(page):
  """Links within the project lead somewhere, to a heading if they name one."""
  for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
    file, _, part = target.partition("#")
    if page.startswith("docs/") and not file:
      continue  # Sphinx checks these, such as those of the reference.
    path = ((ROOT / page).parent / file).resolve()
    assert path.exists(), target
    if part:
      assert part in anchors(path.read_text(encoding="utf-8")), target


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
