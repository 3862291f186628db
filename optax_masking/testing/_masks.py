"""The masks that are tried, and what masked elements hold."""

import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from optax_masking.testing._case import LARGE, Problem


def spread(count: int, samples: int) -> list[int]:
  """At most so many of the numbers below a count, the first and the last."""
  if count <= samples:
    return list(range(count))
  return sorted({round(i) for i in np.linspace(0, count - 1, samples)})


def masks(problem: Problem) -> dict[str, np.ndarray]:
  """Masks of the given one's shape, by name, those that tell most first."""
  given, kinds = problem.where, problem.options.masks
  # Of large data one element is tried, and one row.
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
    for i in spread(given.size, samples)
  ]
  if "elements" in kinds and given.ndim:
    for e in elements:
      add(f"all but the element {list(e)}", without(e))
  if "rows" in kinds and given.ndim > 1:
    for i in spread(given.shape[0], samples):
      add(f"all but the row [{i}]", without((i,)))
  if "columns" in kinds:
    for axis in range(1, given.ndim):
      for i in spread(given.shape[axis], samples):
        column = ":, " * axis + str(i) + ", :" * (given.ndim - axis - 1)
        add(
          f"all but the column [{column}]",
          without((slice(None),) * axis + (i,)),
        )
  if "columns" in kinds and given.ndim > 1 and given.shape[-1] > 1:
    # Another element of each row, for what depends on how many are left.
    where = np.ones(given.shape, bool).reshape(-1, given.shape[-1])
    rows = np.arange(len(where))
    where[rows, unlabelled(problem, rows)] = False
    add("all but one element of each row", where.reshape(given.shape))
  if "rows" in kinds and given.ndim and given.shape[0] > 2:
    add("every other row", without((slice(None, None, 2),)))
  if "given" in kinds:
    add("as given", given)
  if "elements" in kinds and given.ndim:
    for e in elements:
      add(f"the element {list(e)} alone", ~without(e))
  if "rows" in kinds and given.ndim > 1:
    for i in spread(given.shape[0], samples):
      add(f"the row [{i}] alone", ~without((i,)))
  if "none" in kinds:
    add("nothing included", np.zeros(given.shape, bool))
  if "all" in kinds:
    add("all included", np.ones(given.shape, bool))
  return found


def few_of_each_kind(
  found: dict[str, np.ndarray], most: int = 3
) -> dict[str, np.ndarray]:
  """Some of the masks, of each kind."""
  kinds: dict[str, int] = {}
  few = {}
  for name, where in found.items():
    kind = re.sub(r"\d+", "", name)
    kinds[kind] = kinds.get(kind, 0) + 1
    if kinds[kind] <= most:
      few[name] = where
  return few


def unlabelled(problem: Problem, rows: np.ndarray) -> np.ndarray:
  """A column for each row of the mask, none that an integer argument names."""
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


def poisons(dtype: np.dtype, classes: int) -> dict[str, np.ndarray]:
  """What a masked element may hold, by name."""
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
