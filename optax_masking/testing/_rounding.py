"""Comparisons that hold to rounding: two programs of the same data agree."""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_masking.testing._blame import blame
from optax_masking.testing._events import Event, Tried
from optax_masking.testing._masks import few_of_each_kind
from optax_masking.testing._problem import Argument
from optax_masking.testing._program import Quantity
from optax_masking.testing._run import Run, Values, first_index, number

# By how many roundings two programs of the same numbers may differ. Those of
# half precision are large, and most of a program is computed without them.
_ROUNDINGS, _ROUNDINGS_OF_HALF = 32.0, 8.0

Pairs = list[tuple[Quantity, np.ndarray, np.ndarray]]


def differ(run: Run, got: Any, expected: Any, quantity: Quantity) -> np.ndarray:
  """Where numbers differ by more than rounding explains."""
  got, expected = (np.asarray(x, "float64") for x in (got, expected))
  half = run.epsilon > float(jnp.finfo("float32").eps)
  room = run.epsilon * (_ROUNDINGS_OF_HALF if half else _ROUNDINGS)
  largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
  room = room * max(_size(run, quantity), largest)
  return ~((np.abs(got - expected) <= room) | (got == expected))


def _size(run: Run, quantity: Quantity) -> float:
  """The size of the numbers that a quantity is made of, which may cancel.

  A loss is made of terms as large as its gradient times the data, and its
  gradient of terms as large as the loss over the data. What else cancels shows
  in the noise.
  """
  return run.remember(_find_size, quantity)


def _find_size(run: Run, quantity: Quantity) -> float:
  def largest(position):
    x = np.asarray(run.usual[position], "float64")
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))

  position = run.quantities.index(quantity)
  own = max(largest(position), run.remember(_noise)[position] / run.epsilon)
  if quantity.derivative not in ("value", "vjp"):
    return own
  loss = largest(0)
  count = max(1, run.usual[0].size)
  values = run.problem.values
  for q, gradient in zip(run.quantities, run.usual, strict=True):
    if q.part == "vjp" and q.wrt is not None:
      data = np.asarray(values[q.wrt], "float64")
      terms = np.abs(np.asarray(gradient, "float64") * data)
      loss = max(loss, float(terms[np.isfinite(terms)].sum()) / count)
  if quantity.wrt is None:
    return max(own, loss)
  data = np.abs(np.asarray(values[quantity.wrt], "float64")).max(initial=0)
  return max(own, loss / data) if data else own


def _noise(run: Run) -> list[float]:
  """How much the last bits of the data change the numbers of each quantity.

  Half of the numbers change by more: those at a kink change by far more. What
  is 0 but for rounding has noise of a size that its numbers do not show.
  """
  rng = np.random.default_rng(2)
  rows, clean = [], []
  for mask in few_of_each_kind(run.masks, 1):
    for _ in range(2):
      values = list(run.values_of(mask))
      for i in run.problem.floats:
        if i not in run.problem.call.sources:
          x = values[i]
          bits = 2 * float(jnp.finfo(x.dtype).eps)
          factor = 1 + bits * rng.choice((-1, 1), x.shape)
          values[i] = (x * factor).astype(x.dtype)
      rows.append((values, run.tangents, run.masks[mask]))
      clean.append(run.clean[mask])
  changes = []
  for results, *before in zip(run.evaluate(rows), *clean, strict=True):
    change = np.abs(results.astype("float64") - np.stack(before))
    change = change.reshape(len(rows), -1).max(0, initial=0)
    finite = change[np.isfinite(change)]
    changes.append(float(np.median(finite)) if finite.size else 0.0)
  return changes


def agree(
  run: Run,
  clause: str,
  mask: str,
  pairs: Callable[[bool], Pairs],
  message: Callable[[np.ndarray, np.ndarray, tuple], str] | str,
  *,
  transform: str | None = None,
) -> Iterator[Event]:
  """Compares what two programs make of the same data.

  A derivative at a kink depends on how the numbers were rounded: it has to
  differ beside it, too.

  Args:
    run: The run.
    clause: The clause that is broken if they differ.
    mask: The mask, by name.
    pairs: Computes the numbers to compare, of the data or of nearby ones.
    message: The sentence that reports a difference, with fields `what`, `got`
      and `expected`.
    transform: The transformation, if it is not that of the run.
  """
  yield Tried(clause)
  beside: Pairs | None = None
  for i, (quantity, got, expected) in enumerate(pairs(False)):
    # A number that is not finite can't be compared.
    wrong = differ(run, got, expected, quantity) & np.isfinite(expected)
    if quantity.derivative == "hessian":
      # Its terms cancel by more than the computed numbers show.
      wrong &= ~np.isfinite(got)
    if not wrong.any():
      continue
    if quantity.wrt is not None or quantity.label == "the tangent":
      beside = beside or pairs(True)
      if not differ(run, beside[i][1], beside[i][2], quantity).any():
        continue
    index = first_index(wrong)

    def describe(quantity=quantity, got=got, expected=expected, index=index):
      text = message
      if callable(text):
        text = text(got, expected, index)
      where = run.masks.get(mask, run.everything)
      values = run.problem.values_for(where) or run.problem.values
      return {
        "message": text.format(
          what=run.describe(quantity, index),
          got=number(got[index]),
          expected=number(expected[index]),
        ),
        **run.facts(mask, got[index], expected[index], where),
        **blame(run, quantity, got[index], values, where),
      }

    yield run.broken(clause, quantity, describe, quantity.wrt, transform)


def nearby_for(run: Run, where: np.ndarray) -> Values:
  """Data near the clean ones, off their kinks and ties, for a mask."""
  rng = np.random.default_rng(1)

  def moved_from(x):
    # Kinks and ties are most often at 0.
    beside = 0.01 * np.abs(np.asarray(x, "float64")).max(initial=0)
    moved = np.where(x == 0, beside, x) * rng.uniform(0.99, 1.01, x.shape)
    return moved.astype(x.dtype)

  moved = [
    moved_from(x)
    if i in run.problem.floats and i not in run.problem.call.sources
    else x
    for i, x in enumerate(run.problem.values)
  ]
  values = run.problem.call.arrays_for(moved, where)
  return moved if values is None else values


def other_data(
  run: Run, chosen: Callable[[Argument], np.ndarray | None]
) -> list[np.ndarray]:
  """The data with everything included, with other numbers in a part of them.

  Args:
    run: The run.
    chosen: Tells the elements of a masked argument to replace.
  """
  assert run.all_included is not None
  rng = np.random.default_rng(3)
  values = list(run.all_included)
  for f in run.problem.floats:
    a, x = run.problem.arguments[f], values[f]
    replaced = chosen(a) if a.maskable else None
    if replaced is not None:
      other = x * rng.uniform(0.1, 4, x.shape)
      values[f] = np.where(replaced, other, x).astype(x.dtype)
  return values
