"""Clause 5: a mask that masks nothing changes nothing."""

from collections.abc import Iterator
from typing import Any

import jax

from optax_masking.testing._events import Broken, Event
from optax_masking.testing._report import Finding
from optax_masking.testing._rounding import Pairs, agree, nearby_for
from optax_masking.testing._run import Run, weights_of


def identity(run: Run) -> Iterator[Event]:
  """Clause 5: a mask that masks nothing changes no number."""
  unmasked, values = run.unmasked, run.all_included
  if unmasked is None or values is None:
    return
  dtype = jax.eval_shape(unmasked, values).dtype
  if dtype != run.result.dtype:
    facts = {
      "message": f"The loss has dtype {run.result.dtype} with a mask, and"
      f" {dtype} without one.",
      "got": str(run.result.dtype),
      "expected": str(dtype),
    }
    finding = Finding(
      "transforms", "", derivative="value", dtype=run.problem.dtype
    )
    yield Broken(finding, lambda: facts)
  yield from _same_program(run)
  where = run.everything

  def pairs(nearby: bool) -> Pairs:
    data = nearby_for(run, where) if nearby else values
    expected = run.plain([(data, weights_of(run))])
    got = run.evaluate_one(data, where)
    return [
      (quantity, x, expected[quantity.wrt][0])
      for quantity, x in zip(run.quantities, got, strict=True)
      if quantity.part in ("value", "vjp")
    ]

  yield from agree(
    run,
    "identity",
    "all included",
    pairs,
    "With everything included, {what} is {got}; without a mask it is"
    " {expected}.",
  )


def _same_program(run: Run) -> Iterator[Event]:
  """Clause 5: without a mask, the reference's own program."""
  problem = run.problem
  without = problem.call.without_mask(omit=False)
  if problem.options.reference is None or without is None:
    return
  try:
    ours = jax.make_jaxpr(without)(problem.values)
    theirs = jax.make_jaxpr(problem.call.reference)(problem.values)
  except Exception:  # A loss that needs a mask has no such program.
    return
  if str(_without_jit(ours)) != str(_without_jit(theirs)):
    facts = {
      "message": (
        "Without a mask the loss is another program than its reference."
      ),
      "mask": "None",
      "got": "another program",
    }
    finding = Finding(
      "identity", "", derivative="value", dtype=run.problem.dtype
    )
    yield Broken(finding, lambda: facts)


def _without_jit(program: Any) -> Any:
  """A program, or the one that it does no more than call."""
  jaxpr = program.jaxpr
  if len(jaxpr.eqns) == 1 and not program.consts:
    (eqn,) = jaxpr.eqns
    inner = eqn.params.get("jaxpr")
    whole = (eqn.invars, eqn.outvars) == (jaxpr.invars, jaxpr.outvars)
    if eqn.primitive.name in ("jit", "pjit") and whole:
      return _without_jit(inner)
  return program
