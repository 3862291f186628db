"""The changes that `changes.toml` lists, and the fills of the wrappers."""

import ast
import dataclasses
import functools
import pathlib
import re
import tomllib
from typing import Any

from optax_masking.losses._table import ROWS
from optax_masking.upstream._edits import functions

_HERE = pathlib.Path(__file__).parent
_EXAMPLE = """\
x, y = jnp.array([0.5, jnp.nan]), jnp.array([1.0, 0.0])
loss = lambda x: jnp.sum(optax.losses.{}(x, y, where=~jnp.isnan(x)))
print(jax.value_and_grad(loss)(x))"""


@dataclasses.dataclass
class Change:
  """The change of a loss.

  Attributes:
    edits: The beginnings of statements, each with the new statements.
    fills: The number that replaces the masked elements of each argument.
    reason: The comment on the fills.
    needs: The loss that it calls with its mask, or "".
    test: A row of the test, or a method; by default the loss itself.
    note: What else changes for callers.
    obstacle: Why there is no small change, or "".
  """

  edits: dict[str, str] = dataclasses.field(default_factory=dict)
  fills: dict[str, float] = dataclasses.field(default_factory=dict)
  reason: str = ""
  needs: str = ""
  test: str = ""
  note: str = ""
  obstacle: str = ""


@dataclasses.dataclass
class Proposal:
  """A pull request: its losses, and what `changes.toml` says of it."""

  name: str
  losses: list[str]
  example: str
  repairs: str = (
    "Padding can be left out. A `where` around the loss leaves NaN gradients."
  )
  issues: str = "#902"
  alone: bool = False


PROPOSALS: list[Proposal] = []
_CHANGES: dict[str, Change] = {}


def _read(proposals: list[dict[str, Any]]) -> None:
  for proposal in proposals:
    losses: dict[str, Change] = {}
    for names, parts in proposal.pop("changes", {}).items():
      for name in names.split():
        change = losses.setdefault(name, Change())
        change.edits |= parts.get("edits", {})
        vars(change).update({**parts, "edits": change.edits})
    _CHANGES.update(losses)
    proposal.setdefault("example", _EXAMPLE.format(*losses or [""]))
    PROPOSALS.append(Proposal(**{"losses": [*losses], **proposal}))


_FILE = tomllib.loads((_HERE / "changes.toml").read_text("utf-8"))
TEXTS, TEMPLATES = _FILE["texts"], _FILE["templates"]
_read(_FILE["proposals"])
RANK_RULE = PROPOSALS.pop()


def real_name(name: str) -> str:
  """The loss that is changed for a deprecated name or a first result."""
  return ROWS[name].alias_of or ROWS[name].output_of or name


@functools.cache
def change_of(name: str) -> Change:
  """The change of a loss, with the fills that its wrapper declares."""
  change = _CHANGES.get(name) or Change()
  if change.fills or change.needs or change.obstacle:
    return change
  if re.search(r"CANON|jnp\.where\(", str(change.edits)):
    return change
  text, wrapper = next(
    (text, functions(text)[name])
    for path in (_HERE.parent / "losses").glob("_*.py")
    if f"\ndef {name}(" in (text := path.read_text("utf-8"))
  )
  arguments = [a.arg for a in wrapper.args.args][: len(ROWS[name].data)]
  declared = {
    keyword.arg: float(ast.literal_eval(keyword.value))
    for decorator in wrapper.decorator_list
    if isinstance(decorator, ast.Call)
    for keyword in decorator.keywords
    if isinstance(keyword.value, ast.Constant)
  }
  first = min(d.lineno for d in wrapper.decorator_list)
  # Or a derivative that is written out has them: `elementwise(..., fills=...)`.
  pattern = rf"^_{name} = elementwise\(.*?^  fills=(\(.*?\)),$"
  if written := re.search(pattern, text, re.M | re.S):
    fills = ast.literal_eval(written[1])
    declared = dict(zip(arguments, map(float, fills), strict=True))
    first = text.count("\n", 0, written.start()) + 1
  if not declared.keys() >= {*arguments}:
    return Change(obstacle="its fills are no numbers and not in changes.toml")
  above = "\n".join(text.splitlines()[: first - 1])
  comment = re.search(r"(?:^#.*\n?)*\Z", above, re.M)
  reason = " ".join((comment[0] if comment else "").replace("#", "").split())
  fills = {a: declared[a] for a in arguments}
  return dataclasses.replace(change, fills=fills, reason=reason)
