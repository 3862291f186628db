"""Which part of the package imports which: from the tools to the losses."""

import ast
import pathlib

import pytest

import optax_masking

PACKAGE = pathlib.Path(optax_masking.__file__).parent
TOOLS = ("testing", "upstream")
COMMAND = "_command"  # It divides.


def imported(path):
  """The modules of the package that one imports, wherever it does."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module == "optax_masking":
      yield from (f"optax_masking.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module or ""
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def modules(folder):
  """Those of a tool, or those of none."""
  tools = {path for tool in TOOLS for path in (PACKAGE / tool).rglob("*.py")}
  of_folder = set((PACKAGE / folder).rglob("*.py"))
  return of_folder if folder else of_folder - tools


@pytest.mark.parametrize("tool", TOOLS)
def test_losses_import_no_tool(tool):
  found = {
    path.stem
    for path in modules("")
    for name in imported(path)
    if name.startswith(f"optax_masking.{tool}")
  }
  assert found == {COMMAND}  # Which shows that the search finds some.


def test_guard_imports_no_staging():
  names = {name for path in modules("testing") for name in imported(path)}
  assert "optax_masking.testing._report" in names
  assert not [n for n in names if n.startswith("optax_masking.upstream")]
