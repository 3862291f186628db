"""The formulas of other platforms than CPUs, run on a CPU.

Where a loss chooses a formula by the platform, the other tests see that of
CPUs. These make the other choice, for shapes that no other test has: JAX keeps
the programs of a shape.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_allclose

import optax_masking as optax

SHAPE = (7, 11)
LOSSES = {
  "softmax_cross_entropy": optax.softmax_cross_entropy,
  "softmax_cross_entropy_with_integer_labels": (
    optax.softmax_cross_entropy_with_integer_labels
  ),
  "safe_softmax_cross_entropy": optax.safe_softmax_cross_entropy,
  "ranking_softmax_loss": functools.partial(
    optax.losses.ranking_softmax_loss, reduce_fn=None
  ),
  "ntxent": optax.ntxent,
}


@pytest.fixture(autouse=True, scope="module")
def elsewhere():
  def platform_dependent(*arguments, default, **platforms):
    del platforms
    return default(*arguments)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.lax, "platform_dependent", platform_dependent)
    yield


def data(name, seed):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=SHAPE).astype("float32")
  if name == "ntxent":
    return x, np.array([0, 0, 1, 1, 2, 2, 0])
  if "integer" in name:
    return x, rng.integers(0, SHAPE[1], SHAPE[0])
  return x, rng.dirichlet(np.ones(SHAPE[1]), SHAPE[0]).astype("float32")


def value_and_grads(name, x, y, where):
  floating = (0, 1) if np.issubdtype(y.dtype, np.floating) else (0,)
  total = lambda x, y: jnp.sum(LOSSES[name](x, y, where=where))  # noqa: E731
  value, grads = jax.value_and_grad(total, floating)(x, y)
  return [np.asarray(value), *map(np.asarray, grads)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", ["rows", "elements"])
def test_contract(name, kind):
  seed = math.prod(map(ord, name[:3]))
  x, y = data(name, seed % 1000)
  where = np.random.default_rng(1).random(SHAPE) < 0.7
  where[3] = False
  if kind == "rows" or name == "ntxent":
    where = np.repeat(where[:, :1], SHAPE[1], 1)
  expected = value_and_grads(name, x, y, where)
  assert all(np.isfinite(e).all() for e in expected)
  for garbage in (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45):
    poisoned = np.where(where, x, garbage)
    labels = y
    if y.shape == SHAPE:
      labels = np.where(where, y, garbage)
    elif "integer" in name:
      labels = np.where(where.any(-1), y, -100)
    got = value_and_grads(name, poisoned, labels, where)
    for a, b in zip(got, expected, strict=True):
      np.testing.assert_array_equal(a, b)
  for gradient in expected[1:]:
    assert not gradient[~where].any()


@pytest.mark.parametrize("name", list(LOSSES)[:4])
def test_values(name):
  """Against NumPy, in float64, with large logits and a confident one."""
  x, y = data(name, 0)
  x[0] = 1e37 * np.linspace(-1, 1, SHAPE[1])
  x[1, 0] = 40
  where = np.random.default_rng(2).random(SHAPE) < 0.7
  where[0, -1] = where[1, 0] = True
  where[2] = False
  labels = y if y.shape == SHAPE else np.eye(SHAPE[1])[y]
  if y.shape != SHAPE:
    where[np.arange(SHAPE[0]), y] = np.arange(SHAPE[0]) != 2
  x64 = np.where(where, x.astype("float64"), -np.inf)
  top = np.where(where.any(-1), x64.max(-1), 0)[:, None]
  e = np.exp(x64 - top)
  total = np.where(where.any(-1), e.sum(-1), 1)[:, None]
  targets = np.where(where, labels, 0)
  log_p = np.where(where, x - top - np.log(total), 0)
  value, gradient, *_ = value_and_grads(name, x, y, where)
  assert_allclose(value, -(targets * log_p).sum(), rtol=1e-5)
  slope = e / total * targets.sum(-1, keepdims=True) - targets
  scale = np.abs(slope).max(-1, keepdims=True)
  assert (np.abs(gradient - slope) <= 1e-6 * scale).all()
  small = e / total < 1e-6
  small &= (targets == 0) & (e > 1e-30)
  assert_allclose(gradient[small], slope[small], rtol=1e-4)


@pytest.mark.parametrize("name", list(LOSSES)[:4])
def test_included_nan_comes_out(name):
  x, y = data(name, 0)
  x[4, 2] = np.nan
  where = np.ones(SHAPE, bool)
  where[:, 5] = False
  if y.shape != SHAPE:
    y = np.zeros_like(y)
  assert np.isnan(LOSSES[name](x, y, where=where)[4])


def test_safe_labels_of_zero():
  """An impossible class adds 0; labels of 0 have the derivative of others."""
  x = np.array([[1.0, 2.0, -np.inf, np.nan]], "float32")
  y = np.array([[0.0, 1.0, 0.0, 0.5]], "float32")
  where = np.array([[True, True, True, False]])
  total = lambda x, y: jnp.sum(  # noqa: E731
    optax.safe_softmax_cross_entropy(x, y, where=where)
  )
  log_p = np.array([-1, 0]) - math.log1p(math.exp(-1))
  assert_allclose(total(x, y), -log_p[1], rtol=1e-6)
  by_x, by_y = jax.grad(total, (0, 1))(x, y)
  p = np.exp(log_p)
  assert_allclose(by_x[0], [p[0], p[1] - 1, 0, 0], rtol=1e-6)
  assert_allclose(by_y[0], [*-log_p, np.inf, 0], rtol=1e-6)


def test_hessian():
  x, y = data("softmax_cross_entropy", 0)
  where = np.random.default_rng(3).random(SHAPE) < 0.6
  total = lambda x: jnp.sum(  # noqa: E731
    optax.softmax_cross_entropy(x, y, where=where)
  )
  got = np.asarray(jax.hessian(total)(np.where(where, x, np.nan)))
  assert np.isfinite(got).all()
  assert not got[~where].any()
  assert not np.moveaxis(got, (2, 3), (0, 1))[~where].any()
