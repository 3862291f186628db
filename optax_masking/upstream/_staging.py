"""Puts masked losses into a checkout of Optax, as a change to its source.

A loss keeps its text. A stage inserts a decorator, and `axis` and `where` in
the signature and the docstring. Where a wrapper of this package does more than
call the loss, the wrapper's body replaces the loss's body, which stays as the
body of a function `_unmasked_<loss>`. The parts of the engine that the losses
need become one new private module, with a module of tests beside it.

This module has no text of Optax: it inserts the source of this package, and
reads the rest from the checkout.
"""

import ast
import dataclasses
import difflib
import functools
import hashlib
import pathlib
import re
import textwrap
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
)

from optax_masking._output import CommandError
from optax_masking.upstream._source import (
  Edit,
  Module,
  add_imports,
  apply_edits,
  definitions_needed,
  end_line,
  names_defined_by,
  names_in,
  parameter_defaults,
  split_lines,
)
from optax_masking.upstream._wrappers import (
  ALIASES,
  ENGINE,
  FINGERPRINTS,
  LOSSES,
  TESTS,
  engine_module_text,
  has_constant_fills,
  module_for_optax,
  module_of,
  modules_by_loss,
  only_calls_original,
  package_module,
  refuses_ambiguous_where,
  test_module_text,
  with_called_losses,
  wrapper_of,
)

_COPYRIGHT_YEAR = 2026  # Of new files.


class StagingError(CommandError):
  """A checkout, or a loss in it, has a form that a stage does not know.

  Attributes:
    reasons: The losses that can't be staged, each with the reason.
  """

  def __init__(self, message: str, reasons: Mapping[str, str] | None = None):
    super().__init__(message)
    self.reasons = reasons or {}


# The text of one loss.


def fingerprint(module: Module, name: str) -> str:
  """A hash of the code of a loss and of the helpers that it calls.

  Helpers are functions of the same module that are no losses. The hash depends
  neither on docstrings nor on types.
  """
  loss = module.functions[name]
  others = [f for n, f in module.functions.items() if n not in LOSSES]
  text = ""
  for node in (loss, *definitions_needed(others, names_in(loss))):
    (bare,) = ast.parse(ast.unparse(node)).body
    assert isinstance(bare, ast.FunctionDef)
    args = bare.args
    for parameter in (*args.posonlyargs, *args.args, *args.kwonlyargs):
      parameter.annotation = None
    bare.returns = None
    if ast.get_docstring(bare) is not None:
      del bare.body[0]
    text += ast.unparse(bare)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _insert_mask(module: Module, name: str, release_version: str) -> str:
  """The text of a module of Optax with one of its losses masked."""
  loss = module.functions[name]
  present = parameter_defaults(loss)
  added = [a for a in parameter_defaults(wrapper_of(name)) if a not in present]
  keeps_body = only_calls_original(name) and (
    "where" not in present or has_constant_fills(name)
  )
  wrapper_module = module_for_optax(name, keeps_body)
  wrapper = wrapper_module.functions[name]
  docstring, *body = wrapper.body
  inserted: list[ast.AST] = list(wrapper.decorator_list)
  inserted += [] if keeps_body else body
  helpers = _helpers_used_by(wrapper_module, inserted)
  inserted += helpers

  edits = _docstring_edits(module, loss, wrapper, added, release_version)
  if added:
    edits.append(_signature_edit(module, loss, wrapper, added))
  if not keeps_body:
    code = "".join(
      wrapper_module.lines[end_line(docstring) : end_line(wrapper)]
    )
    edits.append(_body_edit(module, loss, code, names_in(*inserted)))
  edits += _helper_edits(module, name, wrapper_module, helpers)
  decorators = wrapper_module.lines[
    wrapper_module.start_line(wrapper) : wrapper.lineno - 1
  ]
  edits.append(Edit(module.start_line(loss), "".join(decorators)))
  return add_imports(
    Module(apply_edits(module, edits)),
    _imports_to_add(module, name, names_in(*inserted) | {ENGINE}),
  )


def _helper_edits(
  module: Module, name: str, wrapper_module: Module, helpers: Sequence[ast.stmt]
) -> Iterator[Edit]:
  """Inserts the helpers of a wrapper that did not come with another loss."""
  for node in helpers:
    (helper,) = names_defined_by(node)
    if helper not in module.functions:
      source = wrapper_module.source(node).rstrip("\n")
      line = _line_of_helper(module, wrapper_module, node)
      yield Edit(line, f"{source}\n\n\n")
    elif not any(
      node
      in _helpers_used_by(wrapper_module, [wrapper_module.functions[other]])
      for other in _staged_losses_in(module)
    ):
      raise StagingError(
        f"{name}: its wrapper needs a function {helper}, but another function"
        " has this name. Nothing was changed."
      )


def _imports_to_add(
  module: Module, name: str, used: Collection[str]
) -> list[str]:
  """Import statements for the names that a wrapper uses and a module lacks."""
  siblings = {path.rpartition("/")[2] for path in modules_by_loss().values()}
  imports = {
    **package_module(module_of(name)).imports,
    **{n: f"from optax.losses import {n}" for n in (ENGINE, *siblings)},
  }
  needed = imports.keys() & used
  for imported in needed & module.imports.keys():
    if module.imports[imported] != imports[imported]:
      raise StagingError(
        f"{name}: its wrapper needs `{imports[imported]}`, but the module has"
        f" `{module.imports[imported]}`. Nothing was changed."
      )
  return [imports[imported] for imported in needed - module.imports.keys()]


def _staged_losses_in(module: Module) -> list[str]:
  return [n for n in module.functions if n in LOSSES and _is_masked(module, n)]


def _is_masked(module: Module, name: str) -> bool:
  """Whether a loss of a module of Optax is staged already.

  A staged loss has an unmasked twin, the decorator of its wrapper or, if the
  wrapper has no decorator, annotations from the engine.
  """
  if f"_unmasked_{name}" in module.functions:
    return True
  loss = module.functions[name]
  nodes = (
    loss.decorator_list if wrapper_of(name).decorator_list else [loss.args]
  )
  return any(f"{ENGINE}." in ast.unparse(node) for node in nodes)


def _module_with_mask(
  module: Module, name: str, release_version: str
) -> Module:
  """A module with one of its losses masked.

  Raises:
    StagingError: If a function would be lost or a parameter would be missing,
      so that the text of the loss was not understood.
  """
  try:
    staged = Module(_insert_mask(module, name, release_version))
    names = [n.name for n in staged.tree.body if isinstance(n, ast.FunctionDef)]
    wanted = parameter_defaults(wrapper_of(name)).keys()
    if all(names.count(n) == 1 for n in module.functions) and (
      wanted <= parameter_defaults(staged.functions[name]).keys()
    ):
      return staged
  except (SyntaxError, ValueError, LookupError):
    pass
  raise StagingError(
    f"{name}: its signature or docstring is written in a way that this command"
    " does not understand. Nothing was changed."
  )


def _body_edit(
  module: Module, loss: ast.FunctionDef, code: str, used: Collection[str]
) -> Edit:
  """Replaces the body of a loss.

  If the new body uses the old one, the old one stays behind it, as the body of
  a function `_unmasked_<loss>`.
  """
  docstring, first = loss.body[0], loss.body[1]
  if f"_unmasked_{loss.name}" not in used:
    return Edit(end_line(docstring), code, end_line(loss))
  signature = "".join(module.lines[loss.lineno - 1 : docstring.lineno - 1])
  signature = signature.replace(
    f"def {loss.name}(", f"def _unmasked_{loss.name}("
  )
  # Below the empty line after the docstring, if there is one.
  line = end_line(docstring)
  line += not module.lines[line].strip() and line < first.lineno - 1
  return Edit(line, f"{code}\n\n{signature}")


def _line_of_helper(
  module: Module, wrapper_module: Module, node: ast.stmt
) -> int:
  """The line before the first loss whose wrapper uses a helper, staged or not.

  So the text does not depend on the order in which losses are staged.
  """
  return min(
    module.start_line(module.functions[name])
    for name in module.functions.keys() & set(LOSSES)
    if node
    in _helpers_used_by(wrapper_module, [wrapper_module.functions[name]])
  )


def _helpers_used_by(
  wrapper_module: Module, nodes: Iterable[ast.AST]
) -> list[ast.stmt]:
  """The definitions of a wrapper's module, but for losses, that nodes use."""
  others = [
    n for n in wrapper_module.tree.body if names_defined_by(n) - set(LOSSES)
  ]
  return definitions_needed(others, names_in(*nodes))


def _docstring_edits(
  module: Module,
  loss: ast.FunctionDef,
  wrapper: ast.FunctionDef,
  added: Sequence[str],
  release_version: str,
) -> list[Edit]:
  """Adds the new arguments to a docstring, and a `versionchanged` note."""
  docstring = loss.body[0]
  begin, last = docstring.lineno - 1, end_line(docstring) - 1
  lines = module.lines[begin:last]
  if ast.get_docstring(loss) is None or module.lines[last].strip() != '"""':
    raise StagingError(
      f"{loss.name}: its docstring does not end on a line of its own."
    )
  edits: list[Edit] = []
  notes = []
  if added:
    names = " and ".join(f"``{argument}``" for argument in added)
    notes.append(f"Added {names} argument{'s' if len(added) > 1 else ''}.")
  if "where" not in parameter_defaults(wrapper):
    notes.append("The loss that is returned takes ``axis`` and ``where``.")
  section = [i for i, line in enumerate(lines) if line.strip() == "Args:"]
  if added and not section:
    raise StagingError(f"{loss.name}: its docstring has no `Args:`.")
  if section:
    entries = _argument_entries(ast.get_docstring(wrapper) or "")
    edits += _argument_edits(
      module.lines[:last],
      begin + section[0] + 1,
      {argument: entries[argument] for argument in added},
    )
  if "where" in parameter_defaults(loss):
    notes.append("Masked elements change no value and no derivative.")
  if "where" in parameter_defaults(loss) and refuses_ambiguous_where(loss.name):
    notes.append("A ``where`` of lower rank has one entry an example.")
  text = _wrap_paragraph(" ".join(notes), "    ")
  follows = re.search(
    r"^  \.\. version\w+:: (.*)\n(?: {4,}.*\n)*\Z", "".join(lines), re.M
  )
  if follows is None or follows[1] != release_version:
    text = f"  .. versionchanged:: {release_version}\n{text}"
  edits.append(Edit(last, text if follows else f"\n{text}"))
  return edits


def _argument_edits(
  lines: Sequence[str], start: int, new_entries: Mapping[str, str]
) -> Iterator[Edit]:
  """Edits of the section `Args:` of a docstring.

  Args:
    lines: The lines of the module up to the end of the docstring.
    start: Index of the line below the heading.
    new_entries: The arguments to add, each with its text.
  """
  while not lines[start].strip():
    start += 1
  end = start
  while end < len(lines) and lines[end].strip():
    end += 1
  indent = re.match(" *", lines[start])[0]  # type: ignore[index]
  new = [_format_entry(text, indent) for text in new_entries.values()]
  yield Edit(end, "".join(new))
  where_entries = [
    i for i in range(start, end) if lines[i].startswith(f"{indent}where:")
  ]
  if where_entries and "where" not in new_entries:
    line = where_entries[0] + 1
    while line < end and lines[line].startswith(f"{indent} "):
      line += 1
    yield Edit(line, _wrap_paragraph(_RANK_OF_WHERE, f"{indent}  "))


# For a `where` that Optax has documented.
_RANK_OF_WHERE = (
  "It is boolean, with the rank of the data, or with that rank less ``axis``:"
  " one entry an example."
)


def _wrap_paragraph(text: str, indent: str, first: str | None = None) -> str:
  lines = textwrap.wrap(
    text,
    80,
    initial_indent=indent if first is None else first,
    subsequent_indent=indent,
    break_long_words=False,
    break_on_hyphens=False,
  )
  return "".join(f"{line}\n" for line in lines)


def _argument_entries(docstring: str) -> dict[str, str]:
  """The arguments in the section `Args:`, each with its entry."""
  section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", docstring, re.M | re.S)
  if section is None:
    return {}
  text = textwrap.dedent(section[1])
  parts = re.split(r"^(?=\*{0,2}\w+:)", text, flags=re.M)
  return {p.partition(":")[0].strip("*"): p for p in parts if p.strip()}


def _format_entry(text: str, indent: str) -> str:
  """An entry for an `Args:` of Optax, without references to this package."""
  text = " ".join(text.split())
  text = re.sub(r",? as in :func:`optax_masking\.masked_inputs`", "", text)
  return _wrap_paragraph(text, f"{indent}  ", indent)


def _signature_edit(
  module: Module,
  loss: ast.FunctionDef,
  wrapper: ast.FunctionDef,
  added: Iterable[str],
) -> Edit:
  """Adds keyword arguments behind the last parameter of a loss."""
  defaults = parameter_defaults(wrapper)
  args = loss.args
  nodes: list[ast.AST | None] = [*args.posonlyargs, *args.args]
  nodes += [*args.kwonlyargs, *args.defaults, *args.kw_defaults]
  line, column = max(
    (end_line(node), getattr(node, "end_col_offset", 0))
    for node in nodes
    if node
  )
  text = "" if args.kwonlyargs or args.vararg else "    *,\n"
  for argument in added:
    default = defaults[argument]
    assert default is not None
    annotation = f"{ENGINE}.{argument.capitalize()}"
    text += f"    {argument}: {annotation} = {ast.unparse(default)},\n"
  last_line = module.lines[line - 1].encode()
  before, rest = last_line[:column].decode(), last_line[column:].decode()
  if rest.startswith(","):
    return Edit(line, text)
  if rest.lstrip().startswith(")"):
    return Edit(line - 1, f"{before},\n{text}{rest.lstrip()}", line)
  return Edit(line - 1, f"{before},{rest}{text}", line)


# The losses of a checkout.


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

  def raw_text(self, module: str) -> str:
    """The text of a module with its own line endings, empty without a file."""
    path = self.path(module)
    try:
      return path.read_bytes().decode() if path.is_file() else ""
    except UnicodeDecodeError as error:
      raise StagingError(f"optax/{module}.py is not UTF-8: {error}.") from error

  def text(self, module: str) -> str:
    """The text of a module with Unix line endings, empty without a file."""
    return self.raw_text(module).replace("\r\n", "\n")

  @functools.cached_property
  def modules(self) -> dict[str, Module]:
    """The modules of losses by name, without their tests."""
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
    """The names that `optax.losses` exports, each with its module."""
    imports = Module(self.text("losses/__init__")).imports
    return {
      name: f"losses/{words[1].rpartition('.')[2]}"
      for name, statement in imports.items()
      if (words := statement.split())[1].startswith("optax.losses.")
    }

  def loss(self, name: str) -> ast.FunctionDef | None:
    """The definition of a loss, if there is one and Optax exports it."""
    module_name = module_of(name)
    module = self.modules.get(module_name)
    if module is None or self.exports.get(name) != module_name:
      return None
    bound = [n for n in module.tree.body if name in names_defined_by(n)]
    return module.functions.get(name) if len(bound) == 1 else None

  def fingerprint(self, name: str) -> str:
    """The fingerprint of a loss that `loss` finds."""
    return fingerprint(self.modules[module_of(name)], name)

  def changed_loss_called_by(self, name: str) -> str | None:
    """A loss that a loss calls, and that has changed, moved or gone."""
    loss = self.loss(name)
    if loss is None:
      return None
    called = names_in(loss) | {
      node.attr for node in ast.walk(loss) if isinstance(node, ast.Attribute)
    }
    for other in LOSSES:
      if other not in called - {name} or self.is_staged(other):
        continue
      if self.loss(other) is None:
        return other
      if self.fingerprint(other) not in FINGERPRINTS[other]:
        return other
    return None

  def mask_parameters(self, name: str) -> set[str]:
    """Which of `axis` and `where` a loss has in its signature."""
    loss = self.loss(name)
    return (
      {"axis", "where"} & parameter_defaults(loss).keys() if loss else set()
    )

  def is_staged(self, name: str) -> bool:
    """Whether an earlier stage has masked a loss."""
    name = ALIASES.get(name, name)
    return self.loss(name) is not None and _is_masked(
      self.modules[module_of(name)], name
    )

  @property
  def optax_version(self) -> str:
    """The version in `optax/__init__.py`."""
    found = re.search(
      r"""^__version__(?:: str)? = ["'](.*)["']""", self.text("__init__"), re.M
    )
    if found is None:
      raise StagingError("optax/__init__.py has no `__version__`.")
    return found[1]

  @property
  def release_version(self) -> str:
    """The release that will bring a change."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", self.optax_version)
    if found is None:
      raise StagingError(
        f"The version in optax/__init__.py, {self.optax_version}, is no version"
        " such as 0.2.8."
      )
    major, minor, micro, rest = found.groups()
    is_prerelease = re.match(r"\.?(dev|rc|a|b)", rest)
    return f"{major}.{minor}.{int(micro or 0) + (0 if is_prerelease else 1)}"

  def header(self) -> str:
    """The license at the top of a new file."""
    text = self.text("losses/_classification")
    header = "".join(re.findall(r"\A(?:#.*\n)+", text))
    return re.sub(r"(?<=Copyright )\d{4}", str(_COPYRIGHT_YEAR), header)


@dataclasses.dataclass(frozen=True)
class Change:
  """A file with its old and its new text. The old text of a new file is empty.

  The string of a change has the numbers of added and of removed lines.
  """

  file: str
  old: str
  new: str

  def __str__(self) -> str:
    lines = difflib.ndiff(split_lines(self.old), split_lines(self.new))
    signs = [line[0] for line in lines]
    removed = f" -{signs.count('-')}" if "-" in signs else ""
    return f"+{signs.count('+')}{removed} lines"


@dataclasses.dataclass(frozen=True)
class Staging:
  """The changes that a stage makes to a checkout.

  Attributes:
    checkout: The checkout.
    changes: The files that change, in the order of their names.
    losses: The losses that the stage masks.
    skipped: The losses that need no stage, each with the reason.
    remarks: Sentences about files that a reviewer should look at.
  """

  checkout: Checkout
  changes: tuple[Change, ...]
  losses: tuple[str, ...]
  skipped: Mapping[str, str]
  remarks: tuple[str, ...]

  def write(self, root: pathlib.Path | None = None) -> None:
    """Writes all files or none, into the checkout or a copy in `root`."""
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
      before, after = split_lines(change.old), split_lines(change.new)
      for line in difflib.unified_diff(before, after, old, new):
        parts.append(line)
        if not line.endswith("\n"):
          parts.append("\n\\ No newline at end of file\n")
    return "".join(parts)


def stage(
  checkout: Checkout,
  names: Iterable[str] = (),
  find_fixed: Callable[[Sequence[str]], Collection[str]] = lambda names: (),
) -> Staging:
  """Masks losses in the text of a checkout, and leaves the files as they are.

  Args:
    checkout: The checkout.
    names: The losses; by default all.
    find_fixed: Returns the losses, of some, that keep the mask contract in the
      checkout. It is called with the losses that have changed since their
      wrappers were tested and take `axis` and `where`.

  Returns:
    The changes.

  Raises:
    StagingError: If a loss is not in its module, or has changed since its
      wrapper was tested.
  """
  requested = tuple(names)
  _check_names(requested)
  skipped: dict[str, str] = {}
  reasons: dict[str, str] = {}
  maybe_fixed: list[str] = []
  to_stage: list[str] = []
  for name in with_called_losses(requested or LOSSES):
    loss = checkout.loss(name)
    if loss is None:
      reasons[name] = _why_missing(checkout, name)
    elif checkout.is_staged(name) and name not in ALIASES:
      skipped[name] = "it is staged already"
    elif checkout.fingerprint(name) in FINGERPRINTS[name]:
      called = checkout.changed_loss_called_by(name)
      if called:
        reasons[name] = f"it calls {called}, which has changed"
      elif name in ALIASES:
        skipped[name] = f"it is a deprecated name: stage {ALIASES[name]}"
      else:
        to_stage.append(name)
    elif {"axis", "where"} <= parameter_defaults(loss).keys():
      maybe_fixed.append(name)
    else:
      reasons[name] = _why_changed(checkout, name)
  fixed = find_fixed(maybe_fixed) if maybe_fixed else ()
  for name in maybe_fixed:
    if name in fixed:
      skipped[name] = (
        "Optax has fixed it: it has another body, takes `axis` and `where`, and"
        " the audit finds nothing"
      )
    else:
      reasons[name] = _why_changed(checkout, name)
  if reasons:
    raise _unknown_optax(reasons, offer_others=not requested)
  changes, remarks = _changes(checkout, to_stage)
  return Staging(checkout, changes, tuple(to_stage), skipped, remarks)


def _check_names(names: Iterable[str]) -> None:
  unknown = [name for name in names if name not in LOSSES]
  if unknown:
    similar = difflib.get_close_matches(unknown[0], LOSSES, 3, 0.5)
    raise StagingError(
      f"There is no loss {', '.join(unknown)}."
      + (f" Did you mean {' or '.join(similar)}?" if similar else "")
    )


def _unknown_optax(
  reasons: Mapping[str, str], offer_others: bool
) -> StagingError:
  options = " ".join(f"--except {name}" for name in reasons)
  return StagingError(
    "Nothing was changed, since this is not the Optax that the wrappers were"
    " tested with:\n"
    + "".join(f"  {name}: {why}\n" for name, why in reasons.items())
    + "CONTRIBUTING.md says how to update the wrapper of a changed loss."
    + (f" To stage all other losses: {options}" if offer_others else ""),
    reasons,
  )


def _why_missing(checkout: Checkout, name: str) -> str:
  expected = module_of(name)
  exported = checkout.exports.get(name)
  found = [m for m, text in checkout.modules.items() if name in text.functions]
  if found == [expected] == [exported]:
    return f"optax/{expected}.py defines it more than once"
  if exported not in (None, expected):
    return f"it has moved from optax/{expected}.py to optax/{exported}.py"
  if found not in ([], [expected]):
    return f"it has moved from optax/{expected}.py to optax/{found[0]}.py"
  if found:
    return "optax/losses/__init__.py does not import it"
  return f"it is gone from optax/{expected}.py"


def _why_changed(checkout: Checkout, name: str) -> str:
  takes = " and ".join(f"`{a}`" for a in sorted(checkout.mask_parameters(name)))
  return (
    "its code or its parameters have changed"
    + (f" (it takes {takes})" if takes else "")
    + ", so that its wrapper may no longer fit; its fingerprint is"
    f" {checkout.fingerprint(name)}"
  )


def _changes(
  checkout: Checkout, names: Collection[str]
) -> tuple[tuple[Change, ...], tuple[str, ...]]:
  """The files that change when some losses are staged, and remarks."""
  before = {n for n in LOSSES if n not in ALIASES and checkout.is_staged(n)}
  if not names and not before:
    return (), ()
  modules = dict(checkout.modules)
  for name in names:
    module_name = module_of(name)
    modules[module_name] = _module_with_mask(
      modules[module_name], name, checkout.release_version
    )
  texts = {module_name: module.text for module_name, module in modules.items()}

  as_staged = _engine_and_tests(checkout, before, checkout.modules.values())
  wanted = _engine_and_tests(checkout, {*before, *names}, modules.values())
  remarks = []
  for module_name, text in wanted.items():
    present = checkout.text(module_name)
    if not names and present and module_name.endswith(TESTS):
      continue  # A reviewer may have removed a row on purpose.
    if _is_free(checkout.path(module_name)) or (
      before and present == as_staged[module_name]
    ):
      texts[module_name] = text
    else:
      texts[module_name], remark = _merge_into_edited(
        checkout, module_name, text, is_used=bool(before)
      )
      if texts[module_name] != present:
        remarks.append(remark)
  changes = []
  for module_name, text in sorted(texts.items()):
    if text != checkout.text(module_name):
      old = checkout.raw_text(module_name)
      new = text.replace("\n", "\r\n") if "\r\n" in old else text
      changes.append(Change(f"optax/{module_name}.py", old, new))
  return tuple(changes), tuple(remarks)


def _is_free(path: pathlib.Path) -> bool:
  """Whether neither a module nor a package of that name exists."""
  return not any(
    p.exists() or p.is_symlink() for p in (path, path.with_suffix(""))
  )


def _merge_into_edited(
  checkout: Checkout, module_name: str, text: str, is_used: bool
) -> tuple[str, str]:
  """Adds to the engine or the tests of a checkout, which somebody has edited.

  Args:
    checkout: The checkout.
    module_name: The engine or the tests.
    text: The text of the module that the losses need.
    is_used: Whether a staged loss uses the module.

  Returns:
    The merged text, and a remark on it.
  """
  path = checkout.path(module_name)
  if not is_used or not path.is_file() or path.is_symlink():
    raise StagingError(
      f"Nothing was changed, since there is an optax/{module_name}.py or a"
      " folder of its name, and no loss that uses it. If it is left over from"
      f" an earlier stage, remove it, and optax/losses/{TESTS}.py."
    )
  try:
    merged, edited = _merge_modules(
      Module(checkout.text(module_name)), Module(text)
    )
  except SyntaxError as error:
    raise StagingError(
      f"Nothing was changed, since optax/{module_name}.py, line"
      f" {error.lineno}, is not Python: {error.msg}."
    ) from error
  return merged, (
    f"optax/{module_name}.py has been edited since it was staged. The stage"
    f" adds to it, and keeps its own {', '.join(edited) or 'text'}."
  )


def _engine_and_tests(
  checkout: Checkout, names: Collection[str], modules: Iterable[Module]
) -> dict[str, str]:
  """The texts of the engine that modules use, and of the tests of losses.

  Without a loss both texts are empty.
  """
  if not names:
    return {f"losses/{ENGINE}": "", f"losses/{TESTS}": ""}
  used = {
    name
    for module in modules
    for name in re.findall(rf"\b{ENGINE}\.(\w+)", module.text)
  }
  return {
    f"losses/{ENGINE}": checkout.header() + engine_module_text(used),
    f"losses/{TESTS}": checkout.header() + test_module_text(names),
  }


def _merge_modules(present: Module, wanted: Module) -> tuple[str, list[str]]:
  """Adds the definitions of a wanted module that the present one does not have.

  Returns:
    The merged text, and the names that the present module defines otherwise.
  """
  by_name = {
    n: node for node in present.tree.body for n in names_defined_by(node)
  }
  edited: list[str] = []
  edits: list[Edit] = []
  missing: list[str] = []
  end = len(present.lines)
  if isinstance(present.tree.body[-1], ast.If):  # `if __name__ == "__main__"`.
    end = present.start_line(present.tree.body[-1])
  last_missing: ast.stmt | None = None
  name = ""
  for node in wanted.tree.body:
    names = names_defined_by(node)
    if not names:
      continue
    # A derivative rule, `@f.defjvp def _`, stands behind its function `f`: it
    # is missing if and only if the function is.
    is_rule = names == {"_"}
    name = name if is_rule else min(names)
    if name not in by_name:
      missing.append(wanted.source(node).rstrip("\n"))
      last_missing = node
      continue
    twin = by_name[name]
    constants = isinstance(twin, ast.Assign) and isinstance(
      last_missing, ast.Assign
    )
    gap = "\n" if constants else "\n\n\n"
    line = present.start_line(twin)
    edits += [Edit(line, source + gap) for source in missing]
    missing = []
    if name == "_CASES":
      rows = _missing_case_rows(twin, node, wanted)
      edits.append(Edit(end_line(twin) - 1, rows))
    elif not is_rule and ast.dump(twin) != ast.dump(node):
      edited.append(name)
  before, after = ("", "\n\n\n") if end < len(present.lines) else ("\n\n", "\n")
  edits += [Edit(end, f"{before}{source}{after}") for source in missing]
  imports = [s for n, s in wanted.imports.items() if n not in present.imports]
  return add_imports(Module(apply_edits(present, edits)), imports), edited


def _missing_case_rows(
  present: ast.stmt, wanted: ast.stmt, module: Module
) -> str:
  """The rows of a wanted table of cases that the present one does not have."""

  def rows(table: ast.stmt) -> dict[str, ast.expr]:
    if not isinstance(table, ast.Assign) or not isinstance(
      table.value, ast.Tuple
    ):
      raise StagingError(
        f"Nothing was changed, since _CASES of optax/losses/{TESTS}.py is no"
        " tuple any more, to which a row could be added."
      )
    return {ast.unparse(row).split(",")[0]: row for row in table.value.elts}

  return "".join(
    "".join(module.lines[row.lineno - 1 : end_line(row)])
    for name, row in rows(wanted).items()
    if name not in rows(present)
  )
