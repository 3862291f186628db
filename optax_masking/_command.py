"""The command `optax-masking`."""

import argparse
import importlib.metadata
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
from optax_masking import _audit, _audit_formats

FORMATS = ("text", "markdown", "json", "github", "html")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command, and returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="optax-masking",
    description="Losses that padding can't poison, and checks of them.",
  )
  parser.add_argument(
    "--version",
    action="version",
    version=f"optax_masking {optax_masking.__version__}",
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_audit(commands)
  given = parser.parse_args(arguments)
  try:
    return given.run(given)
  except UsageError as error:
    given.parser.print_usage(sys.stderr)
    print(f"{given.parser.prog}: error: {error}", file=sys.stderr)
    return 2


class UsageError(Exception):
  """Something that the user of the command can mend."""


def _add_audit(commands: Any) -> None:
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
      " function that returns these; the arguments of a loss are guessed"
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
    help="float32, values and gradients, under jit, and fewer masks",
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
  parser.add_argument("--format", choices=FORMATS, default="text")
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
    help="write what is found to the baseline, and exit with 0",
  )
  parser.set_defaults(run=_run_audit, parser=parser)


def _run_audit(given: argparse.Namespace) -> int:
  if given.update_baseline and not given.baseline:
    raise UsageError("--update-baseline needs --baseline FILE")
  others = [_format_and_file(each) for each in given.also]
  known = None
  if given.baseline and not given.update_baseline:
    known = _read_baseline(given.baseline)
  targets = list(dict.fromkeys(given.target))
  losses = []
  try:
    for target in targets:
      losses += _audit.losses_of(target, given.loss)
  except _audit.TargetError as error:
    raise UsageError(str(error)) from None
  for _, file in [*others, (None, given.output)]:
    if file is not None:
      _check_writable(file)

  jobs = given.jobs
  if jobs is None:
    jobs = os.cpu_count() or 1 if jax.default_backend() == "cpu" else 1
  if jobs < 1:
    raise UsageError(f"--jobs must be 1 or more, but is {jobs}")
  # In the order of the losses, whichever is done first.
  reports: dict[str, dict[str, Any]] = {target: {} for target in targets}
  for loss in losses:
    reports[loss.target][loss.name] = None
  progress = _Progress(len(losses))
  progress.tell(0, f"{losses[0].target} {losses[0].name}")
  for done, (loss, report) in enumerate(
    _audit.checked(losses, given.quick, jobs), 1
  ):
    reports[loss.target][loss.name] = report
    progress.tell(done, f"{loss.target} {loss.name}")
  progress.end()

  found = {
    _audit_formats.identify(target, name, finding)
    for target, its_reports in reports.items()
    for name, report in its_reports.items()
    for finding in report.findings
  }
  new: frozenset[str] | None = None
  gone: tuple[str, ...] = ()
  if known is not None:
    checked = {f"{loss.target}/{loss.name}" for loss in losses}
    new = frozenset(found - known)
    gone = tuple(
      sorted(
        each
        for each in known - found
        if "/".join(each.split("/")[:2]) in checked
      )
    )
  audit = _audit_formats.Audit(reports, _versions(), new, gone, given.quick)
  for name, file in [*others, (given.format, given.output)]:
    _write(_formatted(audit, name, file), file)
  if given.update_baseline:
    _write_baseline(given.baseline, found)
    return 0
  return 1 if (found if new is None else new) else 0


def _format_and_file(also: str) -> tuple[str, str]:
  name, equals, file = also.partition("=")
  if name not in FORMATS or not equals or not file:
    raise UsageError(
      f"--also {also!r} must be FORMAT=FILE, with one of {', '.join(FORMATS)}"
    )
  return name, file


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


def _check_writable(file: str) -> None:
  """Fails before the audit, and not after it."""
  folder = pathlib.Path(file).absolute().parent
  if not folder.is_dir():
    raise UsageError(f"{file} can't be written: there is no folder {folder}")


def _write(text: str, file: str | None) -> None:
  if file is not None:
    pathlib.Path(file).write_text(text, encoding="utf-8")
    return
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
  sys.stdout.flush()


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


def _read_baseline(file: str) -> set[str]:
  try:
    content = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    findings = content["findings"]
    if content["schema"] != 1 or not isinstance(findings, list):
      raise ValueError("it has another schema")
    return set(map(str, findings))
  except FileNotFoundError:
    raise UsageError(
      f"there is no {file}; write it with --baseline {file} --update-baseline"
    ) from None
  except (OSError, KeyError, TypeError, ValueError) as error:
    raise UsageError(f"{file} is no baseline: {error!r}") from None


def _write_baseline(file: str, found: set[str]) -> None:
  content: Mapping[str, object] = {"schema": 1, "findings": sorted(found)}
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
