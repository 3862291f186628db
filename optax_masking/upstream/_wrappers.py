"""The wrappers and the engine of this package, as they are to be in Optax."""

import ast
import functools
import pathlib
import re
from collections.abc import Collection, Iterable

from optax_masking.losses._table import ROWS
from optax_masking.upstream._source import (
  Module,
  defined_by,
  hanging,
  is_third_party,
  joined,
  joined_imports,
  names_in,
  needed,
  sort_key,
)

_PACKAGE = pathlib.Path(__file__).parents[1]
ENGINE = "_masking"
TESTS = "_masking_test"
# The modules of the engine, each after those that it needs.
_ENGINE_PARTS = ("fills", "_mask", "_decorator", "_compiled", "_cross_entropy")

# What each loss was when its wrapper was tested with it: fingerprints.
KNOWN = {name: row.written_for for name, row in ROWS.items()}
# A deprecated name of another loss, which it calls with `axis` and `where`.
ALIASES = {name: row.alias_of for name, row in ROWS.items() if row.alias_of}
LOSSES = tuple(sorted(ROWS))


@functools.cache
def own(name: str) -> Module:
  path = _PACKAGE / f"{name}.py"
  return Module(hanging(path.read_text(encoding="utf-8")))


@functools.cache
def places() -> dict[str, str]:
  """The losses of this package, each with its module."""
  return {
    name: f"losses/{path.stem}"
    for path in sorted((_PACKAGE / "losses").glob("_*.py"))
    for name in own(f"losses/{path.stem}").functions
    if not name.startswith("_")
  }


def module_of(name: str) -> str:
  """The module of a loss, as `"losses/_regression"`: here, and in Optax."""
  return places()[name]


def wrapper_of(name: str) -> ast.FunctionDef:
  return own(module_of(name)).functions[name]


def is_a_call(name: str) -> bool:
  """Whether a wrapper does no more than call the loss."""
  body = wrapper_of(name).body[1:]
  return (
    len(body) == 1
    and isinstance(body[0], ast.Return)
    and isinstance(body[0].value, ast.Call)
    and ast.unparse(body[0].value.func) == f"original.{name}"
  )


def refuses_ambiguous_where(name: str) -> bool:
  """Whether a lower rank of the mask meant something else to the loss."""
  module = own(module_of(name))
  wrapper = wrapper_of(name)
  helpers = [
    module.functions[n] for n in names_in(wrapper) & {*module.functions}
  ]
  return any(
    isinstance(node, ast.keyword) and node.arg == "refuse_ambiguous_where"
    for function in (wrapper, *helpers)
    for node in ast.walk(function)
  )


def fills_only(name: str) -> bool:
  """Whether all that is masked is filled with numbers.

  Then a loss that uses the mask by itself may do so: it is of no consequence.
  """
  return all(
    isinstance(keyword.value, ast.Constant)
    for decorator in wrapper_of(name).decorator_list
    if isinstance(decorator, ast.Call)
    for keyword in decorator.keywords
  )


def with_called(names: Iterable[str]) -> list[str]:
  """Losses, after those of them that they call with a mask."""
  found: dict[str, None] = {}
  for name in names:
    called = (names_in(wrapper_of(name)) & set(LOSSES)) - {name}
    found.update(dict.fromkeys(with_called(sorted(called))))
    found.setdefault(name)
  return list(found)


@functools.cache
def translated(name: str, in_place: bool) -> Module:
  """The module of a wrapper, with the names that things have in Optax."""
  module = own(module_of(name))
  engine = {
    imported
    for imported, statement in module.imports.items()
    if statement.startswith("from optax_masking")
  } - {"original"}

  def in_optax(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == "original":
        if node.attr == name and not in_place:
          return f"_unmasked_{name}"
        place = module_of(node.attr)
        if place != module_of(name):
          return f"{place.rpartition('/')[2]}.{node.attr}"
        return node.attr
    elif isinstance(node, ast.Name) and node.id in engine:
      return f"{ENGINE}.{node.id}"
    return None

  lines = [line.encode() for line in module.lines]  # Offsets are of bytes.
  found = [
    (node.lineno - 1, node.col_offset, node.end_col_offset or 0, text)
    for node in ast.walk(module.tree)
    if isinstance(node, ast.expr) and (text := in_optax(node))
  ]
  for line, start, end, text in sorted(found, reverse=True):
    lines[line] = lines[line][:start] + text.encode() + lines[line][end:]
  return Module(b"".join(lines).decode())


def engine_text(names: Iterable[str]) -> str:
  """The new module: some names, and what these need."""
  parts = [own(name) for name in _ENGINE_PARTS]
  statements = {
    node: part
    for part in parts
    for node in part.tree.body
    if defined_by(node) - {"__all__"}
  }
  defined = [name for node in statements for name in defined_by(node) - {"_"}]
  assert len(defined) == len(set(defined)), "Two parts define one name."
  kept = needed(list(statements), names)
  used = names_in(*kept)
  imports = {
    statement
    for part in parts
    for name, statement in part.imports.items()
    if name in used and "optax_masking" not in statement
  }
  docstring = _docstring(own("_mask"))
  code = joined([(node, statements[node].source(node)) for node in kept])
  text = f"{docstring}\n\n{joined_imports(imports)}\n{code}"
  # What is for a package that exports the decorator, and its fills.
  text = re.sub(r"\n\n +Examples:\n.*?(?=\n +\"\"\")", "", text, flags=re.S)
  return re.sub(r"\n\n +:mod:`optax_masking\.fills` has those .*", "", text)


def _docstring(module: Module) -> str:
  return module.source(module.tree.body[0]).rstrip("\n")


def _losses_in(node: ast.AST) -> set[str]:
  """The losses that a test calls by name."""
  return {
    n.attr
    for n in ast.walk(node)
    if isinstance(n, ast.Attribute) and n.attr in LOSSES
  }


def _cases(names: Collection[str]) -> str:
  """The table of the tests, with what makes and adapts the data of its rows."""
  table = own("losses/_table")
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
  definitions = needed(table.tree.body, used)
  code = joined([(node, table.source(node)) for node in definitions])
  comment = "# The name of a loss, a function of arrays, and the arrays."
  return f"{code}\n\n{comment}\n_CASES = (\n{rows})\n"


def tests_text(names: Collection[str]) -> str:
  """Tests of losses, beside Optax's own and in their style."""
  text = own(f"upstream/{TESTS}").text
  module = Module(text.replace("_CASES = ()\n", _cases(names)))
  body = module.tree.body
  classes = [
    node.name
    for node in body
    if isinstance(node, ast.ClassDef) and _losses_in(node) <= set(names)
  ]
  statements = needed(body, classes)
  imports = {
    statement
    for name, statement in module.imports.items()
    if name in names_in(*statements, body[-1])
  }
  code = joined(
    [(node, module.source(node)) for node in (*statements, body[-1])]
  )
  docstring = _docstring(module)
  groups: list[list[str]] = [[], []]
  for statement in sorted(imports, key=sort_key):
    groups[is_third_party(statement)].append(f"{statement}\n")
  lines = "\n".join("".join(group) for group in groups if group)
  return f"{docstring}\n\n{lines}\n{code}"
