"""Audits of all losses of a package, and of anyone's own loss."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from optax_masking.testing import CLAUSES, Finding, Report
from optax_masking.testing._api import check_case
from optax_masking.testing._find import Loss, find_losses
from optax_masking.testing._guess import TargetError
from optax_masking.testing._program import unoptimized
from optax_masking.testing._report import NOT_APPLICABLE, sort_by_clause

_QUICK_OPTIONS: dict[str, Any] = {
  "derivatives": ("value", "vjp"),
  "transforms": ("eager", "jit"),
  "samples": 6,
}


def check_loss(loss: Loss, quick: bool = False) -> Report:
  """Checks a loss in all of its cases."""
  start = time.perf_counter()
  if loss.unchecked_reason is not None:
    finding = Finding("accepts", f"{loss.name} {loss.unchecked_reason}.")
    reasons = dict.fromkeys(CLAUSES, loss.unchecked_reason)
    clauses = {**reasons, "accepts": "broken"}
    return Report(loss.name, (finding,), clauses, cases=1, seconds=0.0)
  try:
    if quick:
      reports = [check_case(case, **_QUICK_OPTIONS) for case in loss.cases]
    else:
      reports = [
        check_case(case) for case in (*loss.cases, *loss.full_audit_cases)
      ]
  except (TypeError, ValueError) as error:  # The arguments are unusable.
    raise TargetError(f"{loss.target}, {loss.name}: {error}") from error
  for case in loss.refusable_cases:
    try:
      case.loss_fn(
        *case.args,
        where=case.where,
        **{k: v for k, v in case.options.items() if k == "axis"},
      )
    except (TypeError, ValueError):
      continue
    reports.append(check_case(case))
  report = merge_reports(loss.name, reports, time.perf_counter() - start)
  if loss.left_out and not quick:
    data = "; ".join((report.data, *loss.left_out))
    report = dataclasses.replace(report, data=data)
  return report


def merge_reports(name: str, reports: list[Report], seconds: float) -> Report:
  """Merges the reports of one loss in several cases."""
  findings: dict[str, Finding] = {}
  for finding in itertools.chain(*(report.findings for report in reports)):
    known = findings.get(finding.key)
    if known is None:
      findings[finding.key] = finding
    else:
      cases = known.cases + finding.cases
      findings[finding.key] = dataclasses.replace(known, cases=cases)
  clauses: dict[str, str] = {}
  for clause in CLAUSES:
    states = [r.clauses[clause] for r in reports if clause in r.clauses]
    if states:
      clauses[clause] = min(states, key=_weight)
  return Report(
    name=name,
    findings=sort_by_clause(findings.values()),
    clauses=clauses,
    cases=sum(report.cases for report in reports),
    seconds=seconds,
    data="; ".join(dict.fromkeys(report.data for report in reports)),
    notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
    strict=any(report.strict for report in reports),
    serious=any(report.serious for report in reports),
  )


def _weight(state: str) -> int:
  """Which of the states that a clause has in several cases is decisive."""
  if state in ("broken", "kept"):
    return ("broken", "kept").index(state)
  return 3 if state.startswith(NOT_APPLICABLE) else 2


def check_losses(
  losses: Sequence[Loss], quick: bool = False, jobs: int = 1
) -> Generator[tuple[Loss, Report], None, None]:
  """Checks losses in parallel processes, and yields each when it is done.

  The processes end if a check raises, or if the caller is interrupted.
  """
  if jobs <= 1 or len(losses) == 1:
    for loss in losses:
      yield loss, check_loss(loss, quick)
    return
  # Processes can't share the state of JAX: spawned ones start without it.
  context = multiprocessing.get_context("spawn")
  others = set(multiprocessing.active_children())
  pool = concurrent.futures.ProcessPoolExecutor(jobs, context)
  try:
    # The first submit starts the processes.
    with _ignored_interrupts(), _unoptimized_programs():
      running = {
        pool.submit(_check_by_name, loss.target, loss.name, quick): loss
        for loss in losses
      }
    for done in concurrent.futures.as_completed(running):
      yield running[done], done.result()
  except BaseException:
    # A pool waits for what runs, which takes minutes.
    for process in set(multiprocessing.active_children()) - others:
      process.kill()
    raise
  finally:
    pool.shutdown()


@contextlib.contextmanager
def _unoptimized_programs() -> Iterator[None]:
  """Processes that start meanwhile compile in half of the time.

  Most programs of an audit run once.
  """
  given = os.environ.get("XLA_FLAGS")
  flags = [f"--{name}={value}" for name, value in (unoptimized() or {}).items()]
  os.environ["XLA_FLAGS"] = " ".join((*flags, given or ""))
  try:
    yield
  finally:
    if given is None:
      os.environ.pop("XLA_FLAGS", None)
    else:
      os.environ["XLA_FLAGS"] = given


@contextlib.contextmanager
def _ignored_interrupts() -> Iterator[None]:
  """Processes that start meanwhile ignore Ctrl-C, and leave it to this one.

  A terminal sends it to all of them, and each would print a traceback.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, before)


def _check_by_name(target: str, name: str, quick: bool) -> Report:
  (loss,) = find_losses(target, [name])
  return check_loss(loss, quick)
