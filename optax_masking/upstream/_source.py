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
  """A module as text, and what it consists of."""

  text: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.text)

  @functools.cached_property
  def lines(self) -> list[str]:
    return lines_of(self.text)

  @functools.cached_property
  def functions(self) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef)}

  @functools.cached_property
  def imports(self) -> dict[str, str]:
    """Each imported name, and the statement that imports it alone."""
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

  def start(self, node: ast.stmt) -> int:
    """The line at which a statement begins, with its comment and decorators."""
    decorators = getattr(node, "decorator_list", [])
    line = min(n.lineno for n in (node, *decorators)) - 1
    while line and self.lines[line - 1].startswith("#"):
      line -= 1
    return line

  def source(self, node: ast.stmt) -> str:
    return "".join(self.lines[self.start(node) : node.end_lineno])


def lines_of(text: str) -> list[str]:
  """Lines as Python and git count them: they end with a newline."""
  return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


def end_of(node: ast.AST) -> int:
  """The number of lines up to the end of a node."""
  return getattr(node, "end_lineno", None) or 0


def names_in(*nodes: ast.AST) -> set[str]:
  return {
    n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)
  }


def defined_by(node: ast.stmt) -> set[str]:
  """What a statement at the top of a module defines."""
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return {node.name}
  if isinstance(node, ast.Assign):
    return names_in(*node.targets)
  return set()


def needed(
  statements: Sequence[ast.stmt], names: Iterable[str]
) -> list[ast.stmt]:
  """The statements that define names, and what these use, in their order."""
  by_name: dict[str, list[ast.stmt]] = {}
  for node in statements:
    for name in defined_by(node):
      if name == "_":  # A rule, which comes with what it is a rule of.
        assert isinstance(node, ast.FunctionDef)
        (rule,) = (
          n
          for decorator in node.decorator_list
          for n in ast.walk(decorator)
          if isinstance(n, ast.Attribute) and n.attr == "defjvp"
        )
        name = ast.unparse(rule.value)
      by_name.setdefault(name, []).append(node)
  found: set[ast.stmt] = set()
  todo = list(names)
  while todo:
    for node in by_name.get(todo.pop(), ()):
      if node not in found:
        found.add(node)
        todo += names_in(node)
  return [node for node in statements if node in found]


def hanging(text: str) -> str:
  """Indents what is inside of brackets by 4 spaces, as Optax does, not by 2."""
  depths: dict[int, int] = {}
  depth = 0
  ignored = (tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.NEWLINE)
  for token in tokenize.generate_tokens(io.StringIO(text).readline):
    line = token.start[0]
    bracket = token.string if token.type == tokenize.OP else ""
    if token.type not in ignored:
      depths.setdefault(line, depth - (bracket in (")", "]", "}")))
      for inside in range(line + 1, token.end[0] + 1):
        depths.setdefault(inside, 0)  # Of a string.
    depth += (bracket in ("(", "[", "{")) - (bracket in (")", "]", "}"))
  return "".join(
    "  " * depths.get(number, 0) + line
    for number, line in enumerate(lines_of(text), 1)
  )


def joined(blocks: Sequence[tuple[ast.stmt, str]]) -> str:
  """Statements, with two empty lines around functions and classes."""
  text = ""
  before: ast.stmt | None = None
  for node, source in blocks:
    if before is not None:
      small = isinstance(before, ast.Assign) and isinstance(node, ast.Assign)
      if not small:
        text += "\n\n"
      elif source.startswith("#"):
        text += "\n"
    text += source.rstrip("\n") + "\n"
    before = node
  return text


def joined_imports(statements: Iterable[str]) -> str:
  """Import statements in their order, those from one module as one."""
  names: dict[str, set[str]] = {}
  lines: dict[str, str] = {}  # By module.
  for statement in statements:
    words = statement.split()
    if words[0] == "from":
      names.setdefault(words[1], set()).add(" ".join(words[3:]))
      joined = ", ".join(sorted(names[words[1]]))
      lines[words[1]] = f"from {words[1]} import {joined}"
    else:
      lines[words[1]] = statement
  groups: list[list[str]] = [[], []]
  for module in sorted(lines):
    groups[is_third_party(lines[module])].append(lines[module])
  return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


def sort_key(statement: str) -> list[str]:
  """The module, and what is imported from it."""
  return statement.split()[1::2]


def is_third_party(statement: str) -> bool:
  root = statement.split()[1].partition(".")[0]
  return root in ("absl", "jax", "numpy", "optax")


def parameters(node: ast.FunctionDef) -> dict[str, ast.expr | None]:
  """The parameters of a function, and their defaults."""
  a = node.args
  positional = [*a.posonlyargs, *a.args]
  missing = [None] * (len(positional) - len(a.defaults))
  named = [*positional, *a.kwonlyargs]
  defaults = [*missing, *a.defaults, *a.kw_defaults]
  return {x.arg: d for x, d in zip(named, defaults, strict=True)}


@dataclasses.dataclass
class Edit:
  """Text to insert before a line, in the place of some of them or of none."""

  line: int
  text: str
  end: int | None = None


def edited(module: Module, edits: Sequence[Edit]) -> str:
  """A module after edits; those of one line in their order."""
  lines = list(module.lines)
  for edit in sorted(reversed(edits), key=lambda e: e.line, reverse=True):
    lines[edit.line : edit.line if edit.end is None else edit.end] = [edit.text]
  return "".join(lines)


def with_imports(module: Module, statements: Iterable[str]) -> str:
  """A module that imports more, each where the order has it."""
  edits: dict[int, str] = {}
  present = [
    node
    for node in module.tree.body
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]
  for statement in sorted(statements, key=sort_key):
    group = [
      node
      for node in present
      if is_third_party(ast.unparse(node)) == is_third_party(statement)
    ]
    before = [
      n for n in group if sort_key(ast.unparse(n)) <= sort_key(statement)
    ]
    line = 0
    if present:
      line = end_of(before[-1]) if before else (group or present)[0].lineno - 1
    elif ast.get_docstring(module.tree) is not None:
      line = end_of(module.tree.body[0])
    gap = "" if group else "\n"
    edits[line] = edits.get(line, "") + f"{statement}\n{gap}"
  return edited(module, [Edit(line, text) for line, text in edits.items()])
