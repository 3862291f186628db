"""Whether integer arguments are class indices along an axis of the mask."""

from collections.abc import Callable, Iterator

import numpy as np

from optax_masking.testing._program import Quantity
from optax_masking.testing._rounding import differ
from optax_masking.testing._run import Run

RegionOf = Callable[[Quantity, np.ndarray], np.ndarray | None]


def role(run: Run, axis: int) -> str | None:
  """What integers that lack an axis of the mask have to do with it.

  They name a "class" along it if moving the classes, and the names with them,
  changes nothing, and are "free" of it if moving the classes alone does not.
  """
  return run.remember(_find_role, axis)


def _find_role(run: Run, axis: int) -> str | None:
  problem = run.problem
  if run.all_included is None:
    return None
  moved, renamed = [], []
  size = problem.where.shape[axis]
  for a, x in zip(problem.arguments, run.all_included, strict=True):
    if axis in a.axes:
      x = np.roll(x, 1, a.axes.index(axis))
      moved.append(x)
      renamed.append(x)
    else:
      moved.append(x)
      names = (x + 1) % size if a.integer and a.maskable else x
      renamed.append(names.astype(x.dtype))
  results = run.evaluate(
    [(values, run.tangents, run.everything) for values in (moved, renamed)]
  )[0]
  for name, result in zip(("free", "class"), results, strict=True):
    if run.result_axes is not None and axis in run.result_axes:
      result = np.roll(result, -1, run.result_axes.index(axis))
    if not differ(run, result, run.usual[0], run.quantities[0]).any():
      return name
  return None


def lost_examples(run: Run, mask: str) -> Iterator[tuple[int, RegionOf]]:
  """The examples whose own class is masked, by the argument that names it.

  Yields:
    The position of the argument, and a function that gives the entries of a
    quantity that belong to such examples.
  """
  problem = run.problem
  where = run.masks[mask]
  rank = where.ndim
  for i, (a, value) in enumerate(
    zip(problem.arguments, run.values_of(mask), strict=True)
  ):
    lacking = [k for k in range(rank) if k not in a.axes]
    batch = tuple(k for k in range(rank) if k not in lacking)
    if (
      not a.integer
      or len(lacking) != 1
      or a.axes != batch
      or a.value.shape != tuple(where.shape[k] for k in batch)
      or run.result_axes != batch
      or role(run, lacking[0]) != "class"
    ):
      continue
    (axis,) = lacking
    by_class = np.moveaxis(where, axis, -1)
    own = np.take_along_axis(by_class, value[..., None], -1)[..., 0]
    lost = ~own & run.included_of_result(where)
    if lost.any():
      yield i, _region(run, lost, axis, batch)


def _region(
  run: Run, lost: np.ndarray, axis: int, batch: tuple[int, ...]
) -> RegionOf:
  full = tuple(range(run.problem.where.ndim))

  def region_of(quantity, got):
    if quantity.wrt is None:
      return lost
    axes = run.problem.arguments[quantity.wrt].axes
    if axes == full:
      return np.broadcast_to(np.expand_dims(lost, axis), got.shape)
    return np.broadcast_to(lost, got.shape) if axes == batch else None

  return region_of
