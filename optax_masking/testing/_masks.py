"""The masks that a check tries."""

import re

import jax.numpy as jnp
import numpy as np

from optax_masking.testing._problem import LARGE, Problem


def evenly_spaced(count: int, samples: int) -> list[int]:
  """Spreads at most `samples` numbers evenly over `range(count)`."""
  if count <= samples:
    return list(range(count))
  return sorted({round(i) for i in np.linspace(0, count - 1, samples)})


def make_masks(problem: Problem) -> dict[str, np.ndarray]:
  """Masks of the given mask's shape by name, the most revealing ones first."""
  given, kinds = problem.where, problem.options.masks
  # Large data take long: there may be time for one element and one row alone.
  samples = max(1, min(problem.options.samples, LARGE // max(1, problem.size)))
  found: dict[str, np.ndarray] = {}

  def add(name: str, where: np.ndarray) -> None:
    if not any(np.array_equal(where, w) for w in found.values()):
      found[name] = where

  def without(index: tuple) -> np.ndarray:
    where = np.ones(given.shape, bool)
    where[index] = False
    return where

  elements = [
    tuple(map(int, np.unravel_index(i, given.shape)))
    for i in evenly_spaced(given.size, samples)
  ]
  if "elements" in kinds and given.ndim:
    for e in elements:
      add(f"all but the element {list(e)}", without(e))
  if "rows" in kinds and given.ndim > 1:
    for i in evenly_spaced(given.shape[0], samples):
      add(f"all but the row [{i}]", without((i,)))
  if "columns" in kinds:
    for axis in range(1, given.ndim):
      for i in evenly_spaced(given.shape[axis], samples):
        column = ":, " * axis + str(i) + ", :" * (given.ndim - axis - 1)
        add(
          f"all but the column [{column}]",
          without((slice(None),) * axis + (i,)),
        )
  if "columns" in kinds and given.ndim > 1 and given.shape[-1] > 1:
    # As many elements are left in each row, but not the same ones.
    where = np.ones(given.shape, bool).reshape(-1, given.shape[-1])
    rows = np.arange(len(where))
    where[rows, unlabeled_columns(problem, rows)] = False
    add("all but one element of each row", where.reshape(given.shape))
  if "rows" in kinds and given.ndim and given.shape[0] > 2:
    add("every other row", without((slice(None, None, 2),)))
  if "given" in kinds:
    add("as given", given)
  if "padded" in kinds and given.ndim:
    for name, where in padded(given).items():
      add(name, where)
  if "elements" in kinds and given.ndim:
    for e in elements:
      add(f"the element {list(e)} alone", ~without(e))
  if "rows" in kinds and given.ndim > 1:
    for i in evenly_spaced(given.shape[0], samples):
      add(f"the row [{i}] alone", ~without((i,)))
  if "none" in kinds or "padded" in kinds:
    add("nothing included", np.zeros(given.shape, bool))
  if "all" in kinds or "padded" in kinds:
    add("all included", np.ones(given.shape, bool))
  return found


def few_of_each_kind(
  found: dict[str, np.ndarray], most: int = 3
) -> dict[str, np.ndarray]:
  """The first masks of each kind: names of a kind differ in numbers alone."""
  kinds: dict[str, int] = {}
  few = {}
  for name, where in found.items():
    kind = re.sub(r"\d+", "", name)
    kinds[kind] = kinds.get(kind, 0) + 1
    if kinds[kind] <= most:
      few[name] = where
  return few


def unlabeled_columns(problem: Problem, rows: np.ndarray) -> np.ndarray:
  """For each row of the mask a column that no integer argument names."""
  classes = problem.where.shape[-1]
  columns = (rows + 1) % classes
  labels = [
    a.value.reshape(-1)
    for a in problem.arguments
    if jnp.issubdtype(a.value.dtype, jnp.integer) and a.value.size == len(rows)
  ]
  for _ in range(classes):
    named = np.zeros(len(rows), bool)
    for label in labels:
      named |= label == columns
    columns = np.where(named, (columns + 1) % classes, columns)
  return columns


def padded(given: np.ndarray) -> dict[str, np.ndarray]:
  """Masks of sequences of several lengths, with padding at their ends.

  They lie along the last axis, or along the one at whose end the given mask has
  its padding.
  """
  shape = given.shape
  axes = [k for k, s in enumerate(shape) if s > 1] or [0]
  ends = [k for k in axes if (np.diff(given.astype(int), axis=k) <= 0).all()]
  axis = (axes if axes[-1] in ends or not ends else ends)[-1]
  size = shape[axis]
  batch = (*shape[:axis], 1, *shape[axis + 1 :])
  row = np.arange(int(np.prod(batch))).reshape(batch)
  position = np.arange(size).reshape(
    [size if k == axis else 1 for k in range(len(shape))]
  )
  lengths = {
    "sequences of growing lengths": 1 + row * max(1, size // 3) % size,
    "sequences of few elements": np.minimum(1 + row % 2, size),
    "some sequences without any element": (row % 3) * size // 2,
    "sequences without their last element": np.full_like(row, size - 1),
  }
  if len(ends) > 1:  # The rows may be the sequences: have padding at both ends.
    lengths = {n: -np.sort(-x, None).reshape(batch) for n, x in lengths.items()}
  return {
    name: np.broadcast_to(position < length, shape).copy()
    for name, length in lengths.items()
  }
