"""The poisons that a check puts into masked elements."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._run import Run


@dataclasses.dataclass(frozen=True)
class Poisoning:
  """Garbage in all that a mask masks of an argument, or in one element."""

  mask: str
  argument: int
  name: str
  value: np.ndarray

  def data(
    self, run: Run, element: tuple[int, ...] | None = None
  ) -> list[np.ndarray]:
    """The data with the poison in all that is masked, or in one element."""
    values = list(run.values_of(self.mask))
    replaced = np.array(values[self.argument])
    if element is None:
      replaced[run.problem.masked(run.masks[self.mask], self.argument)] = (
        self.value
      )
    else:
      replaced[element] = self.value
    values[self.argument] = replaced
    return values


def inputs(run: Run) -> frozenset[int]:
  """Integers that look up rows of a shared table, as tokens do.

  A mask of tokens is one of their losses: a prompt is masked, and read.
  """
  arguments = run.problem.arguments
  found = {
    i
    for i, a in enumerate(arguments)
    if a.integer
    and a.maskable
    and not run.problem.options.axes_of(a.name)[0]
    and not a.is_label
  }
  if not found or run.jaxpr is None:
    return frozenset()
  shared = {i for i, a in enumerate(arguments) if not a.maskable}
  return frozenset(found & _trace.flow(run.jaxpr, shared).indices)


def poisonings(run: Run, mask: str) -> Iterator[Poisoning]:
  """Each argument with something masked, and each poison for it."""
  problem = run.problem
  classes = max(s for a in problem.arguments for s in (1, *a.value.shape))
  for i, a in enumerate(problem.arguments):
    if i in problem.call.sources:
      continue  # Its values are the mask.
    if i in run.remember(inputs):
      continue  # A model reads tokens that are masked, too.
    if problem.masked(run.masks[mask], i).any():
      for name, value in _poisons(a.value.dtype, classes).items():
        yield Poisoning(mask, i, name, value)


def _poisons(dtype: np.dtype, classes: int) -> dict[str, np.ndarray]:
  """The values that a masked element may hold, by name."""
  if np.issubdtype(dtype, np.bool_):
    values: Sequence = (True, False)
  elif jnp.issubdtype(dtype, jnp.integer):
    limits = jnp.iinfo(dtype)
    values = [
      v
      for v in (-1, -100, classes, limits.max, limits.min)
      if limits.min <= v <= limits.max
    ]
  else:
    info = jnp.finfo(dtype)
    values = (
      np.nan,
      np.inf,
      -np.inf,
      info.max,
      max(-1e30, float(info.min)),
      info.smallest_subnormal,
      0.0,
    )
  return {f"{np.asarray(v, dtype)}": np.asarray(v, dtype) for v in values}
