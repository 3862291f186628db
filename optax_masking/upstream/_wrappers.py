"""Translates the wrappers and the engine of this package for Optax."""

import ast
import functools
import pathlib
import re
from collections.abc import Collection, Iterable

from optax_masking.losses._table import ROWS
from optax_masking.upstream._source import (
  Module,
  definitions_needed,
  import_sort_key,
  indent_like_optax,
  is_third_party,
  join_imports,
  join_statements,
  names_defined_by,
  names_in,
)

_PACKAGE = pathlib.Path(__file__).parents[1]
# The new modules of `optax.losses`.
ENGINE = "_masking"
TESTS = "_masking_test"
# The modules that become the engine, each after those that it needs.
_ENGINE_PARTS = (
  "_classes",
  "fills",
  "_mask",
  "_decorator",
  "_compiled",
  "_cross_entropy",
)

# The fingerprints of the versions of a loss that its wrapper was tested with.
FINGERPRINTS = {name: row.written_for for name, row in ROWS.items()}
# Deprecated names of losses. Each calls the loss with `axis` and `where`.
ALIASES = {name: row.alias_of for name, row in ROWS.items() if row.alias_of}
LOSSES = tuple(sorted(ROWS))


@functools.cache
def package_module(name: str) -> Module:
  """A module of this package, indented as in Optax."""
  path = _PACKAGE / f"{name}.py"
  return Module(indent_like_optax(path.read_text(encoding="utf-8")))


@functools.cache
def modules_by_loss() -> dict[str, str]:
  """The losses of this package, each with the module that defines it."""
  return {
    name: f"losses/{path.stem}"
    for path in sorted((_PACKAGE / "losses").glob("_*.py"))
    for name in package_module(f"losses/{path.stem}").functions
    if not name.startswith("_")
  }


def module_of(name: str) -> str:
  """The module of a loss in this package and in Optax: `"losses/_ranking"`."""
  return modules_by_loss()[name]


def wrapper_of(name: str) -> ast.FunctionDef:
  return package_module(module_of(name)).functions[name]


def only_calls_original(name: str) -> bool:
  """Whether the body of a wrapper is no more than a call of Optax's loss."""
  body = wrapper_of(name).body[1:]
  return (
    len(body) == 1
    and isinstance(body[0], ast.Return)
    and isinstance(body[0].value, ast.Call)
    and ast.unparse(body[0].value.func) == f"original.{name}"
  )


def refuses_ambiguous_where(name: str) -> bool:
  """Whether Optax gave another meaning to a mask of lower rank."""
  module = package_module(module_of(name))
  wrapper = wrapper_of(name)
  helpers = [
    module.functions[n] for n in names_in(wrapper) & {*module.functions}
  ]
  return any(
    isinstance(node, ast.keyword) and node.arg == "refuse_ambiguous_where"
    for function in (wrapper, *helpers)
    for node in ast.walk(function)
  )


def has_constant_fills(name: str) -> bool:
  """Whether a wrapper fills the masked elements with constants.

  If so, a loss with a mask of its own can keep its body: after the fills, the
  loss may apply the mask once more without any effect.
  """
  return all(
    isinstance(keyword.value, ast.Constant)
    for decorator in wrapper_of(name).decorator_list
    if isinstance(decorator, ast.Call)
    for keyword in decorator.keywords
  )


def with_called_losses(names: Iterable[str]) -> list[str]:
  """The named losses, each after the losses that its wrapper calls."""
  found: dict[str, None] = {}
  for name in names:
    called = (names_in(wrapper_of(name)) & set(LOSSES)) - {name}
    found.update(dict.fromkeys(with_called_losses(sorted(called))))
    found.setdefault(name)
  return list(found)


@functools.cache
def module_for_optax(name: str, keeps_body: bool) -> Module:
  """The module of a wrapper, with the names of Optax.

  Args:
    name: The loss.
    keeps_body: Whether the loss keeps its body in Optax. If not, the wrapper
      calls the body by another name, `_unmasked_<loss>`.
  """
  module = package_module(module_of(name))
  engine = {
    imported
    for imported, statement in module.imports.items()
    if statement.startswith("from optax_masking")
  } - {"original"}

  def name_in_optax(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == "original":
        if node.attr == name and not keeps_body:
          return f"_unmasked_{name}"
        place = module_of(node.attr)
        if place != module_of(name):
          return f"{place.rpartition('/')[2]}.{node.attr}"
        return node.attr
    elif isinstance(node, ast.Name) and node.id in engine:
      return f"{ENGINE}.{node.id}"
    return None

  lines = [line.encode() for line in module.lines]  # `ast` counts bytes.
  found = [
    (node.lineno - 1, node.col_offset, node.end_col_offset or 0, text)
    for node in ast.walk(module.tree)
    if isinstance(node, ast.expr) and (text := name_in_optax(node))
  ]
  for line, start, end, text in sorted(found, reverse=True):
    lines[line] = lines[line][:start] + text.encode() + lines[line][end:]
  return Module(b"".join(lines).decode())


def engine_module_text(names: Iterable[str]) -> str:
  """The text of the new module with some names of the engine.

  Definitions that these names do not need are left out.
  """
  parts = [package_module(name) for name in _ENGINE_PARTS]
  statements = {
    node: part
    for part in parts
    for node in part.tree.body
    if names_defined_by(node) - {"__all__"}
  }
  defined = [
    name for node in statements for name in names_defined_by(node) - {"_"}
  ]
  assert len(defined) == len(set(defined)), "Two parts define one name."
  kept = definitions_needed(list(statements), names)
  used = names_in(*kept) | {"annotations"}  # `from __future__`.
  imports = {
    statement
    for part in parts
    for name, statement in part.imports.items()
    if name in used and "optax_masking" not in statement
  }
  docstring = _docstring(package_module("_mask"))
  code = join_statements(
    [(node, statements[node].source(node)) for node in kept]
  )
  text = f"{docstring}\n\n{join_imports(imports)}\n{code}"
  # Examples import this package, and the fills are no public module of Optax.
  text = re.sub(r"\n\n +Examples:\n.*?(?=\n +\"\"\")", "", text, flags=re.S)
  return re.sub(r"\n\n +:mod:`optax_masking\.fills` has those .*", "", text)


def _docstring(module: Module) -> str:
  return module.source(module.tree.body[0]).rstrip("\n")


def _losses_named_in(node: ast.AST) -> set[str]:
  """The losses that a test class calls by name."""
  return {
    n.attr
    for n in ast.walk(node)
    if isinstance(n, ast.Attribute) and n.attr in LOSSES
  }


def _case_table(names: Collection[str]) -> str:
  """The table of the tests, with the functions that make its data."""
  table = package_module("losses/_table")
  rows, used = "", set()
  for name in sorted(names):
    row = ROWS[name]
    makers = [make.__name__ for make in row.data]
    loss = f"losses.{name}"
    used.update(makers)
    if row.adapt:
      used.add(row.adapt.__name__)
      loss = f"{row.adapt.__name__}({loss})"
    rows += (
      f'    (\n        "{name}",\n        {loss},\n'
      f"        _arrays({row.fit((4, 6, 5))}, {', '.join(makers)}),\n    ),\n"
    )
  definitions = definitions_needed(table.tree.body, used)
  code = join_statements([(node, table.source(node)) for node in definitions])
  comment = "# The name of a loss, a function of arrays, and the arrays."
  return f"{code}\n\n{comment}\n_CASES = (\n{rows})\n"


def test_module_text(names: Collection[str]) -> str:
  """The text of a module of tests of losses, in the style of Optax's tests."""
  text = package_module(f"upstream/{TESTS}").text
  module = Module(text.replace("_CASES = ()\n", _case_table(names)))
  body = module.tree.body
  classes = [
    node.name
    for node in body
    if isinstance(node, ast.ClassDef) and _losses_named_in(node) <= set(names)
  ]
  statements = definitions_needed(body, classes)
  imports = {
    statement
    for name, statement in module.imports.items()
    if name in names_in(*statements, body[-1])
  }
  code = join_statements(
    [(node, module.source(node)) for node in (*statements, body[-1])]
  )
  docstring = _docstring(module)
  groups: list[list[str]] = [[], []]
  for statement in sorted(imports, key=import_sort_key):
    groups[is_third_party(statement)].append(f"{statement}\n")
  lines = "\n".join("".join(group) for group in groups if group)
  return f"{docstring}\n\n{lines}\n{code}"
