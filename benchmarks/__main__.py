"""Measures what a mask costs: prints tables, writes JSON and a plot.

    python -m benchmarks                        # What the README shows.
    python -m benchmarks --loss kl_divergence   # The same of another loss.
    python -m benchmarks --all --no-time        # All of it, in hours with time.

Every number is one of a loss under a transform, with the mask, the labels and
the data as arguments. The floor of the ratios is Optax without a mask.

The JSON is an object. `versions`, `device`, `command` and, on a GPU,
`copy_bytes_per_s` tell how it was measured. `rows` is a list of objects, with
null for what was not measured:

- `loss`, `variant`, `mask` (none, row or full), `density` (what part of the
  mask is true, where that matters), `transform`, `dtype`, `shape` and `axis`,
  as asked for; `read_as`, the shape that the loss was given; `n_bytes`, N, the
  bytes of its first argument
- `bytes`, `flops`, `temporaries` and the numbers of operations `transpose`,
  `scatter`, `gather` and `collective` of the compiled program, and, with
  value_and_grad, `kept` and `scan`, the bytes kept for the backward pass and
  the temporaries of the gradient through a scan: all see `counters.py`
- `time_s`; `eager_s`, without jit and for the shape (64, 32); `compile_s`
- `..._ratio` of all but the operations: to the floor; for times the median of
  the ratios of each round. `..._per_n` of what is in bytes: divided by N
- `bytes_per_s` on a GPU: `bytes / time_s`
- `error`: why there is nothing else
"""

import argparse
import importlib.metadata
import itertools
import json
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import cases, timing
from benchmarks.counters import counters_of, kept, scanned_temporaries
from benchmarks.variants import FLOOR, OURS, VARIANTS, applies

Row = dict[str, Any]

_SMALL = (64, 32)
_IN_BYTES = ("bytes", "temporaries", "kept", "scan")
_TIMES = ("time_s", "eager_s", "compile_s")
_OPERATIONS = ("transpose", "scatter", "gather", "collective")
# Of every option all that there is, and what is measured unless `--all` is
# given. A shape comes with its class axis.
_GRID: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
  "loss": (cases.LOSSES, (cases.INTEGER_LABELS,)),
  "shape": (cases.SHAPES, cases.SHAPES[:1]),
  "dtype": (cases.DTYPES, cases.DTYPES),
  "transform": (tuple(cases.TRANSFORMS), ("value_and_grad",)),
  "mask": (cases.MASKS, ("row", "full")),
  "density": (cases.DENSITIES, (0.5,)),
  "variant": (tuple(VARIANTS), tuple(VARIANTS)),
}
_FEW = {"dtype": ("float32",), "variant": (FLOOR, "optax, where=", OURS)}
_MORE_BY_DEFAULT: tuple[dict[str, Sequence[Any]], ...] = (
  {"loss": ("softmax_cross_entropy", "sigmoid_binary_cross_entropy"), **_FEW},
  {"shape": cases.SHAPES[-1:], **_FEW},
)
_COLUMNS = {  # Of a table: the key of a row, and a format.
  "time ÷": ("time_s_ratio", "{:.2f}"),
  "bytes ÷": ("bytes_ratio", "{:.2f}"),
  "flops ÷": ("flops_ratio", "{:.2f}"),
  "eager ÷": ("eager_s_ratio", "{:.2f}"),
  "bytes/N": ("bytes_per_n", "{:.2f}"),
  "temp/N": ("temporaries_per_n", "{:.2f}"),
  "kept/N": ("kept_per_n", "{:.2f}"),
  "scan/N": ("scan_per_n", "{:.2f}"),
  "t s g c": ("operations", "{}"),
  "ms": ("time_ms", "{:.2f}"),
  "eager ms": ("eager_ms", "{:.2f}"),
  "compile s": ("compile_s", "{:.2f}"),
  "of copy": ("of_copy", "{:.0%}"),
}
_LEGEND = """\
÷ is the ratio to Optax without a mask, N the bytes of the logits.
temp: temporaries; kept: bytes kept for the backward pass; scan: temporaries of
the gradient through a scan of 16 steps; t s g c: numbers of transpose, scatter,
gather and collective operations; eager: without jit, shape (64, 32)."""


def main(arguments: Sequence[str] | None = None) -> None:
  """Measures what the command line asks for."""
  command = sys.argv[1:] if arguments is None else list(arguments)
  options = _parser().parse_args(command)
  warnings.filterwarnings("ignore", "The function convex_kl_divergence")
  device = jax.devices()[0]
  packages = ("optax_masking", "optax", "jax", "jaxlib")
  clock = not options.no_time
  on_gpu = clock and jax.default_backend() == "gpu"
  report: dict[str, Any] = {
    "versions": {name: importlib.metadata.version(name) for name in packages},
    "device": f"{device.platform}: {device.device_kind}",
    "command": ["python", "-m", "benchmarks", *command],
    "copy_bytes_per_s": timing.copy_speed() if on_gpu else None,
    "rows": [],
  }
  versions = ", ".join(" ".join(v) for v in report["versions"].items())
  print(f"{versions}; {report['device']}\n{_LEGEND}")
  tables = []
  for grid in _grids(options):
    masks = [grid[name] for name in ("mask", "density", "variant")]
    for loss, shape, dtype, transform in itertools.product(
      *(grid[name] for name in ("loss", "shape", "dtype", "transform"))
    ):
      rows = measure(loss, shape, dtype, transform, *masks, clock)
      tables.append((_title(rows[0]), rows))
      report["rows"] += rows
      # After each table, so that what is interrupted is not lost.
      options.output.write_text(json.dumps(report, indent=1) + "\n")
      print(f"\n{tables[-1][0]}\n")
      print("\n".join(_table(rows, report["copy_bytes_per_s"])), flush=True)
  _plot(tables, options.output.with_suffix(".png"))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m benchmarks")
  add = parser.add_argument
  for name, (choices, _) in _GRID.items():
    if name == "shape":
      hint = "such as 4096x512, or 8x19x128x128@1 with the classes in axis 1"
      add("--shape", nargs="+", type=_shape, help=hint)
    elif name == "density":
      hint = "what part of a mask is true"
      add("--density", nargs="+", type=float, help=hint)
    else:
      hint = "some of: " + "; ".join(choices)
      metavar = name.upper()
      add(f"--{name}", nargs="+", choices=choices, metavar=metavar, help=hint)
  add("--all", action="store_true", help="everything that is not selected")
  add("--no-time", action="store_true", help="only what never varies")
  output = pathlib.Path(__file__).with_name("results.json")
  add("--output", type=pathlib.Path, default=output)
  return parser


def _shape(text: str) -> tuple[tuple[int, ...], int]:
  sizes, _, axis = text.partition("@")
  return tuple(map(int, sizes.split("x"))), int(axis or -1)


def _grids(options: argparse.Namespace) -> list[dict[str, Sequence[Any]]]:
  selected = {name: getattr(options, name) for name in _GRID}
  grid = {
    name: selected[name] or (every if options.all else usual)
    for name, (every, usual) in _GRID.items()
  }
  if options.all or any(selected.values()):
    return [grid]
  return [grid, *(grid | more for more in _MORE_BY_DEFAULT)]


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
  """Measures variants of a loss next to each other.

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
    The rows, as in the JSON, the floor first.
  """
  case = cases.make_case(loss, dtype, *shape)
  small = cases.make_case(loss, dtype, _SMALL, -1)
  fixed = {"loss": loss, "transform": transform, "dtype": dtype}
  fixed |= {"shape": shape[0], "axis": shape[1], "read_as": case.shape}
  fixed["n_bytes"] = case.arguments[0].nbytes
  rows: list[Row] = []
  # What is timed, with the rows that it is the time of.
  calls: list[tuple[list[Row], timing.Call]] = []
  eager: list[tuple[list[Row], timing.Call]] = []
  for mask, variant in [
    ("none", FLOOR),
    *(
      pair
      for pair in itertools.product(masks, variants)
      if applies(*pair, loss)
    ),
  ]:
    counted, program = _compiled(case, variant, mask, transform)
    of_program: list[Row] = []
    for density in densities if clock and mask != "none" else (None,):
      row = {"variant": variant, "mask": mask, "density": density}
      of_program.append(row | fixed | counted)
      if program and clock:
        inputs = _inputs(case, mask, density, transform)
        calls.append(([of_program[-1]], (program, inputs)))
    rows += of_program
    if program and clock:
      function = cases.TRANSFORMS[transform](VARIANTS[variant](small))
      inputs = _inputs(small, mask, 0.5, transform)
      eager.append((of_program, (function, inputs)))
  floor = rows[0]
  if clock and floor["error"] is None:
    _time("time_s", calls)
    _time("eager_s", eager)
  for row in rows:
    for name in (*_IN_BYTES, "flops", *_OPERATIONS, *_TIMES):
      row.setdefault(name, None)
    for name in (*_IN_BYTES, "flops", *_TIMES):
      row.setdefault(f"{name}_ratio", _ratio(row[name], floor[name]))
    for name in _IN_BYTES:
      row[f"{name}_per_n"] = _ratio(row[name], row["n_bytes"])
    on_gpu = jax.default_backend() == "gpu"
    row["bytes_per_s"] = _ratio(row["bytes"], row["time_s"]) if on_gpu else None
  return rows


def _time(name: str, calls: Sequence[tuple[list[Row], timing.Call]]) -> None:
  times = timing.interleaved([call for _, call in calls])
  for (rows, _), (median, ratio) in zip(calls, times, strict=True):
    for row in rows:
      row |= {name: median, f"{name}_ratio": ratio}


def _ratio(number: float | None, unit: float | None) -> float | None:
  return None if number is None or not unit else number / unit


def _inputs(case, mask, density, transform):
  inputs = (*case.arguments, case.mask(mask, density))
  # The tangents are an argument of their own, whatever they hold.
  return (inputs[0], *inputs) if transform == "jvp" else inputs


def _compiled(case, variant, mask, transform):
  """The counters of a variant, and the program if there is one."""
  inputs = _inputs(case, mask, 0.5, transform)
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


def _title(row: Row) -> str:
  shape = f"{row['shape']}"
  if row["axis"] != -1:
    shape += f", axis={row['axis']}"
  if row["read_as"] != row["shape"]:
    shape += f" as {row['read_as']}"
  return f"**{row['loss']}**: {row['transform']}, {row['dtype']}, {shape}"


def _table(rows: list[Row], copy_speed: float | None) -> list[str]:
  """A table in Markdown, in aligned columns, without those that are empty."""
  lines = [["", "mask", *_COLUMNS]]
  for row in rows:
    shown = dict(row)
    for name in ("time", "eager"):
      if row[f"{name}_s"] is not None:
        shown[f"{name}_ms"] = 1e3 * row[f"{name}_s"]
    if row["transpose"] is not None:
      shown["operations"] = " ".join(str(row[name]) for name in _OPERATIONS)
    if row["bytes_per_s"] is not None and copy_speed:
      shown["of_copy"] = row["bytes_per_s"] / copy_speed
    density = "" if row["density"] is None else f" {row['density']:g}"
    cells = (
      "—" if shown.get(key) is None else form.format(shown[key])
      for key, form in _COLUMNS.values()
    )
    lines.append([row["variant"], row["mask"] + density, *cells])
  columns = [
    column
    for column in zip(*lines, strict=True)
    if any(cell != "—" for cell in column[1:])
  ]
  widths = [max(map(len, column)) for column in columns]
  result = []
  for line in zip(*columns, strict=True):
    cells = (
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    result.append(f"| {' | '.join(cells)} |")
  rules = ("-" * w + ("-" if i < 2 else ":") for i, w in enumerate(widths))
  result.insert(1, f"|-{'|-'.join(rules)}|")
  return result


def _plot(tables: Sequence[tuple[str, list[Row]]], path: pathlib.Path) -> None:
  """Plots ratios, of not too many tables, if there is matplotlib."""
  try:
    import matplotlib
  except ImportError:
    return
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  tables = tables[:12]
  heights = [len(rows) for _, rows in tables]
  figure, panels = plt.subplots(
    len(tables),
    figsize=(8, 2 + sum(heights) / 3),
    height_ratios=heights,
    layout="constrained",
    squeeze=False,
  )
  for panel, (title, rows) in zip(panels[:, 0], tables, strict=True):
    rows = [row for row in rows[::-1] if row["bytes_ratio"] is not None]
    y = np.arange(len(rows))
    panel.barh(y, [row["bytes_ratio"] for row in rows], 0.7, label="bytes")
    times = [row["time_s_ratio"] or np.nan for row in rows]
    panel.plot(times, y, "k|", markersize=12, label="time")
    panel.set_yticks(y, [f"{row['variant']} ({row['mask']})" for row in rows])
    panel.axvline(1, color="gray", linewidth=1)
    panel.set_title(title.replace("**", ""), fontsize="medium", loc="left")
    panel.legend(fontsize="small")
  panels[-1, 0].set_xlabel("ratio to Optax without a mask")
  figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
