"""Measures what a mask costs: prints tables, writes JSON and a plot.

    python -m benchmarks                       # What the README shows.
    python -m benchmarks --loss kl_divergence  # The same of another loss.
    python -m benchmarks --all --no-time       # Every loss, mask, shape, ...

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
  `scatter`, `gather` and `collective` of the compiled program; with
  value_and_grad also `kept`, bytes kept for the backward pass, and `scan`,
  temporaries of the gradient through a scan: all as `counters.py` has them
- `time_s`; `eager_s`, without jit and for the shape (64, 32); `compile_s`
- `..._ratio` of all but the operations: to the floor; for `time_s` and
  `eager_s` the median of the ratios of each round
- `..._per_n` of what is in bytes: divided by N
- `bytes_per_s`, which is `bytes / time_s`, and on a GPU `copy_ratio`, that
  divided by `copy_bytes_per_s`
- `error`: why there is nothing else
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
from benchmarks import cases, timing
from benchmarks.measuring import OPERATIONS, Row, measure, ratio
from benchmarks.variants import FLOOR, OURS, VARIANTS

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


def _number(
  key: str, form: str = ".2f", scale: float = 1.0
) -> Callable[[Row], str]:
  return lambda row: "—" if row[key] is None else f"{scale * row[key]:{form}}"


def _operations(row: Row) -> str:
  if row["transpose"] is None:
    return "—"
  return " ".join(str(row[name]) for name in OPERATIONS)


_COLUMNS: dict[str, Callable[[Row], str]] = {
  "time ÷": _number("time_s_ratio"),
  "bytes ÷": _number("bytes_ratio"),
  "flops ÷": _number("flops_ratio"),
  "eager ÷": _number("eager_s_ratio"),
  "bytes/N": _number("bytes_per_n"),
  "temp/N": _number("temporaries_per_n"),
  "kept/N": _number("kept_per_n"),
  "scan/N": _number("scan_per_n"),
  "t s g c": _operations,
  "ms": _number("time_s", scale=1e3),
  "eager ms": _number("eager_s", scale=1e3),
  "compile s": _number("compile_s"),
  "of copy": _number("copy_ratio", ".0%"),
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
  packages = (optax_masking, optax, jax, jaxlib)
  clock = not options.no_time
  on_gpu = clock and device.platform == "gpu"
  report: dict[str, Any] = {
    "versions": {p.__name__: p.__version__ for p in packages},
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
      for row in rows:
        copy_speed = report["copy_bytes_per_s"]
        row["copy_ratio"] = ratio(row["bytes_per_s"], copy_speed)
      tables.append((_title(rows[0]), rows))
      report["rows"] += rows
      # After each table, so that what is interrupted is not lost.
      options.output.write_text(json.dumps(report, indent=1) + "\n")
      print(f"\n{tables[-1][0]}\n\n{_table(rows)}", flush=True)
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
      hint = "what part of a mask is true"
      add("--density", nargs="+", type=float, help=hint)
    else:
      hint = "some of: " + "; ".join(choices)
      metavar = name.upper()
      add(f"--{name}", nargs="+", choices=choices, metavar=metavar, help=hint)
  hint = "all values of what is not selected, which may take hours"
  add("--all", action="store_true", help=hint)
  add("--no-time", action="store_true", help="only the counters")
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
  grid = {
    name: selected[name] or (every if options.all else usual)
    for name, (every, usual) in _GRID.items()
  }
  if options.all or any(selected.values()):
    return [grid]
  return [grid, *(grid | more for more in _MORE_BY_DEFAULT)]


def _title(row: Row) -> str:
  shape = f"{row['shape']}"
  if row["axis"] != -1:
    shape += f", axis={row['axis']}"
  if row["read_as"] != row["shape"]:
    shape += f" as {row['read_as']}"
  return f"**{row['loss']}**: {row['transform']}, {row['dtype']}, {shape}"


def _table(rows: list[Row]) -> str:
  """A table in Markdown, in aligned columns, without those that are empty."""
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
