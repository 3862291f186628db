"""Checks a loss on the data of one dtype, clause by clause."""

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._ambiguity import with_result_axes
from optax_masking.testing._arithmetic import clean_arithmetic
from optax_masking.testing._call import Call, UnusableResult, contents
from optax_masking.testing._compaction import compaction
from optax_masking.testing._events import (
  Broken,
  Event,
  Log,
  Note,
  Tried,
  Untried,
)
from optax_masking.testing._exact import directions, poisoned, zeros
from optax_masking.testing._honesty import honesty
from optax_masking.testing._identity import identity
from optax_masking.testing._masks import padded
from optax_masking.testing._notes import (
  given_numbers,
  underivable_masks,
  unmasked_arrays,
  unmasked_axes,
  unpoisoned_inputs,
)
from optax_masking.testing._options import DERIVATIVES, TRANSFORMS
from optax_masking.testing._problem import (
  Problem,
  make_problem,
  replace_masked,
)
from optax_masking.testing._program import DERIVATIVE_OF, PARTS, program
from optax_masking.testing._report import CLAUSES, Finding
from optax_masking.testing._run import Run, error_line, listed
from optax_masking.testing._trace import GUARD, LIBRARIES
from optax_masking.testing._transforms import (
  in_python,
  refusal,
  repetitions,
  vmapped,
)

_CHECKS = (
  zeros,
  directions,
  poisoned,
  repetitions,
  compaction,
  identity,
  honesty,
  given_numbers,
  unpoisoned_inputs,
  unmasked_arrays,
  unmasked_axes,
  underivable_masks,
)


def check(call: Call, dtype: Any, log: Log) -> tuple[Problem, int]:
  """Checks a loss, and returns the data and the number of cases."""
  problem = make_problem(call, dtype)
  run = _start(problem, log)
  if run is None:
    return problem, 1
  for clause in _checks_of(run):
    try:
      log.add(clause(run))
    except Exception as error:
      if not _is_of_the_loss(error):
        raise
      log.add([_raised(run, error)])
  return problem, run.tally["cases"]


def _is_of_the_loss(error: BaseException) -> bool:
  """Whether the loss raised an error, and not the check."""
  if isinstance(error, jax.errors.JaxRuntimeError):  # By way of a callback.
    return True
  frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
  last = max(i for i, file in enumerate(frames) if file.startswith(GUARD))
  return any(not file.startswith(LIBRARIES) for file in frames[last + 1 :])


def _raised(run: Run, error: BaseException) -> Event:
  """The finding that a loss raises on some of the data."""
  facts = {
    "message": (
      "The loss raises on data that the check makes, of masked or included"
      f" elements that hold other numbers: {error_line(error)}"
    ),
    "got": error_line(error),
  }
  finding = Finding("accepts", "", dtype=run.problem.dtype)
  return Broken(finding, lambda: facts)


def _checks_of(run: Run) -> Iterator[Callable[[Run], Iterator[Event]]]:
  yield from _CHECKS
  transforms = run.problem.options.transforms
  if "vmap" in transforms:
    yield vmapped
  if "eager" in transforms and run.compiled:
    yield in_python
  # At the end: it leaves out what another clause has reported.
  if "clean_arithmetic" not in run.problem.options.skip:
    yield clean_arithmetic


def _start(problem: Problem, log: Log) -> Run | None:
  """Calls the loss with its mask, and finds out what can be computed of it."""
  try:
    value = problem.call(problem.values, problem.call.host_mask(problem.where))
  except UnusableResult:
    raise
  except Exception as error:
    log.add([refusal(problem, error), *_none_tried("the loss does not run")])
    return None
  result = _check_result(problem, value)
  log.add([Tried("accepts")])
  problem = _usable(problem)
  options = problem.options
  compiled = bool({"jit", "vmap"} & set(options.transforms))
  unmasked = _unmasked(problem, result, log)
  parts = _parts(problem, compiled, log)
  if not parts:
    return None
  run = Run(problem, result, unmasked, tuple(parts), compiled)
  if not run.masks:
    log.add(_none_tried("no data could be made for any mask"))
    return None
  return with_result_axes(run)


def _none_tried(reason: str) -> list[Event]:
  return [Untried(clause, reason) for clause in CLAUSES]


def _check_result(problem: Problem, result: Any) -> jax.ShapeDtypeStruct:
  dtype = getattr(result, "dtype", None)
  if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
    return jax.ShapeDtypeStruct(result.shape, dtype)
  if isinstance(result, float):
    return jax.ShapeDtypeStruct((), jnp.asarray(result).dtype)
  raise TypeError(
    f"{problem.call.name} returned {contents(result)}, not one floating array."
    " If the loss is the first of several results, pass has_aux=True; if it is"
    " an entry of the result, name it, output='loss'."
  )


def _usable(problem: Problem) -> Problem:
  """Data with which the loss is finite with everything included."""
  everything = problem.call.everything
  try:
    values = problem.values_for(everything)
    if values is not None:
      value = problem.call(values, problem.call.host_mask(everything))
      if not np.isfinite(np.asarray(value)).all():
        return replace_masked(problem)
  except Exception:  # The checks report what the loss refuses.
    return problem
  return problem


def _unmasked(
  problem: Problem, result: jax.ShapeDtypeStruct, log: Log
) -> Callable[[Sequence[Any]], Any] | None:
  """The loss without a mask, if there is a way to call it."""
  call = problem.call
  candidates: list[Any] = [
    call.without_mask(omit=False),
    call.without_mask(omit=True),
  ]
  if problem.options.reference is not None:
    candidates = [call.reference]
  reason = ""
  gradient = "vjp" in problem.options.derivatives
  for candidate in filter(None, candidates):
    some = program(candidate, ["value", "vjp"][: 1 + gradient], problem.floats)
    try:
      value, *_ = jax.eval_shape(some, problem.values, ())
      if value.shape == result.shape:
        return candidate
      reason = f"it returns the shape {value.shape}"
    except Exception as error:
      reason = reason or error_line(error)
  if problem.options.reference is not None:
    log.add([Untried("identity", f"the reference does not run: {reason}")])
  elif call.mask_is_optional:
    message = (
      f"The loss declares `{call.mask_name}=None`, but does not run without a"
      f" mask: {reason}"
    )
    finding = Finding("accepts", "", mask="None", got=reason)
    log.add([Broken(finding, lambda: {"message": message})])
  return None


def _parts(problem: Problem, compiled: bool, log: Log) -> list[str]:
  """The parts of the program that can be computed."""
  wanted = ("value", *problem.options.derivatives)
  all_parts = [p for d in PARTS if d in wanted for p in PARTS[d]]
  if _failure(problem, all_parts, compiled) is None:
    return all_parts
  errors = {part: _failure(problem, [part], compiled) for part in all_parts}
  parts = [part for part, error in errors.items() if error is None]
  failed: set[str] = set()
  for part, error in errors.items():
    if error and error not in failed:  # Not one that another derivative has.
      failed.add(error)
      log.add([_not_computed(problem, part, compiled, error, parts)])
  if "value" not in parts:
    how = "under jit" if compiled else "eagerly"
    log.add(_none_tried(f"the loss does not run {how}"))
    return []
  return parts


def _failure(
  problem: Problem, parts: Sequence[str], compiled: bool
) -> str | None:
  """Why some parts can't be computed, None if they can."""
  run = problem.program(tuple(parts), compiled)
  tangents = [problem.values[f] for f in problem.floats]
  values, where = problem.values, problem.call.host_mask(problem.where)
  try:
    if compiled:  # A custom_vjp fails only when it is lowered.
      run.lower(values, tangents, where=where)
    else:
      run(values, tangents, where=where)
  except Exception as error:
    return error_line(error)
  return None


def _not_computed(
  problem: Problem, part: str, compiled: bool, error: str, parts: list[str]
) -> Event:
  """A finding, or a note on a derivative that a gradient does not need."""
  how = "under jit" if compiled else "eagerly"
  name = part if part in PARTS else f"Hessian ({part})"
  message = f"The {name} can't be computed {how}: {error}"
  if part != "value":
    left = tuple(
      d for d in problem.options.derivatives if {*PARTS[d]} <= {*parts}
    )
    message += (
      " If the loss does not mean to have it, leave it out:"
      f" derivatives={left}."
    )
  if part not in PARTS["value"] + PARTS["vjp"]:
    return Note(message, serious=True)
  facts = {
    "message": message,
    "mask": "as given",
    "where": listed(problem.where),
    "got": error,
  }
  finding = Finding(
    "transforms",
    "",
    derivative=DERIVATIVE_OF[part],
    transform="jit" if compiled else "eager",
    dtype=problem.dtype,
  )
  return Broken(finding, functools.partial(dict, facts))


def explanations(call: Call, log: Log) -> Iterator[Note]:
  """Notes another reading of the mask, if it explains the findings."""
  found = list(log.found.values())
  if not found or call.where.ndim == 0:
    return
  for reading in (_only_padded(call, found), _inverted(call, found)):
    if reading is None:
      continue
    other, expected, text = reading
    # The same that was found, and no more.
    other = other.with_options(
      derivatives=_kinds(DERIVATIVES, (f.derivative for f in found)),
      transforms=_kinds(TRANSFORMS, (f.transform for f in found)) or ("jit",),
    )
    alone = Log(other.options)
    check(other, found[0].dtype, alone)
    left = {finding.clause for finding in alone.found.values()}
    if "accepts" in alone.tried and left <= expected:
      yield Note(text)
      return


def _kinds(
  known: Sequence[str], found: Iterable[str | None]
) -> tuple[str, ...]:
  wanted = set(found)
  return tuple(kind for kind in known if kind in wanted)


Reading = tuple[Call, set[str], str]


def _only_padded(call: Call, found: Sequence[Finding]) -> Reading | None:
  masks = ("given", "padded")
  given = set(call.options.masks)
  if "padded" not in given or not given - set(masks):
    return None
  usual = ("as given", "all included", "nothing included")
  if all(f.mask in (None, *usual, *padded(call.where)) for f in found):
    return None
  text = (
    "Nothing is found with the given mask and with masks of padded sequences,"
    " whose included elements come first in each row. If the loss is for no"
    f" other masks, say so: masks={masks}."
  )
  return call.with_options(masks=masks), set(), text


def _inverted(call: Call, found: Sequence[Finding]) -> Reading | None:
  clauses = {finding.clause for finding in found}
  reached = any(
    f.clause == "zero_gradient" and f.poison is None and f.got != "nan"
    for f in found
  )
  if call.mask_is_derived or not reached or "compaction" not in clauses:
    return None
  text = (
    f"Less is found with the inverse of `{call.mask_name}`. If the loss takes"
    " True for what is masked, say so: inverted_where=True."
  )
  return call.inverted(), clauses - {"compaction", "empty"}, text
