"""Puts masked losses into a checkout of Optax, as a change to its source.

A loss keeps its text. Inserted are a decorator, `axis` and `where` in its
signature and its docstring and, where a wrapper of this package does more than
call the loss, the wrapper's body, behind which the old one goes on as a
function `_unmasked_<loss>`. The engine becomes one new private module, as far
as it is needed, and has tests beside it.

Nothing of Optax is written here. What is inserted is the source of this
package, and the rest is read from the checkout.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import io
import pathlib
import re
import textwrap
import tokenize
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Mapping,
  Sequence,
)

_PACKAGE = pathlib.Path(__file__).parent
_ENGINE = "_masking"
_TESTS = "_masking_test"
# The modules of the engine, each after those that it needs.
_ENGINE_PARTS = (
  "fills",
  "_arguments",
  "_signatures",
  "_masking",
  "_cross_entropy",
)
_YEAR = 2026  # Of the license of new files.

# What each loss was when its wrapper was tested with it: a `fingerprint` for
# Optax 0.2.7 and 0.2.8, and another if it differs in commit 2edbcbe2.
_KNOWN = {
  "binary_dice_loss": ("3ae98a10",),
  "convex_kl_divergence": ("d32f8a1b",),
  "cosine_distance": ("770e02c1",),
  "cosine_similarity": ("c9a363db",),
  "ctc_loss": ("8cebdd80",),
  "ctc_loss_with_forward_probs": ("91732f90",),
  "dice_loss": ("9d516084", "1173c4fa"),
  "generalized_kl_divergence": ("522956b3",),
  "hinge_loss": ("c7597056",),
  "huber_loss": ("0c328dec",),
  "kl_divergence": ("fcfa2a1e",),
  "kl_divergence_with_log_targets": ("ba393901",),
  "l2_loss": ("85cf2c50",),
  "log_cosh": ("053fd849",),
  "make_fenchel_young_loss": ("5f8e6a5a",),
  "multiclass_generalized_dice_loss": ("3fb94ed9",),
  "multiclass_hinge_loss": ("0555c84a",),
  "multiclass_perceptron_loss": ("568b91a4",),
  "multiclass_sparsemax_loss": ("492dcd02",),
  "ntxent": ("0dda955b",),
  "perceptron_loss": ("9be3f7c3",),
  "poly_loss_cross_entropy": ("53656573",),
  "ranking_softmax_loss": ("a4f8de22",),
  "safe_softmax_cross_entropy": ("abd34809",),
  "sigmoid_binary_cross_entropy": ("fa58b3e2",),
  "sigmoid_focal_loss": ("ca92d550", "b25df937"),
  "smooth_labels": ("f96ddf7e",),
  "softmax_cross_entropy": ("d199865b",),
  "softmax_cross_entropy_with_integer_labels": ("d6211343",),
  "sparsemax_loss": ("c74fb491",),
  "squared_error": ("5cb021b1",),
  "triplet_margin_loss": ("0832ee6a",),
}
# A deprecated name of another loss, which it calls with `axis` and `where`.
_ALIASES = {"convex_kl_divergence": "generalized_kl_divergence"}

LOSSES = tuple(_KNOWN)


class StagingError(Exception):
  """A checkout, or a loss in it, that is not understood.

  Attributes:
    reasons: Which losses are not, each with the reason.
  """

  def __init__(self, message: str, reasons: Mapping[str, str] | None = None):
    super().__init__(message)
    self.reasons = reasons or {}


# Modules as text.


@dataclasses.dataclass(frozen=True)
class Module:
  """A module as text, and what it consists of."""

  text: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.text)

  @functools.cached_property
  def lines(self) -> list[str]:
    return self.text.splitlines(keepends=True)

  @functools.cached_property
  def functions(self) -> dict[str, ast.FunctionDef]:
    return {n.name: n for n in self.tree.body if isinstance(n, ast.FunctionDef)}

  @functools.cached_property
  def imports(self) -> dict[str, str]:
    """Each imported name, and the statement that imports it alone."""
    found = {}
    for node in self.tree.body:
      if isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
          one = (
            ast.ImportFrom(node.module, [alias], 0)
            if isinstance(node, ast.ImportFrom)
            else ast.Import([alias])
          )
          name = alias.asname or alias.name.partition(".")[0]
          found[name] = ast.unparse(one)
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


def _end(node: ast.AST) -> int:
  """The number of lines up to the end of a node."""
  return getattr(node, "end_lineno", None) or 0


def _names_in(*nodes: ast.AST) -> set[str]:
  return {
    n.id for node in nodes for n in ast.walk(node) if isinstance(n, ast.Name)
  }


def _defined_by(node: ast.stmt) -> set[str]:
  """What a statement at the top of a module defines."""
  if isinstance(node, ast.FunctionDef | ast.ClassDef):
    return {node.name}
  if isinstance(node, ast.Assign):
    return _names_in(*node.targets)
  return set()


def _needed(
  statements: Sequence[ast.stmt], names: Iterable[str]
) -> list[ast.stmt]:
  """The statements that define names, and what these use, in their order."""
  by_name: dict[str, list[ast.stmt]] = {}
  for node in statements:
    for name in _defined_by(node):
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
        todo += _names_in(node)
  return [node for node in statements if node in found]


def _hanging(text: str) -> str:
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
    for number, line in enumerate(text.splitlines(keepends=True), 1)
  )


def _joined(blocks: Sequence[tuple[ast.stmt, str]]) -> str:
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


def _joined_imports(statements: Iterable[str]) -> str:
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
    groups[_is_third_party(lines[module])].append(lines[module])
  return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


def _sort_key(statement: str) -> list[str]:
  """The module, and what is imported from it."""
  return statement.split()[1::2]


def _is_third_party(statement: str) -> bool:
  root = statement.split()[1].partition(".")[0]
  return root in ("absl", "jax", "numpy", "optax")


# This package's side.


@functools.cache
def _own(name: str) -> Module:
  path = _PACKAGE / f"{name}.py"
  return Module(_hanging(path.read_text(encoding="utf-8")))


@functools.cache
def wrappers() -> dict[str, str]:
  """The losses of this package, each with its module."""
  return {
    name: f"losses/{path.stem}"
    for path in sorted((_PACKAGE / "losses").glob("_*.py"))
    for name in _own(f"losses/{path.stem}").functions
    if not name.startswith("_")
  }


def _wrapper(name: str) -> ast.FunctionDef:
  return _own(wrappers()[name]).functions[name]


def _is_a_call(name: str) -> bool:
  """Whether a wrapper does no more than call the loss."""
  body = _wrapper(name).body[1:]
  return (
    len(body) == 1
    and isinstance(body[0], ast.Return)
    and isinstance(body[0].value, ast.Call)
    and ast.unparse(body[0].value.func) == f"original.{name}"
  )


def with_called(names: Iterable[str]) -> list[str]:
  """Losses, after those of them that they call with a mask."""
  found: dict[str, None] = {}
  for name in names:
    called = (_names_in(_wrapper(name)) & set(LOSSES)) - {name}
    found.update(dict.fromkeys(with_called(sorted(called))))
    found.setdefault(name)
  return list(found)


@functools.cache
def _translated(name: str, in_place: bool) -> Module:
  """The module of a wrapper, with the names that things have in Optax."""
  module = _own(wrappers()[name])
  engine = {
    imported
    for imported, statement in module.imports.items()
    if statement.startswith("from optax_masking")
  } - {"original", "_cross_entropy"}

  def in_optax(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == "_cross_entropy":
        return f"{_ENGINE}.{node.attr}"
      if node.value.id == "original":
        if node.attr == name and not in_place:
          return f"_unmasked_{name}"
        place = wrappers()[node.attr]
        if place != wrappers()[name]:
          return f"{place.rpartition('/')[2]}.{node.attr}"
        return node.attr
    elif isinstance(node, ast.Name) and node.id in engine:
      return f"{_ENGINE}.{node.id}"
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


def _engine_text(names: Iterable[str]) -> str:
  """The new module: some names, and what these need."""
  parts = [_own(name) for name in _ENGINE_PARTS]
  statements = {
    node: part
    for part in parts
    for node in part.tree.body
    if _defined_by(node) - {"__all__"}
  }
  kept = _needed(list(statements), names)
  used = _names_in(*kept)
  imports = {
    statement
    for part in parts
    for name, statement in part.imports.items()
    if name in used and "optax_masking" not in statement
  }
  main = _own("_masking")
  docstring = main.source(main.tree.body[0])
  code = _joined([(node, statements[node].source(node)) for node in kept])
  text = f"{docstring}\n{_joined_imports(imports)}\n{code}"
  # The examples are for a package that exports the decorator.
  text = re.sub(r"\n\n +Examples:\n.*?(?=\n +\"\"\")", "", text, flags=re.S)
  return re.sub(r" They are in\s+:mod:`optax_masking\.fills`\.", "", text)


def _tests_text(names: Collection[str]) -> str:
  """Tests of losses, beside Optax's own and in their style."""
  template = _own(_TESTS)
  cases = next(
    node for node in template.tree.body if _defined_by(node) == {"_CASES"}
  )
  assert isinstance(cases, ast.Assign) and isinstance(cases.value, ast.Tuple)
  left_out = {
    line
    for row in cases.value.elts
    if isinstance(row, ast.Tuple)
    and isinstance(row.elts[0], ast.Constant)
    and row.elts[0].value not in names
    for line in range(row.lineno - 1, _end(row))
  }
  module = Module(
    "".join(x for i, x in enumerate(template.lines) if i not in left_out)
  )
  body = module.tree.body
  statements = _needed(body, ["MaskTest"])
  imports = {
    statement
    for name, statement in module.imports.items()
    if name in _names_in(*statements, body[-1])
  }
  code = _joined(
    [(node, module.source(node)) for node in (*statements, body[-1])]
  )
  docstring = module.source(body[0])
  lines = "".join(f"{s}\n" for s in sorted(imports, key=_sort_key))
  return f"{docstring}\n{lines}\n{code}"


# Optax's side.


def fingerprint(node: ast.FunctionDef) -> str:
  """Of what a loss computes: not of its documentation, nor of its types."""
  (node,) = ast.parse(ast.unparse(node)).body  # type: ignore[assignment]
  a = node.args
  for parameter in (*a.posonlyargs, *a.args, *a.kwonlyargs):
    parameter.annotation = None
  node.returns, node.decorator_list = None, []
  if ast.get_docstring(node) is not None:
    del node.body[0]
  return hashlib.sha256(ast.unparse(node).encode()).hexdigest()[:8]


def parameters(node: ast.FunctionDef) -> dict[str, ast.expr | None]:
  """The parameters of a function, and their defaults."""
  a = node.args
  positional = [*a.posonlyargs, *a.args]
  missing = [None] * (len(positional) - len(a.defaults))
  named = [*positional, *a.kwonlyargs]
  defaults = [*missing, *a.defaults, *a.kw_defaults]
  return {x.arg: d for x, d in zip(named, defaults, strict=True)}


@dataclasses.dataclass
class _Edit:
  """Text to insert before a line, in the place of some of them or of none."""

  line: int
  text: str
  end: int | None = None


def _edited(module: Module, edits: Iterable[_Edit]) -> str:
  lines = list(module.lines)
  for edit in sorted(edits, key=lambda e: e.line, reverse=True):
    lines[edit.line : edit.line if edit.end is None else edit.end] = [edit.text]
  return "".join(lines)


def _staged(module: Module, name: str, version: str) -> str:
  """The text of a module of Optax with one of its losses masked."""
  loss = module.functions[name]
  has = parameters(loss)
  added = [a for a in parameters(_wrapper(name)) if a not in has]
  # One with a `where` of its own would be given the mask, and is not asked.
  in_place = _is_a_call(name) and "where" not in has
  ours = _translated(name, in_place)
  wrapper = ours.functions[name]
  edits = _docstring_edits(module, loss, wrapper, added, version)
  if added:
    edits.append(_signature_edit(module, loss, wrapper, added))

  # What comes before it: the decorator, and functions that are used.
  docstring, *body = wrapper.body
  inserted: list[ast.AST] = list(wrapper.decorator_list)
  inserted += [] if in_place else body
  helpers = [
    node
    for node in _helpers(ours, inserted)
    if not _defined_by(node) & module.functions.keys()  # By another loss.
  ]
  inserted += helpers
  heads: dict[int, str] = {}
  for node in helpers:
    # Before all that may need it one day.
    line = min(
      module.start(module.functions[other])
      for other in module.functions.keys() & set(LOSSES)
      if node in _helpers(ours, [ours.functions[other]])
    )
    source = ours.source(node).rstrip("\n")
    heads[line] = heads.get(line, "") + f"{source}\n\n\n"
  line = module.start(loss)
  decorators = "".join(ours.lines[ours.start(wrapper) : wrapper.lineno - 1])
  heads[line] = heads.get(line, "") + decorators
  edits += [_Edit(line, text) for line, text in heads.items()]

  # The body.
  code = "".join(ours.lines[_end(docstring) : _end(wrapper)])
  docstring = loss.body[0]
  if f"_unmasked_{name}" in _names_in(*inserted):
    signature = module.lines[loss.lineno - 1 : docstring.lineno - 1]
    old = "".join(signature).replace(f"def {name}(", f"def _unmasked_{name}(")
    edits.append(_Edit(_end(docstring), f"{code}\n\n{old}"))
  elif not in_place:
    edits.append(_Edit(_end(docstring), code, _end(loss)))

  siblings = {place.rpartition("/")[2] for place in wrappers().values()}
  imports = {
    **_own(wrappers()[name]).imports,
    **{n: f"from optax.losses import {n}" for n in (_ENGINE, *siblings)},
  }
  wanted = _names_in(*inserted) | {_ENGINE}
  return _with_imports(
    Module(_edited(module, edits)),
    [s for n, s in imports.items() if n in wanted and n not in module.imports],
  )


def _helpers(ours: Module, nodes: Iterable[ast.AST]) -> list[ast.stmt]:
  """What the module of a wrapper defines besides losses, and nodes need."""
  others = [n for n in ours.tree.body if _defined_by(n) - set(LOSSES)]
  return _needed(others, _names_in(*nodes))


def _docstring_edits(
  module: Module,
  loss: ast.FunctionDef,
  wrapper: ast.FunctionDef,
  added: Sequence[str],
  version: str,
) -> list[_Edit]:
  """Entries for the new arguments, and a note of the version."""
  docstring = loss.body[0]
  begin, last = docstring.lineno - 1, _end(docstring) - 1
  lines = [line.strip() for line in module.lines[begin : last + 1]]
  if ast.get_docstring(loss) is None or lines[-1] != '"""':
    raise StagingError(
      f"{loss.name}: its docstring does not end on a line of its own."
    )
  edits = []
  if added and "Args:" in lines:
    end = begin + lines.index("", lines.index("Args:"))
    entries = _entries(ast.get_docstring(wrapper) or "")
    edits.append(_Edit(end, "".join(map(_entry, map(entries.get, added)))))
  notes = []
  if added:
    names = " and ".join(f"``{argument}``" for argument in added)
    notes.append(f"Added {names} argument{'s' if len(added) > 1 else ''}.")
  if "where" in parameters(loss):
    notes.append("What ``where`` excludes changes no value or derivative.")
  if "where" not in parameters(wrapper):
    notes.append("The loss that is returned takes ``axis`` and ``where``.")
  text = f"  .. versionchanged:: {version}\n"
  text += textwrap.indent(textwrap.fill(" ".join(notes), 76), " " * 4) + "\n"
  follows = re.search(
    r"^ *\.\. version\w+::.*\n(?: {4,}.*\n)*\Z",
    "".join(module.lines[begin:last]),
    re.M,
  )
  edits.append(_Edit(last, text if follows else f"\n{text}"))
  return edits


def _entries(docstring: str) -> dict[str, str]:
  """The entries of `Args:`, each with its text."""
  section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", docstring, re.M | re.S)
  if section is None:
    return {}
  text = textwrap.dedent(section[1])
  parts = re.split(r"^(?=\*{0,2}\w+:)", text, flags=re.M)
  return {p.partition(":")[0].strip("*"): p for p in parts if p.strip()}


def _entry(text: str | None) -> str:
  """An entry for an `Args:` of Optax, without references to this package."""
  text = " ".join((text or "").split())
  text = re.sub(r",? as in :func:`optax_masking\.masked_inputs`", "", text)
  lines = textwrap.wrap(
    text, 80, initial_indent=" " * 4, subsequent_indent=" " * 6
  )
  return "".join(f"{line}\n" for line in lines)


def _signature_edit(
  module: Module,
  loss: ast.FunctionDef,
  wrapper: ast.FunctionDef,
  added: Iterable[str],
) -> _Edit:
  """New keywords behind the parameters of a loss."""
  defaults = parameters(wrapper)
  a = loss.args
  nodes = [*a.posonlyargs, *a.args, *a.kwonlyargs, *a.defaults, *a.kw_defaults]
  line, column = max(
    (_end(node), getattr(node, "end_col_offset", 0)) for node in nodes if node
  )
  text = "" if a.kwonlyargs or a.vararg else "    *,\n"
  for argument in added:
    default = defaults[argument]
    assert default is not None
    kind = f"{_ENGINE}.{argument.capitalize()}"
    text += f"    {argument}: {kind} = {ast.unparse(default)},\n"
  last = module.lines[line - 1].encode()
  rest = last[column:].decode()
  if rest.startswith(","):
    return _Edit(line, text)
  return _Edit(line - 1, f"{last[:column].decode()},\n{text}{rest}", line)


def _with_imports(module: Module, statements: Iterable[str]) -> str:
  """A module that imports more, each where the order has it."""
  edits: dict[int, str] = {}
  present = [
    node
    for node in module.tree.body
    if isinstance(node, ast.Import | ast.ImportFrom)
  ]
  for statement in sorted(statements, key=_sort_key):
    group = [
      node
      for node in present
      if _is_third_party(ast.unparse(node)) == _is_third_party(statement)
    ]
    before = [
      n for n in group if _sort_key(ast.unparse(n)) <= _sort_key(statement)
    ]
    line = _end(before[-1]) if before else (group or present)[0].lineno - 1
    gap = "" if group else "\n"
    edits[line] = edits.get(line, "") + f"{statement}\n{gap}"
  return _edited(module, [_Edit(line, text) for line, text in edits.items()])


# The whole.


@dataclasses.dataclass(frozen=True)
class Checkout:
  """A git checkout of Optax, or a copy of an installed one.

  Attributes:
    root: The folder that holds the package `optax`, which paths in a patch are
      relative to.
  """

  root: pathlib.Path

  @classmethod
  def at(cls, path: str | pathlib.Path) -> "Checkout":
    path = pathlib.Path(path).absolute()
    for root in (path, path.parent):
      losses = root / "optax" / "losses" / "__init__.py"
      if losses.is_file() and path in (root, root / "optax"):
        return cls(root)
    raise StagingError(
      f"{path} is no checkout of Optax: it has no optax/losses/__init__.py."
    )

  def path(self, module: str) -> pathlib.Path:
    """The file of a module such as `"losses/_regression"`."""
    return self.root / "optax" / f"{module}.py"

  def text(self, module: str) -> str:
    """The text of a module, empty if there is none."""
    path = self.path(module)
    return path.read_text(encoding="utf-8") if path.is_file() else ""

  @functools.cached_property
  def modules(self) -> dict[str, Module]:
    """The modules of losses, without their tests."""
    found = {}
    for path in sorted((self.root / "optax" / "losses").glob("_*.py")):
      if path.stem not in (_ENGINE, "__init__") and not path.stem.endswith(
        "_test"
      ):
        name = f"losses/{path.stem}"
        found[name] = Module(self.text(name))
        try:
          ast.parse(found[name].text)
        except SyntaxError as error:
          raise StagingError(f"optax/{name}.py: {error}") from error
    return found

  def loss(self, name: str) -> ast.FunctionDef | None:
    """The definition of a loss, if it is where Optax has it."""
    module = self.modules.get(wrappers()[name])
    return module.functions.get(name) if module else None

  def is_staged(self, name: str) -> bool:
    """Whether a loss has been masked by this package."""
    name = _ALIASES.get(name, name)
    loss = self.loss(name)
    if loss is None or not self.path(f"losses/{_ENGINE}").is_file():
      return False
    marks = " ".join(map(ast.unparse, (*loss.decorator_list, loss.args)))
    functions = self.modules[wrappers()[name]].functions
    return f"{_ENGINE}." in marks or f"_unmasked_{name}" in functions

  @functools.cached_property
  def version(self) -> str:
    """The release that a change will be in."""
    found = re.search(
      r"""^__version__ = ["'](\d+)\.(\d+)\.(\d+)([^"']*)""",
      self.text("__init__"),
      re.M,
    )
    if found is None:
      raise StagingError("optax/__init__.py has no `__version__`.")
    major, minor, micro = map(int, found.groups()[:3])
    return f"{major}.{minor}.{micro if found[4] else micro + 1}"

  def header(self) -> str:
    """The license at the top of a new file."""
    text = self.text("losses/_classification")
    header = "".join(re.findall(r"\A(?:#.*\n)+", text))
    return re.sub(r"(?<=Copyright )\d{4}", str(_YEAR), header)


@dataclasses.dataclass(frozen=True)
class Change:
  """A file that changes, or a new one, whose old text is empty."""

  file: str
  old: str
  new: str

  def __str__(self) -> str:
    lines = len(self.new.splitlines()) - len(self.old.splitlines())
    return f"{lines} lines more" if self.old else f"new, {lines} lines"


@dataclasses.dataclass(frozen=True)
class Staging:
  """What putting losses into a checkout comes to.

  Attributes:
    checkout: The checkout.
    texts: The new texts of the files that change.
    losses: The losses that are put there.
    skipped: Those that are not, each with the reason.
  """

  checkout: Checkout
  texts: Mapping[pathlib.Path, str]
  losses: tuple[str, ...]
  skipped: Mapping[str, str]

  def write(self, root: pathlib.Path | None = None) -> None:
    """Writes the files, into the checkout or into a copy of it."""
    for path, text in self.texts.items():
      if root is not None:
        path = root / path.relative_to(self.checkout.root)
      try:
        path.write_text(text, encoding="utf-8")
      except OSError as error:
        raise StagingError(f"{path} can't be written: {error}.") from error

  @functools.cached_property
  def changes(self) -> tuple[Change, ...]:
    """The files that change, as they were before it was written."""
    return tuple(
      Change(
        path.relative_to(self.checkout.root).as_posix(),
        path.read_text(encoding="utf-8") if path.is_file() else "",
        text,
      )
      for path, text in sorted(self.texts.items())
    )

  def patch(self) -> str:
    """The changes as `git apply` takes them."""
    parts = []
    for change in self.changes:
      old, new = f"a/{change.file}", f"b/{change.file}"
      parts.append(f"diff --git {old} {new}\n")
      if not change.old:
        parts.append("new file mode 100644\n")
        old = "/dev/null"
      lines = (change.old.splitlines(True), change.new.splitlines(True))
      parts += difflib.unified_diff(*lines, old, new)
    return "".join(parts)


def stage(
  checkout: Checkout,
  names: Iterable[str] = (),
  is_fixed: Callable[[Sequence[str]], Mapping[str, bool]] = lambda names: {},
) -> Staging:
  """Masks losses in the text of a checkout, which it leaves as it is.

  Args:
    checkout: The checkout.
    names: The losses; all, if none is named.
    is_fixed: Tells which losses keep the mask contract in the checkout. It is
      asked for those that are not what they were, and take `axis` and `where`.

  Returns:
    The changes.

  Raises:
    StagingError: If a loss is not where or what it is known to be.
  """
  names = tuple(names) or LOSSES
  unknown = [name for name in names if name not in LOSSES]
  if unknown:
    raise StagingError(
      f"There is no loss {', '.join(unknown)}. There are {', '.join(LOSSES)}."
    )
  skipped: dict[str, str] = {}
  reasons: dict[str, str] = {}
  changed: list[str] = []
  todo: list[str] = []
  for name in with_called(names):
    loss = checkout.loss(name)
    if loss is None:
      reasons[name] = _missing(checkout, name)
    elif checkout.is_staged(name) and name not in _ALIASES:
      skipped[name] = "it is staged already"
    elif fingerprint(loss) in _KNOWN[name]:
      if name in _ALIASES:
        skipped[name] = f"it is as good as {_ALIASES[name]}, which it calls"
      else:
        todo.append(name)
    elif {"axis", "where"} <= parameters(loss).keys():
      changed.append(name)
    else:
      reasons[name] = _changed(loss)
  for name, fixed in (is_fixed(changed) if changed else {}).items():
    if fixed:
      skipped[name] = (
        "Optax has fixed it: it has another body, takes `axis` and `where`, and"
        " the audit finds nothing"
      )
  for name in changed:
    if name not in skipped:
      loss = checkout.loss(name)
      assert loss is not None
      reasons[name] = _changed(loss)
  if reasons:
    others = set(LOSSES) - reasons.keys()
    raise StagingError(
      "Nothing was changed, since this is not the Optax that the wrappers were"
      " tested with:\n"
      + "".join(f"  {name}: {why}\n" for name, why in reasons.items())
      + (
        "Name the losses to stage with --loss, without "
        + ("it." if len(reasons) == 1 else "these.")
        if others and set(names) - reasons.keys()
        else "Stage it by hand, or see whether there is a newer optax_masking."
      ),
      reasons,
    )
  return Staging(checkout, _new_texts(checkout, todo), tuple(todo), skipped)


def _missing(checkout: Checkout, name: str) -> str:
  place = wrappers()[name]
  found = [m for m, text in checkout.modules.items() if name in text.functions]
  moved = f"it has moved to optax/{found[0]}.py" if found else "it is gone"
  return f"{moved}, and was in optax/{place}.py"


def _changed(loss: ast.FunctionDef) -> str:
  has = [a for a in ("axis", "where") if a in parameters(loss)]
  return (
    "its body or its parameters have changed"
    + (f" (it takes {' and '.join(f'`{a}`' for a in has)})" if has else "")
    + ", so that its wrapper may no longer fit; its fingerprint is"
    f" {fingerprint(loss)}"
  )


def _new_texts(
  checkout: Checkout, names: Collection[str]
) -> dict[pathlib.Path, str]:
  """The files of losses, the engine and the tests, with more losses masked."""
  if not names:
    return {}
  before = {n for n in LOSSES if n not in _ALIASES and checkout.is_staged(n)}
  modules = dict(checkout.modules)
  old = _new_files(checkout, before, modules.values())
  for module, text in old.items():
    if checkout.text(module) != text:
      raise StagingError(
        f"Nothing was changed, since optax/{module}.py is there, and is not"
        " what this version of optax_masking writes. Start from a checkout"
        " without it, or move it away."
      )
  for name in names:
    place = wrappers()[name]
    modules[place] = Module(_staged(modules[place], name, checkout.version))
  new = {m: module.text for m, module in modules.items()}
  new.update(_new_files(checkout, {*before, *names}, modules.values()))
  return {
    checkout.path(module): text
    for module, text in new.items()
    if text != checkout.text(module)
  }


def _new_files(
  checkout: Checkout, names: Collection[str], modules: Iterable[Module]
) -> dict[str, str]:
  """The engine that modules use, and the tests of losses; empty for none."""
  used = {
    name
    for module in modules
    for name in re.findall(rf"\b{_ENGINE}\.(\w+)", module.text)
  }
  engine = f"{checkout.header()}\n{_engine_text(used)}" if names else ""
  tests = f"{checkout.header()}{_tests_text(names)}" if names else ""
  return {f"losses/{_ENGINE}": engine, f"losses/{_TESTS}": tests}
