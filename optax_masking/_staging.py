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
  "convex_kl_divergence": ("200e36fc",),
  "cosine_distance": ("770e02c1",),
  "cosine_similarity": ("c9a363db",),
  "ctc_loss": ("8cebdd80",),
  "ctc_loss_with_forward_probs": ("91732f90",),
  "dice_loss": ("6008cf68", "4e4ed75a"),
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
  "multiclass_sparsemax_loss": ("37639fac",),
  "ntxent": ("0dda955b",),
  "perceptron_loss": ("9be3f7c3",),
  "poly_loss_cross_entropy": ("53656573",),
  "ranking_softmax_loss": ("eb71e2ed",),
  "safe_softmax_cross_entropy": ("7cdce703",),
  "sigmoid_binary_cross_entropy": ("fa58b3e2",),
  "sigmoid_focal_loss": ("ca92d550", "b25df937"),
  "smooth_labels": ("f96ddf7e",),
  "softmax_cross_entropy": ("d199865b",),
  "softmax_cross_entropy_with_integer_labels": ("53a93425",),
  "sparsemax_loss": ("c74fb491",),
  "squared_error": ("5cb021b1",),
  "triplet_margin_loss": ("0832ee6a",),
}
# A deprecated name of another loss, which it calls with `axis` and `where`.
ALIASES = {"convex_kl_divergence": "generalized_kl_divergence"}

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
    return _lines(self.text)

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


def _lines(text: str) -> list[str]:
  """Lines as Python and git count them: they end with a newline."""
  return re.findall(r"[^\n]*\n|[^\n]+\Z", text)


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
    for number, line in enumerate(_lines(text), 1)
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
def _modules() -> dict[str, str]:
  """The losses of this package, each with its module."""
  return {
    name: f"losses/{path.stem}"
    for path in sorted((_PACKAGE / "losses").glob("_*.py"))
    for name in _own(f"losses/{path.stem}").functions
    if not name.startswith("_")
  }


def module_of(name: str) -> str:
  """The module of a loss, as `"losses/_regression"`: here, and in Optax."""
  return _modules()[name]


def _wrapper(name: str) -> ast.FunctionDef:
  return _own(module_of(name)).functions[name]


def _is_a_call(name: str) -> bool:
  """Whether a wrapper does no more than call the loss."""
  body = _wrapper(name).body[1:]
  return (
    len(body) == 1
    and isinstance(body[0], ast.Return)
    and isinstance(body[0].value, ast.Call)
    and ast.unparse(body[0].value.func) == f"original.{name}"
  )


def refuses_ambiguous_where(name: str) -> bool:
  """Whether a lower rank of the mask meant something else to the loss."""
  keywords = {
    keyword.arg
    for decorator in _wrapper(name).decorator_list
    if isinstance(decorator, ast.Call)
    for keyword in decorator.keywords
  }
  return "refuse_ambiguous_where" in keywords


def _fills_only(name: str) -> bool:
  """Whether all that is masked is filled with numbers.

  Then a loss that uses the mask by itself may do so: it is of no consequence.
  """
  (decorator,) = _wrapper(name).decorator_list
  assert isinstance(decorator, ast.Call)
  return all(
    isinstance(keyword.value, ast.Constant) and keyword.value.value is not None
    for keyword in decorator.keywords
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
  module = _own(module_of(name))
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
  defined = [name for node in statements for name in _defined_by(node) - {"_"}]
  assert len(defined) == len(set(defined)), "Two parts define one name."
  kept = _needed(list(statements), names)
  used = _names_in(*kept)
  imports = {
    statement
    for part in parts
    for name, statement in part.imports.items()
    if name in used and "optax_masking" not in statement
  }
  docstring = _docstring(_own("_masking"))
  code = _joined([(node, statements[node].source(node)) for node in kept])
  text = f"{docstring}\n\n{_joined_imports(imports)}\n{code}"
  # What is for a package that exports the decorator, and its fills.
  text = re.sub(r"\n\n +Examples:\n.*?(?=\n +\"\"\")", "", text, flags=re.S)
  return re.sub(r"\n\n +Those of :mod:`optax_masking\.fills` .*", "", text)


def _docstring(module: Module) -> str:
  return module.source(module.tree.body[0]).rstrip("\n")


def _losses_in(node: ast.AST) -> set[str]:
  """The losses that a test calls by name."""
  return {
    n.attr
    for n in ast.walk(node)
    if isinstance(n, ast.Attribute) and n.attr in LOSSES
  }


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
    and str(row.elts[0].value).partition("__")[0] not in names
    for line in range(row.lineno - 1, _end(row))
  }
  module = Module(
    "".join(x for i, x in enumerate(template.lines) if i not in left_out)
  )
  body = module.tree.body
  classes = [
    node.name
    for node in body
    if isinstance(node, ast.ClassDef) and _losses_in(node) <= set(names)
  ]
  statements = _needed(body, classes)
  imports = {
    statement
    for name, statement in module.imports.items()
    if name in _names_in(*statements, body[-1])
  }
  code = _joined(
    [(node, module.source(node)) for node in (*statements, body[-1])]
  )
  docstring = _docstring(module)
  lines = "".join(f"{s}\n" for s in sorted(imports, key=_sort_key))
  return f"{docstring}\n\n{lines}\n{code}"


# Optax's side.


def fingerprint(module: Module, name: str) -> str:
  """Of a loss, and of the functions of its module that it calls but for losses.

  It does not depend on documentation, nor on types.
  """
  loss = module.functions[name]
  others = [f for n, f in module.functions.items() if n not in LOSSES]
  text = ""
  for node in (loss, *_needed(others, _names_in(loss))):
    (bare,) = ast.parse(ast.unparse(node)).body
    assert isinstance(bare, ast.FunctionDef)
    a = bare.args
    for parameter in (*a.posonlyargs, *a.args, *a.kwonlyargs):
      parameter.annotation = None
    bare.returns = None
    if ast.get_docstring(bare) is not None:
      del bare.body[0]
    text += ast.unparse(bare)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


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


def _edited(module: Module, edits: Sequence[_Edit]) -> str:
  """A module after edits; those of one line in their order."""
  lines = list(module.lines)
  for edit in sorted(reversed(edits), key=lambda e: e.line, reverse=True):
    lines[edit.line : edit.line if edit.end is None else edit.end] = [edit.text]
  return "".join(lines)


def _staged(module: Module, name: str, version: str) -> str:
  """The text of a module of Optax with one of its losses masked."""
  loss = module.functions[name]
  has = parameters(loss)
  added = [a for a in parameters(_wrapper(name)) if a not in has]
  in_place = _is_a_call(name) and ("where" not in has or _fills_only(name))
  ours = _translated(name, in_place)
  wrapper = ours.functions[name]
  docstring, *body = wrapper.body
  inserted: list[ast.AST] = list(wrapper.decorator_list)
  inserted += [] if in_place else body
  helpers = _helpers(ours, inserted)
  inserted += helpers

  edits = _docstring_edits(module, loss, wrapper, added, version)
  if added:
    edits.append(_signature_edit(module, loss, wrapper, added))
  if not in_place:
    code = "".join(ours.lines[_end(docstring) : _end(wrapper)])
    edits.append(_body_edit(module, loss, code, _names_in(*inserted)))
  for node in helpers:
    (helper,) = _defined_by(node)
    present = module.functions.get(helper)
    if present is None:
      line = _line_of_helper(module, ours, node)
      edits.append(_Edit(line, _source_of_helper(ours, node)))
    elif not any(
      node in _helpers(ours, [ours.functions[other]])
      for other in _masked_in(module)
    ):  # If not, it came with another.
      raise StagingError(
        f"{name}: its wrapper needs a function {helper}, and another one has"
        " that name. Nothing was changed."
      )
  decorators = ours.lines[ours.start(wrapper) : wrapper.lineno - 1]
  edits.append(_Edit(module.start(loss), "".join(decorators)))

  siblings = {place.rpartition("/")[2] for place in _modules().values()}
  imports = {
    **_own(module_of(name)).imports,
    **{n: f"from optax.losses import {n}" for n in (_ENGINE, *siblings)},
  }
  wanted = imports.keys() & (_names_in(*inserted) | {_ENGINE})
  for imported in wanted & module.imports.keys():
    if module.imports[imported] != imports[imported]:
      raise StagingError(
        f"{name}: its wrapper needs `{imports[imported]}`, and there is"
        f" `{module.imports[imported]}`. Nothing was changed."
      )
  return _with_imports(
    Module(_edited(module, edits)),
    [imports[imported] for imported in wanted - module.imports.keys()],
  )


def _masked_in(module: Module) -> list[str]:
  """The losses of a module that are staged."""
  return [n for n in module.functions if n in LOSSES and _is_masked(module, n)]


def _is_masked(module: Module, name: str) -> bool:
  """Whether a loss has the decorator of its wrapper, or else its parameters."""
  if f"_unmasked_{name}" in module.functions:
    return True
  loss = module.functions[name]
  marks = loss.decorator_list if _wrapper(name).decorator_list else [loss.args]
  return any(f"{_ENGINE}." in ast.unparse(node) for node in marks)


def _checked(module: Module, name: str, version: str) -> Module:
  """A module with one loss masked, if its text is understood."""
  try:
    staged = Module(_staged(module, name, version))
    # All that it had, once, and what a mask needs.
    old = [node.name for node in module.functions.values()]
    new = [n.name for n in staged.tree.body if isinstance(n, ast.FunctionDef)]
    takes = parameters(_wrapper(name)).keys()
    if all(new.count(n) == 1 for n in old) and (
      takes <= parameters(staged.functions[name]).keys()
    ):
      return staged
  except (SyntaxError, ValueError, LookupError):
    pass
  raise StagingError(
    f"{name}: its signature or docstring is written in a way that is not"
    " understood. Nothing was changed."
  )


def _body_edit(
  module: Module, loss: ast.FunctionDef, code: str, used: Collection[str]
) -> _Edit:
  """Another body, behind which the old one goes on if it is used."""
  docstring, first = loss.body[0], loss.body[1]
  if f"_unmasked_{loss.name}" not in used:
    return _Edit(_end(docstring), code, _end(loss))
  lines = module.lines[loss.lineno - 1 : docstring.lineno - 1]
  signature = "".join(lines)
  signature = signature.replace(
    f"def {loss.name}(", f"def _unmasked_{loss.name}("
  )
  # Behind an empty line, if there is one.
  line = _end(docstring)
  line += not module.lines[line].strip() and line < first.lineno - 1
  return _Edit(line, f"{code}\n\n{signature}")


def _line_of_helper(module: Module, ours: Module, node: ast.stmt) -> int:
  """A line before all losses that may need it one day."""
  return min(
    module.start(module.functions[name])
    for name in module.functions.keys() & set(LOSSES)
    if node in _helpers(ours, [ours.functions[name]])
  )


def _source_of_helper(ours: Module, node: ast.stmt) -> str:
  source = ours.source(node).rstrip("\n")
  return f"{source}\n\n\n"


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
  """Entries for the arguments, and a note of the version."""
  docstring = loss.body[0]
  begin, last = docstring.lineno - 1, _end(docstring) - 1
  lines = module.lines[begin:last]
  if ast.get_docstring(loss) is None or module.lines[last].strip() != '"""':
    raise StagingError(
      f"{loss.name}: its docstring does not end on a line of its own."
    )
  edits = []
  notes = []
  if added:
    names = " and ".join(f"``{argument}``" for argument in added)
    notes.append(f"Added {names} argument{'s' if len(added) > 1 else ''}.")
  if "where" not in parameters(wrapper):
    notes.append("The loss that is returned takes ``axis`` and ``where``.")
  section = [i for i, line in enumerate(lines) if line.strip() == "Args:"]
  if added and not section:
    raise StagingError(f"{loss.name}: its docstring has no `Args:`.")
  if section:
    start = section[0] + 1
    while not lines[start].strip():
      start += 1
    end = start
    while end < len(lines) and lines[end].strip():
      end += 1
    indent = re.match(" *", lines[start])[0]  # type: ignore[index]
    ours = _entries(ast.get_docstring(wrapper) or "")
    new = [_entry(ours[argument], indent) for argument in added]
    edits.append(_Edit(begin + end, "".join(new)))
    of_where = [
      i for i in range(start, end) if lines[i].startswith(f"{indent}where:")
    ]
    if of_where and "where" in parameters(loss):
      entry = of_where[0] + 1
      while entry < end and lines[entry].startswith(f"{indent} "):
        entry += 1
      text = _wrapped(_RANK_OF_WHERE, f"{indent}  ")
      edits.append(_Edit(begin + entry, text))
  if "where" in parameters(loss):
    notes.append("Masked elements change no value and no derivative.")
  if "where" in parameters(loss) and refuses_ambiguous_where(loss.name):
    notes.append("A ``where`` of lower rank has one entry an example.")
  text = _wrapped(" ".join(notes), "    ")
  follows = re.search(
    r"^  \.\. version\w+:: (.*)\n(?: {4,}.*\n)*\Z", "".join(lines), re.M
  )
  if follows is None or follows[1] != version:
    text = f"  .. versionchanged:: {version}\n{text}"
  edits.append(_Edit(last, text if follows else f"\n{text}"))
  return edits


# Of a `where` that Optax has documented.
_RANK_OF_WHERE = (
  "It is boolean, with the rank of the data, or with that rank less ``axis``:"
  " one entry an example."
)


def _wrapped(text: str, indent: str, first: str | None = None) -> str:
  lines = textwrap.wrap(
    text,
    80,
    initial_indent=indent if first is None else first,
    subsequent_indent=indent,
    break_long_words=False,
    break_on_hyphens=False,
  )
  return "".join(f"{line}\n" for line in lines)


def _entries(docstring: str) -> dict[str, str]:
  """The entries of `Args:`, each with its text."""
  section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", docstring, re.M | re.S)
  if section is None:
    return {}
  text = textwrap.dedent(section[1])
  parts = re.split(r"^(?=\*{0,2}\w+:)", text, flags=re.M)
  return {p.partition(":")[0].strip("*"): p for p in parts if p.strip()}


def _entry(text: str, indent: str) -> str:
  """An entry for an `Args:` of Optax, without references to this package."""
  text = " ".join(text.split())
  text = re.sub(r",? as in :func:`optax_masking\.masked_inputs`", "", text)
  return _wrapped(text, f"{indent}  ", indent)


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
  before, rest = last[:column].decode(), last[column:].decode()
  if rest.startswith(","):
    return _Edit(line, text)
  if rest.lstrip().startswith(")"):
    return _Edit(line - 1, f"{before},\n{text}{rest.lstrip()}", line)
  return _Edit(line - 1, f"{before},{rest}{text}", line)


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
    line = 0
    if before or group or present:
      line = _end(before[-1]) if before else (group or present)[0].lineno - 1
    elif ast.get_docstring(module.tree) is not None:
      line = _end(module.tree.body[0])
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
    path = pathlib.Path(path).resolve()
    for root in (path, path.parent):
      losses = root / "optax" / "losses" / "__init__.py"
      if losses.is_file() and path in (root, root / "optax"):
        return cls(root)
    raise StagingError(
      f"{path} is no checkout of Optax. Name the folder that holds the folder"
      " optax, with optax/losses/__init__.py in it."
    )

  def path(self, module: str) -> pathlib.Path:
    """The file of a module such as `"losses/_regression"`."""
    return self.root / "optax" / f"{module}.py"

  def text_as_written(self, module: str) -> str:
    """The text of a module with its ends of lines, empty if there is none."""
    path = self.path(module)
    try:
      return path.read_bytes().decode() if path.is_file() else ""
    except UnicodeDecodeError as error:
      raise StagingError(f"optax/{module}.py is not UTF-8: {error}.") from error

  def text(self, module: str) -> str:
    """The text of a module, empty if there is none."""
    return self.text_as_written(module).replace("\r\n", "\n")

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
          raise StagingError(
            f"optax/{name}.py, line {error.lineno}: {error.msg}."
          ) from error
    return found

  @functools.cached_property
  def exports(self) -> dict[str, str]:
    """The module that `optax.losses` has each name from."""
    imports = Module(self.text("losses/__init__")).imports
    return {
      name: f"losses/{words[1].rpartition('.')[2]}"
      for name, statement in imports.items()
      if (words := statement.split())[1].startswith("optax.losses.")
    }

  def loss(self, name: str) -> ast.FunctionDef | None:
    """The definition of a loss, if it is where Optax has it."""
    place = module_of(name)
    module = self.modules.get(place)
    if module is None or self.exports.get(name) != place:
      return None
    bound = [n for n in module.tree.body if name in _defined_by(n)]
    return module.functions.get(name) if len(bound) == 1 else None

  def fingerprint(self, name: str) -> str:
    """That of a loss which is where Optax has it."""
    return fingerprint(self.modules[module_of(name)], name)

  def unknown_loss_of(self, name: str) -> str | None:
    """A loss that a loss calls, and that is not what it was."""
    loss = self.loss(name)
    if loss is None:
      return None
    called = _names_in(loss) | {
      node.attr for node in ast.walk(loss) if isinstance(node, ast.Attribute)
    }
    for other in LOSSES:
      if other in called - {name} and not self.is_staged(other):
        if self.loss(other) is None:
          return other
        if self.fingerprint(other) not in _KNOWN[other]:
          return other
    return None

  def takes(self, name: str) -> set[str]:
    """Which of `axis` and `where` a loss has in its signature."""
    loss = self.loss(name)
    return {"axis", "where"} & parameters(loss).keys() if loss else set()

  def source_of(self, name: str) -> str:
    """The text of the module that a loss is in."""
    return self.text(module_of(name))

  def is_staged(self, name: str) -> bool:
    """Whether a loss has been masked by this package."""
    name = ALIASES.get(name, name)
    return self.loss(name) is not None and _is_masked(
      self.modules[module_of(name)], name
    )

  @property
  def version_as_written(self) -> str:
    """The version of the checkout."""
    found = re.search(
      r"""^__version__(?:: str)? = ["'](.*)["']""", self.text("__init__"), re.M
    )
    if found is None:
      raise StagingError("optax/__init__.py has no `__version__`.")
    return found[1]

  @property
  def version(self) -> str:
    """The release that a change will be in."""
    version = self.version_as_written
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    if found is None:
      raise StagingError(
        f"optax/__init__.py has the version {version}, which is not understood."
      )
    major, minor, micro, rest = found.groups()
    ahead = re.match(r"\.?(dev|rc|a|b)", rest)  # Of that release.
    return f"{major}.{minor}.{int(micro or 0) + (0 if ahead else 1)}"

  def header(self) -> str:
    """The license at the top of a new file."""
    text = self.text("losses/_classification")
    header = "".join(re.findall(r"\A(?:#.*\n)+", text))
    return re.sub(r"(?<=Copyright )\d{4}", str(_YEAR), header)


@dataclasses.dataclass(frozen=True)
class Change:
  """A file that changes, or a new one, whose old text is empty.

  As text it is the number of its new lines, and of those that it loses.
  """

  file: str
  old: str
  new: str

  def __str__(self) -> str:
    lines = difflib.ndiff(_lines(self.old), _lines(self.new))
    signs = [line[0] for line in lines]
    removed = f" -{signs.count('-')}" if "-" in signs else ""
    return f"+{signs.count('+')}{removed} lines"


@dataclasses.dataclass(frozen=True)
class Staging:
  """What putting losses into a checkout comes to.

  Attributes:
    checkout: The checkout.
    changes: The files that change, in the order of their names.
    losses: The losses that are put there.
    skipped: Those that are not, each with the reason.
    remarks: What to look at, in sentences.
  """

  checkout: Checkout
  changes: tuple[Change, ...]
  losses: tuple[str, ...]
  skipped: Mapping[str, str]
  remarks: tuple[str, ...]

  def write(self, root: pathlib.Path | None = None) -> None:
    """Writes all files or none, into the checkout or into a copy of it."""
    root = root or self.checkout.root
    for i, change in enumerate(self.changes):
      try:
        (root / change.file).write_bytes(change.new.encode())
      except OSError as error:
        for written in self.changes[:i]:
          if written.old:
            (root / written.file).write_bytes(written.old.encode())
          else:
            (root / written.file).unlink()
        raise StagingError(
          f"Nothing was changed, since {error.filename} can't be written:"
          f" {error.strerror}."
        ) from error

  @property
  def paths(self) -> set[pathlib.Path]:
    """The files that change."""
    return {self.checkout.root / change.file for change in self.changes}

  def patch(self) -> str:
    """The changes as `git apply` takes them."""
    parts = []
    for change in self.changes:
      old, new = f"a/{change.file}", f"b/{change.file}"
      parts.append(f"diff --git {old} {new}\n")
      if not change.old:
        parts.append("new file mode 100644\n")
        old = "/dev/null"
      before, after = _lines(change.old), _lines(change.new)
      for line in difflib.unified_diff(before, after, old, new):
        parts.append(line)
        if not line.endswith("\n"):
          parts.append("\n\\ No newline at end of file\n")
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
  named = tuple(names)
  names = named or LOSSES
  unknown = [name for name in names if name not in LOSSES]
  if unknown:
    near = difflib.get_close_matches(unknown[0], LOSSES, 3, 0.5)
    raise StagingError(
      f"There is no loss {', '.join(unknown)}."
      + (f" Did you mean {' or '.join(near)}?" if near else "")
    )
  skipped: dict[str, str] = {}
  reasons: dict[str, str] = {}
  changed: list[str] = []
  todo: list[str] = []
  for name in with_called(names):
    loss = checkout.loss(name)
    other = checkout.unknown_loss_of(name)
    if loss is None:
      reasons[name] = _missing(checkout, name)
    elif checkout.is_staged(name) and name not in ALIASES:
      skipped[name] = "it is staged already"
    elif checkout.fingerprint(name) in _KNOWN[name] and other:
      reasons[name] = f"it calls {other}, which is not what it was"
    elif checkout.fingerprint(name) in _KNOWN[name]:
      if name in ALIASES:
        skipped[name] = f"it calls {ALIASES[name]}, which is what to stage"
      else:
        todo.append(name)
    elif {"axis", "where"} <= parameters(loss).keys():
      changed.append(name)
    else:
      reasons[name] = _changed(checkout, name)
  for name, fixed in (is_fixed(changed) if changed else {}).items():
    if fixed:
      skipped[name] = (
        "Optax has fixed it: it has another body, takes `axis` and `where`, and"
        " the audit finds nothing"
      )
  for name in changed:
    if name not in skipped:
      reasons[name] = _changed(checkout, name)
  if reasons:
    options = " ".join(f"--except {name}" for name in reasons)
    raise StagingError(
      "Nothing was changed, since this is not the Optax that the wrappers were"
      " tested with:\n"
      + "".join(f"  {name}: {why}\n" for name, why in reasons.items())
      + "CONTRIBUTING.md tells what to do about a loss that has changed."
      + ("" if named else f" For all others: {options}"),
      reasons,
    )
  changes, remarks = _changes(checkout, todo)
  return Staging(checkout, changes, tuple(todo), skipped, remarks)


def _missing(checkout: Checkout, name: str) -> str:
  place = module_of(name)
  exported = checkout.exports.get(name)
  found = [m for m, text in checkout.modules.items() if name in text.functions]
  if found == [place] == [exported]:
    return f"optax/{place}.py defines it more than once"
  if exported not in (None, place):
    return f"it has moved from optax/{place}.py to optax/{exported}.py"
  if found not in ([], [place]):
    return f"it has moved from optax/{place}.py to optax/{found[0]}.py"
  if found:
    return "optax/losses/__init__.py does not import it"
  return f"it is gone, and was a function of optax/{place}.py"


def _changed(checkout: Checkout, name: str) -> str:
  loss = checkout.loss(name)
  takes = parameters(loss).keys() & {"axis", "where"} if loss else ()
  known = " and ".join(f"`{a}`" for a in sorted(takes))
  return (
    "its code or its parameters have changed"
    + (f" (it takes {known})" if known else "")
    + ", so that its wrapper may no longer fit; its fingerprint is"
    f" {checkout.fingerprint(name)}"
  )


def _changes(
  checkout: Checkout, names: Collection[str]
) -> tuple[tuple[Change, ...], tuple[str, ...]]:
  """What masking more losses changes, and remarks on it."""
  before = {n for n in LOSSES if n not in ALIASES and checkout.is_staged(n)}
  if not names and not before:
    return (), ()
  modules = dict(checkout.modules)
  for name in names:
    place = module_of(name)
    modules[place] = _checked(modules[place], name, checkout.version)
  texts = {place: module.text for place, module in modules.items()}

  staged = _new_files(checkout, before, checkout.modules.values())
  wanted = _new_files(checkout, {*before, *names}, modules.values())
  remarks = []
  for place, text in wanted.items():
    path, present = checkout.path(place), checkout.text(place)
    free = not any(
      p.exists() or p.is_symlink() for p in (path, path.with_suffix(""))
    )
    if not names and present and place.endswith(_TESTS):
      continue  # Which may have lost a row by intent.
    if free or (before and present == staged[place]):
      texts[place] = text
    elif not before or not path.is_file() or path.is_symlink():
      raise StagingError(
        f"Nothing was changed, since there is an optax/{place}.py or a folder"
        " of its name, and no loss that uses it. If it is left over from an"
        f" earlier stage, remove it, and optax/losses/{_TESTS}.py."
      )
    else:
      try:
        texts[place], own = _merged(Module(present), Module(text))
      except SyntaxError as error:
        raise StagingError(
          f"Nothing was changed, since optax/{place}.py, line {error.lineno},"
          f" is not Python: {error.msg}."
        ) from error
      if texts[place] != present:
        remarks.append(
          f"optax/{place}.py has been edited since it was staged. It is added"
          f" to, and keeps its own {', '.join(own) or 'text'}."
        )
  changes = []
  for place, text in sorted(texts.items()):
    if text != checkout.text(place):
      old = checkout.text_as_written(place)
      new = text.replace("\n", "\r\n") if "\r\n" in old else text
      changes.append(Change(f"optax/{place}.py", old, new))
  return tuple(changes), tuple(remarks)


def _new_files(
  checkout: Checkout, names: Collection[str], modules: Iterable[Module]
) -> dict[str, str]:
  """The engine that modules use, and the tests of losses; empty for none."""
  if not names:
    return {f"losses/{_ENGINE}": "", f"losses/{_TESTS}": ""}
  used = {
    name
    for module in modules
    for name in re.findall(rf"\b{_ENGINE}\.(\w+)", module.text)
  }
  return {
    f"losses/{_ENGINE}": checkout.header() + _engine_text(used),
    f"losses/{_TESTS}": checkout.header() + _tests_text(names),
  }


def _merged(present: Module, wanted: Module) -> tuple[str, list[str]]:
  """A module with what it lacks of another, and what it has otherwise."""
  by_name = {n: node for node in present.tree.body for n in _defined_by(node)}
  own: list[str] = []
  edits: list[_Edit] = []
  lacking: list[str] = []
  end = len(present.lines)
  if isinstance(present.tree.body[-1], ast.If):  # What runs the tests.
    end = present.start(present.tree.body[-1])
  last: ast.stmt | None = None
  # A rule follows what it is a rule of, and is lacking if that is.
  follows = ""
  for node in wanted.tree.body:
    names = _defined_by(node)
    if not names:
      continue
    follows = follows if names == {"_"} else min(names)
    if follows not in by_name:
      lacking.append(wanted.source(node).rstrip("\n"))
      last = node
      continue
    here = by_name[follows]
    small = isinstance(here, ast.Assign) and isinstance(last, ast.Assign)
    gap = "\n" if small else "\n\n\n"
    edits += [_Edit(present.start(here), source + gap) for source in lacking]
    lacking = []
    if names == {"_CASES"}:
      edits.append(_Edit(_end(here) - 1, _lacking_cases(here, node, wanted)))
    elif names != {"_"} and ast.dump(here) != ast.dump(node):
      own.append(follows)
  before, after = ("", "\n\n\n") if end < len(present.lines) else ("\n\n", "\n")
  edits += [_Edit(end, f"{before}{source}{after}") for source in lacking]
  statements = [
    s for n, s in wanted.imports.items() if n not in present.imports
  ]
  return _with_imports(Module(_edited(present, edits)), statements), own


def _lacking_cases(present: ast.stmt, wanted: ast.stmt, module: Module) -> str:
  """The rows that a table of cases does not have."""

  def rows(node: ast.stmt) -> dict[str, ast.expr]:
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
      raise StagingError(
        f"Nothing was changed, since _CASES of optax/losses/{_TESTS}.py is no"
        " tuple of rows any more, to which another could be added."
      )
    return {ast.unparse(row).split(",")[0]: row for row in node.value.elts}

  return "".join(
    "".join(module.lines[row.lineno - 1 : _end(row)])
    for name, row in rows(wanted).items()
    if name not in rows(present)
  )
