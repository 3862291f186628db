"""Edits of Python source, by LibCST, that keep its format."""

import ast
import hashlib
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import libcst as cst
from libcst import matchers

from optax_masking._output import CommandError


class EditError(CommandError):
  """The source has a form that an edit does not know."""


def functions(text: str) -> dict[str, ast.FunctionDef]:
  """The functions at the top of a module."""
  body = ast.parse(text).body
  return {n.name: n for n in body if isinstance(n, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
  args = function.args
  return [*args.posonlyargs, *args.args, *args.kwonlyargs]


def fingerprint(text: str, name: str, losses: Collection[str]) -> str:
  """A hash of the code of a loss and of the helpers that it calls.

  Helpers are functions of the same module that are no losses. The hash depends
  neither on docstrings nor on types.
  """
  found = functions(text)
  helpers: set[str] = set()
  todo = {name}
  while todo:
    nodes = ast.walk(found[todo.pop()])
    used = {n.id for n in nodes if isinstance(n, ast.Name)} - set(losses)
    todo |= (used & found.keys()) - helpers
    helpers |= used & found.keys()
  code = ""
  for node in (found[name], *(found[n] for n in found if n in helpers)):
    for parameter in parameters(node):
      parameter.annotation = None
    node.returns = None
    if ast.get_docstring(node) is not None:
      del node.body[0]
    code += ast.unparse(node)
  return hashlib.sha256(code.encode()).hexdigest()[:8]


def with_quotes_of(text: str, code: str) -> str:
  """Code with the quotes that prevail in a text."""
  quotes = [
    token.string.lstrip("rbfRBF")[0]
    for token in tokenize.generate_tokens(io.StringIO(text).readline)
    if token.type == tokenize.STRING and '"""' not in token.string
  ]
  if quotes.count("'") > quotes.count('"'):
    return re.sub(r'(?<!")"(?!")([^"\n]*)"', r"'\1'", code)
  return code


def _statements(code: str) -> list[Any]:
  # Comments above the first statement would belong to the module.
  config = cst.PartialParserConfig(default_indent="  ")
  found = cst.parse_module(f"pass\n{code}\n", config).body[1:]
  bare = matchers.EmptyLine(comment=None)
  return [
    matchers.replace(node, bare, cst.EmptyLine(indent=False)) for node in found
  ]


def _code(node: cst.CSTNode) -> str:
  return cst.Module([]).code_for_node(node)


class _Replacer(cst.CSTTransformer):
  """Replaces a statement that begins with a text, but for its format."""

  def __init__(self, old: str, new: str):
    super().__init__()
    self.count = 0
    self._old, self._new = old, _statements(new)

  def on_leave(self, original_node: Any, updated_node: Any) -> Any:
    updated_node = super().on_leave(original_node, updated_node)
    if not isinstance(original_node, cst.SimpleStatementLine | cst.If):
      return updated_node
    found = ast.unparse(ast.parse(textwrap.dedent(_code(original_node))))
    if not found.startswith(self._old):
      return updated_node
    self.count += 1
    return cst.FlattenSentinel(self._replaced(updated_node))

  def _replaced(self, old: Any) -> list[Any]:
    """The new statements, below the empty lines and comments of the old one."""
    new = list(self._new)
    if new and matchers.matches(
      old, matchers.SimpleStatementLine([matchers.Return()])
    ):
      value = old.body[0].value
      new[0] = matchers.replace(new[0], matchers.Name("RETURNED"), value)
    place = [i for i, node in enumerate(new) if _code(node).strip() == "..."]
    empty = [line for line in old.leading_lines if line.comment is None]
    comments = [
      line
      for line in old.leading_lines
      if line.comment and "bad-return" not in line.comment.value
    ]
    if place:
      new[place[0]] = old.with_changes(
        leading_lines=[*new[place[0]].leading_lines, *comments]
      )
      comments = []
    elif new and isinstance(new[0], cst.SimpleStatementLine):
      end = old.trailing_whitespace
      if "bad-return" not in _code(end):
        new[0] = new[0].with_changes(trailing_whitespace=end)
    if new:
      lines = [*empty, *comments, *new[0].leading_lines]
      new[0] = new[0].with_changes(leading_lines=lines)
    return new


def _with_function(
  text: str, name: str, change: Callable[[Any, Any], Any]
) -> str:
  """A text of which a change was made to one function, in LibCST."""
  module = cst.parse_module(text)
  body = [
    change(module, node)
    if isinstance(node, cst.FunctionDef) and node.name.value == name
    else node
    for node in module.body
  ]
  return module.with_changes(body=body).code


def replace(text: str, name: str, edits: Sequence[tuple[str, str]]) -> str:
  """Replaces statements of a function: the beginning of each, and the new.

  `...` in the new statements stands for the old one, RETURNED for its value.

  Raises:
    EditError: If a statement is not there, or twice.
  """

  def replaced(module: Any, node: Any) -> Any:
    del module
    for old, new in edits:
      replacer = _Replacer(old, with_quotes_of(text, new))
      node = node.visit(replacer)
      if replacer.count != 1:
        raise EditError(f"{name} has {replacer.count} statements `{old}`")
    return node

  return _with_function(text, name, replaced)


def first_statement(function: ast.FunctionDef) -> str:
  """The first statement behind the docstring and the checks."""
  body = [ast.unparse(node) for node in function.body[1:]]
  checks = [i for i, code in enumerate(body) if code.startswith("utils.check_")]
  return body[checks[-1] + 1 if checks else 0]


def add_parameters(text: str, name: str, added: Mapping[str, str]) -> str:
  """Adds keyword-only parameters, each with its type and default."""

  def changed(module: Any, node: Any) -> Any:
    code, old = module.code_for_node, node.params
    lines = [*map(code, old.params), "*", *map(code, old.kwonly_params)]
    lines += [f"{name}: {rest}" for name, rest in added.items()]
    header = "".join(f"    {line.strip().rstrip(',')},\n" for line in lines)
    new: Any = cst.parse_statement(f"def f(\n{header}):\n  pass\n")
    space = new.whitespace_before_params
    return node.with_changes(params=new.params, whitespace_before_params=space)

  return _with_function(text, name, changed)


def edit_docstring(
  text: str, name: str, entries: Mapping[str, str], version: str, note: str
) -> str:
  """Adds arguments and a `versionchanged` note to a docstring."""

  def changed(module: Any, node: Any) -> Any:
    del module
    old = node.body.body[0].body[0].value
    new = old.value.removesuffix('"""').rstrip()
    section = re.search(r"\n *Args:\n+(( +)\w+:.*\n(?: *\S.*\n)*)", new)
    if section and entries:
      indent, end = section[2], section.end()
      lines = [
        wrapped(f"{k}: {v}", f"{indent}  ", indent) for k, v in entries.items()
      ]
      new = new[:end] + "".join(lines) + new[end:]
    head = f"  .. versionchanged:: {version}\n"
    last = new.rpartition("\n\n")[2]
    if head not in last:
      new += ("\n" if ".. version" in last else "\n\n") + head.rstrip("\n")
    new = f'{new}\n{wrapped(note, "    ")}  """'
    return node.deep_replace(old, old.with_changes(value=new))

  return _with_function(text, name, changed)


def wrapped(text: str, indent: str, first: str | None = None) -> str:
  first = indent if first is None else first
  return (
    textwrap.fill(
      text,
      80,
      initial_indent=first,
      subsequent_indent=indent,
      break_on_hyphens=False,
    )
    + "\n"
  )
