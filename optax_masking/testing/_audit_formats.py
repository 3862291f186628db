"""What an audit found, as text, Markdown, JSON, annotations and a page.

Each format is a function of an `Audit`. What it returns ends with a newline, or
is empty. Names, messages and sources are data: they are escaped wherever they
go, and no text of theirs ends a line, a cell or an element early.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

from optax_masking.testing._report import CLAUSES, Finding, Report

_COLUMNS = 100
_NAME_COLUMNS = 41  # softmax_cross_entropy_with_integer_labels
# Where the name of a clause is too long to stand above its column.
_HEADINGS = {"clean_arithmetic": "arithmetic"}
_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Such as escape and line breaks.
_SYMBOLS = {"kept": "✓", "broken": "✗", "untried": "·", "unasked": " "}


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
  """

  reports: Mapping[str, Mapping[str, Report]]
  versions: Mapping[str, str]
  new: frozenset[str] | None = None
  gone: tuple[str, ...] = ()
  quick: bool = False

  @property
  def cases(self) -> int:
    """How many results were compared."""
    return sum(_summary(self, target).cases for target in self.reports)

  @property
  def seconds(self) -> float:
    """How long it took."""
    return sum(_summary(self, target).seconds for target in self.reports)


def identify(target: str, name: str, finding: Finding) -> str:
  """The name of a finding in a baseline: the target, the loss and the key."""
  return f"{target}/{name}/{finding.key}"


# What the formats have in common.


class _Summary(NamedTuple):
  """The numbers of one target."""

  losses: int
  clean: int
  findings: int
  new: int | None
  cases: int
  seconds: float


class _Cell(NamedTuple):
  """What became of a clause: a key of `_SYMBOLS`, and why it was not tried."""

  state: str
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Findings of one clause about one argument, told as one."""

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
  def what(self) -> str:
    """The argument, the derivatives and the dtypes."""
    return _join(
      " · ",
      self.first.argument,
      _join(", ", *(_derivative(f) for f in self.findings)),
      _join(", ", *(f.dtype for f in self.findings)),
    )

  @property
  def more(self) -> str:
    """How many findings there are besides the first."""
    return f"and {len(self.findings) - 1:,} more" if self.findings[1:] else ""


def _join(separator: str, *parts: str | None) -> str:
  """Joins what there is, each once."""
  return separator.join(dict.fromkeys(part for part in parts if part))


def _count(number: int, singular: str, plural: str = "") -> str:
  noun = singular if number == 1 else plural or f"{singular}s"
  return f"{number:,} {noun}"


def _losses(number: int) -> str:
  return _count(number, "loss", "losses")


def _derivative(finding: Finding) -> str | None:
  if finding.wrt in (None, finding.argument):
    return finding.derivative
  return f"{finding.derivative or 'derivative'} wrt {finding.wrt}"


def _source(finding: Finding) -> str:
  """The source without the folder in which packages are installed."""
  return re.sub(r"\S*[/\\]site-packages[/\\]", "", finding.source or "")


def _is_new(audit: Audit, target: str, name: str, finding: Finding) -> bool:
  return audit.new is not None and identify(target, name, finding) in audit.new


def _summary(audit: Audit, target: str) -> _Summary:
  reports = audit.reports[target]
  new = [
    _is_new(audit, target, name, finding)
    for name, report in reports.items()
    for finding in report.findings
  ]
  return _Summary(
    losses=len(reports),
    clean=sum(report.ok for report in reports.values()),
    findings=len(new),
    new=None if audit.new is None else sum(new),
    cases=sum(report.cases for report in reports.values()),
    seconds=sum(report.seconds for report in reports.values()),
  )


def _cells(report: Report) -> dict[str, _Cell]:
  """What became of each clause."""
  broken = {finding.clause for finding in report.findings}
  cells = {}
  for clause in CLAUSES:
    told = report.clauses.get(clause)
    if clause in broken or told == "broken":
      cells[clause] = _Cell("broken")
    elif told == "kept":
      cells[clause] = _Cell("kept")
    elif told is None:
      cells[clause] = _Cell("unasked")
    else:
      cells[clause] = _Cell("untried", told)
  return cells


def _reasons(
  reports: Mapping[str, Report],
) -> dict[str, list[tuple[str, str]]]:
  """Why clauses were not tried: the losses and clauses by reason."""
  found = collections.defaultdict(list)
  for name, report in reports.items():
    for clause, cell in _cells(report).items():
      if cell.state == "untried":
        found[cell.reason].append((name, clause))
  return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def _entries(
  audit: Audit, target: str, name: str, by_source: bool = False
) -> list[_Entry]:
  """The findings of a loss: new ones first, then in the order of clauses."""
  groups = collections.defaultdict(list)
  for finding in audit.reports[target][name].findings:
    known = not _is_new(audit, target, name, finding)
    source = finding.source if by_source else None
    groups[known, finding.clause, finding.argument, source].append(finding)
  order = list(CLAUSES)
  return [
    _Entry(name, tuple(groups[key]), not key[0])
    for key in sorted(groups, key=lambda key: (key[0], order.index(key[1])))
  ]


def _broken(
  audit: Audit, target: str
) -> Iterator[tuple[list[str], list[_Entry]]]:
  """The losses with findings, those together that have the same ones."""
  groups = collections.defaultdict(list)
  for name in audit.reports[target]:
    entries = _entries(audit, target, name)
    if entries:
      alike = tuple(
        (e.first.clause, e.what, e.more, e.message, e.first.source, e.new)
        for e in entries
      )
      groups[alike].append((name, entries))
  for group in groups.values():
    yield [name for name, _ in group], group[0][1]


def _visible(text: str, keep: str = "\n\t") -> str:
  """Text in which characters that steer a terminal are spelled out."""
  return "".join(
    ascii(c)[1:-1]
    if unicodedata.category(c) in _STEERING and c not in keep
    else c
    for c in text
  )


def _line(text: str) -> str:
  """The text as one visible line."""
  return _visible(" ".join(text.split()), keep="")


def _shortened(text: str, length: int) -> str:
  return textwrap.shorten(text, length, placeholder=" …")


def _rich(text: str, plain: Callable[[str], str]) -> str:
  """Escapes text for HTML; what is between backticks is code."""
  parts = re.split(r"`([^`\n]+)`", text)
  return "".join(
    f"<code>{plain(part)}</code>" if i % 2 else plain(part)
    for i, part in enumerate(parts)
  )


# Text.


def text(audit: Audit, color: bool = False) -> str:
  """A table of losses and clauses, sums, and what breaks the clauses.

  No line has more than 100 columns.

  Args:
    audit: What was found.
    color: Whether to colour it for a terminal.
  """

  def paint(line: str, style: str) -> str:
    return f"\x1b[{style}m{line}\x1b[0m" if color and line.strip() else line

  red, green, dim, bold = "31", "32", "2", "1"
  kind = "Quick audit" if audit.quick else "Audit"
  versions = ", ".join(f"{k} {v}" for k, v in audit.versions.items())
  lines = [paint(f"{kind} of the mask contract", bold)]
  lines += [paint(line, dim) for line in _wrap(versions)]

  shades = {"kept": green, "broken": f"{bold};{red}", "untried": dim}
  for targets in _side_by_side(audit):
    lines += ["", *_table(audit, targets, paint, shades)]
  told = {"kept": "kept", "broken": "broken", "untried": "not tried"}
  lines += [
    "",
    "   ".join(
      f"{paint(_SYMBOLS[state], shades[state])} {word}"
      for state, word in told.items()
    ),
    "",
  ]

  for target in audit.reports:
    lines += _sums(audit, target, paint)
  if audit.gone:
    lines += ["", f"No longer found, of the baseline: {len(audit.gone):,}"]
    for key in audit.gone:
      lines += _wrap(key, "  ", "    ")

  for target in audit.reports:
    for names, entries in _broken(audit, target):
      heading = f"{target}: {', '.join(names)}"
      lines += ["", *(paint(line, bold) for line in _wrap(heading))]
      for entry in entries:
        mark = f"✗ {entry.first.clause}"
        first, *rest = _described(entry, mark)
        lines += [first.replace(mark, paint(mark, red), 1), *rest]
  return "\n".join(line.rstrip() for line in lines).rstrip("\n") + "\n"


def _reason_at(reason: str, places: Sequence[tuple[str, str]]) -> str:
  """A reason, with the clause if it is of one alone."""
  clauses = {clause for _, clause in places}
  return f"{clauses.pop()}: {reason}" if len(clauses) == 1 else reason


def _sums(
  audit: Audit, target: str, paint: Callable[[str, str], str]
) -> Iterator[str]:
  """The numbers of a target, and why clauses were not tried."""
  s = _summary(audit, target)
  found = _count(s.findings, "finding")
  found += "" if s.new is None else f" ({s.new:,} new)"
  for line in _wrap(
    f"{target}: {s.clean:,} of {_losses(s.losses)} clean, {found},"
    f" {_count(s.cases, 'case')}, {s.seconds:,.1f} s",
    subsequent="  ",
  ):
    yield paint(line, "32" if s.clean == s.losses else "31")
  reasons = _reasons(audit.reports[target])
  shown = [
    f"{_reason_at(reason, at)} ({len(at):,})" for reason, at in reasons.items()
  ][:5]
  if len(reasons) > 5:
    shown.append(_count(len(reasons) - 5, "other reason"))
  if shown:
    for line in _wrap(f"not tried: {'; '.join(shown)}", "  ", "    "):
      yield paint(line, "2")


def _described(entry: _Entry, mark: str) -> list[str]:
  """What was found, where, and the line at fault."""
  new = "new" if entry.new else None
  head = _join(" · ", mark, new, entry.what, entry.more)
  source = _source(entry.first) and f"at {_source(entry.first)}"
  if source and len(f"  {head} · {source}") <= _COLUMNS:
    head, source = f"{head} · {source}", ""
  lines = _wrap(head, "  ", "    ")
  lines += _wrap(entry.message, "    ", "    ", most=2)
  return lines + (_wrap(source, "    ", "    ") if source else [])


def _wrap(
  line: str, initial: str = "", subsequent: str = "", most: int | None = None
) -> list[str]:
  """Wraps a paragraph, and cuts it after so many lines."""
  return textwrap.wrap(
    _line(line),
    _COLUMNS,
    initial_indent=initial,
    subsequent_indent=subsequent,
    break_on_hyphens=False,
    max_lines=most,
    placeholder=" …",
  ) or [""]


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
  most = max(1, (_COLUMNS - _NAME_COLUMNS - 1) // _stride())
  return [
    table[i : i + most] for table in tables for i in range(0, len(table), most)
  ]


def _heading(clause: str) -> str:
  return _HEADINGS.get(clause, clause)


def _stride() -> int:
  """Columns of a target: the headings climb above each other to the right."""
  return 1 + max(2 * i + len(_heading(c)) for i, c in enumerate(CLAUSES))


def _table(
  audit: Audit,
  targets: Sequence[str],
  paint: Callable[[str, str], str],
  shades: Mapping[str, str],
) -> Iterator[str]:
  """One line a loss, one block of cells a target."""
  stride = _stride()
  names = list(dict.fromkeys(n for t in targets for n in audit.reports[t]))
  width = min(_NAME_COLUMNS, max((len(_line(n)) for n in names), default=0)) + 2

  def row(name: str, blocks: Iterable[str]) -> str:
    return f"{name:{width}}" + "".join(blocks)

  def pad(block: str, length: int) -> str:
    return block + " " * (stride - length)

  def cut(target: str) -> str:
    line = _line(target)
    return line if len(line) < stride else f"{line[: stride - 2]}…"

  yield row("", (pad(paint(cut(t), "1"), len(cut(t))) for t in targets))
  for i, clause in enumerate(CLAUSES):
    heading = "│ " * i + _heading(clause)
    yield row("", (pad(paint(heading, "2"), len(heading)) for _ in targets))
  for name in names:
    blocks = []
    for target in targets:
      report = audit.reports[target].get(name)
      if report is None:
        blocks.append(pad("no such loss", 12))
        continue
      cells = [
        paint(_SYMBOLS[cell.state], shades.get(cell.state, ""))
        for cell in _cells(report).values()
      ]
      blocks.append(pad(" ".join(cells), 2 * len(cells) - 1))
    shown = _line(name)
    if len(shown) > width - 2:
      yield from _wrap(shown)
      shown = ""
    yield row(shown, blocks)


# Markdown.


def markdown(audit: Audit) -> str:
  """A table for each target, for a comment or the summary of a workflow.

  What breaks the clauses is folded up below.
  """
  kind = "quick audit" if audit.quick else "audit"
  lines = [f"## Mask contract: {kind}", ""]
  versions = [f"{_md(k)} {_md(v)}" for k, v in audit.versions.items()]
  lines += [" · ".join(versions), ""] if versions else []
  heads = ["target", "clean losses", "findings", "cases", "seconds"]
  if audit.new is not None:
    heads.insert(3, "new")
  lines += [_row(heads), _row([":--"] + ["--:"] * (len(heads) - 1))]
  for target in audit.reports:
    s = _summary(audit, target)
    numbers = [f"{s.clean:,} of {s.losses:,}", f"{s.findings:,}"]
    numbers += [] if s.new is None else [f"{s.new:,}"]
    numbers += [f"{s.cases:,}", f"{s.seconds:,.1f}"]
    lines.append(_row([_md_code(target), *numbers]))

  for word, keys in (("New", sorted(audit.new or ())), ("Gone", audit.gone)):
    if keys:
      lines += ["", f"**{word} against the baseline ({len(keys):,})**", ""]
      lines += [f"- {_md_code(key)}" for key in keys]

  signs = {"kept": "✅", "broken": "❌", "untried": "·", "unasked": " "}
  for target, reports in audit.reports.items():
    lines += ["", f"### {_md_code(target)}", ""]
    clauses = [_md(clause.replace("_", " ")) for clause in CLAUSES]
    lines += [_row(["loss", *clauses]), _row([":--"] + [":-:"] * len(clauses))]
    for name, report in reports.items():
      cells = [signs[cell.state] for cell in _cells(report).values()]
      lines.append(_row([_md_code(name), *cells]))
    lines.append("")
    for names, entries in _broken(audit, target):
      lines += _folded(
        f"{', '.join(map(_md_code, names))}: "
        + _count(sum(len(e.findings) for e in entries), "finding")
        + (" each" if len(names) > 1 else ""),
        [_item(entry) for entry in entries],
      )
    reasons = _reasons(reports)
    if reasons:
      lines += _folded(
        "Not tried",
        [
          f"- {_rich(_line(reason), _md)}: {_md(_places(places))}"
          for reason, places in reasons.items()
        ],
      )
  legend = [f"- **{_md(c)}**: {_md(told)}" for c, told in CLAUSES.items()]
  lines += [
    "",
    *_folded("✅ kept, ❌ broken, · not tried: the clauses", legend),
  ]
  return "\n".join(lines).rstrip("\n") + "\n"


def _md(text: str) -> str:
  """Text in which no character is markup, neither of Markdown nor of HTML."""
  return re.sub(
    r"""[\\`*_\[\]<>|~$&#"']""",
    lambda match: f"&#{ord(match[0])};",
    _visible(re.sub(r"\s+", " ", text), keep=""),
  )


def _md_code(text: str) -> str:
  return f"<code>{_md(text)}</code>"


def _row(cells: Iterable[str]) -> str:
  return "| " + " | ".join(cells) + " |"


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
  head = f"<details><summary>{summary}</summary>"
  return [head, "", *lines, "", "</details>", ""]


def _item(entry: _Entry) -> str:
  first = entry.first
  where = f"at {_md_code(_source(first))}" if first.source else ""
  new = "**new**" if entry.new else ""
  head = _join(" · ", f"**{_md(first.clause)}**", _md(entry.what), where, new)
  message = _rich(_line(entry.message), _md)
  return f"- {head}<br>{_join(' · ', message, entry.more)}"


def _places(places: Sequence[tuple[str, str]]) -> str:
  """The losses at which a clause was not tried."""
  by_clauses = collections.defaultdict(list)
  clauses_of = collections.defaultdict(list)
  for name, clause in places:
    clauses_of[name].append(clause)
  for name, clauses in clauses_of.items():
    by_clauses[tuple(clauses)].append(name)
  return "; ".join(
    f"{', '.join(clauses)} of {', '.join(names)}"
    for clauses, names in by_clauses.items()
  )


# JSON.


def json_text(audit: Audit) -> str:
  """One JSON object, for programs.

  Numbers that JSON does not have, such as NaN, are strings in it. Its keys:

    schema: 1, the version of this format. It grows if a key changes or goes; a
      program must ignore keys that it does not know.
    versions: The versions of the packages involved, by name.
    quick: Whether only part of the masks, dtypes and derivatives was tried.
    targets: For each target, its losses by name. Of each loss:
      name: The name of the loss.
      ok: Whether nothing was found.
      cases: How many results were compared.
      seconds: How long it took.
      data: The dtypes and shapes that the loss was called with.
      clauses: For each clause that was asked for, "kept", "broken", or why it
        could not be tried on this loss.
      findings: What breaks the contract, a list. Of each finding, null where
        it does not apply:
        key: The clause, `argument`, `derivative`, `wrt` and `dtype`, with a
          slash between them and "-" for null. It stays the same while the
          finding is known but not mended.
        clause: The clause, a key of `clauses`.
        message: What was found, in a sentence with the numbers.
        argument: Name of the argument at fault.
        element: Index of the element of `argument`, a list.
        mask: The mask that was tried, in words.
        where: The same mask, as nested lists of booleans.
        poison: What the masked element held.
        derivative: "value", "vjp", "jvp" or "hessian".
        wrt: With respect to which argument the derivative is.
        transform: "eager", "jit" or "vmap".
        dtype: The dtype of the floating arguments.
        got: The number that came out, or the error: a string.
        expected: The number that was expected, a string.
        primitive: The operation of JAX in which the wrong number arose.
        source: The line that called it, as "file.py:12 in function".
        code: The text of that line.
        cases: How many of the tried cases fail in this way.
    new: The findings that the baseline does not have, a sorted list of
      "TARGET/LOSS/KEY". null without a baseline.
    gone: The findings of the baseline that were not made, a list of the same.
    summary: The numbers of each target, by its name:
      losses: How many losses it has.
      clean: About how many of them nothing was found.
      findings: How many findings were made.
      new: How many of them are new, null without a baseline.
      cases: How many results were compared.
      seconds: How long it took.
  """
  told = {
    "schema": 1,
    "versions": dict(audit.versions),
    "quick": audit.quick,
    "targets": {
      target: {name: report.to_dict() for name, report in reports.items()}
      for target, reports in audit.reports.items()
    },
    "new": None if audit.new is None else sorted(audit.new),
    "gone": list(audit.gone),
    "summary": {
      target: {
        **(s := _summary(audit, target))._asdict(),
        "seconds": round(s.seconds, 3),
      }
      for target in audit.reports
    },
  }
  return json.dumps(_plain(told), indent=2, allow_nan=False) + "\n"


def _plain(x: Any) -> Any:
  """The same of types that JSON has."""
  if isinstance(x, Mapping):
    return {str(key): _plain(value) for key, value in x.items()}
  if isinstance(x, list | tuple):
    return [_plain(value) for value in x]
  if hasattr(x, "tolist"):
    return _plain(x.tolist())
  if isinstance(x, float) and not math.isfinite(x):
    return str(x)
  return x if x is None or isinstance(x, bool | int | float | str) else str(x)


# Annotations of a workflow.


def github(audit: Audit) -> str:
  """Workflow commands that annotate the lines at fault.

  Findings are errors; those that a baseline knows, and what is gone from it,
  are notices. Errors come first, since GitHub shows but the first ten.
  """
  errors: list[str] = []
  notices: list[str] = []
  for target in audit.reports:
    for name in audit.reports[target]:
      for entry in _entries(audit, target, name, by_source=True):
        error = audit.new is None or entry.new
        kind = "error" if error else "notice"
        line = _annotation(kind, target, name, entry)
        (errors if error else notices).append(line)
  if audit.gone:
    title = _property("No longer found, of the baseline")
    notices.append(f"::notice title={title}::{_data(chr(10).join(audit.gone))}")
  return "".join(f"{line}\n" for line in errors + notices)


def _annotation(kind: str, target: str, name: str, entry: _Entry) -> str:
  first = entry.first
  properties = {"title": f"{target} {name}: {first.clause}"}
  place = re.match(r"(.+?):(\d+)(?= in |, |$)", first.source or "")
  if place:
    file, number = place.groups()
    properties = {"file": _relative(file), "line": number, **properties}
  told = ",".join(f"{k}={_property(v)}" for k, v in properties.items())
  lines = [first.message, _join(" · ", entry.what, entry.more)]
  lines.append(f"{first.clause}: {CLAUSES[first.clause]}")
  return f"::{kind} {told}::{_data(chr(10).join(filter(None, lines)))}"


def _relative(file: str) -> str:
  """The path from the working directory, if it is below."""
  path = pathlib.Path(os.path.abspath(file))
  here = pathlib.Path.cwd()
  if path.is_relative_to(here):
    return path.relative_to(here).as_posix()
  return pathlib.Path(file).as_posix()


def _data(text: str) -> str:
  text = _visible(text, keep="\n\r\t").replace("%", "%25")
  return text.replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
  return _data(text).replace(":", "%3A").replace(",", "%2C")


# The page.

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f4; --card: #ffffff; --ink: #20242c; --soft: #5b6472;
  --line: #e2e3dd; --wash: #f0f1ec; --link: #2456a8;
  --good: #2b7a4b; --good-wash: #dcefe2;
  --bad: #a8261b; --bad-wash: #fbe3df; --bad-line: #eab8b0;
  --new: #7a4b00; --new-wash: #fdecc8;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
    monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1b1f25; --ink: #e3e6ea; --soft: #9aa4b1;
    --line: #2d333b; --wash: #22272e; --link: #8db4f5;
    --good: #79c79a; --good-wash: #1d3a2a;
    --bad: #ff9d90; --bad-wash: #43201c; --bad-line: #6d332c;
    --new: #f0c674; --new-wash: #41320f;
  }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem;
  background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
    "Liberation Sans", sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; overflow-wrap: anywhere; }
h1, h2 { font-weight: 650; letter-spacing: -.01em; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0; }
a { color: var(--link); text-underline-offset: .15em; }
:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; border-radius: .25rem;
}
code, pre, .name { font-family: var(--mono); font-size: .875em; }
code { overflow-wrap: anywhere; }
ul { list-style: none; margin: 0; padding: 0; }
.hidden {
  position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap;
}
.soft { color: var(--soft); }
.versions { display: flex; flex-wrap: wrap; gap: 0 1.25rem; }
.versions, .signs { color: var(--soft); font-size: .875rem; }
.cards {
  display: grid; gap: 1rem; margin-top: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
}
.card, .grid, .panel, .clauses, .baseline {
  background: var(--card); border: 1px solid var(--line); border-radius: .75rem;
}
.card { padding: 1rem 1.25rem; }
.card a { font-weight: 600; overflow-wrap: anywhere; }
.card strong { font-size: 2rem; font-weight: 650; letter-spacing: -.02em; }
.bar {
  height: .375rem; margin: .375rem 0 .75rem; border-radius: 1rem;
  background: var(--bad-line); overflow: hidden;
}
.bar span { display: block; height: 100%; background: var(--good); }
.numbers { font-size: .875rem; color: var(--soft); }
.baseline { margin-top: 1rem; padding: 1rem 1.25rem; }
.baseline ul { margin-bottom: .75rem; }
.baseline ul:last-child { margin-bottom: 0; }
.baseline li { overflow-wrap: anywhere; }
.badge {
  display: inline-block; padding: 0 .5em; border-radius: 1em;
  background: var(--new-wash); color: var(--new);
  font-size: .75rem; font-weight: 600; line-height: 1.6;
}
.signs {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-bottom: .75rem;
}
.signs .all { margin-left: auto; }
.close-all { display: none; }
.target:target .close-all { display: inline; }
.target:target .open-all { display: none; }

.grid { width: 100%; border-collapse: separate; border-spacing: 0; }
.grid caption { text-align: left; }
.grid thead th {
  position: sticky; top: 0; z-index: 1; background: var(--card);
  border-bottom: 1px solid var(--line); padding: .625rem .25rem;
  font-size: .75rem; font-weight: 500; line-height: 1.25; width: 6.2%;
  vertical-align: bottom; border-radius: .75rem .75rem 0 0;
}
.grid thead th:first-child { width: auto; text-align: left; }
.grid thead a { color: var(--soft); text-decoration: none; }
.grid thead a:hover { color: var(--link); text-decoration: underline; }
.grid th:first-child { padding-left: 1.25rem; }
.grid thead th:last-child, .grid td:last-child { padding-right: .75rem; }
.grid tbody th {
  text-align: left; font-weight: 400; padding-top: .25rem;
  padding-bottom: .25rem; overflow-wrap: anywhere;
}
.grid td { text-align: center; padding: .1875rem .125rem; }
.grid tbody + tbody .loss > * { border-top: 1px solid var(--wash); }
.loss:hover { background: var(--wash); }
.loss:target .name { font-weight: 650; }
.kept { color: var(--good); }
.untried { color: var(--soft); font-size: .8125rem; }
.grid td.because { text-align: left; padding-left: .75rem; }
.because span { overflow-wrap: anywhere; }
.broken a, .broken > b {
  display: block; min-width: 2rem; padding: .0625rem .25rem;
  border: 1px solid var(--bad-line); border-radius: .375rem;
  background: var(--bad-wash); color: var(--bad); font-size: .875rem;
  font-weight: 600; text-decoration: none; font-variant-numeric: tabular-nums;
}
.broken a:hover { border-color: var(--bad); }
.broken a.new { box-shadow: inset 0 -3px 0 var(--new); }

.detail { display: none; }
.detail:target, .target:target .detail { display: table-row; }
.detail { scroll-margin-top: 7rem; }
.detail:focus { outline: none; }
.grid .detail > td { text-align: left; padding: .5rem 1rem 1rem; }
.panel { background: var(--page); padding: 1rem 1.25rem; }
.panel header { display: flex; gap: 1rem; align-items: baseline; }
.panel header .close { margin-left: auto; font-size: .875rem; }
.finding { margin-top: .75rem; border-top: 1px solid var(--line); }
.finding summary, .alone { padding-top: .75rem; }
.finding summary { cursor: pointer; }
.finding span { overflow-wrap: anywhere; }
.finding .what { color: var(--soft); font-size: .875rem; }
.facts {
  display: grid; grid-template-columns: max-content minmax(0, 1fr);
  gap: .25rem 1.25rem; margin: .5rem 0 0; padding-left: 1rem;
  font-size: .9375rem;
}
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.facts pre {
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
}
.facts .source {
  padding: .375rem .625rem; background: var(--wash); border-radius: .375rem;
}
.facts .mask { line-height: 1.2; white-space: pre; overflow-x: auto; }
mark { background: none; color: var(--bad); }
.mask + span { font-size: .8125rem; }
.wrong { color: var(--bad); font-weight: 600; }
.why { margin-top: .75rem; font-size: .9375rem; }
.why summary { cursor: pointer; color: var(--soft); }
.why li { margin-top: .375rem; padding-left: 1rem; overflow-wrap: anywhere; }
.clauses {
  display: grid; gap: .75rem 2rem; margin: 0; padding: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
}
.clauses dt { font-weight: 600; }
.clauses dd { margin: 0; color: var(--soft); }
.clauses div:target dt { color: var(--link); }

@media (max-width: 56rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .grid, .grid tbody, .grid caption { display: block; }
  .grid thead {
    display: block; position: sticky; top: 0; z-index: 1;
    background: var(--card); border-radius: .75rem;
    border-bottom: 1px solid var(--line);
  }
  .grid thead tr, .loss {
    display: grid; padding: .25rem .5rem;
    grid-template-columns: repeat(var(--clauses), minmax(0, 1fr));
  }
  .grid thead th, .grid thead th:last-child {
    position: static; border: 0; width: auto; padding: .25rem 0;
    display: flex; align-items: end; justify-content: center;
  }
  .grid thead th:first-child {
    position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); padding: 0;
  }
  .grid thead th a { writing-mode: vertical-rl; transform: rotate(180deg); }
  .grid tbody + tbody .loss { border-top: 1px solid var(--line); }
  .grid tbody + tbody .loss > * { border: 0; }
  .grid tbody th {
    grid-column: 1 / -1; padding: .25rem .25rem .125rem !important;
  }
  .grid td, .grid td:last-child {
    grid-column: span var(--span, 1); padding: .125rem; align-self: center;
  }
  .broken a, .broken > b { min-width: 0; padding: .0625rem 0; }
  .detail { scroll-margin-top: 13rem; }
  .detail:target, .target:target .detail { display: block; }
  .grid .detail > td { display: block; padding: .25rem .5rem .75rem; }
  .panel { padding: .75rem; }
  .facts { padding-left: 0; }
}
@media (max-width: 40rem) {
  .broken .number { display: none; }
}
@media (max-width: 30rem) {
  .facts { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .facts dt { font-size: .8125rem; margin-top: .375rem; }
}
@media print {
  body { max-width: none; padding: 0; }
  .detail { display: table-row; }
  .close, .signs .all { display: none; }
}
"""


def html(audit: Audit) -> str:
  """A page of its own, without scripts and without anything to load.

  A grid for each target; a broken cell opens what broke there. The address of
  what is open, as `#optax/cosine_distance/empty`, can be passed on.
  """
  kind = "Quick audit" if audit.quick else "Audit"
  title = f"{kind} of the mask contract"
  versions = "".join(
    f"<li>{_h(name)} {_h(version)}</li>"
    for name, version in audit.versions.items()
  )
  parts = [
    "<!doctype html>",
    '<html lang="en">',
    "<head>",
    '<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'none'; style-src 'unsafe-inline'\">",
    f"<title>{_h(title)}: {_h(', '.join(audit.reports))}</title>",
    f"<style>{_STYLE}</style>",
    "</head>",
    "<body>",
    "<header>",
    f"<h1>{title}</h1>",
    f'<ul class="versions" aria-label="Versions">{versions}</ul>',
    '<ul class="cards" aria-label="Targets">',
    *(_card(audit, target) for target in audit.reports),
    "</ul>",
    *_baseline(audit),
    "</header>",
    "<main>",
  ]
  for target in audit.reports:
    parts += _section(audit, target)
  parts += [
    '<section aria-labelledby="-clauses">',
    '<h2 id="-clauses">The clauses</h2>',
    '<dl class="clauses">',
    *(
      f'<div id="{_id("-clause", clause)}"><dt>{_h(_words(clause))}</dt>'
      f"<dd>{_h(told)}</dd></div>"
      for clause, told in CLAUSES.items()
    ),
    "</dl>",
    "</section>",
    "</main>",
    "</body>",
    "</html>",
  ]
  return "\n".join(parts) + "\n"


def _h(text: str) -> str:
  return escape(_visible(text.replace("\r\n", "\n")))


def _words(clause: str) -> str:
  return clause.replace("_", " ")


def _id(*parts: str) -> str:
  """An id that is also the fragment of an address."""
  return "/".join(quote(_visible(part), safe=":") for part in parts)


def _hidden(told: str) -> str:
  return f'<span class="hidden">{told}</span>'


def _badge(new: bool) -> str:
  return ' <span class="badge">new</span>' if new else ""


def _card(audit: Audit, target: str) -> str:
  s = _summary(audit, target)
  share = 100 * s.clean / s.losses if s.losses else 100
  new = "" if s.new is None else f" ({s.new:,} new)"
  return (
    f'<li class="card"><a href="#{_id(target)}">{_h(target)}</a>'
    f"<p><strong>{s.clean:,}</strong> of {_losses(s.losses)} clean</p>"
    f'<div class="bar" aria-hidden="true">'
    f'<span style="width:{share:.1f}%"></span></div>'
    f'<p class="numbers">{_count(s.findings, "finding")}{new}'
    f" · {_count(s.cases, 'case')} · {s.seconds:,.1f}&nbsp;s</p></li>"
  )


def _baseline(audit: Audit) -> Iterator[str]:
  """What is new and what is gone."""
  if audit.new is None and not audit.gone:
    return
  links = {
    identify(target, name, finding): _id(target, name, finding.clause)
    for target, reports in audit.reports.items()
    for name, report in reports.items()
    for finding in report.findings
  }
  yield '<section class="baseline" aria-label="Against the baseline">'
  new = sorted(audit.new or ())
  if not new and not audit.gone:
    yield "<p>Nothing new and nothing gone against the baseline.</p>"
  for told, keys in (("new", new), ("no longer found", audit.gone)):
    if not keys:
      continue
    yield f"<h3>{len(keys):,} {told}, against the baseline</h3>"
    yield "<ul>"
    for key in keys:
      shown = f"<code>{_h(key)}</code>"
      if key in links:
        shown = f'<a href="#{links[key]}">{shown}</a>'
      yield f"<li>{shown}</li>"
    yield "</ul>"
  yield "</section>"


def _section(audit: Audit, target: str) -> Iterator[str]:
  """The grid of a target."""
  reports = audit.reports[target]
  yield f'<section class="target" id="{_id("-all", target)}">'
  yield f'<h2 id="{_id(target)}">{_h(target)}</h2>'
  yield '<p class="signs"><span><b class="kept">✓</b> kept</span>'
  yield '<span><b class="wrong">✗</b> broken, number of findings</span>'
  yield "<span>· not tried</span>"
  if _summary(audit, target).new:
    yield "<span><u>✗</u> some are new</span>"
  if any(not report.ok for report in reports.values()):
    yield (
      f'<a class="all open-all" href="#{_id("-all", target)}">Open all findings'
      f'</a><a class="all close-all" href="#{_id(target)}">Close all</a>'
    )
  yield "</p>"
  yield (
    f'<table class="grid" role="table" style="--clauses:{len(CLAUSES)}">'
    f'<caption class="hidden">The losses of {_h(target)} and the clauses of'
    " the mask contract</caption>"
  )
  yield '<thead role="rowgroup"><tr role="row">'
  yield '<th scope="col" role="columnheader">loss</th>'
  for clause, told in CLAUSES.items():
    yield (
      f'<th scope="col" role="columnheader"><a title="{_h(told)}"'
      f' href="#{_id("-clause", clause)}">{_h(_words(clause))}</a></th>'
    )
  yield "</tr></thead>"
  for name in reports:
    yield '<tbody role="rowgroup">'
    row = _id(target, name)
    yield f'<tr class="loss" role="row" id="{row}">'
    yield f'<th scope="row" role="rowheader" class="name">{_h(name)}</th>'
    yield from _grid_cells(audit, target, name)
    yield "</tr>"
    for clause in CLAUSES:
      yield from _detail(audit, target, name, clause)
    yield "</tbody>"
  yield "</table>"
  reasons = _reasons(reports)
  if reasons:
    yield '<details class="why"><summary>Why clauses were not tried</summary>'
    yield "<ul>"
    for reason, places in reasons.items():
      at = f'<span class="soft">{_h(_places(places))}</span>'
      yield f"<li>{_rich(reason, _h)}: {at}</li>"
    yield "</ul></details>"
  yield "</section>"


def _grid_cells(audit: Audit, target: str, name: str) -> Iterator[str]:
  """The cells of a loss; several not tried for one reason are one cell."""
  report = audit.reports[target][name]
  cells = list(_cells(report).items())
  while cells:
    clause, cell = cells[0]
    run = 1
    while cell.reason and run < len(cells) and cells[run][1] == cell:
      run += 1
    run = run if run > 2 else 1
    del cells[:run]
    found = [f for f in report.findings if f.clause == clause]
    inside = ""
    if found:
      new = any(_is_new(audit, target, name, f) for f in found)
      inside = (
        f'<a href="#{_id(target, name, clause)}"{" class=new" if new else ""}>'
        f'<span aria-hidden="true">✗<span class="number"> {len(found):,}'
        "</span></span>"
        + _hidden(
          f"{_h(_words(clause))} broken: {_count(len(found), 'finding')}"
          + (", some new" if new else "")
        )
        + "</a>"
      )
    elif cell.state == "broken":
      inside = f"<b>✗{_hidden('broken')}</b>"
    elif cell.state == "kept":
      inside = f'<span aria-hidden="true">✓</span>{_hidden("kept")}'
    elif cell.state == "unasked":
      inside = _hidden("not asked for")
    elif run > 1:
      inside = (
        f"<span>{_rich(_shortened(cell.reason, 72), _h)}"
        f"{_hidden(': not tried')}</span>"
      )
    else:
      inside = f'<span aria-hidden="true" title="{_h(cell.reason)}">·</span>'
      inside += _hidden(f"not tried: {_h(cell.reason)}")
    wide = f' colspan="{run}" style="--span:{run}"' if run > 1 else ""
    kind = f"{cell.state} because" if run > 1 else cell.state
    yield f'<td role="cell" class="{kind}"{wide}>{inside}</td>'


def _detail(audit: Audit, target: str, name: str, clause: str) -> Iterator[str]:
  """The row that a broken cell opens."""
  found = [
    f for f in audit.reports[target][name].findings if f.clause == clause
  ]
  if not found:
    return
  found.sort(key=lambda f: not _is_new(audit, target, name, f))
  yield (
    f'<tr class="detail" role="row" id="{_id(target, name, clause)}"'
    f' tabindex="-1"><td role="cell" colspan="{1 + len(CLAUSES)}">'
    '<div class="panel"><header>'
    f'<h3><span class="name">{_h(name)}</span>: {_h(_words(clause))}</h3>'
    f'<a class="close" href="#{_id(target, name)}">Close</a></header>'
    f'<p class="soft">{_h(CLAUSES[clause])}</p>'
  )
  for i, finding in enumerate(found):
    new = _is_new(audit, target, name, finding)
    yield _finding(finding, new, is_open=i == 0 or len(found) < 4)
  yield "</div></td></tr>"


def _finding(finding: Finding, new: bool, is_open: bool) -> str:
  message = finding.message.strip()
  short = _shortened(message, 240)
  long = short != " ".join(message.split()) or "\n" in message
  what = _join(
    " · ",
    finding.argument,
    _derivative(finding),
    finding.transform,
    finding.dtype,
  )
  facts = {
    "message": f"<pre>{_h(message)}</pre>"
    if long and message != (finding.got or "").strip()
    else "",
    "got": f'<pre class="wrong">{_h(finding.got)}</pre>' if finding.got else "",
    "expected": f"<pre>{_h(finding.expected)}</pre>"
    if finding.expected
    else "",
    "argument": f"<code>{_h(finding.argument)}</code>"
    + (f" at {_h(str(list(finding.element)))}" if finding.element else "")
    if finding.argument
    else "",
    "mask": _h(finding.mask or ""),
    "where": _drawing(finding.where, finding.element),
    "held": f"<code>{_h(finding.poison)}</code>" if finding.poison else "",
    "arose in": _h(finding.primitive or ""),
    "at": f"<code>{_h(_source(finding))}</code>" if finding.source else "",
    "code": f'<pre class="source">{_h(finding.code)}</pre>'
    if finding.code
    else "",
    "cases": f"{finding.cases:,} fail in this way" if finding.cases > 1 else "",
  }
  rows = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items() if v)
  head = (
    f"<span>{_rich(short, _h)}</span>{_badge(new)}"
    f' <span class="what">{_h(what)}</span>'
  )
  if not rows:
    return f'<p class="finding alone">{head}</p>'
  return (
    f'<details class="finding"{" open" if is_open else ""}>'
    f'<summary>{head}</summary><dl class="facts">{rows}</dl></details>'
  )


def _drawing(where: Any, element: tuple[int, ...] | None) -> str:
  """A small mask, drawn: matrices below each other, the element marked."""
  rows = _rows(where, ())
  if rows is None or not 1 < sum(map(len, rows)) <= 400:
    return ""
  signs = {True: "■", False: "□"}
  marks = {True: "<mark>◆</mark>", False: "<mark>◇</mark>"}
  lines: list[str] = []
  last = rows[0][0][0][:-2]
  for row in rows:
    matrix = row[0][0][:-2]
    if matrix != last:
      lines.append("")
    last = matrix
    lines.append(
      " ".join((marks if i == element else signs)[value] for i, value in row)
    )
  flat = [value for row in rows for _, value in row]
  marked = [marks[value] for row in rows for i, value in row if i == element]
  told = f"{sum(flat):,} of {len(flat):,} elements included"
  key = "■ included □ masked" + "".join(f" {m} this element" for m in marked)
  return (
    f'<pre class="mask" role="img" aria-label="{told}">'
    + "\n".join(lines)
    + f'</pre><span class="soft">{key}</span>'
  )


def _rows(
  where: Any, index: tuple[int, ...]
) -> list[list[tuple[tuple[int, ...], bool]]] | None:
  """The rows of nested lists of booleans, with the index of each; or None."""
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
