"""Where a wrong number arose."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._program import Quantity
from optax_masking.testing._run import Run


def blame(
  run: Run,
  quantity: Quantity,
  got: Any,
  values: Sequence[Any],
  where: np.ndarray,
  *,
  against: Sequence[Any] | None = None,
) -> dict[str, Any]:
  """The operation and the line in which a wrong number arose, if found.

  Args:
    run: The run.
    quantity: The quantity that has the number.
    got: The number.
    values: The data that give it.
    where: Their mask.
    against: Data that do not give it, for a finite number.
  """
  finite = bool(np.isfinite(got))
  if finite and against is None:
    return {}
  try:
    steps, outputs = run.steps(values, where)
    clean = run.steps(against, where)[0] if finite and against else []

    def changed(value):
      x = _trace.floating(value)
      if x is None or len(steps) != len(clean):
        return False
      y = clean[value.step].outputs[value.position].array
      return not np.array_equal(x, np.asarray(y), equal_nan=True)

    wrong = _trace.has_nan if np.isnan(got) else _trace.nonfinite
    output = outputs[run.quantities.index(quantity)]
    step = _trace.first(steps, output, changed if finite else wrong)
  except Exception:  # Of a loss that can't be run so, or a newer JAX.
    return {}
  return {} if step is None else step_facts(step)


def step_facts(step: _trace.Step) -> dict[str, Any]:
  """The operation and the line of a step, as facts of a finding."""
  place, code = _trace.source(step)
  return {"primitive": step.primitive, "source": place, "code": code}
