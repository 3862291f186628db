"""Data without their masked elements, and data with more of them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from optax_masking.testing._labels import role
from optax_masking.testing._masks import padded
from optax_masking.testing._options import Axes
from optax_masking.testing._problem import Argument
from optax_masking.testing._rounding import differ, other_data
from optax_masking.testing._run import Run

Take = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resized:
  """Data of another size, of which the loss has to be the same.

  Attributes:
    values: Makes the data of those of the full size.
    where: Their mask.
    of_result: Takes the entries of the full result that the other one has.
    of_argument: The same for the gradients, None for one that can't be
      compared.
    how: A description, to be put after "with".
    back: Takes the entries of the other result that the full one has.
    is_one: Whether one index or element is left.
    of_weights: Makes the cotangents of the other result of those of the full
      one, by default as `of_result`.
  """

  values: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
  where: np.ndarray
  of_result: Take
  of_argument: tuple[Take | None, ...]
  how: str
  back: Take = lambda x: x
  of_weights: Take | None = None
  is_one: bool = False


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _rename(kept: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Renames classes to their positions among those that are kept."""
  return np.searchsorted(kept, x).astype(x.dtype)


def _padded(axes: Axes, axis: int, count: int, x: np.ndarray) -> np.ndarray:
  """Adds zeros along an axis of the mask."""
  if axis not in axes or x.shape[axes.index(axis)] == 1:
    return x
  return np.pad(x, [(0, count if a == axis else 0) for a in axes])


def _constant(value: np.ndarray, _: np.ndarray) -> np.ndarray:
  return value


def _applied(
  steps: Sequence[Sequence[Take]], values: Sequence[np.ndarray]
) -> list[np.ndarray]:
  """Applies to each array its functions, step by step."""
  arrays = list(values)
  for functions in steps:
    arrays = [f(x) for f, x in zip(functions, arrays, strict=True)]
  return arrays


def _take(
  axes: Axes, shape: Sequence[int], axis: int, kept: np.ndarray
) -> Take:
  """Takes indices along an axis of the mask."""
  if axis not in axes or shape[axes.index(axis)] == 1:
    return _same
  return lambda x: np.take(x, kept, axes.index(axis))


def without_masked(run: Run, mask: str) -> Iterator[Resized]:
  """The data that a mask leaves, in each way in which they make an array."""
  where = run.masks[mask]
  if where.all() or not where.any() or run.result_axes is None:
    return
  for axis in range(where.ndim):
    others = tuple(k for k in range(where.ndim) if k != axis)
    kept = where.any(others)
    if (where == np.expand_dims(kept, others)).all():
      if _may_be_removed(run, mask, axis):
        yield from _without(run, axis, np.flatnonzero(kept))
      return
  if _may_be_removed(run, mask, where.ndim - 1):
    yield from _slices(run, where)


def _may_be_removed(run: Run, mask: str, axis: int) -> bool:
  """Whether a loss has to be the same without what is masked along an axis.

  If it matters where an element is, as with atoms of a residue or the steps of
  a recursion, only padding can be left out, of a mask that is meant.
  """
  if run.all_included is None or role(run, axis) is not None:
    return True
  given, where = run.problem.where, run.masks[mask]
  if (np.diff(given.astype(int), axis=axis) > 0).any():
    return True  # The given mask has holes, too.
  meant = mask == "as given" or mask in padded(given)
  return meant and bool((np.diff(where.astype(int), axis=axis) <= 0).all())


def _without(run: Run, axis: int, kept: np.ndarray) -> Iterator[Resized]:
  """All arrays with some indices of an axis alone."""
  problem = run.problem
  takes, renames = [], []
  for a in problem.arguments:
    take = _take(a.axes, a.value.shape, axis, kept)
    rename = _same
    if take is _same and a.integer and a.maskable:
      found = role(run, axis)
      if found is None or (
        found == "class" and not np.isin(a.value, kept).all()
      ):
        return
      if found == "class":
        rename = functools.partial(_rename, kept)
    takes.append(take)
    renames.append(rename)
  where = problem.where
  axes = tuple(range(where.ndim))
  small = _take(axes, where.shape, axis, kept)(np.ones(where.shape, bool))
  assert run.result_axes is not None
  yield Resized(
    functools.partial(_applied, (takes, renames)),
    small,
    _take(run.result_axes, run.result.shape, axis, kept),
    tuple(takes),
    "the masked elements removed from the data",
    is_one=len(kept) == 1,
  )


def _slices(run: Run, where: np.ndarray) -> Iterator[Resized]:
  """Slices that are left with the same number of elements, side by side."""
  axis = where.ndim - 1
  batch = tuple(range(axis))
  full = (*batch, axis)
  if (
    axis < 1
    or where.shape[axis] == 1
    or run.result_axes not in ((), batch, full)
  ):
    return
  if run.result.shape not in ((), where.shape[:-1], where.shape):
    return
  counts = where.reshape(-1, where.shape[axis]).sum(-1)
  sizes = sorted(set(counts.tolist()) - {0})
  if run.result_axes == () and len(sizes) > 1:
    return  # `flattened` covers what has no slices.
  if not run.remember(separate, axis):
    return
  for size in sizes[:2]:
    rows = np.flatnonzero(counts == size)
    resized = _slices_of(run, where, rows)
    if resized is not None and (len(rows) > 1 or len(counts) == 1):
      yield resized


def _slices_of(run: Run, where: np.ndarray, rows: np.ndarray) -> Resized | None:
  axis = where.ndim - 1
  batch = tuple(range(axis))
  mask = where.reshape(-1, where.shape[axis])[rows]
  size = int(mask[0].sum())
  examples = (len(rows), *[1] * (axis - 1))

  def of_elements(x):
    rest = x.shape[where.ndim :]
    flat = x.reshape(-1, where.shape[axis], *rest)[rows]
    return flat[mask].reshape(*examples, size, *rest)

  def of_examples(x):
    return x.reshape(-1, *x.shape[axis:])[rows].reshape(
      *examples, *x.shape[axis:]
    )

  takes: list[Take] = []
  renames: list[Take] = []
  all_rows = len(rows) == math.prod(where.shape[:-1])
  for a in run.problem.arguments:
    take = _take_of_slices(a, where.shape, of_elements, of_examples)
    if take is None:
      return None
    rename = _same
    if a.integer and a.maskable and take is not of_elements:
      found = role(run, axis)
      if found is None:
        return None
      if found == "class":
        labels = of_examples(a.value).reshape(-1)
        if not mask[np.arange(len(rows)), labels].all():
          return None
        before = np.cumsum(mask, -1)[np.arange(len(rows)), labels] - 1
        renamed = before.reshape(examples).astype(a.value.dtype)
        rename = functools.partial(_constant, renamed)
    takes.append(take)
    renames.append(rename)
  of_result: dict[Axes | None, Take] = {(): _same, batch: of_examples}
  return Resized(
    functools.partial(_applied, (takes, renames)),
    np.ones((*examples, size), bool),
    of_result.get(run.result_axes, of_elements),
    # The gradient of what all rows share is a sum over all of them.
    tuple(take if all_rows or take is not _same else None for take in takes),
    "the masked elements removed from the data",
  )


def _take_of_slices(
  a: Argument, shape: tuple[int, ...], of_elements: Take, of_examples: Take
) -> Take | None:
  rank = len(shape)
  if not a.maskable:
    return _same if all(k is None for k in a.axes) else None
  leading = a.value.shape[:rank]
  if a.axes[:rank] == tuple(range(rank)) and leading == shape:
    return of_elements
  if a.axes == tuple(range(rank - 1)) and a.value.shape == shape[:-1]:
    return of_examples
  return None


def separate(run: Run, axis: int) -> bool:
  """Whether no slice along an axis changes the loss of another."""
  problem = run.problem
  if run.all_included is None:
    return False
  if not run.result_axes and run.epsilon > 1e-6:
    return False  # In half precision a small change of others is lost.
  if run.result_axes:
    alone = _slice(
      tuple(range(problem.where.ndim)), problem.where.shape, axis, 0
    )
    values = problem.values_for(alone)
    if values is None:
      return False
    own = _slice(run.result_axes, run.result.shape, axis, 0)
    loss = run.evaluate_one(values, alone)[0]
    if differ(run, loss[own], run.usual[0][own], run.quantities[0]).any():
      return False  # It is divided by what all of them include.
  # A recursion goes one way, and may end before the last one.
  shape = problem.where.shape
  middle = min((s for k, s in enumerate(shape) if k != axis), default=1) // 2
  return all(_changes_itself(run, axis, index) for index in (0, middle, -1))


def _slice(
  axes: Axes, shape: tuple[int, ...], axis: int, index: int
) -> np.ndarray:
  """The elements of one slice along an axis, at an index of all others."""
  chosen = np.zeros(shape, bool)
  at = tuple(index if k not in (axis, None) else slice(None) for k in axes)
  chosen[at] = True
  return chosen


def _changes_itself(run: Run, axis: int, index: int) -> bool:
  """Whether other data in a slice change its own loss and gradients alone.

  The data have to change, since a derivative may be stopped.
  """
  arguments = run.problem.arguments
  values = other_data(run, lambda a: _slice(a.axes, a.value.shape, axis, index))
  results = run.evaluate_one(values, run.everything)
  known = False
  for quantity, got, usual in zip(
    run.quantities, results, run.usual, strict=True
  ):
    axes: Axes | None = None
    wrt = quantity.wrt
    if quantity.part == "value":
      axes = run.result_axes
    elif quantity.part == "vjp" and wrt is not None and arguments[wrt].maskable:
      axes = arguments[wrt].axes
    if not axes or not {*axes} - {axis, None}:
      continue
    known = True
    others = ~_slice(axes, got.shape, axis, index)
    if differ(run, got[others], usual[others], quantity).any():
      return False
  return known


def flattened(run: Run, where: np.ndarray) -> Resized | None:
  """All included elements in one row.

  Only a loss for which rows do not matter, such as a mean over tokens, has to
  be the same: `compaction` checks that first.
  """
  rank = where.ndim
  axes = tuple(range(rank))
  result_axes = run.result_axes
  if rank < 2 or result_axes is None:
    return None
  whole = all(a is None for a in result_axes)
  if not whole and result_axes != axes:
    return None

  def of_elements(x):
    rest = x.shape[rank:]
    flat = x.reshape(-1, *rest)[where.reshape(-1)]
    return flat.reshape(*[1] * (rank - 1), -1, *rest)

  takes: list[Take] = []
  for a in run.problem.arguments:
    if all(k is None for k in a.axes):
      takes.append(_same)
    elif a.axes[:rank] == axes and a.value.shape[:rank] == where.shape:
      takes.append(of_elements)
    else:
      return None
  return Resized(
    functools.partial(_applied, (takes,)),
    np.ones((*[1] * (rank - 1), int(where.sum())), bool),
    _same if whole else of_elements,
    tuple(takes),
    "the included elements in one row",
    is_one=int(where.sum()) == 1,
  )


def extended(run: Run, mask: str, axis: int, count: int) -> Resized | None:
  """The data with more indices of an axis of the mask, all of them masked."""
  where = run.masks[mask]
  if where.shape[axis] == 1 or run.result_axes is None:
    return None

  size = where.shape[axis]
  add, drop = np.arange(size + count) % size, np.arange(size)
  longer = _take(tuple(range(where.ndim)), where.shape, axis, add)(where)
  np.moveaxis(longer, axis, 0)[size:] = False
  arguments = run.problem.arguments
  adds = [_take(a.axes, a.value.shape, axis, add) for a in arguments]
  drops = [_take(a.axes, a.value.shape, axis, drop) for a in arguments]
  return Resized(
    functools.partial(_applied, (adds,)),
    longer,
    _same,
    tuple(drops),
    f"{count} masked {'rows' if axis == 0 else 'elements'} more",
    back=_take(run.result_axes, run.result.shape, axis, drop),
    of_weights=functools.partial(_padded, run.result_axes, axis, count),
  )
