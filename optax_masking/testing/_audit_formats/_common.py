"""The audit that each format writes, and the parts that the formats share."""

import collections
import dataclasses
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from optax_masking.testing._find import WITHOUT_WHERE
from optax_masking.testing._report import (
  CLAUSES,
  NOT_APPLICABLE,
  Finding,
  Report,
)

# Categories of characters that steer a terminal: escape, line breaks and such.
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


class Summary(NamedTuple):
  """The numbers of one target."""

  losses: int
  clean: int
  without_where: int
  new_without_where: int
  findings: int
  new: int | None
  cases: int
  seconds: float

  @property
  def broken(self) -> int:
    """How many losses take a mask, and break a clause."""
    return self.losses - self.clean - self.without_where

  @property
  def known(self) -> int:
    """How many findings the baseline has."""
    return 0 if self.new is None else self.findings - self.new

  @property
  def losses_in_words(self) -> str:
    """How many losses are clean, and what of the others."""
    return f"{self.clean:,} {self.others_in_words}"

  @property
  def others_in_words(self) -> str:
    """The same without the number of clean losses, which comes before it."""
    parts = [f"of {count(self.losses, 'loss', 'losses')} clean"]
    if self.broken:
      parts.append(f"{self.broken:,} with broken clauses")
    if self.without_where:
      new = self.new_without_where
      parts.append(
        f"{self.without_where:,} without `where`"
        + (f" ({new:,} new)" if new else "")
      )
    return ", ".join(parts)

  @property
  def findings_in_words(self) -> str:
    """How many findings there are, but for those that a mask is missing."""
    text = count(self.findings - self.without_where, "finding")
    if self.new is None:
      return text
    return f"{text} ({self.new - self.new_without_where:,} new)"


@dataclasses.dataclass(frozen=True)
class FindingGroup:
  """Findings of one clause about one argument, which are written as one."""

  loss: str
  findings: tuple[Finding, ...]
  new: bool

  @property
  def first(self) -> Finding:
    return self.findings[0]

  @property
  def message(self) -> str:
    """That of the first, for a reader who knows which loss it is about."""
    return self.first.message.removeprefix(f"{self.loss} ")

  @property
  def circumstances(self) -> str:
    """The argument, the derivatives and the dtypes."""
    return join_unique(
      " · ",
      self.first.argument,
      join_unique(", ", *map(describe_derivative, self.findings)),
      join_unique(", ", *(finding.dtype for finding in self.findings)),
    )

  @property
  def others(self) -> str:
    """How many findings there are besides the first."""
    return f"and {len(self.findings) - 1:,} more" if self.findings[1:] else ""


@dataclasses.dataclass(frozen=True)
class Audit:
  """What was found about all losses of some targets.

  Attributes:
    reports: For each target, what was found about each loss, by name.
    versions: The versions of the packages involved, by name.
    new: The findings that the baseline does not have, as `identify` names
      them. None without a baseline.
    gone: The findings of the baseline that were not made.
    quick: Whether only part of the masks, dtypes and derivatives was tried.
    seconds: How long all of it took. None if that is not known.
    definitions: For each target, where each loss is defined, by name, as
      "file.py:12 in function".
  """

  reports: Mapping[str, Mapping[str, Report]]
  versions: Mapping[str, str]
  new: frozenset[str] | None = None
  gone: tuple[str, ...] = ()
  quick: bool = False
  seconds: float | None = None
  definitions: Mapping[str, Mapping[str, str]] = dataclasses.field(
    default_factory=dict
  )

  @property
  def title(self) -> str:
    return f"{'Quick audit' if self.quick else 'Audit'} of the mask contract"

  @property
  def found(self) -> frozenset[str]:
    """All findings, as `identify` names them."""
    return frozenset(
      identify(target, name, finding)
      for target, reports in self.reports.items()
      for name, report in reports.items()
      for finding in report.findings
    )

  @property
  def failures_of_strict(self) -> bool:
    """Whether a strict check fails without a finding."""
    return any(
      not report.ok and not report.findings
      for reports in self.reports.values()
      for report in reports.values()
    )

  def against(self, known: Set[str], audited: tuple[str, ...]) -> "Audit":
    """The audit next to a baseline.

    Args:
      known: The findings of the baseline.
      audited: The beginnings of the identifiers of all audited losses.
    """
    found = self.found
    gone = sorted(e for e in known - found if e.startswith(audited))
    return dataclasses.replace(
      self, new=frozenset(found - known), gone=tuple(gone)
    )

  def is_new(self, target: str, name: str, finding: Finding) -> bool:
    """Whether there is a baseline that does not have the finding."""
    return self.new is not None and identify(target, name, finding) in self.new

  def summary(self, target: str) -> Summary:
    """The numbers of a target."""
    reports = self.reports[target]
    new = {
      name: sum(self.is_new(target, name, f) for f in report.findings)
      for name, report in reports.items()
    }
    without_where = [n for n, report in reports.items() if _lacks_where(report)]
    return Summary(
      losses=len(reports),
      clean=sum(report.ok for report in reports.values()),
      without_where=len(without_where),
      new_without_where=sum(new[name] for name in without_where),
      findings=sum(len(report.findings) for report in reports.values()),
      new=None if self.new is None else sum(new.values()),
      cases=sum(report.cases for report in reports.values()),
      seconds=sum(report.seconds for report in reports.values()),
    )

  def finding_groups(
    self, target: str, name: str, by_source: bool = False
  ) -> list[FindingGroup]:
    """The findings of a loss: new ones first, then in the order of clauses."""
    groups = collections.defaultdict(list)
    for finding in self.reports[target][name].findings:
      known = not self.is_new(target, name, finding)
      source = finding.source if by_source else None
      groups[known, finding.clause, finding.argument, source].append(finding)
    order = list(CLAUSES)
    return [
      FindingGroup(name, tuple(groups[key]), not key[0])
      for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))
    ]

  def losses_by_findings(
    self, target: str
  ) -> Iterator[tuple[list[str], list[FindingGroup]]]:
    """The losses with findings, those together that have the same ones.

    With a baseline, only those that are new.
    """
    losses = collections.defaultdict(list)
    for name in self.reports[target]:
      groups = [
        group
        for group in self.finding_groups(target, name)
        if group.new or self.new is None
      ]
      if groups:
        alike = tuple(
          (
            group.first.clause,
            group.circumstances,
            group.others,
            group.message,
            group.first.source,
            group.new,
          )
          for group in groups
        )
        losses[alike].append((name, groups))
    for same in losses.values():
      yield [name for name, _ in same], same[0][1]


def identify(target: str, name: str, finding: Finding) -> str:
  """The name of a finding in a baseline: the target, the loss and the key."""
  return f"{target}/{name}/{finding.key}"


# Clauses.


def _lacks_where(report: Report) -> bool:
  return WITHOUT_WHERE in report.clauses.values()


class ClauseStatus(NamedTuple):
  """What became of a clause on a loss.

  Attributes:
    status: "kept", "broken", "untried", "inapplicable" or "unasked".
    reason: Why the clause was not tried or does not apply.
  """

  status: str
  reason: str = ""


def clause_statuses(report: Report) -> dict[str, ClauseStatus]:
  """What became of each clause."""
  broken = {finding.clause for finding in report.findings}
  statuses = {}
  for clause in CLAUSES:
    reported = report.clauses.get(clause)
    if clause in broken or reported == "broken":
      statuses[clause] = ClauseStatus("broken")
    elif reported == "kept":
      statuses[clause] = ClauseStatus("kept")
    elif reported is None:
      statuses[clause] = ClauseStatus("unasked")
    elif reported.startswith(NOT_APPLICABLE):
      reason = reported.removeprefix(NOT_APPLICABLE).lstrip(": ")
      statuses[clause] = ClauseStatus("inapplicable", reason)
    else:
      statuses[clause] = ClauseStatus("untried", reported)
  return statuses


def untried_by_reason(
  reports: Mapping[str, Report], status: str = "untried"
) -> dict[str, list[tuple[str, str]]]:
  """The losses and clauses that were not tried, the frequent reasons first.

  Or those with another status that has reasons.
  """
  found = collections.defaultdict(list)
  for name, report in reports.items():
    for clause, (found_status, reason) in clause_statuses(report).items():
      if found_status == status:
        found[reason].append((name, clause))
  return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def notes_of_losses(reports: Mapping[str, Report]) -> dict[str, list[str]]:
  """Each note, with the losses that it is about."""
  found = collections.defaultdict(list)
  for name, report in reports.items():
    for note in report.notes:
      found[note].append(name)
  return dict(found)


def describe_known(number: int) -> str:
  return f"{count(number, 'known finding')}, see --baseline"


def describe_untried(untried: Sequence[tuple[str, str]]) -> str:
  """Losses and clauses in words: "empty of l2_loss, log_cosh"."""
  clauses_of_loss = collections.defaultdict(list)
  for name, clause in untried:
    clauses_of_loss[name].append(clause)
  losses_of_clauses = collections.defaultdict(list)
  for name, clauses in clauses_of_loss.items():
    losses_of_clauses[tuple(clauses)].append(name)
  return "; ".join(
    f"{', '.join(clauses)} of {', '.join(names)}"
    for clauses, names in losses_of_clauses.items()
  )


# Findings.


def describe_derivative(finding: Finding) -> str | None:
  """The derivative, and with respect to which other argument it is."""
  if finding.wrt in (None, finding.argument):
    return finding.derivative
  return f"{finding.derivative or 'derivative'} wrt {finding.wrt}"


def short_source(finding: Finding) -> str:
  """The source without the folder in which packages are installed."""
  return re.sub(r"\S*[/\\]site-packages[/\\]", "", finding.source or "")


# Strings.


def join_unique(separator: str, *parts: str | None) -> str:
  """Joins the parts that are neither None nor empty, each once."""
  return separator.join(dict.fromkeys(part for part in parts if part))


def count(number: int, singular: str, plural: str = "") -> str:
  """The number with its noun, as "1 loss" or "2,000 losses"."""
  noun = singular if number == 1 else plural or f"{singular}s"
  return f"{number:,} {noun}"


def spell_out(text: str, keep: str = "\n\t") -> str:
  r"""Spells out the characters that steer a terminal, escape as \x1b."""
  return "".join(
    ascii(character)[1:-1]
    if unicodedata.category(character) in _STEERING and character not in keep
    else character
    for character in text
  )


def one_line(text: str) -> str:
  """The text as one line of characters that are visible."""
  return spell_out(" ".join(text.split()), keep="")


def shorten(text: str, length: int) -> str:
  """The text as one line, cut at a space if it is longer."""
  return textwrap.shorten(text, length, placeholder=" …")


def split_code(text: str) -> list[str]:
  """The parts of a text: every second one was between backticks, as code."""
  return re.split(r"`([^`\n]+)`", text)
