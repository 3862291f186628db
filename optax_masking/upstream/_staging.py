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
import pathlib
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from optax_masking._output import CommandError
from optax_masking.upstream._source import (
  Edit,
  Module,
  defined_by,
  edited,
  end_of,
  lines_of,
  names_in,
  needed,
  parameters,
  with_imports,
)
from optax_masking.upstream._wrappers import (
  ALIASES,
  ENGINE,
  KNOWN,
  LOSSES,
  TESTS,
  engine_text,
  fills_only,
  is_a_call,
  module_of,
  own,
  places,
  refuses_ambiguous_where,
  tests_text,
  translated,
  with_called,
  wrapper_of,
)

_YEAR = 2026  # Of the license of new files.


class StagingError(CommandError):
  """A checkout, or a loss in it, that is not understood.

  Attributes:
    reasons: Which losses are not, each with the reason.
  """

  def __init__(self, message: str, reasons: Mapping[str, str] | None = None):
    super().__init__(message)
    self.reasons = reasons or {}


# One loss.


def fingerprint(module: Module, name: str) -> str:
  """Of a loss, and of the functions of its module that it calls but for losses.

  It does not depend on documentation, nor on types.
  """
  loss = module.functions[name]
  others = [f for n, f in module.functions.items() if n not in LOSSES]
  text = ""
  for node in (loss, *needed(others, names_in(loss))):
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


def _staged(module: Module, name: str, version: str) -> str:
  """The text of a module of Optax with one of its losses masked."""
  loss = module.functions[name]
  has = parameters(loss)
  added = [a for a in parameters(wrapper_of(name)) if a not in has]
  in_place = is_a_call(name) and ("where" not in has or fills_only(name))
  ours = translated(name, in_place)
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
    code = "".join(ours.lines[end_of(docstring) : end_of(wrapper)])
    edits.append(_body_edit(module, loss, code, names_in(*inserted)))
  for node in helpers:
    (helper,) = defined_by(node)
    present = module.functions.get(helper)
    if present is None:
      source = ours.source(node).rstrip("\n")
      line = _line_of_helper(module, ours, node)
      edits.append(Edit(line, f"{source}\n\n\n"))
    elif not any(
      node in _helpers(ours, [ours.functions[other]])
      for other in _masked_in(module)
    ):  # If not, it came with another.
      raise StagingError(
        f"{name}: its wrapper needs a function {helper}, and another one has"
        " that name. Nothing was changed."
      )
  decorators = ours.lines[ours.start(wrapper) : wrapper.lineno - 1]
  edits.append(Edit(module.start(loss), "".join(decorators)))

  siblings = {place.rpartition("/")[2] for place in places().values()}
  imports = {
    **own(module_of(name)).imports,
    **{n: f"from optax.losses import {n}" for n in (ENGINE, *siblings)},
  }
  wanted = imports.keys() & (names_in(*inserted) | {ENGINE})
  for imported in wanted & module.imports.keys():
    if module.imports[imported] != imports[imported]:
      raise StagingError(
        f"{name}: its wrapper needs `{imports[imported]}`, and there is"
        f" `{module.imports[imported]}`. Nothing was changed."
      )
  return with_imports(
    Module(edited(module, edits)),
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
  marks = (
    loss.decorator_list if wrapper_of(name).decorator_list else [loss.args]
  )
  return any(f"{ENGINE}." in ast.unparse(node) for node in marks)


def _checked(module: Module, name: str, version: str) -> Module:
  """A module with one loss masked, if its text is understood."""
  try:
    staged = Module(_staged(module, name, version))
    # All that it had, once, and what a mask needs.
    new = [n.name for n in staged.tree.body if isinstance(n, ast.FunctionDef)]
    takes = parameters(wrapper_of(name)).keys()
    if all(new.count(n) == 1 for n in module.functions) and (
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
) -> Edit:
  """Another body, behind which the old one goes on if it is used."""
  docstring, first = loss.body[0], loss.body[1]
  if f"_unmasked_{loss.name}" not in used:
    return Edit(end_of(docstring), code, end_of(loss))
  signature = "".join(module.lines[loss.lineno - 1 : docstring.lineno - 1])
  signature = signature.replace(
    f"def {loss.name}(", f"def _unmasked_{loss.name}("
  )
  # Behind an empty line, if there is one.
  line = end_of(docstring)
  line += not module.lines[line].strip() and line < first.lineno - 1
  return Edit(line, f"{code}\n\n{signature}")


def _line_of_helper(module: Module, ours: Module, node: ast.stmt) -> int:
  """A line before all losses that may need it one day."""
  return min(
    module.start(module.functions[name])
    for name in module.functions.keys() & set(LOSSES)
    if node in _helpers(ours, [ours.functions[name]])
  )


def _helpers(ours: Module, nodes: Iterable[ast.AST]) -> list[ast.stmt]:
  """What the module of a wrapper defines besides losses, and nodes need."""
  others = [n for n in ours.tree.body if defined_by(n) - set(LOSSES)]
  return needed(others, names_in(*nodes))


def _docstring_edits(
  module: Module,
  loss: ast.FunctionDef,
  wrapper: ast.FunctionDef,
  added: Sequence[str],
  version: str,
) -> list[Edit]:
  """Entries for the arguments, and a note of the version."""
  docstring = loss.body[0]
  begin, last = docstring.lineno - 1, end_of(docstring) - 1
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
    edits.append(Edit(begin + end, "".join(new)))
    of_where = [
      i for i in range(start, end) if lines[i].startswith(f"{indent}where:")
    ]
    if of_where and "where" in parameters(loss):
      entry = of_where[0] + 1
      while entry < end and lines[entry].startswith(f"{indent} "):
        entry += 1
      text = _wrapped(_RANK_OF_WHERE, f"{indent}  ")
      edits.append(Edit(begin + entry, text))
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
  edits.append(Edit(last, text if follows else f"\n{text}"))
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
) -> Edit:
  """New keywords behind the parameters of a loss."""
  defaults = parameters(wrapper)
  a = loss.args
  nodes = [*a.posonlyargs, *a.args, *a.kwonlyargs, *a.defaults, *a.kw_defaults]
  line, column = max(
    (end_of(node), getattr(node, "end_col_offset", 0)) for node in nodes if node
  )
  text = "" if a.kwonlyargs or a.vararg else "    *,\n"
  for argument in added:
    default = defaults[argument]
    assert default is not None
    kind = f"{ENGINE}.{argument.capitalize()}"
    text += f"    {argument}: {kind} = {ast.unparse(default)},\n"
  last = module.lines[line - 1].encode()
  before, rest = last[:column].decode(), last[column:].decode()
  if rest.startswith(","):
    return Edit(line, text)
  if rest.lstrip().startswith(")"):
    return Edit(line - 1, f"{before},\n{text}{rest.lstrip()}", line)
  return Edit(line - 1, f"{before},{rest}{text}", line)


# All of it.


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
      if path.stem not in (ENGINE, "__init__") and not path.stem.endswith(
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
    bound = [n for n in module.tree.body if name in defined_by(n)]
    return module.functions.get(name) if len(bound) == 1 else None

  def fingerprint(self, name: str) -> str:
    """That of a loss which is where Optax has it."""
    return fingerprint(self.modules[module_of(name)], name)

  def unknown_loss_of(self, name: str) -> str | None:
    """A loss that a loss calls, and that is not what it was."""
    loss = self.loss(name)
    if loss is None:
      return None
    called = names_in(loss) | {
      node.attr for node in ast.walk(loss) if isinstance(node, ast.Attribute)
    }
    for other in LOSSES:
      if other in called - {name} and not self.is_staged(other):
        if self.loss(other) is None:
          return other
        if self.fingerprint(other) not in KNOWN[other]:
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
    lines = difflib.ndiff(lines_of(self.old), lines_of(self.new))
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
      before, after = lines_of(change.old), lines_of(change.new)
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
    elif checkout.fingerprint(name) in KNOWN[name] and other:
      reasons[name] = f"it calls {other}, which is not what it was"
    elif checkout.fingerprint(name) in KNOWN[name]:
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
    if not names and present and place.endswith(TESTS):
      continue  # Which may have lost a row by intent.
    if free or (before and present == staged[place]):
      texts[place] = text
    elif not before or not path.is_file() or path.is_symlink():
      raise StagingError(
        f"Nothing was changed, since there is an optax/{place}.py or a folder"
        " of its name, and no loss that uses it. If it is left over from an"
        f" earlier stage, remove it, and optax/losses/{TESTS}.py."
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
    return {f"losses/{ENGINE}": "", f"losses/{TESTS}": ""}
  used = {
    name
    for module in modules
    for name in re.findall(rf"\b{ENGINE}\.(\w+)", module.text)
  }
  return {
    f"losses/{ENGINE}": checkout.header() + engine_text(used),
    f"losses/{TESTS}": checkout.header() + tests_text(names),
  }


def _merged(present: Module, wanted: Module) -> tuple[str, list[str]]:
  """A module with what it lacks of another, and what it has otherwise."""
  by_name = {n: node for node in present.tree.body for n in defined_by(node)}
  own: list[str] = []
  edits: list[Edit] = []
  lacking: list[str] = []
  end = len(present.lines)
  if isinstance(present.tree.body[-1], ast.If):  # What runs the tests.
    end = present.start(present.tree.body[-1])
  last: ast.stmt | None = None
  # A rule follows what it is a rule of, and is lacking if that is.
  follows = ""
  for node in wanted.tree.body:
    names = defined_by(node)
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
    edits += [Edit(present.start(here), source + gap) for source in lacking]
    lacking = []
    if names == {"_CASES"}:
      edits.append(Edit(end_of(here) - 1, _lacking_cases(here, node, wanted)))
    elif names != {"_"} and ast.dump(here) != ast.dump(node):
      own.append(follows)
  before, after = ("", "\n\n\n") if end < len(present.lines) else ("\n\n", "\n")
  edits += [Edit(end, f"{before}{source}{after}") for source in lacking]
  statements = [
    s for n, s in wanted.imports.items() if n not in present.imports
  ]
  return with_imports(Module(edited(present, edits)), statements), own


def _lacking_cases(present: ast.stmt, wanted: ast.stmt, module: Module) -> str:
  """The rows that a table of cases does not have."""

  def rows(node: ast.stmt) -> dict[str, ast.expr]:
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
      raise StagingError(
        f"Nothing was changed, since _CASES of optax/losses/{TESTS}.py is no"
        " tuple of rows any more, to which another could be added."
      )
    return {ast.unparse(row).split(",")[0]: row for row in node.value.elts}

  return "".join(
    "".join(module.lines[row.lineno - 1 : end_of(row)])
    for name, row in rows(wanted).items()
    if name not in rows(present)
  )
