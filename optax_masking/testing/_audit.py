"""Audits of all losses of a package, and of anyone's own loss."""

import concurrent.futures
import dataclasses
import importlib
import inspect
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import optax

import optax_masking
from optax_masking.losses._table import ROWS, class_index, soft_labels
from optax_masking.testing import CLAUSES, Finding, MaskCase, Report
from optax_masking.testing._api import check_case
from optax_masking.testing._report import in_order

TARGETS = {"optax": optax.losses, "optax_masking": optax_masking.losses}

# What tells whether a mask means what it says.
_MEANING: dict[str, Any] = {
  "skip": ("clean_arithmetic", "honesty", "identity"),
  "derivatives": ("value", "vjp"),
  "transforms": ("jit",),
  "masks": ("given", "rows"),
}


_HALF_PRECISION: dict[str, Any] = {
  "transforms": ("jit",),
  "samples": 6,
}
_QUICK: dict[str, Any] = {
  "derivatives": ("value", "vjp"),
  "transforms": ("eager", "jit"),
  "samples": 6,
}
_SQUARES = ((4, 4), (4, 4, 3))


class TargetError(ValueError):
  """A target that can't be audited, for a reason that its user can mend."""


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss of a target, with the cases that it is checked in.

  `more` are left out of a quick audit, and of the masks of `refusable` ones a
  loss may refuse any. `lacking` is a reason not to check it.
  """

  target: str
  name: str
  cases: tuple[MaskCase, ...] = ()
  more: tuple[MaskCase, ...] = ()
  refusable: tuple[MaskCase, ...] = ()
  lacking: str | None = None


def losses_of(target: str, names: Iterable[str] = ()) -> list[Loss]:
  """Finds the losses of a target.

  Args:
    target: `"optax"`, `"optax_masking"` or `"package.module:name"`, where the
      name is that of a loss, a `MaskCase`, a sequence of these, or a function
      without arguments that returns them.
    names: Which of the losses; by default all.

  Returns:
    The losses, in the order of their names.

  Raises:
    TargetError: If there is no such target or loss, or if the arguments of a
      loss can't be guessed.
  """
  if target in TARGETS:
    losses = [_of_optax(target, name) for name in _names(TARGETS[target])]
  else:
    losses = _of_anyone(target)
  wanted = set(names)
  unknown = wanted - {loss.name for loss in losses}
  if unknown:
    raise TargetError(
      f"{target} has no loss {', '.join(sorted(unknown))}. It has"
      f" {', '.join(loss.name for loss in losses)}."
    )
  return [loss for loss in losses if not wanted or loss.name in wanted]


def _names(module: Any) -> list[str]:
  return [
    name
    for name in sorted(vars(module))
    if not name.startswith("_") and inspect.isfunction(vars(module)[name])
  ]


def _of_optax(target: str, name: str) -> Loss:
  function = getattr(TARGETS[target], name)
  row = ROWS.get(name)
  if row is None:  # One that is newer than this audit.
    try:
      return _guessed(target, name, function)
    except TargetError as error:
      return Loss(target, name, lacking=str(error))
  loss = row.of(TARGETS[target])
  if loss is function and not _takes(function, "where"):
    return Loss(target, name, lacking="takes no `where`")
  axes = {} if row.result_axes is None else {"return": row.result_axes}
  skip = () if row.compacts else ("compaction",)

  def case(shape, where_shape, **options):
    args = map(np.asarray, row.arguments(shape=shape))
    return MaskCase(loss, *args, where=_mask(where_shape), name=name, **options)

  reference = None
  if target != "optax":
    reference = row.of(optax.losses)
  main = {"axes": axes, "reference": reference, "skip": skip}
  first = case(row.shape, row.shape, **main, dtypes=("float32",))
  more = [
    case(row.shape, row.shape, **main, **_HALF_PRECISION, dtypes=("float16",)),
  ]
  # What overflows in bfloat16 does so in float32.
  main["skip"] = (*skip, "clean_arithmetic")
  more.append(
    case(row.shape, row.shape, **main, **_HALF_PRECISION, dtypes=("bfloat16",))
  )
  refusable = []
  if row.masks_examples:
    examples = row.shape[:-1]
    of_examples = {
      **_MEANING,
      "axes": {**axes, "where": tuple(range(len(examples)))},
    }
    if row.elementwise:  # It has examples where it is summed over an axis.
      of_examples["axis"] = -1
    more.append(case(row.shape, examples, **of_examples))
    if len(examples) == 1 and len(row.data) > 1:
      # Masks that fit another axis by chance.
      refusable = [case(shape, (4,), **of_examples) for shape in _SQUARES]
  return Loss(target, name, (first,), tuple(more), tuple(refusable))


def _in_32_bits(x: np.ndarray) -> np.ndarray:
  return x.astype("int32" if x.dtype.kind == "i" else "float32")


def _mask(shape: tuple[int, ...]) -> np.ndarray:
  where = np.random.default_rng(5).uniform(size=shape) < 0.6
  where.flat[0], where.flat[-1] = True, False
  return where


def _takes(function: Callable[..., Any], keyword: str) -> bool:
  parameters = inspect.signature(function).parameters
  return keyword in parameters or any(
    p.kind is p.VAR_KEYWORD for p in parameters.values()
  )


def _of_anyone(target: str) -> list[Loss]:
  module_name, colon, attribute = target.partition(":")
  if not colon or not module_name or not attribute:
    raise TargetError(
      f"{target!r} is no target. Write optax, optax_masking, or"
      " package.module:name of a loss."
    )
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  try:
    found: Any = importlib.import_module(module_name)
    for part in attribute.split("."):
      found = getattr(found, part)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
      found = found()
  except Exception as error:  # Whatever a module of anyone's raises.
    raise TargetError(
      f"{target} can't be imported: {type(error).__name__}: {error}"
    ) from error
  if isinstance(found, MaskCase):
    found = [found]
  if isinstance(found, list | tuple):
    if not found or not all(isinstance(case, MaskCase) for case in found):
      held = ", ".join(sorted({type(x).__name__ for x in found})) or "nothing"
      raise TargetError(
        f"{target} is a {type(found).__name__} of {held}; it may be one of"
        " MaskCase."
      )
    named: dict[str, MaskCase] = {}
    for case in found:
      name, number = case.name, 1
      while name in named:
        number += 1
        name = f"{case.name}#{number}"
      named[name] = case
    return [Loss(target, name, (case,)) for name, case in named.items()]
  if not callable(found):
    raise TargetError(
      f"{target} is {type(found).__name__}, not a loss or a MaskCase."
    )
  return [_guessed(target, attribute, found)]


def _guessed(target: str, name: str, function: Callable[..., Any]) -> Loss:
  """A loss with arguments that it runs with."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError) as error:
    raise TargetError(f"{target} has no signature: {error}") from error
  masks = [m for m in ("where", "mask") if m in parameters]
  if not masks and target in TARGETS:
    return Loss(target, name, lacking="takes no `where`")
  if not masks:
    raise TargetError(
      f"{target} has no argument `where` or `mask`. If its mask has another"
      " name, tell it with a MaskCase: MaskCase(loss, ..., where=...,"
      " where_name='...')."
    )
  required = [
    p
    for p in parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    and p.name != masks[0]
  ]
  integers = ("label", "index", "indices", "class", "ids")
  kinds = [
    (class_index, soft_labels)
    if any(i in p.name for i in integers)
    else (soft_labels, class_index)
    for p in required
  ]
  errors = []
  for makes in itertools.product(*kinds):
    if not any(make is soft_labels for make in makes):
      continue
    for where_shape in ((4, 5), (4,)):
      rng = np.random.default_rng(0)
      arrays = [_in_32_bits(make(rng, (4, 5))) for make in makes]
      where = _mask(where_shape)
      args = [
        a
        for a, p in zip(arrays, required, strict=True)
        if p.kind is not p.KEYWORD_ONLY
      ]
      keywords = {
        p.name: a
        for a, p in zip(arrays, required, strict=True)
        if p.kind is p.KEYWORD_ONLY
      }
      try:
        result = function(*args, **keywords, **{masks[0]: where})
        if np.issubdtype(np.asarray(result).dtype, np.floating):
          case = MaskCase(
            function,
            *args,
            where=where,
            name=name,
            where_name=masks[0],
            **keywords,
          )
          return Loss(target, name, (case,))
      except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
  raise TargetError(
    f"No arguments could be guessed for {target}: it runs on none of the shapes"
    " (4, 5) and (4,) with a mask of these. Name a MaskCase instead, or a"
    " sequence of them. With the first guess:"
    f" {errors[0] if errors else 'it returns no floating array'}"
  )


def check(loss: Loss, quick: bool = False) -> Report:
  """Checks a loss in all of its cases."""
  start = time.perf_counter()
  if loss.lacking is not None:
    finding = Finding("accepts", f"{loss.name} {loss.lacking}.")
    reasons = dict.fromkeys(CLAUSES, loss.lacking)
    clauses = {**reasons, "accepts": "broken"}
    return Report(loss.name, (finding,), clauses, 1, 0.0)
  try:
    if quick:
      reports = [check_case(case, **_QUICK) for case in loss.cases]
    else:
      reports = [check_case(case) for case in (*loss.cases, *loss.more)]
  except (TypeError, ValueError) as error:  # Findings are not raised.
    raise TargetError(f"{loss.target}, {loss.name}: {error}") from error
  for case in loss.refusable:
    try:
      case.loss_fn(
        *case.args,
        where=case.where,
        **{k: v for k, v in case.options.items() if k == "axis"},
      )
    except (TypeError, ValueError):
      continue
    reports.append(check_case(case))
  return merged(loss.name, reports, time.perf_counter() - start)


def merged(name: str, reports: list[Report], seconds: float) -> Report:
  """The reports of one loss in several cases as one."""
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
    told = [r.clauses[clause] for r in reports if clause in r.clauses]
    if told:
      best = (state for state in ("broken", "kept") if state in told)
      clauses[clause] = next(best, told[0])
  return Report(
    name,
    in_order(findings.values()),
    clauses,
    sum(report.cases for report in reports),
    seconds,
    "; ".join(dict.fromkeys(report.data for report in reports)),
  )


def checked(
  losses: Sequence[Loss], quick: bool = False, jobs: int = 1
) -> Iterator[tuple[Loss, Report]]:
  """Checks losses, in some processes at a time, and yields those done."""
  if jobs <= 1 or len(losses) == 1:
    for loss in losses:
      yield loss, check(loss, quick)
    return
  # A process of its own starts without the state of JAX, which can't be shared.
  with concurrent.futures.ProcessPoolExecutor(
    jobs, multiprocessing.get_context("spawn")
  ) as pool:
    running = {
      pool.submit(_check_by_name, loss.target, loss.name, quick): loss
      for loss in losses
    }
    for done in concurrent.futures.as_completed(running):
      yield running[done], done.result()


def _check_by_name(target: str, name: str, quick: bool) -> Report:
  (loss,) = losses_of(target, [name])
  return check(loss, quick)
