"""The half of the command that audits losses."""

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
from optax_masking.testing import _audit, _audit_formats

FORMATS = ("text", "markdown", "json", "github", "html")


def add_to(commands: Any) -> None:
  parser = commands.add_parser(
    "audit",
    help="check losses for NaN gradients and mask leaks",
    description=(
      "Checks every loss of each TARGET against the mask contract, with many"
      " masks, with NaN, infinity and other garbage in what is masked, and in"
      " all derivatives."
    ),
    epilog=(
      "Exit status: 0 if nothing was found (with --baseline: nothing new), 1"
      " if something was, 2 if the command was used in a wrong way."
    ),
  )
  parser.add_argument(
    "target",
    nargs="*",
    metavar="TARGET",
    default=["optax", "optax_masking"],
    help=(
      "optax, optax_masking (by default both, side by side), or"
      " package.module:name of a loss, of a MaskCase or a list of them, or of a"
      " function that returns these. The arguments of a loss are guessed:"
      " arrays of shape (4, 5), of integers of shape (4,) if they are named as"
      " labels or an index, and a mask named where or mask"
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
  parser.add_argument(
    "--format",
    choices=FORMATS,
    default="text",
    help="text by default; html needs the extra optax_masking[report]",
  )
  parser.add_argument(
    "--output",
    metavar="FILE",
    help="write there, and not to the standard output",
  )
  parser.add_argument(
    "--also",
    action="append",
    default=[],
    metavar="FORMAT=FILE",
    help="write another format of the same audit; may be repeated",
  )
  parser.add_argument(
    "--baseline",
    metavar="FILE",
    help="known findings, which do not count; those that are gone are told",
  )
  parser.add_argument(
    "--update-baseline",
    action="store_true",
    help=(
      "write what is found to the baseline, in the place of what it has of the"
      " same losses, and exit with 0"
    ),
  )
  parser.set_defaults(run=_run_audit, parser=parser)


def _run_audit(given: argparse.Namespace) -> int:
  if given.update_baseline and not given.baseline:
    raise UsageError("--update-baseline needs --baseline FILE")
  also = [_format_and_file(each) for each in given.also]
  _check_page(given.format, given.also)
  known = None
  if given.baseline and not given.update_baseline:
    known = _read_baseline(given.baseline, given.quick)
  targets = list(dict.fromkeys(given.target))
  losses = []
  try:
    for target in targets:
      losses += _audit.losses_of(target, given.loss)
  except _audit.TargetError as error:
    raise UsageError(str(error)) from None
  for file in (*(file for _, file in also), given.output, given.baseline):
    if file is not None:
      check_writable(file)

  jobs = given.jobs
  if jobs is None:
    jobs = _processors() if jax.default_backend() == "cpu" else 1
  if jobs < 1:
    raise UsageError(f"--jobs must be 1 or more, but is {jobs}")
  # In the order of the losses, whichever is done first.
  reports: dict[str, dict[str, Any]] = {target: {} for target in targets}
  for loss in losses:
    reports[loss.target][loss.name] = None
  progress = _Progress(len(losses))
  progress.tell(0, f"{losses[0].target} {losses[0].name}")
  try:
    for done, (loss, report) in enumerate(
      _audit.checked(losses, given.quick, jobs), 1
    ):
      reports[loss.target][loss.name] = report
      progress.tell(done, f"{loss.target} {loss.name}")
  except _audit.TargetError as error:
    raise UsageError(str(error)) from None
  finally:
    progress.end()

  found = {
    _audit_formats.identify(target, name, finding)
    for target, its_reports in reports.items()
    for name, report in its_reports.items()
    for finding in report.findings
  }
  new: frozenset[str] | None = None
  gone: tuple[str, ...] = ()
  checked = tuple(f"{loss.target}/{loss.name}/" for loss in losses)
  if known is not None:
    new = frozenset(found - known)
    gone = tuple(sorted(e for e in known - found if e.startswith(checked)))
  audit = _audit_formats.Audit(reports, _versions(), new, gone, given.quick)
  for name, file in (*also, (given.format, given.output)):
    write(_formatted(audit, name, file), file)
  if given.update_baseline:
    kept: set[str] = set()
    if os.path.exists(given.baseline):
      kept = _read_baseline(given.baseline, given.quick)
    others = {each for each in kept if not each.startswith(checked)}
    _write_baseline(given.baseline, found | others, given.quick)
    print(
      f"{given.baseline}: {len(found)} findings of these losses,"
      f" {len(others)} of others",
      file=sys.stderr,
    )
    return 0
  return 1 if (found if new is None else new) else 0


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
    findings, of_quick = content["findings"], content["quick"]
    if content["schema"] != 1 or not isinstance(findings, list):
      raise ValueError("it has another schema")
  except FileNotFoundError:
    raise UsageError(
      f"there is no {file}; write it with --baseline {file} --update-baseline"
    ) from None
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise UsageError(
      f"{file} is no baseline ({type(error).__name__}: {error}); write one with"
      f" --baseline FILE --update-baseline"
    ) from None
  if of_quick != quick:
    raise UsageError(
      f"{file} is the baseline of {'a quick' if of_quick else 'a full'} audit;"
      f" use it {'with' if of_quick else 'without'} --quick"
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
  """Tells on the standard error how far a long run is."""

  seconds_between = 30.0  # Where it is not a terminal.

  def __init__(self, total: int):
    self.total = total
    self.terminal = sys.stderr.isatty()
    self.last = time.monotonic()

  def tell(self, done: int, name: str) -> None:
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
