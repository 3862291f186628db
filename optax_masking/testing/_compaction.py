"""Clause 3: the loss of the data without what is masked."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._ambiguity import without_shared_axes
from optax_masking.testing._events import Broken, Event, Tried, Untried
from optax_masking.testing._labels import role
from optax_masking.testing._problem import Argument
from optax_masking.testing._resized import (
  Resized,
  extended,
  flattened,
  without_masked,
)
from optax_masking.testing._rounding import Pairs, agree, differ, nearby_for
from optax_masking.testing._run import (
  Run,
  Values,
  error_line,
  number,
  weights_of,
)


def compaction(run: Run) -> Iterator[Event]:
  """Compares the loss with that of data of another size."""
  if _trace.draws_random_numbers(run.jaxpr):
    yield Untried(
      "compaction",
      "the loss draws random numbers, which depend on the shape of the data",
    )
    return
  shared = [a for a in run.remember(_indices_of_masked) if not a.maskable]
  if shared:
    yield Untried(
      "compaction",
      f"`{shared[0].name}` has indices of data, which removing some changes",
    )
    return
  events = list(_of_other_sizes(run))
  other = without_shared_axes(run.problem)
  if other and any(isinstance(event, Broken) for event in events):
    others = list(_of_other_sizes(dataclasses.replace(run, problem=other)))
    if all(isinstance(event, Tried) for event in others):
      events = others
  yield from events
  yield from _equal_elements(run)


def _indices_of_masked(run: Run) -> list[Argument]:
  """The arrays that index what a mask masks, as labels do, too."""
  arguments = run.problem.arguments
  if run.jaxpr is None or not any(a.integer for a in arguments):
    return []
  masked = {i for i, a in enumerate(arguments) if a.maskable}
  found = _trace.flow(run.jaxpr, masked).indices
  return [a for i, a in enumerate(arguments) if i in found and a.integer]


def _of_other_sizes(run: Run) -> Iterator[Event]:
  call = run.problem.call
  # Each shape is a program to compile: one of each kind is enough.
  shapes: dict[Any, tuple[int, ...]] = {}
  refused: set[Any] = set()
  narrow = _is_narrow(run)
  for mask in run.masks:
    for resized in _resizings(run, mask):
      if call.sources and not call.derives(
        resized.values(run.values_of(mask)), resized.where
      ):
        continue
      shape, full = resized.where.shape, run.problem.where.shape
      kind: tuple[Any, ...] = (
        resized.how,
        *map(operator.eq, shape, full),
      )
      if resized.is_one:
        # One alone broadcasts with arrays that the loss has of its own, for
        # which it would not take others.
        if narrow or kind not in shapes or kind in refused:
          continue
        kind = (*kind, "one")
      if shapes.setdefault(kind, shape) == shape:
        events = list(_same_loss(run, mask, resized))
        if any(isinstance(event, Untried) for event in events):
          refused.add(kind)
        yield from events


def _is_narrow(run: Run) -> bool:
  """Whether to compile less, as in a quick audit and in half precision."""
  return "vmap" not in run.problem.options.transforms


def _resizings(run: Run, mask: str) -> Iterator[Resized]:
  where = run.masks[mask]
  yield from without_masked(run, mask)
  if mask.startswith(("as given", "sequences of growing", "the element")):
    if where.any() and not where.all() and _rows_do_not_matter(run, mask):
      resized = flattened(run, where)
      if resized is not None:
        yield resized
    last = 0 if _is_narrow(run) else where.ndim - 1
    for axis in sorted({0, last} if where.ndim else ()):
      if run.remember(_indices_of_masked) and role(run, axis) is None:
        continue  # They may count all elements, also of other rows.
      longer = extended(run, mask, axis, count=2)
      if longer is not None:
        yield longer


def _rows_do_not_matter(run: Run, mask: str) -> bool:
  """Whether elements in one row have the loss that they have in several.

  They have in a mean over tokens, and not in a mean of the means of rows.
  """
  return run.remember(_one_row_is_the_same) and not _adds_rows(run, mask)


def _one_row_is_the_same(run: Run) -> bool:
  if run.all_included is None:
    return False
  resized = flattened(run, run.everything)
  if resized is None:
    return False
  try:
    other = _evaluate(run, resized, run.all_included)
  except Exception:  # Of a loss that needs its rows.
    return False
  pairs = _pairs(run, resized, run.usual, other)
  return not any(differ(run, a, b, q).any() for q, a, b in pairs)


def _adds_rows(run: Run, mask: str) -> bool:
  """Whether the loss is the sum or the mean of the losses of the rows alone."""
  where = run.masks[mask]
  rows = np.flatnonzero(where.reshape(len(where), -1).any(-1))
  alone = []
  for row in rows:
    one = np.zeros_like(where)
    one[row] = where[row]
    values = run.problem.values_for(one)
    if values is None:
      return False
    alone.append((values, run.tangents, one))
  losses = np.asarray(run.evaluate(alone)[0], "float64")
  total, whole = losses.sum(0), run.clean[mask][0]
  first = run.quantities[0]
  return len(rows) > 1 and any(
    not differ(run, whole, expected, first).any()
    for expected in (total, total / len(rows))
  )


def _evaluate(
  run: Run, resized: Resized, values: Sequence[np.ndarray]
) -> dict[int | None, np.ndarray]:
  """The value and the gradients of the loss of the data of another size."""
  weights = (resized.of_weights or resized.of_result)(weights_of(run))
  row: tuple[Any, ...] = (resized.values(values), weights)
  if run.unmasked is not None and resized.where.all():
    return {k: x[0] for k, x in run.plain([row]).items()}
  return {k: x[0] for k, x in run.with_mask([(*row, resized.where)]).items()}


def _pairs(
  run: Run,
  resized: Resized,
  results: Sequence[np.ndarray],
  other: dict[int | None, np.ndarray],
) -> Pairs:
  pairs: Pairs = []
  for quantity, got in zip(run.quantities, results, strict=True):
    if quantity.part == "value":
      taken = resized.of_result(got)
      expected = resized.back(other[None])
    elif quantity.part == "vjp" and quantity.wrt is not None:
      take = resized.of_argument[quantity.wrt]
      if take is None:
        continue
      x = other[quantity.wrt]
      # Either is the larger one: the entries of the smaller are compared.
      longer = x.size > got.size
      taken, expected = (got, take(x)) if longer else (take(got), x)
    else:
      continue
    pairs.append((quantity, taken, expected))
  # The losses of examples may be scaled for their mean, which their number is
  # part of.
  scale = other[None].size / max(1, run.result.size)
  scaled = [(q, got * scale, expected) for q, got, expected in pairs]
  if scale == 1 or any(a.shape != b.shape for _, a, b in pairs):
    return pairs
  return (
    pairs if any(differ(run, a, b, q).any() for q, a, b in scaled) else scaled
  )


def _same_loss(run: Run, mask: str, resized: Resized) -> Iterator[Event]:
  where = run.masks[mask]

  def pairs(nearby: bool) -> Pairs:
    values: Values = run.values_of(mask)
    results = run.clean[mask]
    if nearby:
      values = nearby_for(run, where)
      results = run.evaluate_one(values, where)
    return _pairs(run, resized, results, _evaluate(run, resized, values))

  try:
    first = pairs(False)
  except Exception as error:
    yield Untried("compaction", _why_not(run, resized, mask, error))
    return
  if any(a.shape != b.shape for _, a, b in first):
    yield Untried("compaction", _UNEXPLAINED)
    return
  yield from agree(
    run,
    "compaction",
    mask,
    lambda nearby: pairs(True) if nearby else first,
    lambda got, expected, index: _message(
      run, resized, where, got[index], expected[index]
    ),
  )


_UNEXPLAINED = "the loss has a shape that its axes do not explain"


def _why_not(run: Run, resized: Resized, mask: str, error: Exception) -> str:
  """Why the loss of data of another size can't be compared."""
  take = resized.of_weights or resized.of_result
  values = resized.values(run.values_of(mask))
  where = run.problem.call.host_mask(resized.where)
  try:
    shape = jax.eval_shape(run.problem.call, values, where).shape
    if shape != take(weights_of(run)).shape:
      return _UNEXPLAINED
  except Exception:  # The same again.
    pass
  return f"the loss does not take data of another size: {error_line(error)}"


def _message(
  run: Run, resized: Resized, where: np.ndarray, got: Any, expected: Any
) -> str:
  text = "With the mask, {what} is {got}; with " + resized.how
  text += " it is {expected}."
  # Of the data of the other size, the same elements are included.
  size, included = where.size, int(where.sum())
  ratio = size / resized.where.size
  if included < size and got and abs(expected / got / ratio - 1) < 1e-3:
    text += (
      " It is as if the loss were divided by the number of all elements,"
      f" {size}, and not of the included ones, {included}."
    )
  return text


def _equal_elements(run: Run) -> Iterator[Event]:
  """Clause 3 for one element: the mean of equal ones is that of each."""
  problem = run.problem
  if run.result.shape or problem.where.size < 4 or run.epsilon > 1e-6:
    return  # In half precision equal means differ by more.
  values = [
    np.broadcast_to(
      x[tuple(slice(None) if k is None else slice(1) for k in a.axes)], x.shape
    )
    if a.maskable
    else x
    for a, x in zip(problem.arguments, problem.values, strict=True)
  ]
  rows = []
  for count in (1, 2, 3, 4):
    where = np.arange(problem.where.size) < count
    where = where.reshape(problem.where.shape)
    arrays = problem.call.arrays_for(values, where)
    if arrays is None:
      return
    rows.append((arrays, run.tangents, where))
  quantity = run.quantities[0]
  one, *more = run.evaluate(rows)[0]
  if differ(run, more, more[0], quantity).any():
    return  # It depends on more than their mean.
  # A small number that is added to the count changes less.
  if not one or not abs(one - more[0]) > 0.01 * abs(more[0]):
    return
  facts = {
    "message": (
      "With the same data in all elements, the loss of two, of three and of"
      f" four included ones is {number(more[0])}, and that of one is"
      f" {number(one)}, as if it were divided by two or more."
    ),
    **run.facts("the first element alone", one, more[0], rows[0][2]),
  }
  yield run.broken("compaction", quantity, lambda: facts)
