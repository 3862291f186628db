"""What the checks of the clauses yield, and what a report is made of."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from optax_masking.testing._options import Options
from optax_masking.testing._report import (
  CLAUSES,
  NOT_APPLICABLE,
  Finding,
  Report,
  sort_by_clause,
)

_WHY_UNTRIED = {
  **dict.fromkeys(CLAUSES, "there is nothing to try it on"),
  "zero_gradient": "no derivative was asked for, or nothing is masked",
  "honesty": "no gradient shows which elements count",
  "compaction": "no mask leaves data of which the loss has to be the same",
}
_WHY_NOT_APPLICABLE = {
  "transforms": "one transformation alone was asked for",
  "masked_label": "no integer argument names a class that a mask masks",
  "identity": "the loss needs a mask, and there is no `reference`",
}


@dataclasses.dataclass(frozen=True)
class Tried:
  """A clause was tried."""

  clause: str


@dataclasses.dataclass(frozen=True)
class Untried:
  """A clause could not be tried in some way, for a reason."""

  clause: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Note:
  """Something that is no fault of the mask.

  Attributes:
    text: A sentence about it.
    serious: Whether it is a failure in a strict check.
  """

  text: str
  serious: bool = False


@dataclasses.dataclass(frozen=True)
class Broken:
  """A case in which a clause is broken.

  Attributes:
    finding: The facts that tell its kind from others.
    describe: Computes the other facts, which takes time.
    if_new: Another event, if no case of this kind was found before.
  """

  finding: Finding
  describe: Callable[[], dict[str, Any]]
  if_new: "Broken | None" = None

  @property
  def clause(self) -> str:
    return self.finding.clause


Event = Tried | Untried | Note | Broken


class Log:
  """Collects events: one example of each kind of finding, and its cases."""

  def __init__(self, options: Options):
    self.options = options
    self.found: dict[str, Finding] = {}
    self.tried: set[str] = set()
    self.reasons: dict[str, str] = {}
    self.notes: dict[str, bool] = {}

  def add(self, events: Iterable[Event]) -> None:
    """Adds events, but for those of clauses that are left out."""
    for event in events:
      if isinstance(event, Note):
        self.notes[event.text] = event.serious
        continue
      if event.clause in self.options.skip:
        continue
      if isinstance(event, Untried):
        self.reasons.setdefault(event.clause, event.reason)
        continue
      self.tried.add(event.clause)
      if isinstance(event, Broken):
        self._add_broken(event)

  def _add_broken(self, event: Broken) -> None:
    key = event.finding.key
    known = self.found.get(key)
    if known is None:
      self.found[key] = dataclasses.replace(event.finding, **event.describe())
      if event.if_new is not None:
        self.add([event.if_new])
    else:
      cases = known.cases + 1
      self.found[key] = dataclasses.replace(known, cases=cases)

  def report(self, name: str, cases: int, seconds: float, data: str) -> Report:
    """Makes the report of all events."""
    findings = sort_by_clause(_without_repetitions(self.found.values()))
    broken = {finding.clause for finding in findings}
    clauses = {}
    for clause in CLAUSES:
      if clause in broken:
        clauses[clause] = "broken"
      elif clause not in self.options.skip:
        clauses[clause] = self._state(clause)
    notes = dict(self.notes)
    for clause in self.tried & self.reasons.keys():
      reason = self.reasons[clause]
      notes[f"Not all of {clause} could be tried: {reason}."] = False
    return Report(
      name=name,
      findings=findings,
      clauses=clauses,
      cases=cases,
      seconds=seconds,
      data=data,
      notes=tuple(notes),
      strict=self.options.strict,
      serious=any(notes.values()),
    )

  def _state(self, clause: str) -> str:
    """What a report says of a clause that it does not call broken."""
    if any(finding.clause == clause for finding in self.found.values()):
      return f"{NOT_APPLICABLE}: another clause reports what it found"
    if clause in self.tried:
      return "kept"
    if clause in self.reasons or clause not in _WHY_NOT_APPLICABLE:
      return self.reasons.get(clause, _WHY_UNTRIED[clause])
    return f"{NOT_APPLICABLE}: {_WHY_NOT_APPLICABLE[clause]}"


def _without_repetitions(findings: Iterable[Finding]) -> list[Finding]:
  """Drops findings of arithmetic whose number another clause reports."""
  findings = list(findings)
  reported = {
    (f.primitive, f.source)
    for f in findings
    if f.primitive and f.clause != "clean_arithmetic"
  }
  return [
    f
    for f in findings
    if f.clause != "clean_arithmetic" or (f.primitive, f.source) not in reported
  ]
