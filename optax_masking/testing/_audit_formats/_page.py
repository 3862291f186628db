"""An audit as an HTML page, written from the template `page.html.jinja`.

The page has no scripts and loads nothing: its stylesheet, `page.css`, is in it.
The functions here prepare what the template shows.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jinja2

from optax_masking.testing._audit_formats._common import (
  Audit,
  ClauseStatus,
  clause_statuses,
  count,
  describe_derivative,
  describe_known,
  describe_untried,
  identify,
  join_unique,
  notes_of_losses,
  short_source,
  shorten,
  spell_out,
  split_code,
  untried_by_reason,
)
from optax_masking.testing._report import CLAUSES, Finding, Report

_LARGEST_DRAWING = 400  # Elements of a mask.
_Row = list[tuple[tuple[int, ...], bool]]  # Of a mask: indices and elements.


def html(audit: Audit) -> str:
  """A page with a grid for each target; a broken cell opens its findings.

  The address of what is open, as `#optax/cosine_distance/empty`, can be shared.
  """
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("optax_masking.testing._audit_formats", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_printable,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.globals.update(anchor=_anchor, count=count)
  environment.filters.update(
    number=lambda number: f"{number:,}",
    spaced=lambda clause: clause.replace("_", " "),
    split_code=split_code,
  )
  return environment.get_template("page.html.jinja").render(
    title=audit.title,
    versions=audit.versions,
    seconds=audit.seconds,
    baseline=_baseline(audit),
    targets=[_target(audit, target) for target in audit.reports],
    clauses=CLAUSES,
  )


def _printable(value: Any) -> Any:
  """Spells out control characters of each text that the template inserts."""
  if isinstance(value, str) and not hasattr(value, "__html__"):
    return spell_out(value.replace("\r\n", "\n"))
  return value


def _anchor(*parts: str) -> str:
  """The id of an element, which is also the fragment of its address."""
  return "/".join(quote(spell_out(part), safe=":") for part in parts)


def _baseline(audit: Audit) -> dict[str, Any] | None:
  """The findings that are new and those that are gone; None if no baseline."""
  if audit.new is None and not audit.gone:
    return None
  anchors = {
    identify(target, name, finding): _anchor(target, name, finding.clause)
    for target, reports in audit.reports.items()
    for name, report in reports.items()
    for finding in report.findings
  }
  return {
    "new": sorted(audit.new or ()),
    "gone": audit.gone,
    "anchors": anchors,
  }


def _target(audit: Audit, target: str) -> dict[str, Any]:
  reports = audit.reports[target]
  numbers = audit.summary(target)
  losses = [_loss(audit, target, name) for name in reports]
  return {
    "name": target,
    "numbers": numbers,
    "percent": 100 * numbers.clean / numbers.losses if numbers.losses else 100,
    "known": describe_known(numbers.known) if numbers.known else "",
    "losses": losses,
    "opens": any(loss["details"] for loss in losses),
    "notes": {
      note: ", ".join(names) for note, names in notes_of_losses(reports).items()
    },
    "untried": {
      reason: describe_untried(untried)
      for reason, untried in untried_by_reason(reports).items()
    },
  }


def _loss(audit: Audit, target: str, name: str) -> dict[str, Any]:
  """The row of a loss: its cells, and by clause the findings that they open.

  With a baseline, only new findings are shown.
  """
  report = audit.reports[target][name]
  details: dict[str, list[dict[str, Any]]] = {}
  for clause in CLAUSES:
    found = [
      {"new": audit.new is not None, **_finding(finding)}
      for finding in report.findings
      if finding.clause == clause
      and (audit.new is None or audit.is_new(target, name, finding))
    ]
    if found:
      details[clause] = found
  return {
    "name": name,
    "cells": list(_cells(report, details)),
    "details": details,
  }


def _cells(
  report: Report, details: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
  """The cells of a loss, one for three or more not tried for one reason."""
  statuses = list(clause_statuses(report).items())
  numbers = collections.Counter(f.clause for f in report.findings)
  while statuses:
    clause, status = statuses[0]
    span = _run_length([status for _, status in statuses])
    if status.status != "untried" or span < 3:
      span = 1
    del statuses[:span]
    yield {
      "clause": clause,
      "status": status.status,
      "reason": status.reason,
      "short_reason": shorten(status.reason, 72),
      "span": span,
      "findings": numbers[clause],
      "opens": clause in details,
      "new": any(finding["new"] for finding in details.get(clause, ())),
    }


def _run_length(statuses: Sequence[ClauseStatus]) -> int:
  """How many at the start are the same."""
  for length, status in enumerate(statuses):
    if status != statuses[0]:
      return length
  return len(statuses)


def _finding(finding: Finding) -> dict[str, Any]:
  message = finding.message.strip()
  headline = shorten(message, 240)
  cut = headline != " ".join(message.split()) or "\n" in message
  if message == (finding.got or "").strip():
    cut = False  # The page shows all of it as the error that came out.
  element = str(list(finding.element)) if finding.element else ""
  argument = finding.argument and finding.argument + element
  fails = f"{finding.cases:,} fail in this way" if finding.cases > 1 else ""
  facts = [
    ("message", "block", message if cut else ""),
    ("got", "wrong", finding.got),
    ("expected", "block", finding.expected),
    ("argument", "code", argument),
    ("mask", "text", finding.mask),
    ("where", "drawing", _drawing(finding.where, finding.element)),
    ("poison", "code", finding.poison),
    ("operation", "text", finding.primitive),
    ("source", "code", short_source(finding)),
    ("code", "source", finding.code),
    ("cases", "text", fails),
  ]
  return {
    "headline": headline,
    "circumstances": join_unique(
      " · ",
      finding.argument,
      describe_derivative(finding),
      finding.transform,
      finding.dtype,
    ),
    "facts": [fact for fact in facts if fact[-1]],
  }


def _drawing(
  where: Any, element: tuple[int, ...] | None
) -> dict[str, Any] | None:
  """A small mask as rows to draw; None if it is too large, or is no mask."""
  rows = _rows(where, ())
  if rows is None or not 1 < sum(map(len, rows)) <= _LARGEST_DRAWING:
    return None
  matrices: list[list[list[tuple[bool, bool]]]] = []
  before = None
  for row in rows:
    matrix = row[0][0][:-2]
    if matrix != before:
      matrices.append([])
    before = matrix
    matrices[-1].append([(value, i == element) for i, value in row])
  elements = dict(item for row in rows for item in row)
  return {
    "matrices": matrices,
    "included": sum(elements.values()),
    "elements": len(elements),
    "marked": elements.get(element) if element else None,
  }


def _rows(where: Any, index: tuple[int, ...]) -> list[_Row] | None:
  """The rows of nested lists of booleans; None if they are anything else."""
  if not isinstance(where, list | tuple) or not where:
    return None
  if all(isinstance(x, bool) for x in where):
    return [[((*index, i), x) for i, x in enumerate(where)]]
  rows = []
  for i, x in enumerate(where):
    below = _rows(x, (*index, i))
    if below is None:
      return None
    rows += below
  return rows
