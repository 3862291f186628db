"""Measures the cross-entropy of a linear layer next to other ways to have it.

    python -m benchmarks.linear                        # 4096 x 512 x 32000.
    python -m benchmarks.linear --shape 256x64x1000    # Rows, features, ...
    python -m benchmarks.linear --no-time --shape 16384x512x32000
    python -m benchmarks.linear --for h100             # Without one.

Each line is of a value and its gradients by features and kernel, as one
program. The mean is of the included rows, but Optax's is of all of them: it is
the floor, and ratios are to it. `temp MB` are the program's temporaries, and
`GB` what its kernels read and write: `counters.py` defines both. A loop of
unknown length counts once, so there `GB` is none. Seconds are those of the
processors too, which other programs on the same machine change less.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_masking
from benchmarks import h100, timing
from benchmarks.counters import counters_of
from optax_masking.reductions import masked_mean

SCANNED = 512  # Rows in a step of the scan.
Mean = Callable[..., jax.Array]


def optax_unfused(features, kernel, labels, where):
  """The floor: all logits, and no mask."""
  del where
  return optax.softmax_cross_entropy_with_integer_labels(
    features @ kernel, labels
  ).mean()


def ours_unfused(features, kernel, labels, where):
  """All logits, with a mask."""
  losses = optax_masking.softmax_cross_entropy_with_integer_labels(
    features @ kernel, labels, where=where
  )
  return masked_mean(losses, where)


def checkpoint_in_scan(features, kernel, labels, where):
  """Some rows at a time, computed a second time for the gradient."""
  parts = jax.tree.map(
    lambda x: x.reshape(-1, min(SCANNED, x.shape[0]), *x.shape[1:]),
    (features, labels, where),
  )

  @jax.checkpoint
  def losses(features, labels, where):
    return optax_masking.softmax_cross_entropy_with_integer_labels(
      features @ kernel, labels, where=where
    )

  _, found = jax.lax.scan(lambda c, part: (c, losses(*part)), None, parts)
  return masked_mean(found.reshape(-1), where)


def ours_fused(features, kernel, labels, where):
  """Blocks of the included rows."""
  losses = optax_masking.linear_softmax_cross_entropy_with_integer_labels(
    features, kernel, labels, where=where
  )
  return masked_mean(losses, where)


VARIANTS: dict[str, Mean] = {
  "optax, unfused, no mask": optax_unfused,
  "ours, unfused": ours_unfused,
  "checkpoint in a scan": checkpoint_in_scan,
  "ours, fused": ours_fused,
}


def make_data(shape: tuple[int, int, int], dtype: str) -> tuple[Any, ...]:
  """Features, kernel and labels."""
  rows, features, classes = shape
  rng = np.random.default_rng(0)
  x = rng.standard_normal((rows, features), "float32")
  kernel = rng.standard_normal((features, classes), "float32") / features**0.5
  labels = rng.integers(0, classes, rows)
  return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels)


def make_mask(rows: int, density: float, padded: bool) -> jax.Array:
  """A mask of exactly so many rows: random ones, or those of padded texts."""
  rng = np.random.default_rng(1)
  mask = np.arange(rows) < round(rows * density)
  if not padded:
    return jnp.asarray(rng.permutation(mask))
  length = min(rows, 256)
  lengths = rng.uniform(0, 2 * density, rows // length).clip(0, 1) * length
  return jnp.asarray((np.arange(length) < lengths[:, None]).reshape(-1))


class _Timed:
  """A function that notes the processors' seconds of its calls."""

  def __init__(self, function: Callable[..., Any]):
    self.function = function
    self.seconds: list[float] = []

  def __call__(self, *arguments: Any) -> Any:
    start = time.process_time()
    result = jax.block_until_ready(self.function(*arguments))
    self.seconds.append(time.process_time() - start)
    return result


def measure(options: argparse.Namespace) -> None:
  """Prints a line for each variant and density."""
  data = make_data(options.shape, options.dtype)
  rows = options.shape[0]
  masks = {
    density: make_mask(rows, density, options.padded)
    for density in options.density
  }
  calls: list[tuple[_Timed, tuple[Any, ...]]] = []
  lines: list[tuple[str, str, str, str]] = []
  for name, mean in VARIANTS.items():
    function = jax.jit(jax.value_and_grad(mean, (0, 1)))
    inputs = (*data, next(iter(masks.values())))
    program = h100.compiled(function, inputs, options.target == "h100")
    found = counters_of(program)
    n_bytes = f"{found['bytes'] / 1e9:.2f}" if mean is not ours_fused else "—"
    of_program = f"{found['temporaries'] / 1e6:.0f}", n_bytes
    for density, mask in masks.items():
      if mean is not optax_unfused or density == options.density[0]:
        shown = "—" if mean is optax_unfused else f"{density:g}"
        lines.append((name, shown, *of_program))
        calls.append((_Timed(program), (*data, mask)))
  head = "|  | density | temp MB | GB |"
  if options.no_time or options.target == "h100":
    print(head + "\n|---|---:|---:|---:|")
    for line in lines:
      print(f"| {' | '.join(line)} |")
    return
  times = timing.time_interleaved(calls, options.rounds, options.budget)
  processors = [statistics.median(f.seconds[1:]) for f, _ in calls]
  print(f"{head} s | ÷ | processors' s | ÷ |\n|---|{'---:|' * 7}")
  for line, (seconds, ratio), own in zip(lines, times, processors, strict=True):
    cells = (
      f"{seconds:.3f} | {ratio:.2f} | {own:.3f} | {own / processors[0]:.2f}"
    )
    print(f"| {' | '.join(line)} | {cells} |", flush=True)


def _shape(text: str) -> tuple[int, ...]:
  shape = tuple(map(int, text.split("x")))
  if len(shape) != 3:
    raise argparse.ArgumentTypeError(f"{text!r} is no shape as 4096x512x32000")
  return shape


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the benchmark with the options of the command line."""
  parser = argparse.ArgumentParser(
    "python -m benchmarks.linear",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--shape", type=_shape, default=(4096, 512, 32000), help="N x D x V")
  add("--dtype", default="float32", choices=("float32", "bfloat16"))
  add("--density", nargs="+", type=float, default=(0.1, 0.5, 1.0))
  add("--padded", action="store_true", help="mask tails, not random rows")
  add("--rounds", type=int, default=5)
  add("--budget", type=float, default=120.0, help="seconds, after five rounds")
  add("--no-time", action="store_true", help="only the counters")
  hint = "h100: the counters of a program for an H100, which need not be there"
  add("--for", dest="target", choices=("here", "h100"), help=hint)
  options = parser.parse_args(arguments)
  if options.target == "h100":
    h100.prepare()
  device = options.target or jax.devices()[0]
  print(f"jax {jax.__version__}, optax {optax.__version__}, {device}")
  measure(options)


if __name__ == "__main__":
  main(sys.argv[1:])
