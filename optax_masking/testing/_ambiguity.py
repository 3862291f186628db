"""Arrays whose axes may be several of the mask's, which have the same size."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from optax_masking.testing._options import Axes
from optax_masking.testing._problem import Argument, Problem
from optax_masking.testing._rounding import differ, other_data
from optax_masking.testing._run import Run


def without_shared_axes(problem: Problem) -> Problem | None:
  """The problem, if arrays that all examples share have no axis of the mask.

  Such an axis may have the same size by chance. None if there is none.
  """
  if all(a.maskable or not {*a.axes} - {None} for a in problem.arguments):
    return None
  arguments = (
    a if a.maskable else dataclasses.replace(a, axes=(None,) * len(a.axes))
    for a in problem.arguments
  )
  return dataclasses.replace(problem, arguments=tuple(arguments))


def with_result_axes(run: Run) -> Run:
  """The run, with the axes of the result that the loss is found to have."""
  shape = run.result.shape
  readings = list(_readings(shape, run.problem.where.shape))
  if len(readings) < 2 or run.problem.options.axes_of("return")[0]:
    return run
  for axes in readings:
    if _explains(run, axes):
      given = run.problem.options.axes or {}
      call = run.problem.call.with_options(axes={**given, "return": axes})
      problem = dataclasses.replace(run.problem, call=call)
      return dataclasses.replace(run, problem=problem)
  return run


def _readings(shape: tuple[int, ...], mask: tuple[int, ...]) -> Iterator[Axes]:
  for axes in itertools.combinations(range(len(mask)), len(shape)):
    if shape == tuple(mask[k] for k in axes):
      yield axes


def _explains(run: Run, axes: Axes) -> bool:
  """Whether other data in one slice change its own entries of the result."""
  if run.all_included is None:
    return False
  for position, axis in enumerate(axes):
    values = other_data(run, functools.partial(_first_of, axis))
    got = run.evaluate_one(values, run.everything)[0]
    changed = differ(run, got, run.usual[0], run.quantities[0])
    if np.moveaxis(changed, position, 0)[1:].any():
      return False
  return True


def _first_of(axis: int | None, argument: Argument) -> np.ndarray | None:
  """The first slice of an argument along an axis, None without this axis."""
  if axis not in argument.axes:
    return None
  chosen = np.zeros(argument.value.shape, bool)
  np.moveaxis(chosen, argument.axes.index(axis), 0)[0] = True
  return chosen
