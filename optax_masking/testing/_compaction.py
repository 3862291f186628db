"""The data without their masked elements, where they still make an array."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from optax_masking.testing._case import Axes, Problem

# A function of an axis of the data. For the integer arguments without this axis
# it returns "class" if they name classes along the axis, "free" if the axis
# does not concern them, and None otherwise.
Roles = Callable[[int], str | None]
Taking = Callable[[np.ndarray], np.ndarray]
T = TypeVar("T")


class Compact(NamedTuple):
  """Data without their masked elements.

  `left_of` has for each argument a function that takes, from an array of its
  shape, the part that the smaller data keep; None if they keep no such part.
  `left_of_result` does the same for the result.
  """

  values: list[np.ndarray]
  where: np.ndarray
  left_of_result: Taking
  left_of: list[Taking | None]


def _same(x: T) -> T:
  return x


def compactions(
  problem: Problem,
  data: Sequence[np.ndarray],
  where: np.ndarray,
  result_axes: Axes | None,
  result_shape: tuple[int, ...],
  roles: Roles,
  separate: Callable[[int], bool],
) -> Iterator[Compact]:
  """Makes the data that a mask leaves, if it leaves rectangles.

  Args:
    problem: The loss and the shapes of its data.
    data: The arrays to make smaller ones of.
    where: The mask.
    result_axes: Which axes of the data the result has, None if unknown.
    result_shape: The shape of the result.
    roles: The role of integer arguments for an axis that they lack.
    separate: Whether the loss computes each slice along an axis on its own.

  Yields:
    A `Compact` if the mask takes whole indices out of one axis; or one for each
    number of elements that slices are left with, if these are `separate`.
  """
  full = problem.full(where)
  if where.all() or not where.any() or result_axes is None:
    return
  for axis in range(full.ndim):
    others = tuple(k for k in range(full.ndim) if k != axis)
    kept = full.any(others)
    if (full == np.expand_dims(kept, others)).all():
      compact = _without(
        problem,
        data,
        axis,
        np.flatnonzero(kept),
        result_axes,
        result_shape,
        roles,
      )
      if compact is not None:
        yield compact
      return
  if all(
    k is not None and s == problem.shape[k]
    for k, s in zip(result_axes, result_shape, strict=True)
  ):
    yield from _slices(problem, data, full, result_axes, roles, separate)


def _is_integer(x: np.ndarray) -> bool:
  return jnp.issubdtype(x.dtype, jnp.integer)


def _without(
  problem: Problem,
  data: Sequence[np.ndarray],
  axis: int,
  kept: np.ndarray,
  result_axes: Axes,
  result_shape: tuple[int, ...],
  roles: Roles,
) -> Compact | None:
  """All arrays with some indices of an axis alone."""

  def taking(axes: Axes, shape: Sequence[int]) -> Taking:
    if axis not in axes or shape[axes.index(axis)] == 1:
      return _same
    return lambda x: np.take(x, kept, axes.index(axis))

  values: list[np.ndarray] = []
  left_of: list[Taking | None] = []
  for argument, x in zip(problem.arguments, data, strict=True):
    take = taking(argument.axes, x.shape)
    x = take(x)
    if take is _same and _is_integer(x):
      role = roles(axis)
      if role is None:
        return None
      if role == "class":
        if not np.isin(x, kept).all():
          return None
        x = np.searchsorted(kept, x).astype(x.dtype)
    values.append(x)
    left_of.append(take)
  take_where = taking(problem.where_axes, problem.where.shape)
  ones = np.ones(problem.where.shape, bool)
  return Compact(
    values,
    take_where(ones),
    taking(result_axes, result_shape),
    left_of,
  )


def _slices(
  problem: Problem,
  data: Sequence[np.ndarray],
  full: np.ndarray,
  result_axes: Axes,
  roles: Roles,
  separate: Callable[[int], bool],
) -> Iterator[Compact]:
  """Slices that are left with the same number of elements, side by side."""
  rank = full.ndim
  reduced = problem.reduced or (rank - 1,)
  if rank < 2 or len(reduced) != 1 or problem.shape != full.shape:
    return
  (axis,) = reduced
  batch = tuple(k for k in range(rank) if k != axis)
  all_axes = tuple(range(rank))
  if result_axes not in ((), batch, all_axes) or not separate(axis):
    return
  mask = np.moveaxis(full, axis, -1).reshape(-1, full.shape[axis])
  counts = mask.sum(-1)
  sizes = sorted(set(counts) - {0})
  if result_axes == () and len(sizes) > 1:
    return  # How the loss adds them up is not known.
  for size in sizes:
    rows = np.flatnonzero(counts == size)
    compact = _slices_of(problem, data, axis, mask, rows, result_axes, roles)
    if compact is not None:
      yield compact


def _slices_of(
  problem: Problem,
  data: Sequence[np.ndarray],
  axis: int,
  mask: np.ndarray,
  rows: np.ndarray,
  result_axes: Axes,
  roles: Roles,
) -> Compact | None:
  rank = len(problem.shape)
  batch = tuple(k for k in range(rank) if k != axis)
  kept = mask[rows]
  size = int(kept[0].sum())
  examples = (len(rows), *[1] * (len(batch) - 1))

  def of_elements(x):
    flat = np.moveaxis(x, axis, -1).reshape(mask.shape)[rows]
    return np.moveaxis(flat[kept].reshape(*examples, size), -1, axis)

  def of_examples(x):
    return x.reshape(-1)[rows].reshape(examples)

  takes_of_result: dict[Axes, Taking] = {(): _same, batch: of_examples}
  values: list[np.ndarray] = []
  left_of: list[Taking | None] = []
  for argument, x in zip(problem.arguments, data, strict=True):
    axes = argument.axes
    if (not argument.maskable and all(k is None for k in axes)) or not x.ndim:
      if _is_integer(x) and roles(axis) != "free":
        return None
      values.append(x)
      left_of.append(_same)
    elif axes == tuple(range(rank)):
      values.append(of_elements(np.broadcast_to(x, problem.shape)))
      left_of.append(of_elements if x.shape == problem.shape else None)
    elif axes == batch:
      shape = tuple(problem.shape[k] for k in batch)
      labels = of_examples(np.broadcast_to(x, shape))
      if _is_integer(x):
        role = roles(axis)
        if role == "class":
          flat = labels.reshape(-1)
          if not kept[np.arange(len(rows)), flat].all():
            return None
          before = np.cumsum(kept, -1)[np.arange(len(rows)), flat] - 1
          labels = before.reshape(labels.shape).astype(x.dtype)
        elif role is None:
          return None
      values.append(labels)
      left_of.append(of_examples if x.shape == shape else None)
    else:
      return None
  return Compact(
    values,
    of_elements(np.ones(problem.shape, bool)),
    takes_of_result.get(result_axes, of_elements),
    left_of,
  )
