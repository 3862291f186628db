"""The command `audit`."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
import time
import types
from collections.abc import Sequence, Set
from typing import Any

import jax
import jaxlib
import numpy as np
import optax

import optax_masking
from optax_masking._output import (
  CommandError,
  UsageError,
  check_writable,
  write,
)
from optax_masking.testing import Report, _audit, _audit_formats
from optax_masking.testing._baseline import read_baseline, write_baseline
from optax_masking.testing._find import Loss, find_losses
from optax_masking.testing._guess import TargetError
from optax_masking.testing._settings import read_settings

FORMATS = ("text", "markdown", "json", "github", "html", "sarif")
_DEFAULTS = {
  "target": ["optax", "optax_masking"],
  "format": "text",
  "quick": False,
}


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
      " with findings, 2 if the command was used in a wrong way, 130 after"
      " Ctrl-C."
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
    help=(
      "optax, optax_masking, or package.module:name of a loss, of a MaskCase or"
      " a list of them, or of a function that returns these; by default the"
      " targets that pyproject.toml has in the table [tool.optax-masking], of"
      " which the keys are targets and the names of options, or else optax and"
      " optax_masking, side by side. The audit guesses the arguments of a loss:"
      " arrays of one to four axes, integers for arguments that are named as"
      " labels, and a mask for where or mask"
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
    action=argparse.BooleanOptionalAction,
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
    help=(
      "text by default; sarif is for code scanning; html needs the extra"
      " optax_masking[report]"
    ),
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
  _complete(args)
  if args.update_baseline and not args.baseline:
    raise UsageError("--update-baseline needs --baseline FILE")
  also = [_format_and_file(each) for each in args.also]
  _check_page(args.format, args.also)
  known: frozenset[str] = frozenset()
  if args.baseline and not (
    args.update_baseline and not os.path.lexists(args.baseline)
  ):
    known = read_baseline(args.baseline, args.quick)
  updated = args.baseline if args.update_baseline else None
  for file in (*(file for _, file in also), args.output, updated):
    if file is not None:
      check_writable(file)
  losses = _find_losses(args)
  start = time.perf_counter()
  reports = _check_losses(losses, args.quick, _jobs(args.jobs))
  audit = _audit_formats.Audit(
    reports,
    _versions(),
    quick=args.quick,
    seconds=time.perf_counter() - start,
    definitions={
      loss.target: {x.name: x.definition for x in losses if x.definition}
      for loss in losses
    },
  )
  audited = tuple(f"{loss.target}/{loss.name}/" for loss in losses)
  if args.baseline and not args.update_baseline:
    audit = audit.against(known, audited)
  for name, file in (*also, (args.format, args.output)):
    write(_formatted(audit, name, file), file)
  if args.update_baseline:
    _update_baseline(args, known, audit.found, audited)
    return 0
  counted = audit.found if audit.new is None else audit.new
  return 1 if counted or audit.failures_of_strict else 0


def _complete(args: argparse.Namespace) -> None:
  """Fills in what the command line leaves out.

  It comes from pyproject.toml if no TARGET is given, and else is the default.
  """
  given = vars(args)
  settings = {} if args.target else read_settings(FORMATS)
  if "targets" in settings:
    settings["target"] = settings.pop("targets")
  for key, value in {**_DEFAULTS, **settings}.items():
    if given[key] in (None, []):
      given[key] = value


def _find_losses(args: argparse.Namespace) -> list[Loss]:
  losses = []
  try:
    for target in dict.fromkeys(args.target):
      losses += find_losses(target, args.loss)
  except TargetError as error:
    raise UsageError(str(error)) from None
  return losses


def _jobs(requested: int | None) -> int:
  if requested is None:
    return _processors() if jax.default_backend() == "cpu" else 1
  if requested < 1:
    raise UsageError(f"--jobs must be 1 or more, but is {requested}")
  return requested


def _check_losses(losses: Sequence[Loss], quick: bool, jobs: int) -> Reports:
  """Checks losses; returns their reports by target and name, in their order."""
  done: dict[tuple[str, str], Report] = {}
  progress = _Progress(len(losses))
  progress.show(0, f"{losses[0].target} {losses[0].name}")
  checked = _audit.check_losses(losses, quick, jobs)
  try:
    with contextlib.closing(checked):
      for loss, report in checked:
        done[loss.target, loss.name] = report
        progress.show(len(done), f"{loss.target} {loss.name}")
  except TargetError as error:
    raise UsageError(str(error)) from None
  finally:
    progress.end()
  reports: Reports = {loss.target: {} for loss in losses}
  for loss in losses:
    reports[loss.target][loss.name] = done[loss.target, loss.name]
  return reports


def _update_baseline(
  args: argparse.Namespace,
  known: Set[str],
  found: Set[str],
  audited: tuple[str, ...],
) -> None:
  """Writes the findings to the baseline, which keeps those of other losses.

  Args:
    args: The options of the command.
    known: The findings in the baseline.
    found: The findings of the audit.
    audited: The beginnings of the identifiers of all audited losses.
  """
  others = {each for each in known if not each.startswith(audited)}
  write_baseline(args.baseline, found | others, args.quick)
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
    "sarif": _audit_formats.sarif,
  }[name](audit)


def _versions() -> dict[str, str]:
  """Of the packages that were imported, which may not be the installed ones."""
  versions = {"optax_masking": optax_masking.__version__}
  for module in (optax, jax, jaxlib, np):
    name = module.__name__
    versions[name] = module.__version__
    if not _is_installed(name, module):
      versions[name] += f" ({pathlib.Path(module.__file__ or '').parent})"
  return {**versions, "python": platform.python_version()}


def _is_installed(name: str, module: types.ModuleType) -> bool:
  """Whether the module is a file of the installed distribution."""
  try:
    distribution = importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    return False
  installed = pathlib.Path(str(distribution.locate_file(name)), "__init__.py")
  imported = pathlib.Path(module.__file__ or "")
  return installed.resolve() == imported.resolve()


def _processors() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


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
