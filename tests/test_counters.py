"""The counters of the benchmark, on programs with known costs."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.counters import counters

ROWS, CLASSES = 4096, 512
X = jax.ShapeDtypeStruct((ROWS, CLASSES), "float32")
Y = jax.ShapeDtypeStruct((ROWS,), "int32")


def gathered(x, y):
  return jnp.take_along_axis(x, y[:, None], 1)


def gathered_wide(x, y):
  return jnp.take_along_axis(x.astype("float32"), y[:, None], 1)


def scattered(x, y):
  return (2 * x).at[jnp.arange(ROWS), y].add(1.0)


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="Other compilers fuse otherwise."
)
@pytest.mark.parametrize(
  ("function", "dtype", "arrays"),
  [
    (lambda x, y: 2 * x, "float32", 2),  # Read, and written.
    (gathered, "float32", 0),
    (gathered_wide, "bfloat16", 0),
    (scattered, "float32", 2),  # The product is written; the sums are in place.
    (lambda x, y: 2 * x + gathered(x, y), "float32", 2),
  ],
)
def test_bytes(function, dtype, arrays):
  """Counts bytes in arrays of the size of `x`, and few others in each row."""
  x = jax.ShapeDtypeStruct(X.shape, dtype)
  got = counters(function, x, Y)["bytes"] / (x.size * x.dtype.itemsize)
  assert arrays <= got <= arrays + 0.05
