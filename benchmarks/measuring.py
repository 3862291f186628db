"""Measures the variants of a loss next to each other."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import cases, timing
from benchmarks.counters import counters_of, kept, scanned_temporaries
from benchmarks.variants import FLOOR, VARIANTS, applies

Row = dict[str, Any]

IN_BYTES = ("bytes", "temporaries", "kept", "scan")
TIMES = ("time_s", "eager_s", "compile_s")
OPERATIONS = ("transpose", "scatter", "gather", "collective")
_SMALL = (64, 32)
_DENSITY = 0.5  # Where it does not matter.


def measure(
  loss: str,
  shape: tuple[tuple[int, ...], int],
  dtype: str,
  transform: str,
  masks: Sequence[str],
  densities: Sequence[float],
  variants: Sequence[str],
  clock: bool,
) -> list[Row]:
  """Measures what one table shows.

  Args:
    loss: Name of the loss.
    shape: Shape of the logits, and their class axis.
    dtype: Of the floating arguments.
    transform: Name of the transform.
    masks: Kinds of masks.
    densities: What parts of the masks are true.
    variants: Names of the variants.
    clock: Whether to measure times.

  Returns:
    The rows of the JSON, the floor first.
  """
  case = cases.make_case(loss, dtype, *shape)
  small = cases.make_case(loss, dtype, _SMALL, -1)
  same = {"loss": loss, "transform": transform, "dtype": dtype}
  same |= {"shape": shape[0], "axis": shape[1], "read_as": case.shape}
  same["n_bytes"] = case.arguments[0].nbytes
  rows: list[Row] = []
  # What is timed, after the rows that it is the time of.
  calls: list[tuple[list[Row], timing.Call]] = []
  eager: list[tuple[list[Row], timing.Call]] = []
  pairs = itertools.product(masks, variants)
  pairs = (pair for pair in pairs if applies(*pair, loss))
  for mask, variant in (("none", FLOOR), *pairs):
    counted, program = _compiled(case, variant, mask, transform)
    if not clock:
      program, counted["compile_s"] = None, None
    of_program: list[Row] = []
    for density in densities if clock and mask != "none" else (None,):
      row = {"variant": variant, "mask": mask, "density": density}
      of_program.append(row | same | counted)
      if program:
        inputs = _inputs(case, mask, density, transform)
        calls.append((of_program[-1:], (program, inputs)))
    rows += of_program
    if program:
      function = cases.TRANSFORMS[transform](VARIANTS[variant](small))
      inputs = _inputs(small, mask, _DENSITY, transform)
      eager.append((of_program, (function, inputs)))
  if calls and calls[0][0][0] is rows[0]:  # Else there is no floor.
    _time("time_s", calls)
    _time("eager_s", eager)
  for row in rows:
    _complete(row, rows[0])
  return rows


def ratio(number: float | None, unit: float | None) -> float | None:
  """Divides, where both are known and there is something to divide by."""
  return None if number is None or not unit else number / unit


def _inputs(case, mask, density, transform):
  inputs = (*case.arguments, case.mask(mask, density))
  # The tangents are an argument of their own, whatever they hold.
  return (inputs[0], *inputs) if transform == "jvp" else inputs


def _compiled(case, variant, mask, transform):
  """The counters of a variant, and the program if there is one."""
  inputs = _inputs(case, mask, _DENSITY, transform)
  try:
    loss = VARIANTS[variant](case)
    function = jax.jit(cases.TRANSFORMS[transform](loss))
    start = time.perf_counter()
    program = function.lower(*inputs).compile()
    counted = {"error": None, "compile_s": time.perf_counter() - start}
    counted |= counters_of(program)
    if transform == "value_and_grad":
      counted["kept"] = kept(loss, *inputs)
      counted["scan"] = scanned_temporaries(loss, inputs)
  except Exception as error:  # Whatever a loss raises for what it can't do.
    return {"error": f"{type(error).__name__}: {error}"}, None
  return counted, program


def _time(name, calls):
  times = timing.interleaved([call for _, call in calls])
  for (rows, _), (median, to_floor) in zip(calls, times, strict=True):
    for row in rows:
      row |= {name: median, f"{name}_ratio": to_floor}


def _complete(row, floor):
  """Adds the quotients, but for those of times that are known already."""
  for name in (*IN_BYTES, "flops", *OPERATIONS, *TIMES):
    row.setdefault(name, None)
  for name in (*IN_BYTES, "flops", *TIMES):
    row.setdefault(f"{name}_ratio", ratio(row[name], floor[name]))
  for name in IN_BYTES:
    row[f"{name}_per_n"] = ratio(row[name], row["n_bytes"])
  row["bytes_per_s"] = ratio(row["bytes"], row["time_s"])
