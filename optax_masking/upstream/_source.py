"""Python modules as text, and changes to them."""

import ast
import dataclasses
import functools
import io
import re
import tokenize
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Module:
  """The text of a module, and its functions, imports and lines."""

  text: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.text)

  @functools.cached_property
  def lines(self) -> list[str]:
    return split_lines(self.text)

  @functools.cached_property
  def functions(self) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef)}

  @functools.cached_property
  def imports(self) -> dict[str, str]:
    """Each imported name, with a statement that imports this name alone."""
    found: dict[str, str] = {}
    for node in self.tree.body:
      if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
          one = (
            ast.ImportFrom(node.module, [alias], 0)
            if isinstance(node, ast.ImportFrom)
            else ast.Import([alias])
          )
          name = alias.asname or alias.name.partition(".")[0]
          found.setdefault(name, ast.unparse(one))
    return found

  def start_line(self, node: ast.stmt) -> int:
    """The index of the first line of a statement's comment or decorators."""
    decorators = getattr(node, "decorator_list", [])
    line = min(n.lineno for n in (node, *decorators)) - 1
    while line and self.lines[line - 1].startswith("#"):
      line -= 1
    return line

  def source(self, node: ast.stmt) -> str:
    return "".join(self.lines[self.start_line(node) : node.end_lineno])


def split_lines(text: str) -> list[str]:
  """Splits a text at newlines alone, as Python and git count lines."""
  return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


def end_line(node: ast.AST) -> int:
  """The number of the last line of a node, 0 if it has none."""
  return getattr(node, "end_lineno", None) or 0


def names_in(*nodes: ast.AST) -> set[str]:
  return {
    n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)
  }


def names_defined_by(node: ast.stmt) -> set[str]:
  """The names that a statement at the top of a module defines."""
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return {node.name}
  if isinstance(node, ast.Assign):
    return names_in(*node.targets)
  return set()


def definitions_needed(
  statements: Sequence[ast.stmt], names: Iterable[str]
) -> list[ast.stmt]:
  """The statements that define names and, recursively, all that they use.

  The statements keep their order. A derivative rule, `@f.defjvp def _`, comes
  with its function `f`.
  """
  by_name: dict[str, list[ast.stmt]] = {}
  for node in statements:
    for name in names_defined_by(node):
      if name == "_":
        assert isinstance(node, ast.FunctionDef)
        (defjvp,) = (
          n
          for decorator in node.decorator_list
          for n in ast.walk(decorator)
          if isinstance(n, ast.Attribute) and n.attr == "defjvp"
        )
        name = ast.unparse(defjvp.value)
      by_name.setdefault(name, []).append(node)
  found: set[ast.stmt] = set()
  todo = list(names)
  while todo:
    for node in by_name.get(todo.pop(), ()):
      if node not in found:
        found.add(node)
        todo += names_in(node)
  return [node for node in statements if node in found]


def indent_like_optax(text: str) -> str:
  """Indents lines inside of brackets by 4 spaces, as Optax does, not by 2."""
  depths: dict[int, int] = {}
  depth = 0
  ignored = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.NEWLINE)
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    line = token.start[0]
    bracket = token.string if token.type == tokenize.OP else ""
    if token.type not in ignored:
      depths.setdefault(line, depth - (bracket in (")", "]", "}")))
      for inside in range(line + 1, token.end[0] + 1):
        depths.setdefault(inside, 0)  # The lines of a string stay as they are.
    depth += (bracket in ("(", "[", "{")) - (bracket in (")", "]", "}"))
  return "".join(
    "  " * depths.get(number, 0) + line
    for number, line in enumerate(split_lines(text), 1)
  )


def join_statements(blocks: Sequence[tuple[ast.stmt, str]]) -> str:
  """Joins statements, with two empty lines around functions and classes.

  Args:
    blocks: Statements, each with its source.
  """
  text = ""
  before: ast.stmt | None = None
  for node, source in blocks:
    if before is not None:
      if not (isinstance(before, ast.Assign) and isinstance(node, ast.Assign)):
        text += "\n\n"
      elif source.startswith("#"):
        text += "\n"
    text += source.rstrip("\n") + "\n"
    before = node
  return text


def join_imports(statements: Iterable[str]) -> str:
  """Sorts imports, and imports names of one module in one statement."""
  names: dict[str, set[str]] = {}
  by_module: dict[str, str] = {}
  for statement in statements:
    words = statement.split()
    module = words[1]
    if words[0] == "from":
      names.setdefault(module, set()).add(" ".join(words[3:]))
      statement = f"from {module} import {', '.join(sorted(names[module]))}"
    by_module[module] = statement
  groups: list[list[str]] = [[], []]
  for module in sorted(by_module):
    groups[is_third_party(by_module[module])].append(by_module[module])
  return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


def import_sort_key(statement: str) -> list[str]:
  """The module of an import statement and the imported name, for sorting."""
  return statement.split()[1::2]


def is_third_party(statement: str) -> bool:
  root = statement.split()[1].partition(".")[0]
  return root in ("absl", "jax", "numpy", "optax")


def parameter_defaults(node: ast.FunctionDef) -> dict[str, ast.expr | None]:
  """The parameters of a function, each with its default or None."""
  args = node.args
  positional = [*args.posonlyargs, *args.args]
  required = [None] * (len(positional) - len(args.defaults))
  defaults = [*required, *args.defaults, *args.kw_defaults]
  parameters = [*positional, *args.kwonlyargs]
  return {p.arg: d for p, d in zip(parameters, defaults, strict=True)}


@dataclasses.dataclass
class Edit:
  """Text for the lines from `line` to `end`; without an `end`, an insertion."""

  line: int
  text: str
  end: int | None = None


def apply_edits(module: Module, edits: Sequence[Edit]) -> str:
  """The text of a module after edits.

  Edits that begin at the same line are applied in their order.
  """
  lines = list(module.lines)
  for edit in sorted(reversed(edits), key=lambda e: e.line, reverse=True):
    lines[edit.line : edit.line if edit.end is None else edit.end] = [edit.text]
  return "".join(lines)


def add_imports(module: Module, statements: Iterable[str]) -> str:
  """The text of a module with more imports, each at its place in the order."""
  edits: dict[int, str] = {}
  imports = [
    node
    for node in module.tree.body
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]
  for statement in sorted(statements, key=import_sort_key):
    group = [
      node
      for node in imports
      if is_third_party(ast.unparse(node)) == is_third_party(statement)
    ]
    key = import_sort_key(statement)
    before = [n for n in group if import_sort_key(ast.unparse(n)) <= key]
    line = 0
    if before:
      line = end_line(before[-1])
    elif imports:
      line = (group or imports)[0].lineno - 1
    elif ast.get_docstring(module.tree) is not None:
      line = end_line(module.tree.body[0])
    gap = "" if group else "\n"
    edits[line] = edits.get(line, "") + f"{statement}\n{gap}"
  return apply_edits(module, [Edit(line, text) for line, text in edits.items()])
