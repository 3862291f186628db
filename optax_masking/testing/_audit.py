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
from optax_masking.testing._report import sort_by_clause

TARGETS = {"optax": optax.losses, "optax_masking": optax_masking.losses}

# The options for masks of examples: enough to see which axis a loss masks.
_EXAMPLE_MASK_OPTIONS: dict[str, Any] = {
  "skip": ("clean_arithmetic", "honesty", "identity"),
  "derivatives": ("value", "vjp"),
  "transforms": ("jit",),
  "masks": ("given", "rows"),
}
_HALF_PRECISION_OPTIONS: dict[str, Any] = {
  "transforms": ("jit",),
  "samples": 6,
}
_QUICK_OPTIONS: dict[str, Any] = {
  "derivatives": ("value", "vjp"),
  "transforms": ("eager", "jit"),
  "samples": 6,
}
# Shapes in which a mask of four examples also fits another axis.
_AMBIGUOUS_SHAPES = ((4, 4), (4, 4, 3))


class TargetError(ValueError):
  """A target can't be audited, for a reason that its user can fix."""


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss of a target, with the cases to check it in.

  Attributes:
    target: The target.
    name: The name of the loss.
    cases: The cases of every audit.
    full_audit_cases: The cases that a quick audit leaves out.
    refusable_cases: Cases with masks that the loss may refuse. If the loss
      accepts such a mask, the case is checked.
    unchecked_reason: Why the loss can't be checked, None if it can.
  """

  target: str
  name: str
  cases: tuple[MaskCase, ...] = ()
  full_audit_cases: tuple[MaskCase, ...] = ()
  refusable_cases: tuple[MaskCase, ...] = ()
  unchecked_reason: str | None = None


def find_losses(target: str, names: Iterable[str] = ()) -> list[Loss]:
  """Finds the losses of a target.

  Args:
    target: `"optax"`, `"optax_masking"` or `"package.module:name"`, where the
      name is that of a loss, a `MaskCase`, a sequence of these, or a function
      without arguments that returns them.
    names: The names of some losses; by default all.

  Returns:
    The losses, in the order of their names.

  Raises:
    TargetError: If there is no such target or loss, or if the arguments of a
      loss can't be guessed.
  """
  if target in TARGETS:
    losses = [
      _loss_of_package(target, name)
      for name in _public_functions(TARGETS[target])
    ]
  else:
    losses = _losses_at_import_path(target)
  wanted = set(names)
  unknown = wanted - {loss.name for loss in losses}
  if unknown:
    raise TargetError(
      f"{target} has no loss {', '.join(sorted(unknown))}. It has"
      f" {', '.join(loss.name for loss in losses)}."
    )
  return [loss for loss in losses if not wanted or loss.name in wanted]


def _public_functions(module: Any) -> list[str]:
  return [
    name
    for name in sorted(vars(module))
    if not name.startswith("_") and inspect.isfunction(vars(module)[name])
  ]


def _loss_of_package(target: str, name: str) -> Loss:
  """A loss of Optax or of this package, with cases from its row."""
  function = getattr(TARGETS[target], name)
  row = ROWS.get(name)
  if row is None:  # The loss is newer than this audit.
    try:
      return _with_guessed_arguments(target, name, function)
    except TargetError as error:
      return Loss(target, name, unchecked_reason=str(error))
  loss = row.of(TARGETS[target])
  if loss is function and not _accepts_keyword(function, "where"):
    return Loss(target, name, unchecked_reason="takes no `where`")

  def case(shape, where_shape, **options):
    args = map(np.asarray, row.arguments(shape=shape))
    where = _random_mask(where_shape)
    return MaskCase(loss, *args, where=where, name=name, **options)

  axes = {} if row.result_axes is None else {"return": row.result_axes}
  skip = () if row.compacts else ("compaction",)
  reference = None if target == "optax" else row.of(optax.losses)
  options: dict[str, Any] = {"axes": axes, "reference": reference}
  half_options = {**options, **_HALF_PRECISION_OPTIONS}
  float32 = case(
    row.shape, row.shape, **options, skip=skip, dtypes=("float32",)
  )
  float16 = case(
    row.shape, row.shape, **half_options, skip=skip, dtypes=("float16",)
  )
  # Arithmetic that overflows in bfloat16 overflows in float32, too.
  skip = (*skip, "clean_arithmetic")
  bfloat16 = case(
    row.shape, row.shape, **half_options, skip=skip, dtypes=("bfloat16",)
  )
  full_audit_cases = [float16, bfloat16]
  refusable_cases = []
  if row.masks_examples:
    batch_shape = row.shape[:-1]
    where_axes = tuple(range(len(batch_shape)))
    options = {**_EXAMPLE_MASK_OPTIONS, "axes": {**axes, "where": where_axes}}
    if row.elementwise:  # Such a loss has examples if it sums over an axis.
      options["axis"] = -1
    full_audit_cases.append(case(row.shape, batch_shape, **options))
    if len(batch_shape) == 1 and len(row.data) > 1:
      refusable_cases = [
        case(shape, (4,), **options) for shape in _AMBIGUOUS_SHAPES
      ]
  return Loss(
    target, name, (float32,), tuple(full_audit_cases), tuple(refusable_cases)
  )


def _in_32_bits(x: np.ndarray) -> np.ndarray:
  return x.astype("int32" if x.dtype.kind == "i" else "float32")


def _random_mask(shape: tuple[int, ...]) -> np.ndarray:
  where = np.random.default_rng(5).uniform(size=shape) < 0.6
  where.flat[0], where.flat[-1] = True, False
  return where


def _accepts_keyword(function: Callable[..., Any], keyword: str) -> bool:
  parameters = inspect.signature(function).parameters
  return keyword in parameters or any(
    p.kind is p.VAR_KEYWORD for p in parameters.values()
  )


def _losses_at_import_path(target: str) -> list[Loss]:
  """The losses at `package.module:name`."""
  found = _import(target)
  if isinstance(found, MaskCase):
    found = [found]
  if isinstance(found, list | tuple):
    if not found or not all(isinstance(case, MaskCase) for case in found):
      types = ", ".join(sorted({type(x).__name__ for x in found})) or "nothing"
      raise TargetError(
        f"{target} is a {type(found).__name__} of {types}; it may be one of"
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
  _, _, attribute = target.partition(":")
  return [_with_guessed_arguments(target, attribute, found)]


def _import(target: str) -> Any:
  """The object at `package.module:name`. A function without parameters runs."""
  module_name, _, attribute = target.partition(":")
  if not module_name or not attribute:
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
  except Exception as error:  # A user's module may raise anything.
    raise TargetError(
      f"{target} can't be imported: {type(error).__name__}: {error}"
    ) from error
  return found


def _with_guessed_arguments(
  target: str, name: str, function: Callable[..., Any]
) -> Loss:
  """A loss with the first guess of arguments that it runs with."""
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError) as error:
    raise TargetError(f"{target} has no signature: {error}") from error
  masks = [m for m in ("where", "mask") if m in parameters]
  if not masks and target in TARGETS:
    return Loss(target, name, unchecked_reason="takes no `where`")
  if not masks:
    raise TargetError(
      f"{target} has no argument `where` or `mask`. If its mask has another"
      " name, write a MaskCase: MaskCase(loss, ..., where=...,"
      " where_name='...')."
    )
  required = [
    p
    for p in parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    and p.name != masks[0]
  ]
  errors = []
  for args, keywords, where in _guess_arguments(required):
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
    f"No arguments could be guessed for {target}: it does not run on arrays of"
    " shapes (4, 5) and (4,) with a mask of these shapes. Name a MaskCase"
    " instead, or a sequence of them. With the first guess:"
    f" {errors[0] if errors else 'it returns no floating array'}"
  )


def _guess_arguments(
  required: Sequence[inspect.Parameter],
) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray], np.ndarray]]:
  """Makes positional arguments, keyword arguments and masks for a loss.

  The first guess has integers for parameters that are named as labels.
  """
  label_names = ("label", "index", "indices", "class", "ids")
  makers = [
    (class_index, soft_labels)
    if any(part in p.name for part in label_names)
    else (soft_labels, class_index)
    for p in required
  ]
  for chosen in itertools.product(*makers):
    if not any(make is soft_labels for make in chosen):
      continue
    for where_shape in ((4, 5), (4,)):
      rng = np.random.default_rng(0)
      args, keywords = [], {}
      for make, parameter in zip(chosen, required, strict=True):
        array = _in_32_bits(make(rng, (4, 5)))
        if parameter.kind is parameter.KEYWORD_ONLY:
          keywords[parameter.name] = array
        else:
          args.append(array)
      yield args, keywords, _random_mask(where_shape)


def check_loss(loss: Loss, quick: bool = False) -> Report:
  """Checks a loss in all of its cases."""
  start = time.perf_counter()
  if loss.unchecked_reason is not None:
    finding = Finding("accepts", f"{loss.name} {loss.unchecked_reason}.")
    reasons = dict.fromkeys(CLAUSES, loss.unchecked_reason)
    clauses = {**reasons, "accepts": "broken"}
    return Report(loss.name, (finding,), clauses, 1, 0.0)
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
  return merge_reports(loss.name, reports, time.perf_counter() - start)


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
      decisive = (state for state in ("broken", "kept") if state in states)
      clauses[clause] = next(decisive, states[0])
  return Report(
    name,
    sort_by_clause(findings.values()),
    clauses,
    sum(report.cases for report in reports),
    seconds,
    "; ".join(dict.fromkeys(report.data for report in reports)),
  )


def check_losses(
  losses: Sequence[Loss], quick: bool = False, jobs: int = 1
) -> Iterator[tuple[Loss, Report]]:
  """Checks losses in parallel processes, and yields each when it is done."""
  if jobs <= 1 or len(losses) == 1:
    for loss in losses:
      yield loss, check_loss(loss, quick)
    return
  # Processes can't share the state of JAX: spawned ones start without it.
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
  (loss,) = find_losses(target, [name])
  return check_loss(loss, quick)
