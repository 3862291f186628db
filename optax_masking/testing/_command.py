"""The command `audit`."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import optax_masking
from optax_masking._output import (
  CommandError,
  UsageError,
  check_writable,
  write,
)
from optax_masking.testing import Report, _audit, _audit_formats

FORMATS = ("text", "markdown", "json", "github", "html")


Reports = dict[str, dict[str, Report]]


def add_commands(commands: Any) -> None:
  parser = commands.add_parser(
    "audit",
    help="check losses for NaN gradients and mask leaks",
    description=(
      "Checks every loss of each TARGET against the mask contract, with many"
      " masks, with NaN, infinity and other garbage in masked elements, and in"
      " all derivatives."
    ),
    epilog=(
      "Exit status: 0 without a finding (with --baseline: without a new one), 1"
      " with findings, 2 if the command was used in a wrong way."
    ),
  )
  _add_selection(parser)
  _add_output(parser)
  _add_baseline(parser)
  parser.set_defaults(run=_run_audit, parser=parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "target",
    nargs="*",
    metavar="TARGET",
    default=["optax", "optax_masking"],
    help=(
      "optax, optax_masking (by default both, side by side), or"
      " package.module:name of a loss, of a MaskCase or a list of them, or of a"
      " function that returns these. The audit guesses the arguments of a loss:"
      " arrays of shape (4, 5), integers of shape (4,) for arguments that are"
      " named as labels or an index, and a mask for where or mask"
    ),
  )
  parser.add_argument(
    "--loss",
    action="append",
    default=[],
    metavar="NAME",
    help="check this loss of the targets alone; may be repeated",
  )
  parser.add_argument(
    "--quick",
    action="store_true",
    help="float32, values and gradients, without vmap, and fewer masks",
  )
  parser.add_argument(
    "--jobs",
    type=int,
    metavar="N",
    help=(
      "how many losses to check at a time, each in a process of its own; by"
      " default one for each processor, and 1 on anything but a CPU"
    ),
  )


def _add_output(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--format",
    choices=FORMATS,
    default="text",
    help="text by default; html needs the extra optax_masking[report]",
  )
  parser.add_argument(
    "--output",
    metavar="FILE",
    help="write to FILE, not to the standard output",
  )
  parser.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="FORMAT=FILE",
    help="write another format of the same audit; may be repeated",
  )


def _add_baseline(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--baseline",
    metavar="FILE",
    help=(
      "known findings, which do not count; the report lists those that are gone"
    ),
  )
  parser.add_argument(
    "--update-baseline",
    action="store_true",
    help=(
      "replace the findings that the baseline has of the audited losses by"
      " those of this audit, and exit with 0"
    ),
  )


def _run_audit(args: argparse.Namespace) -> int:
  if args.update_baseline and not args.baseline:
    raise UsageError("--update-baseline needs --baseline FILE")
  also = [_format_and_file(each) for each in args.also]
  _check_page(args.format, args.also)
  baseline: set[str] | None = None
  if args.baseline and not args.update_baseline:
    baseline = _read_baseline(args.baseline, args.quick)
  losses = _find_losses(args)
  for file in (*(file for _, file in also), args.output, args.baseline):
    if file is not None:
      check_writable(file)
  reports = _check_losses(losses, args.quick, _jobs(args.jobs))

  found = {
    _audit_formats.identify(target, name, finding)
    for target, reports_by_loss in reports.items()
    for name, report in reports_by_loss.items()
    for finding in report.findings
  }
  new: frozenset[str] | None = None
  gone: tuple[str, ...] = ()
  audited = tuple(f"{loss.target}/{loss.name}/" for loss in losses)
  if baseline is not None:
    new = frozenset(found - baseline)
    gone = tuple(sorted(e for e in baseline - found if e.startswith(audited)))
  audit = _audit_formats.Audit(reports, _versions(), new, gone, args.quick)
  for name, file in (*also, (args.format, args.output)):
    write(_formatted(audit, name, file), file)
  if args.update_baseline:
    _update_baseline(args, found, audited)
    return 0
  return 1 if (found if new is None else new) else 0


def _find_losses(args: argparse.Namespace) -> list[_audit.Loss]:
  losses = []
  try:
    for target in dict.fromkeys(args.target):
      losses += _audit.find_losses(target, args.loss)
  except _audit.TargetError as error:
    raise UsageError(str(error)) from None
  return losses


def _jobs(requested: int | None) -> int:
  if requested is None:
    return _processors() if jax.default_backend() == "cpu" else 1
  if requested < 1:
    raise UsageError(f"--jobs must be 1 or more, but is {requested}")
  return requested


def _check_losses(
  losses: Sequence[_audit.Loss], quick: bool, jobs: int
) -> Reports:
  """Checks losses; returns their reports by target and name, in their order."""
  done: dict[tuple[str, str], Report] = {}
  progress = _Progress(len(losses))
  progress.show(0, f"{losses[0].target} {losses[0].name}")
  try:
    for loss, report in _audit.check_losses(losses, quick, jobs):
      done[loss.target, loss.name] = report
      progress.show(len(done), f"{loss.target} {loss.name}")
  except _audit.TargetError as error:
    raise UsageError(str(error)) from None
  finally:
    progress.end()
  reports: Reports = {loss.target: {} for loss in losses}
  for loss in losses:
    reports[loss.target][loss.name] = done[loss.target, loss.name]
  return reports


def _update_baseline(
  args: argparse.Namespace, found: set[str], audited: tuple[str, ...]
) -> None:
  """Writes the findings to the baseline, which keeps those of other losses.

  Args:
    args: The options of the command.
    found: The identifiers of the findings.
    audited: The beginnings of the identifiers of all audited losses.
  """
  before: set[str] = set()
  if os.path.exists(args.baseline):
    before = _read_baseline(args.baseline, args.quick)
  others = {each for each in before if not each.startswith(audited)}
  _write_baseline(args.baseline, found | others, args.quick)
  print(
    f"{args.baseline}: {len(found)} findings of these losses, {len(others)} of"
    " others",
    file=sys.stderr,
  )


def _format_and_file(also: str) -> tuple[str, str]:
  name, equals, file = also.partition("=")
  if name not in FORMATS or not equals or not file:
    raise UsageError(
      f"--also {also!r} must be FORMAT=FILE, with one of {', '.join(FORMATS)}"
    )
  return name, file


def _check_page(format_: str, also: Sequence[str]) -> None:
  """Raises before the audit starts, if a page could not be written."""
  pages = ["--format html"] if format_ == "html" else []
  pages += [f"--also {each}" for each in also if each.startswith("html=")]
  if pages and importlib.util.find_spec("jinja2") is None:
    raise CommandError(
      f"{pages[0]} needs Jinja2: pip install 'optax_masking[report]'"
    )


def _formatted(audit: _audit_formats.Audit, name: str, file: str | None) -> str:
  if name == "text":
    terminal = file is None and sys.stdout.isatty()
    return _audit_formats.text(
      audit, color=terminal and not os.environ.get("NO_COLOR")
    )
  return {
    "markdown": _audit_formats.markdown,
    "json": _audit_formats.json_text,
    "github": _audit_formats.github,
    "html": _audit_formats.html,
  }[name](audit)


def _versions() -> dict[str, str]:
  versions = {
    name: importlib.metadata.version(name)
    for name in ("optax", "jax", "jaxlib", "numpy")
  }
  return {
    "optax_masking": optax_masking.__version__,
    **versions,
    "python": platform.python_version(),
  }


def _processors() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _read_baseline(file: str, quick: bool) -> set[str]:
  try:
    content = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    findings, baseline_is_quick = content["findings"], content["quick"]
    if content["schema"] != 1 or not isinstance(findings, list):
      raise ValueError("its schema is not 1")
  except FileNotFoundError:
    raise UsageError(
      f"there is no {file}; write it with --baseline {file} --update-baseline"
    ) from None
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise UsageError(
      f"{file} is no baseline ({type(error).__name__}: {error}); write one with"
      f" --baseline FILE --update-baseline"
    ) from None
  if baseline_is_quick != quick:
    audit, use = ("quick", "with") if baseline_is_quick else ("full", "without")
    raise UsageError(
      f"{file} is the baseline of a {audit} audit; use it {use} --quick"
    )
  return set(map(str, findings))


def _write_baseline(file: str, found: set[str], quick: bool) -> None:
  content: Mapping[str, object] = {
    "schema": 1,
    "quick": quick,
    "findings": sorted(found),
  }
  pathlib.Path(file).write_text(
    json.dumps(content, indent=2) + "\n", encoding="utf-8"
  )


class _Progress:
  """Shows on the standard error how far a long run is."""

  seconds_between = 30.0  # If the standard error is no terminal.

  def __init__(self, total: int):
    self.total = total
    self.terminal = sys.stderr.isatty()
    self.last = time.monotonic()

  def show(self, done: int, name: str) -> None:
    text = f"[{done}/{self.total}] {name}"
    if self.terminal:
      sys.stderr.write(f"\r\x1b[K{text}")
    elif time.monotonic() - self.last > self.seconds_between:
      self.last = time.monotonic()
      sys.stderr.write(text + "\n")
    sys.stderr.flush()

  def end(self) -> None:
    if self.terminal:
      sys.stderr.write("\r\x1b[K")
      sys.stderr.flush()
