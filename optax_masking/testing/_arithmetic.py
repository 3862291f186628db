"""Clause 7: no NaN or infinity is computed because of a mask."""

from collections.abc import Iterator, Sequence

import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._blame import step_facts
from optax_masking.testing._events import Event, Tried, Untried
from optax_masking.testing._masks import few_of_each_kind
from optax_masking.testing._poisons import Poisoning, poisonings
from optax_masking.testing._run import Run, error_line, number


def clean_arithmetic(run: Run) -> Iterator[Event]:
  """Looks at every operation, for some of the masks."""
  try:
    yield from _all_operations(run)
  except Exception as error:
    yield Untried(
      "clean_arithmetic",
      f"the loss can't be run operation by operation: {error_line(error)}",
    )


def _all_operations(run: Run) -> Iterator[Event]:
  if run.all_included is None:
    first = next(iter(run.masks))
    steps, outputs = run.steps(run.values_of(first), run.masks[first])
  else:
    steps, outputs = run.steps(run.all_included, run.everything)
  yield Tried("clean_arithmetic")
  if run.is_long:
    yield Untried(
      "clean_arithmetic",
      "the program is long, so that only values and gradients were looked at",
    )
  made = _trace.making_nonfinite(steps, outputs)
  usual = {_place(steps[i]) for i in made}
  for mask in few_of_each_kind(run.masks, 1):
    known = set(usual)
    # The usual label of padding is finite, too.
    labels = [
      p
      for p in poisonings(run, mask)
      if p.name == "-100" and run.problem.arguments[p.argument].is_label
    ]
    for poisoning in (None, *labels):
      data = run.values_of(mask) if poisoning is None else poisoning.data(run)
      steps, outputs = run.steps(data, run.masks[mask])
      made = _trace.making_nonfinite(steps, outputs)
      new = [i for i in made if _place(steps[i]) not in known]
      if new:
        yield _broken(run, mask, steps, outputs, new[0], poisoning=poisoning)
      if poisoning is None:
        known |= {_place(steps[i]) for i in made}


def _place(step: _trace.Step) -> tuple:
  return step.primitive, _trace.source(step)


def _broken(
  run: Run,
  mask: str,
  steps: Sequence[_trace.Step],
  outputs: Sequence[_trace.Value],
  first: int,
  *,
  poisoning: Poisoning | None,
) -> Event:
  step = steps[first]
  quantity = next(
    (
      q
      for q, output in zip(run.quantities, outputs, strict=False)
      if first in _trace.origins(steps, [output])[0]
    ),
    run.quantities[0],
  )
  numbers = np.ravel(
    np.asarray(next(filter(_trace.nonfinite, step.outputs)).array)
  )
  got = numbers[~np.isfinite(numbers)][0]
  if poisoning is None:
    when = "On finite data, with this mask"
    _, positions = _trace.origins(steps, step.inputs)
    sources = [p for p in positions if p in run.problem.floats]
    argument = sources[0] if len(sources) == 1 else None
  else:
    argument = poisoning.argument
    name = run.problem.arguments[argument].name
    when = f"When `{name}` holds {poisoning.name} where it is masked"

  def describe():
    return {
      "message": (
        f"{when}, `{step.primitive}` computes {number(got)} on the way to"
        f" {run.describe(quantity)}."
      ),
      "poison": None if poisoning is None else poisoning.name,
      **run.facts(mask, got, 0),
      "expected": "a finite number",
      **step_facts(step),
    }

  return run.broken("clean_arithmetic", quantity, describe, argument)
