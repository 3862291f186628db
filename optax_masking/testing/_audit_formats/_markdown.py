"""An audit as Markdown, for a comment or the summary of a workflow."""

import re
from collections.abc import Iterable, Iterator, Sequence

from optax_masking.testing._audit_formats._common import (
  Audit,
  FindingGroup,
  clause_statuses,
  count,
  describe_known,
  describe_untried,
  join_unique,
  notes_of_losses,
  one_line,
  short_source,
  spell_out,
  split_code,
  untried_by_reason,
)
from optax_masking.testing._report import CLAUSES

_SYMBOLS = {
  "kept": "✅",
  "broken": "❌",
  "untried": "·",
  "inapplicable": " ",
  "unasked": " ",
}


def markdown(audit: Audit) -> str:
  """A table for each target; what breaks the clauses is folded up below."""
  kind = "quick audit" if audit.quick else "audit"
  lines = [f"## Mask contract: {kind}", ""]
  head = [f"{_escape(k)} {_escape(v)}" for k, v in audit.versions.items()]
  if audit.seconds is not None:
    head.append(f"took {audit.seconds:,.1f} s")
  lines += [" · ".join(head), ""] if head else []
  lines += _summary_table(audit)
  for word, keys in (("New", sorted(audit.new or ())), ("Gone", audit.gone)):
    if keys:
      lines += ["", f"**{word} against the baseline ({len(keys):,})**", ""]
      lines += [f"- {_code(key)}" for key in keys]
  for target in audit.reports:
    lines += _section(audit, target)
  clauses = [f"- **{_escape(c)}**: {_escape(CLAUSES[c])}" for c in CLAUSES]
  legend = (
    "✅ kept, ❌ broken, · not tried, empty: does not apply, or was left out:"
    " the clauses"
  )
  lines += ["", *_folded(legend, clauses)]
  return "\n".join(lines).rstrip("\n") + "\n"


def _summary_table(audit: Audit) -> Iterator[str]:
  """The numbers of each target."""
  heads = ["target", "clean", "broken", "without where", "findings"]
  if audit.new is not None:
    heads.append("new")
  heads.append("cases")
  yield _row(heads)
  yield _row([":--"] + ["--:"] * (len(heads) - 1))
  for target in audit.reports:
    numbers = audit.summary(target)
    cells = [_code(target), f"{numbers.clean:,} of {numbers.losses:,}"]
    counts = [
      numbers.broken,
      numbers.without_where,
      numbers.findings - numbers.without_where,
      *([] if numbers.new is None else [numbers.new]),
      numbers.cases,
    ]
    yield _row([*cells, *(f"{number:,}" for number in counts)])


def _section(audit: Audit, target: str) -> Iterator[str]:
  """The table of a target, its findings and why clauses were not tried."""
  reports = audit.reports[target]
  yield from ["", f"### {_code(target)}", ""]
  yield _row(["loss", *(_escape(c.replace("_", " ")) for c in CLAUSES)])
  yield _row([":--"] + [":-:"] * len(CLAUSES))
  for name, report in reports.items():
    statuses = clause_statuses(report).values()
    yield _row([_code(name), *(_SYMBOLS[status] for status, _ in statuses)])
  yield ""
  for names, groups in audit.losses_by_findings(target):
    found = count(sum(len(group.findings) for group in groups), "finding")
    each = " each" if len(names) > 1 else ""
    summary = f"{', '.join(map(_code, names))}: {found}{each}"
    yield from _folded(summary, [_item(group) for group in groups])
  known = audit.summary(target).known
  if known:
    yield from [f"**{_escape(describe_known(known))}**", ""]
  for title, status in (
    ("Not tried", "untried"),
    ("Does not apply", "inapplicable"),
  ):
    items = [
      f"- {_prose(reason)}: {_escape(describe_untried(untried))}"
      for reason, untried in untried_by_reason(reports, status).items()
    ]
    if items:
      yield from _folded(title, items)
  notes = [
    f"- {', '.join(map(_code, names))}: {_prose(note)}"
    for note, names in notes_of_losses(reports).items()
  ]
  if notes:
    yield from _folded("Notes", notes)


def _item(group: FindingGroup) -> str:
  """The item of a list that has a finding, and those like it."""
  first = group.first
  source = f"at {_code(short_source(first))}" if first.source else ""
  new = "**new**" if group.new else ""
  clause = f"**{_escape(first.clause)}**"
  circumstances = _escape(group.circumstances)
  head = join_unique(" · ", clause, circumstances, source, new)
  message = join_unique(" · ", _prose(group.message), group.others)
  return f"- {head}<br>{message}"


def _row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
  head = f"<details><summary>{summary}</summary>"
  return [head, "", *lines, "", "</details>", ""]


def _escape(text: str) -> str:
  """Text in which no character is markup, neither of Markdown nor of HTML."""
  return re.sub(
    r"""[\\`*_\[\]<>|~$&#"']""",
    lambda match: f"&#{ord(match[0])};",
    spell_out(re.sub(r"\s+", " ", text), keep=""),
  )


def _code(text: str) -> str:
  return f"<code>{_escape(text)}</code>"


def _prose(text: str) -> str:
  """A sentence, in which text between backticks becomes code."""
  return "".join(
    _code(part) if i % 2 else _escape(part)
    for i, part in enumerate(split_code(one_line(text)))
  )
