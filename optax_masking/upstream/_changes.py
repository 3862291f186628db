"""The changes that `changes.txt` lists, and the fills of the wrappers."""

import ast
import dataclasses
import functools
import pathlib
import re

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

  edits: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  fills: dict[str, float] = dataclasses.field(default_factory=dict)
  reason: str = ""
  needs: str = ""
  test: str = ""
  note: str = ""
  obstacle: str = ""


@dataclasses.dataclass
class Proposal:
  """A pull request: its losses, and what `changes.txt` says of it."""

  name: str
  losses: list[str] = dataclasses.field(default_factory=list)
  repairs: str = (
    "Padding can be left out. A `where` around the loss keeps NaN gradients."
  )
  issues: str = "#902"
  example: str = ""
  alone: bool = False

  @property
  def is_rank_rule(self) -> bool:
    return self.name == "rank-rule"


def _read() -> tuple[list[Proposal], dict[str, Change], dict[str, str]]:
  proposals: list[Proposal] = []
  changes: dict[str, Change] = {}
  templates: dict[str, str] = {}
  names: list[str] = []
  text = (_HERE / "changes.txt").read_text("utf-8")
  for part in re.split(r"^%", text, flags=re.M)[1:]:
    head, _, body = part.partition("\n")
    key, _, value = head.partition(" ")
    if key == "proposal":
      proposals.append(Proposal(value))
    elif key in ("repairs", "issues", "alone", "example"):
      setattr(proposals[-1], key, value or body.strip() or True)
    elif key == "loss":
      names = value.split()
      for name in names:
        changes.setdefault(name, Change())
      known = proposals[-1].losses
      known += [name for name in names if name not in known]
    elif key in ("helper", "class"):
      templates[key] = body.strip() + "\n"
    for change in map(changes.get, names):
      assert change is not None
      if key == "old":
        change.edits.append((value, body.rstrip()))
      elif key == "fills":
        pairs = (pair.split("=") for pair in value.split())
        change.fills = {argument: float(fill) for argument, fill in pairs}
        change.reason = body.strip()
      elif key in ("needs", "note", "obstacle", "test"):
        setattr(change, key, value or body.rstrip())
  for proposal in proposals:
    if not proposal.example:
      proposal.example = _EXAMPLE.format(proposal.losses[0])
  return proposals, changes, templates


PROPOSALS, _CHANGES, TEMPLATES = _read()


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
  declared = {
    keyword.arg: float(ast.literal_eval(keyword.value))
    for decorator in wrapper.decorator_list
    if isinstance(decorator, ast.Call)
    for keyword in decorator.keywords
    if isinstance(keyword.value, ast.Constant)
  }
  arguments = [a.arg for a in wrapper.args.args][: len(ROWS[name].data)]
  if not declared.keys() >= {*arguments}:
    return Change(obstacle="its fills are no numbers, and changes.txt lacks it")
  first = min(d.lineno for d in wrapper.decorator_list)
  above = "\n".join(text.splitlines()[: first - 1])
  comment = re.search(r"(?:^#.*\n?)*\Z", above, re.M)
  reason = " ".join((comment[0] if comment else "").replace("#", "").split())
  fills = {a: declared[a] for a in arguments}
  return dataclasses.replace(change, fills=fills, reason=reason)
