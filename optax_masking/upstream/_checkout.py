"""A checkout of Optax, and the losses that are staged in it."""

import ast
import dataclasses
import difflib
import pathlib
import re
import textwrap
from collections.abc import Iterable, Mapping

from optax_masking.losses._table import ROWS
from optax_masking.upstream import _edits
from optax_masking.upstream._changes import TEMPLATES, change_of, real_name
from optax_masking.upstream._edits import EditError

_HELPER = "canonicalize_where"
_HOME = "_classification"  # The module with the helper.
_NOTE = "Values and gradients do not depend on"
_RANK_NOTE = (
  "A ``where`` of lower rank has one entry for each slice along ``axis``."
)
_AXIS_ENTRY = (
  "Axis or axes to sum over; by default none, which returns a loss for each"
  " element."
)
_WHERE_ENTRY = (
  "Boolean mask of the elements to include; the others add nothing. Of the"
  " shape of ``{}``, or that without {}."
)
# Optax's rule for masks of lower rank, where it has one.
_OLD_RULE = re.compile(
  r"^(?:  #.*\n)?  if where is not None and where.ndim.*\n.*expand_dims.*\n",
  re.M,
)
_ABSL = "from absl.testing import absltest\n"


@dataclasses.dataclass(frozen=True)
class Checkout:
  """The text of an Optax.

  Attributes:
    root: The folder that holds the package `optax`.
    texts: The losses' modules and their tests, by name: `"_ranking_test"`.
    version: The release that will bring a change.
  """

  root: pathlib.Path
  texts: Mapping[str, str]
  version: str

  @classmethod
  def at(cls, path: str | pathlib.Path) -> "Checkout":
    path = pathlib.Path(path).resolve()
    for root in (path, path.parent):
      losses = root / "optax" / "losses"
      if path in (root, root / "optax") and (losses / "__init__.py").is_file():
        texts = {p.stem: p.read_text("utf-8") for p in losses.glob("_*.py")}
        version = (root / "optax" / "__init__.py").read_text("utf-8")
        return cls(root, texts, _release(version))
    raise EditError(
      f"{path} is no checkout of Optax. Name the folder that holds the folder"
      " optax, with optax/losses/__init__.py in it."
    )

  def module_of(self, name: str) -> str:
    """The module that defines a loss, or ""."""
    found = (m for m, text in self.texts.items() if f"\ndef {name}(" in text)
    return next(found, "")

  def function(self, name: str) -> ast.FunctionDef:
    return _edits.functions(self.texts[self.module_of(name)])[name]

  def is_staged(self, name: str, note: str = _NOTE) -> bool:
    if not self.module_of(name):
      return False
    docstring = ast.get_docstring(self.function(name)) or ""
    return note in " ".join(docstring.split())

  def obstacle(self, name: str) -> str:
    """Why a loss can't be staged, or ""."""
    name = real_name(name)
    change, module = change_of(name), self.module_of(name)
    if not module:
      return "it is in none of the modules of optax.losses"
    found = _edits.fingerprint(self.texts[module], name, ROWS)
    if found not in ROWS[name].written_for:
      return f"its code has changed, to {found}: see CONTRIBUTING.md"
    if change.needs and not self.is_staged(change.needs):
      called = self.obstacle(change.needs)
      return f"{change.needs}, which it calls: {called}" if called else ""
    return change.obstacle

  def staged(self, names: Iterable[str]) -> "Checkout":
    """The checkout with some losses staged, and those that they call.

    Raises:
      EditError: If a loss can't be staged.
    """
    found = self
    for name in map(real_name, names):
      if found.is_staged(name):
        continue
      if obstacle := found.obstacle(name):
        raise EditError(f"{name} can't be staged: {obstacle}.")
      if change_of(name).needs:
        found = found.staged([change_of(name).needs])
      found = found._with_change(name)
    return found

  def _with_change(self, name: str) -> "Checkout":
    """Makes the change of one loss."""
    row, change, module = ROWS[name], change_of(name), self.module_of(name)
    text, function = self.texts[module], self.function(name)
    present = {p.arg for p in _edits.parameters(function)}
    edits = [(s, self._canon(module, c)) for s, c in change.edits.items()]
    if change.fills:
      code = "\n".join([*self._fills(module, name, present), "..."])
      edits.append((_edits.first_statement(function), code))
    if row.elementwise and "axis=axis" not in str(edits):
      edits.append(_sum(function))
    text = _edits.replace(text, name, edits)

    union = "Union" in text.partition("\n\n\n")[0]
    mask = "jax.typing.ArrayLike"
    mask = f"Union[{mask}, None]" if union else f"Optional[{mask}]"
    new, entries = {}, {}
    if row.elementwise and "axis" not in present:
      new["axis"] = "Union[int, tuple[int, ...], None] = ()"
      entries["axis"] = _AXIS_ENTRY
    if "where" not in present and row.compacts:
      new["where"] = f"{mask} = None"
      last = "CANON(where, -1" in str(change.edits)
      has_axis = "axis" in present | {*new} and not last
      without = "``axis``" if has_axis else "the last axis"
      entries["where"] = _WHERE_ENTRY.format(function.args.args[0].arg, without)
    note = f"{_NOTE} {'masked elements' if row.compacts else 'padded frames'}."
    if new:
      text = _edits.add_parameters(text, name, new)
      if not union and "import Optional" not in text:
        typing = "from typing import Optional\n\n"
        text = text.replace("import jax\n", f"{typing}import jax\n", 1)
      both = "``axis`` and ``where`` arguments"
      note = (
        f"Added {both if 'axis' in new else 'the ``where`` argument'}. {note}"
      )
    note = f"{note} {change.note}".rstrip()
    for loss in (name, *(n for n in ROWS if ROWS[n].output_of == name)):
      of_loss = entries if loss == name else {}
      text = _edits.edit_docstring(text, loss, of_loss, self.version, note)
    found = self._with(module, text)
    return found._with_helper(module)._with_test(module, name)

  def _fills(self, module: str, name: str, present: set[str]) -> list[str]:
    """The statements that replace masked elements by numbers."""
    change, row = change_of(name), ROWS[name]
    lines = ["if where is not None:"]
    if "where" not in present:
      has_axis = row.elementwise or "axis" in present
      lines += self._call(module, name, "axis" if has_axis else "-1")
    comment = _edits.wrapped(change.reason, "    # ")
    lines += [line[2:] for line in comment.splitlines()]
    for argument, fill in change.fills.items():
      number = int(fill) if fill == int(fill) else fill
      lines.append(f"  {argument} = jnp.where(where, {argument}, {number})")
    return lines

  def _canon(self, module: str, code: str) -> str:
    home = "" if module == _HOME else f"{_HOME}."
    return code.replace("CANON", f"{home}{_HELPER}")

  def _call(self, module: str, name: str, axis: str) -> list[str]:
    """A call of the helper, with the arguments that a mask fits."""
    row = ROWS[name]
    parameters = _edits.parameters(self.function(name))[: len(row.data)]
    arrays = [
      p.arg for i, p in enumerate(parameters) if i not in row.per_example
    ]
    given = ", ".join(["where", axis, *arrays])
    helper = self._canon(module, "CANON")
    line = f"  where = {helper}({given})"
    if len(line) < 79:
      return [line]
    return [f"  where = {helper}(", f"      {given}", "  )"]

  def with_rank_rule(self, names: Iterable[str]) -> "Checkout":
    """The checkout in which masks of lower rank have one entry a slice.

    Raises:
      EditError: If a loss is not staged.
    """
    found = self
    for name in names:
      if found.is_staged(name, _RANK_NOTE):
        continue
      if not found.is_staged(name):
        raise EditError(f"stage {name} first: the rank rule comes after it.")
      module = found.module_of(name)
      function, text = found.function(name), found.texts[module]
      call = "\n  ".join(["", *found._call(module, name, "axis")])
      code = ast.get_source_segment(text, function) or ""
      # In front of what the staged loss does with a mask.
      changed = _OLD_RULE.sub("  if where is not None:\n", code)
      start = re.search(r"^  (?:if where is not None|else):", changed, re.M)
      assert start is not None
      end = start.end()
      changed = f"{changed[:end]}{call}{changed[end:]}"
      text = text.replace(code, changed)
      text = _edits.edit_docstring(text, name, {}, found.version, _RANK_NOTE)
      found = found._with(module, text)._with_helper(module)
      found = found._with_row("test_of_rank", module, name)
    return found

  def _with(self, module: str, text: str) -> "Checkout":
    return dataclasses.replace(self, texts={**self.texts, module: text})

  def _with_helper(self, module: str) -> "Checkout":
    """Adds the helper, its test, and its import, if a module calls it."""
    text, home = self.texts[module], self.texts[_HOME]
    if f"{_HELPER}(" not in text:
      return self
    found = self
    if f"def {_HELPER}(" not in home:
      place = "\n\n\ndef sigmoid_binary_cross_entropy("
      helper = _edits.with_quotes_of(home, TEMPLATES["helper"])
      home = home.replace(place, f"\n\n\n{helper.rstrip()}{place}")
      found = self._with(_HOME, home)
      found = found._with_method(_HOME, "MaskTest", TEMPLATES["test_of_helper"])
    statement = f"from optax.losses import {_HOME}\n"
    if module == _HOME or statement in text:
      return found
    utils = "from optax._src import utils\n"
    return found._with(module, text.replace(utils, f"{utils}{statement}"))

  def _with_test(self, module: str, name: str) -> "Checkout":
    """Adds the row of a loss to the test of its file, or a test of its own."""
    test = change_of(name).test
    if "def test" in test:
      of_class = "NtxentTest" if name == "ntxent" else "CTCTest"
      return self._with_method(module, of_class, test)
    return self._with_row("test", module, name)

  def _with_row(self, template: str, module: str, name: str) -> "Checkout":
    """Adds a row to a parameterized test, and the test if it is not there."""
    loss, wrapper = f"{module}.{name}", ""
    if ROWS[name].has_classes:
      wrapper = "_of_first_class"
    elif ROWS[name].elementwise:
      loss, wrapper = f"{loss}, axis=-1", "functools.partial"
    row = change_of(name).test
    if not row:
      row = f"({wrapper}({loss}),)," if wrapper else f"({loss},),"
      if len(row) > 74:
        row = f"(\n    {wrapper}(\n        {loss}\n    ),\n),"
    found = self._with_method(module, "MaskTest", TEMPLATES[template])
    text = found.texts[f"{module}_test"]
    (test,) = re.findall(r"  \)\n  def \w+\(", TEMPLATES[template])
    row = textwrap.indent(textwrap.dedent(row).strip(), " " * 6)
    text = text.replace(test, f"{row}\n{test}")
    if "_of_first_class(" in row and "def _of_first_class" not in text:
      helper = _edits.with_quotes_of(text, TEMPLATES["of_first_class"])
      place = "\n\n\nclass MaskTest("
      text = text.replace(place, f"\n\n\n{helper.rstrip()}{place}")
    if "functools." in row and "import functools\n" not in text:
      text = text.replace(_ABSL, f"import functools\n\n{_ABSL}")
    return found._with(f"{module}_test", text)

  def _with_method(self, module: str, of_class: str, method: str) -> "Checkout":
    """Adds a test to a class, and the class if it is not there."""
    text = self.texts[f"{module}_test"]
    (name,) = re.findall(r"  def test\w+\(", method)
    if name in text:
      return self
    start = f"\n\n\nclass {of_class}("
    if start not in text:
      place = re.search(r"\n\n\n(?:def load_tests|if __name__)", text)
      end = place.start() if place else len(text)
      text = f"{text[:end]}{start}parameterized.TestCase):{text[end:]}"
    end = text.index("\n\n\n", text.index(start) + 3)
    method = _edits.with_quotes_of(text, method)
    text = f"{text[:end]}\n\n{method.rstrip()}{text[end:]}"
    if "import parameterized\n" not in text:
      line = "from absl.testing import parameterized\n"
      text = text.replace(_ABSL, _ABSL + line)
    return self._with(f"{module}_test", text)

  def changed(self, before: "Checkout") -> dict[str, tuple[str, str]]:
    """The old and the new text of each file that is not as before."""
    return {
      f"optax/losses/{module}.py": (before.texts[module], text)
      for module, text in sorted(self.texts.items())
      if text != before.texts[module]
    }

  def patch(self, before: "Checkout") -> str:
    """The changes as `git apply` takes them."""
    parts = []
    for file, (old, new) in self.changed(before).items():
      parts.append(f"diff --git a/{file} b/{file}\n")
      lines = old.splitlines(True), new.splitlines(True)
      parts += difflib.unified_diff(*lines, f"a/{file}", f"b/{file}")
    return "".join(parts)


def _release(init: str) -> str:
  found = re.search(
    r"""^__version__.* = ["'](\d+)\.(\d+)\.(\d+)(.*)["']""", init, re.M
  )
  if found is None:
    raise EditError("optax/__init__.py has no `__version__`.")
  major, minor, micro, rest = found.groups()
  return f"{major}.{minor}.{int(micro) + (0 if 'dev' in rest else 1)}"


def _sum(function: ast.FunctionDef) -> tuple[str, str]:
  """Sums what a function returns, if an axis or a mask is given."""
  last = function.body[-1]
  assert isinstance(last, ast.Return) and last.value is not None
  return ast.unparse(last), (
    "loss = RETURNED\nif where is None and axis == ():\n  return loss\n"
    "return jnp.sum(loss, axis=axis, where=where)"
  )
