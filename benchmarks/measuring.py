"""Measures the variants of a loss next to each other."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import cases, h100, timing
from benchmarks.counters import counters_of, residual_bytes, scanned_temporaries
from benchmarks.variants import FLOOR, VARIANTS, is_measured

Row = dict[str, Any]

IN_BYTES = ("bytes", "temporaries", "kept", "scan")
TIMES = ("time_s", "eager_s", "compile_s")
OPERATIONS = ("kernels", "transpose", "scatter", "gather", "collective")
_EAGER_SHAPE = (64, 32)
_ANY_DENSITY = 0.5  # For measurements that do not depend on the density.


def measure(
  loss: str,
  shape: tuple[tuple[int, ...], int],
  dtype: str,
  transform: str,
  *,
  masks: Sequence[str],
  densities: Sequence[float],
  variants: Sequence[str],
  measure_time: bool,
  for_h100: bool = False,
) -> list[Row]:
  """Measures the rows of one table.

  Args:
    loss: Name of the loss.
    shape: Shape of the logits, and their class axis.
    dtype: Dtype of the floating arguments.
    transform: Name of the transform.
    masks: Kinds of masks.
    densities: Fractions of the masks that are true.
    variants: Names of the variants.
    measure_time: Whether to measure times, too.
    for_h100: Whether to compile for an H100, which need not be there.

  Returns:
    The rows of the JSON, the floor first.
  """
  case = cases.make_case(loss, dtype, *shape)
  small = cases.make_case(loss, dtype, _EAGER_SHAPE, -1)
  columns_of_all = {"loss": loss, "transform": transform, "dtype": dtype}
  columns_of_all |= {"shape": shape[0], "axis": shape[1], "read_as": case.shape}
  columns_of_all["n_bytes"] = case.arguments[0].nbytes
  rows: list[Row] = []
  # Calls to time, each with the rows that get its time.
  calls: list[tuple[list[Row], timing.Call]] = []
  eager: list[tuple[list[Row], timing.Call]] = []
  pairs = itertools.product(masks, variants)
  pairs = (pair for pair in pairs if is_measured(*pair, loss))
  for mask, variant in (("none", FLOOR), *pairs):
    counters, program = _compiled(case, variant, mask, transform, for_h100)
    if not measure_time:
      program, counters["compile_s"] = None, None
    rows_of_program: list[Row] = []
    for density in densities if measure_time and mask != "none" else (None,):
      row = {"variant": variant, "mask": mask, "density": density}
      rows_of_program.append(row | columns_of_all | counters)
      if program:
        inputs = _inputs(case, mask, density, transform)
        calls.append((rows_of_program[-1:], (program, inputs)))
    rows += rows_of_program
    if program:
      function = cases.TRANSFORMS[transform](VARIANTS[variant](small))
      inputs = _inputs(small, mask, _ANY_DENSITY, transform)
      eager.append((rows_of_program, (function, inputs)))
  if calls and calls[0][0][0] is rows[0]:  # The floor runs.
    _add_times("time_s", calls)
    _add_times("eager_s", eager)
  for row in rows:
    _add_missing_columns(row, rows[0])
  return rows


def ratio_or_none(number: float | None, unit: float | None) -> float | None:
  """Divides, or returns None if a number is None or the unit is 0."""
  return None if number is None or not unit else number / unit


def _inputs(case, mask, density, transform):
  inputs = (*case.arguments, case.mask(mask, density))
  # Any array of the shape does as a tangent.
  return (inputs[0], *inputs) if transform == "jvp" else inputs


def _compiled(case, variant, mask, transform, for_h100):
  """The counters of a variant and its program, None if it does not compile."""
  inputs = _inputs(case, mask, _ANY_DENSITY, transform)
  try:
    loss = VARIANTS[variant](case)
    function = jax.jit(cases.TRANSFORMS[transform](loss))
    start = time.perf_counter()
    program = h100.compiled(function, inputs, for_h100)
    counters = {"error": None, "compile_s": time.perf_counter() - start}
    counters |= counters_of(program)
    if transform == "value_and_grad" and not for_h100:
      counters["kept"] = residual_bytes(loss, *inputs)
      counters["scan"] = scanned_temporaries(loss, inputs)
  except Exception as error:  # A variant may not support the mask.
    return {"error": f"{type(error).__name__}: {error}"}, None
  return counters, program


def _add_times(name, calls):
  times = timing.time_interleaved([call for _, call in calls])
  for (rows, _), (median, to_floor) in zip(calls, times, strict=True):
    for row in rows:
      row |= {name: median, f"{name}_ratio": to_floor}


def _add_missing_columns(row, floor):
  """Adds ratios to a row, and None for numbers that were not measured."""
  for name in (*IN_BYTES, "flops", *OPERATIONS, *TIMES):
    row.setdefault(name, None)
  for name in (*IN_BYTES, "flops", *TIMES):
    row.setdefault(f"{name}_ratio", ratio_or_none(row[name], floor[name]))
  for name in IN_BYTES:
    row[f"{name}_per_n"] = ratio_or_none(row[name], row["n_bytes"])
  row["bytes_per_s"] = ratio_or_none(row["bytes"], row["time_s"])
