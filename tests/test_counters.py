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


def sliced(x, y):
  return jax.lax.scan(lambda total, row: (total + row[0], None), 0.0, x)[0]


def chosen(x, y):
  return jax.lax.cond(y[0] > 0, lambda x: 2 * x, lambda x: 0 * x, x)


@pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="Other compilers fuse otherwise."
)
@pytest.mark.parametrize(
  ("function", "dtype", "arrays"),
  [
    (lambda x, y: 2 * x, "float32", 2),  # Read, and written.
    (lambda x, y: 2 * x + x.T.T, "float32", 2),  # Read once.
    (lambda x, y: jnp.sum(x, -1), "float32", 1),
    (lambda x, y: x[:, :256] * 2, "float32", 1),  # Half of it, and written.
    (lambda x, y: x @ x.T, "float32", 1 + ROWS / CLASSES),
    (lambda x, y: x > 0, "float32", 1.25),  # A bool has a byte.
    (lambda x, y: x > 0, "bfloat16", 1.5),
    (gathered, "float32", 0),
    (gathered_wide, "bfloat16", 0),
    (scattered, "float32", 2),  # The product is written; the sums are in place.
    (lambda x, y: 2 * x + gathered(x, y), "float32", 2),
    (sliced, "float32", 0),  # Of each row the first element.
    (chosen, "float32", 2),  # One of two branches runs.
  ],
)
def test_bytes(function, dtype, arrays):
  """Counts bytes in arrays of the size of `x`, and few others in each row."""
  x = jax.ShapeDtypeStruct(X.shape, dtype)
  got = counters(function, x, Y)["bytes"] / (x.size * x.dtype.itemsize)
  assert arrays <= got <= arrays + 0.05


def test_kernels_of_a_loop():
  """A loop counts as often as it runs."""
  run = lambda steps: counters(  # noqa: E731
    lambda x, y: jax.lax.fori_loop(0, steps, lambda i, x: jnp.sin(x), x), X, Y
  )
  few, many = run(10), run(20)
  size = X.size * 4
  assert many["bytes"] - few["bytes"] == pytest.approx(10 * 2 * size, rel=0.01)
  assert many["kernels"] - few["kernels"] >= 10
