"""Measures what a mask costs: prints tables, writes JSON and a plot.

    python -m benchmarks                       # As in docs/costs.md.
    python -m benchmarks --loss kl_divergence  # The same of another loss.
    python -m benchmarks --all --no-time       # Every loss, mask, shape, ...
    python -m benchmarks --ratios --all        # A line for each loss.
    python -m benchmarks --ratios --for h100   # Compiled for an H100.
    timeout 480 python -m benchmarks --ratios  # On a GPU, with its speed.

All numbers are of a loss under a transform, with the mask, the labels and the
data as arguments. Ratios are to the floor: Optax without a mask.

The JSON is an object. `versions`, `device`, `command` and, on a GPU,
`copy_bytes_per_s` describe the measurement. `rows` is a list of objects, with
null for numbers that were not measured:

- `loss`, `variant`, `mask` (none, row or full), `density` (the fraction of the
  mask that is true, where it matters), `transform`, `dtype`, `shape` and `axis`
  from the command line; `read_as`, the shape that the loss was given;
  `n_bytes`, N, the bytes of its first argument
- `bytes`, `flops`, `temporaries`, `kernels` and the numbers of operations
  `transpose`, `scatter`, `gather` and `collective` of the compiled program;
  with value_and_grad also `kept`, the bytes of the residuals for the backward
  pass, and `scan`, the temporaries of the gradient through a scan:
  `counters.py` defines all of them
- `time_s`; `eager_s`, without jit and for the shape (64, 32); `compile_s`
- `..._ratio` to the floor, for all numbers but those of operations; for
  `time_s` and `eager_s` the median of the ratios of each round
- `..._per_n` for all numbers of bytes: divided by N
- `bytes_per_s`, which is `bytes / time_s`, and on a GPU `copy_ratio`, which is
  `bytes_per_s / copy_bytes_per_s`
- `error`: the reason if a variant can't be measured
"""

import argparse
import itertools
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
import optax

import optax_masking
from benchmarks import cases, h100, timing
from benchmarks.measuring import OPERATIONS, Row, measure, ratio_or_none
from benchmarks.variants import FLOOR, OURS, VARIANTS

# For every option all values, and the values without `--all`. A shape comes
# with its class axis.
_GRID: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
  "loss": (cases.LOSSES, (cases.INTEGER_LABELS,)),
  "shape": (cases.SHAPES, cases.SHAPES[:1]),
  "dtype": (cases.DTYPES, cases.DTYPES),
  "transform": (tuple(cases.TRANSFORMS), ("value_and_grad",)),
  "mask": (cases.MASKS, ("row", "full")),
  "density": (cases.DENSITIES, (0.5,)),
  "variant": (tuple(VARIANTS), tuple(VARIANTS)),
}
_FEWER = {"dtype": ("float32",), "variant": (FLOOR, "optax, where=", OURS)}
_EXTRA_DEFAULT_GRIDS: tuple[dict[str, Sequence[Any]], ...] = (
  {"loss": ("softmax_cross_entropy", "sigmoid_binary_cross_entropy"), **_FEWER},
  {"shape": cases.SHAPES[-1:], **_FEWER},
)


def _number_column(
  key: str, format_spec: str = ".2f", scale: float = 1.0
) -> Callable[[Row], str]:
  def cell(row: Row) -> str:
    return "—" if row[key] is None else f"{scale * row[key]:{format_spec}}"

  return cell


def _operations_cell(row: Row) -> str:
  if row["transpose"] is None:
    return "—"
  return " ".join(str(row[name]) for name in OPERATIONS)


_COLUMNS: dict[str, Callable[[Row], str]] = {
  "time ÷": _number_column("time_s_ratio"),
  "bytes ÷": _number_column("bytes_ratio"),
  "flops ÷": _number_column("flops_ratio"),
  "eager ÷": _number_column("eager_s_ratio"),
  "bytes/N": _number_column("bytes_per_n"),
  "temp/N": _number_column("temporaries_per_n"),
  "kept/N": _number_column("kept_per_n"),
  "scan/N": _number_column("scan_per_n"),
  "k t s g c": _operations_cell,
  "ms": _number_column("time_s", scale=1e3),
  "eager ms": _number_column("eager_s", scale=1e3),
  "compile s": _number_column("compile_s"),
  "of copy": _number_column("copy_ratio", ".0%"),
}
_LEGEND = """\
÷ is the ratio to Optax without a mask, N the bytes of the logits.
temp: temporaries; kept: bytes kept for the backward pass; scan: temporaries of
the gradient through a scan of 16 steps; k t s g c: numbers of kernels, and of
transpose, scatter, gather and collective operations; eager: without jit, shape
(64, 32)."""
_RATIOS_LEGEND = """\
A mask of examples / a mask of elements, relative to Optax without a mask. The
table is printed when all of it is measured."""
_RATIO_LOSSES = (
  cases.INTEGER_LABELS,
  "softmax_cross_entropy",
  "sigmoid_binary_cross_entropy",
  "kl_divergence",
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the benchmark with the options of the command line."""
  command = sys.argv[1:] if arguments is None else list(arguments)
  options = _parser().parse_args(command)
  warnings.filterwarnings("ignore", "The function convex_kl_divergence")
  for_h100 = options.target == "h100"
  if for_h100:
    h100.prepare()
  device = jax.devices()[0]
  packages = (optax_masking, optax, jax, jaxlib)
  measure_time = not (options.no_time or for_h100)
  on_gpu = measure_time and device.platform == "gpu"
  report: dict[str, Any] = {
    "versions": {p.__name__: p.__version__ for p in packages},
    "device": "compiled for an H100"
    if for_h100
    else f"{device.platform}: {device.device_kind}",
    "command": ["python", "-m", "benchmarks", *command],
    "copy_bytes_per_s": timing.copy_speed() if on_gpu else None,
    "rows": [],
  }
  versions = ", ".join(" ".join(v) for v in report["versions"].items())
  legend = _RATIOS_LEGEND if options.ratios else _LEGEND
  print(f"{versions}; {report['device']}\n{legend}")
  tables = []
  for grid in _grids(options):
    for loss, shape, dtype, transform in itertools.product(
      *(grid[name] for name in ("loss", "shape", "dtype", "transform"))
    ):
      rows = measure(
        loss,
        shape,
        dtype,
        transform,
        masks=grid["mask"],
        densities=grid["density"],
        variants=grid["variant"],
        measure_time=measure_time,
        for_h100=for_h100,
      )
      for row in rows:
        copy_speed = report["copy_bytes_per_s"]
        row["copy_ratio"] = ratio_or_none(row["bytes_per_s"], copy_speed)
      tables.append((_title(rows[0]), rows))
      report["rows"] += rows
      # An interrupted run keeps its tables.
      options.output.write_text(json.dumps(report, indent=1) + "\n")
      if not options.ratios:
        print(f"\n{tables[-1][0]}\n\n{_table(rows)}", flush=True)
  if options.ratios:
    print(f"\n{_ratios(report['rows'])}")
    return
  _plot(tables, options.output.with_suffix(".png"))
  print(f"\nWritten to {options.output}")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m benchmarks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  for name, (choices, _) in _GRID.items():
    if name == "shape":
      hint = "such as 4096x512, or 8x19x128x128@1 with the classes in axis 1"
      add("--shape", nargs="+", type=_shape, help=hint)
    elif name == "density":
      hint = "the fraction of a mask that is true"
      add("--density", nargs="+", type=float, help=hint)
    else:
      hint = "some of: " + "; ".join(choices)
      metavar = name.upper()
      add(f"--{name}", nargs="+", choices=choices, metavar=metavar, help=hint)
  hint = "all values of the options that are not given, which may take hours"
  add("--all", action="store_true", help=hint)
  add("--no-time", action="store_true", help="only the counters")
  hint = "a line for each loss: row mask / full mask, relative to no mask"
  add("--ratios", action="store_true", help=hint)
  hint = "h100: the counters of a program for an H100, which need not be there"
  add("--for", dest="target", choices=("here", "h100"), help=hint)
  output = pathlib.Path(__file__).with_name("results.json")
  hint = "where to write the JSON, with a plot beside it if there is matplotlib"
  add("--output", type=_output, default=output, help=f"{hint} ({output.name})")
  return parser


def _shape(text: str) -> tuple[tuple[int, ...], int]:
  match = re.fullmatch(r"(\d+(?:x\d+)*)(?:@(-?\d+))?", text)
  shape = tuple(map(int, match[1].split("x"))) if match else ()
  axis = int(match[2] or -1) if match else 0
  if not -len(shape) <= axis < len(shape):
    raise argparse.ArgumentTypeError(
      f"{text!r} is no shape such as 4096x512, or 8x19x128x128@1"
    )
  return shape, axis


def _output(text: str) -> pathlib.Path:
  path = pathlib.Path(text)
  if not path.parent.is_dir():
    raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
  return path


def _grids(options: argparse.Namespace) -> list[dict[str, Sequence[Any]]]:
  selected = {name: getattr(options, name) for name in _GRID}
  if options.ratios:
    losses = cases.LOSSES if options.all else _RATIO_LOSSES
    usual = {name: values for name, (_, values) in _GRID.items()}
    grid = {**usual, "loss": losses, "variant": (OURS,)}
    return [grid | {n: v for n, v in selected.items() if v}]
  grid = {
    name: selected[name] or (every if options.all else usual)
    for name, (every, usual) in _GRID.items()
  }
  if options.all or any(selected.values()):
    return [grid]
  return [grid, *(grid | more for more in _EXTRA_DEFAULT_GRIDS)]


def _title(row: Row) -> str:
  shape = f"{row['shape']}"
  if row["axis"] != -1:
    shape += f", axis={row['axis']}"
  if row["read_as"] != row["shape"]:
    shape += f" as {row['read_as']}"
  return f"**{row['loss']}**: {row['transform']}, {row['dtype']}, {shape}"


def _table(rows: list[Row]) -> str:
  """A table in Markdown with aligned columns. Empty columns are left out."""
  lines = [["", "mask", *_COLUMNS]]
  for row in rows:
    density = "" if row["density"] is None else f" {row['density']:g}"
    cells = (show(row) for show in _COLUMNS.values())
    lines.append([row["variant"], row["mask"] + density, *cells])
  columns = []
  for column in zip(*lines, strict=True):
    width = max(map(len, column))
    if len(columns) < 2:
      head, *cells = (cell.ljust(width) for cell in column)
      columns.append([head, "-" * width, *cells])
    elif any(cell != "—" for cell in column[1:]):
      head, *cells = (cell.rjust(width) for cell in column)
      columns.append([head, "-" * (width - 1) + ":", *cells])
  lines_of_cells = zip(*columns, strict=True)
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines_of_cells)


def _ratios(rows: list[Row]) -> str:
  """A table in Markdown: the ratios of a row mask / a full mask."""
  dtypes = dict.fromkeys(row["dtype"] for row in rows)
  heads_of = {
    "bytes_ratio": "bytes",
    "time_s_ratio": "time",
    "copy_ratio": "of a copy's bytes a second",
  }
  numbers = [n for n in heads_of if rows[0][n] is not None]
  columns = list(itertools.product(numbers, dtypes))
  heads = [f"{heads_of[n]}, {dtype}" for n, dtype in columns]
  lines = [f"| loss | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
  for loss in dict.fromkeys(row["loss"] for row in rows):
    cells = []
    for number, dtype in columns:
      found = [
        _number_column(number)(row)
        for row in rows
        if (row["loss"], row["dtype"]) == (loss, dtype)
        and row["mask"] != "none"
      ]
      cells.append(" / ".join(found))
    lines.append(f"| {loss} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _plot(tables: Sequence[tuple[str, list[Row]]], path: pathlib.Path) -> None:
  """Plots the ratios of the first tables, if there is matplotlib."""
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
    figsize=(9, 2 + sum(heights) / 3),
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
    panel.set_title(title.replace("**", ""), fontsize="small", loc="left")
  panels[0, 0].legend()
  panels[-1, 0].set_xlabel("ratio to Optax without a mask")
  figure.savefig(path, dpi=150)


if __name__ == "__main__":
  main()
