"""An audit as text, for a terminal or a log."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from optax_masking.testing._audit_formats._common import (
  Audit,
  FindingGroup,
  clause_statuses,
  count,
  describe_known,
  join_unique,
  notes_of_losses,
  one_line,
  short_source,
  untried_by_reason,
)
from optax_masking.testing._report import CLAUSES

Paint = Callable[[str, str], str]  # Colours a line.

_COLUMNS = 100
_NAME_COLUMNS = 41  # softmax_cross_entropy_with_integer_labels
# Where the name of a clause is too long to stand above its column.
_HEADINGS = {"clean_arithmetic": "arithmetic"}
_SYMBOLS = {
  "kept": "✓",
  "broken": "✗",
  "untried": "·",
  "inapplicable": " ",
  "unasked": " ",
}
_LEGEND = {"kept": "kept", "broken": "broken", "untried": "not tried"}
_BLANK = "blank: does not apply, or was left out"

# Parameters of the control sequence that sets colours.
_BOLD, _DIM, _RED, _GREEN = "1", "2", "31", "32"
_SHADES = {"kept": _GREEN, "broken": f"{_BOLD};{_RED}", "untried": _DIM}


def text(audit: Audit, color: bool = False) -> str:
  """A table of losses and clauses, sums, and what breaks the clauses.

  No line has more than 100 columns.

  Args:
    audit: What was found.
    color: Whether to colour it for a terminal.
  """

  def paint(line: str, style: str) -> str:
    return f"\x1b[{style}m{line}\x1b[0m" if color and line.strip() else line

  versions = ", ".join(f"{k} {v}" for k, v in audit.versions.items())
  lines = [paint(audit.title, _BOLD)]
  if audit.seconds is not None:
    lines[0] += f", {audit.seconds:,.1f} s"
  lines += [paint(line, _DIM) for line in _wrap(versions)]
  for targets in _side_by_side(audit):
    lines += ["", *_table(audit, targets, paint)]
  legend = [
    f"{paint(_SYMBOLS[status], _SHADES[status])} {word}"
    for status, word in _LEGEND.items()
  ]
  blank = {"inapplicable", "unasked"} & {
    status
    for reports in audit.reports.values()
    for report in reports.values()
    for status, _ in clause_statuses(report).values()
  }
  legend += [_BLANK] if blank else []
  lines += ["", "   ".join(legend), ""]
  for target in audit.reports:
    lines += _summary_lines(audit, target, paint)
  if audit.gone:
    lines += ["", f"No longer found, of the baseline: {len(audit.gone):,}"]
    for key in audit.gone:
      lines += _wrap(key, "  ", "    ")
  for target in audit.reports:
    lines += _finding_lines(audit, target, paint)
  return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"


def _wrap(
  line: str, initial: str = "", subsequent: str = "", most: int | None = None
) -> list[str]:
  """Wraps a paragraph, and cuts it after so many lines."""
  return textwrap.wrap(
    one_line(line),
    _COLUMNS,
    initial_indent=initial,
    subsequent_indent=subsequent,
    break_on_hyphens=False,
    max_lines=most,
    placeholder=" …",
  ) or [""]


# The table.


def _side_by_side(audit: Audit) -> list[list[str]]:
  """The targets of each table: together if they share losses."""
  tables: list[list[str]] = []
  for target, reports in audit.reports.items():
    for table in tables:
      if any(set(reports) & set(audit.reports[other]) for other in table):
        table.append(target)
        break
    else:
      tables.append([target])
  most = max(1, (_COLUMNS - _NAME_COLUMNS - 1) // _target_columns())
  return [
    table[i : i + most] for table in tables for i in range(0, len(table), most)
  ]


def _target_columns() -> int:
  """Columns of a target, whose headings climb above each other to the right."""
  return 1 + max(2 * i + len(_heading(c)) for i, c in enumerate(CLAUSES))


def _heading(clause: str) -> str:
  return _HEADINGS.get(clause, clause)


def _table(audit: Audit, targets: Sequence[str], paint: Paint) -> Iterator[str]:
  """One line for each loss, one block of cells for each target."""
  columns = _target_columns()
  names = list(dict.fromkeys(n for t in targets for n in audit.reports[t]))
  longest = max((len(one_line(name)) for name in names), default=0)
  width = min(_NAME_COLUMNS, longest)

  def row(name: str, blocks: Iterable[tuple[str, int]]) -> str:
    """The blocks come with their lengths, to which colours do not add."""
    padded = (block + " " * (columns - length) for block, length in blocks)
    return f"{name:{width + 2}}" + "".join(padded)

  titles = [_cut(one_line(target), columns - 1) for target in targets]
  yield row("", [(paint(title, _BOLD), len(title)) for title in titles])
  for i, clause in enumerate(CLAUSES):
    heading = "│ " * i + _heading(clause)
    yield row("", [(paint(heading, _DIM), len(heading))] * len(targets))
  for name in names:
    shown = one_line(name)
    if len(shown) > width:
      yield from _wrap(shown)
      shown = ""
    yield row(shown, [_cells(audit, target, name, paint) for target in targets])


def _cut(line: str, length: int) -> str:
  return line if len(line) <= length else f"{line[: length - 1]}…"


def _cells(
  audit: Audit, target: str, name: str, paint: Paint
) -> tuple[str, int]:
  """The cells of a loss, and their length without colours."""
  report = audit.reports[target].get(name)
  if report is None:
    missing = "no such loss"
    return missing, len(missing)
  cells = [
    paint(_SYMBOLS[status], _SHADES.get(status, ""))
    for status, _ in clause_statuses(report).values()
  ]
  return " ".join(cells), 2 * len(cells) - 1


# Below the table.


def _summary_lines(audit: Audit, target: str, paint: Paint) -> Iterator[str]:
  """The numbers of a target, and why clauses were not tried."""
  numbers = audit.summary(target)
  for line in _wrap(
    f"{target}: {numbers.losses_in_words}, {numbers.findings_in_words},"
    f" {count(numbers.cases, 'case')}",
    subsequent="  ",
  ):
    yield paint(line, _GREEN if numbers.clean == numbers.losses else _RED)
  reasons = untried_by_reason(audit.reports[target])
  shown = [_untried(reason, untried) for reason, untried in reasons.items()][:5]
  if len(reasons) > 5:
    shown.append(count(len(reasons) - 5, "other reason"))
  if shown:
    for line in _wrap(f"not tried: {'; '.join(shown)}", "  ", "    "):
      yield paint(line, _DIM)

  for note, names in notes_of_losses(audit.reports[target]).items():
    for line in _wrap(f"note on {', '.join(names)}: {note}", "  ", "    "):
      yield paint(line, _DIM)


def _untried(reason: str, untried: Sequence[tuple[str, str]]) -> str:
  """A reason, with the clause if it is of one alone, and how often it is."""
  clauses = {clause for _, clause in untried}
  clause = f"{clauses.pop()}: " if len(clauses) == 1 else ""
  return f"{clause}{reason} ({len(untried):,})"


def _finding_lines(audit: Audit, target: str, paint: Paint) -> Iterator[str]:
  """What was found about the losses of a target."""
  for names, groups in audit.losses_by_findings(target):
    yield ""
    for line in _wrap(f"{target}: {', '.join(names)}"):
      yield paint(line, _BOLD)
    for group in groups:
      mark = f"✗ {group.first.clause}"
      first, *rest = _group_lines(group, mark)
      yield first.replace(mark, paint(mark, _RED), 1)
      yield from rest
  known = audit.summary(target).known
  if known:
    yield ""
    yield from _wrap(f"{target}: {describe_known(known)}", subsequent="  ")


def _group_lines(group: FindingGroup, mark: str) -> list[str]:
  """What was found, where, and the line at fault."""
  new = "new" if group.new else None
  head = join_unique(" · ", mark, new, group.circumstances, group.others)
  source = short_source(group.first) and f"at {short_source(group.first)}"
  if source and len(f"  {head} · {source}") <= _COLUMNS:
    head, source = f"{head} · {source}", ""
  lines = _wrap(head, "  ", "    ")
  most = None if group.new else 2
  lines += _wrap(group.message, "    ", "    ", most)
  return lines + (_wrap(source, "    ", "    ") if source else [])
