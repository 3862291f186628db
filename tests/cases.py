"""The table of cases: every masked loss, its data and an independent formula.

A new loss is one row. Each property of the contract is one test over the table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream

import optax_masking as optax

# float64 exists only where JAX is told so before it starts.
DTYPES = (
  ("float64",)
  if jax.config.jax_enable_x64
  else ("float32", "bfloat16", "float16")
)
SHAPE = (4, 5)


def tolerance(dtype: str, roundings: float = 16.0) -> dict[str, float]:
  """Room for some roundings at numbers of the size of the test data."""
  epsilon = roundings * float(jnp.finfo(dtype).eps)
  return {"rtol": epsilon, "atol": epsilon}


# NumPy by itself takes NaN for equal to NaN.
assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)


def assert_close(
  got, expected, dtype: str, message: str = "", roundings: float = 16.0
) -> None:
  """Compares numbers of a dtype, up to some roundings."""
  assert_allclose(
    np.asarray(got, "float64"),
    np.asarray(expected, "float64"),
    **tolerance(dtype, roundings),
    err_msg=message,
  )


def assert_equal(got, expected, message: str = "") -> None:
  """Compares finite numbers, exactly."""
  assert np.all(np.isfinite(np.asarray(got, "float64"))), message
  np.testing.assert_array_equal(got, expected, err_msg=message)


def _logits(rng, shape, axis):
  return rng.normal(size=shape) * 2


def _probabilities(rng, shape, axis):
  x = rng.uniform(0.5, 2.0, size=shape)
  return x / x.sum(axis, keepdims=True)


def _log_probabilities(rng, shape, axis):
  return np.log(_probabilities(rng, shape, axis))


def _soft_labels(rng, shape, axis):
  return rng.uniform(0.1, 0.9, size=shape)


def _index(rng, shape, axis):
  axes = np.arange(len(shape))[list(np.atleast_1d(axis))]
  classes = int(np.prod([shape[a] for a in axes]))
  batch = [s for a, s in enumerate(shape) if a not in axes]
  return rng.integers(0, classes, size=batch)


def _log_softmax(x):
  return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def _focal(x, y, gamma=2.0):
  p = 1 / (1 + np.exp(-x))
  p_of_label = y * p + (1 - y) * (1 - p)
  cross_entropy = -y * np.log(p) - (1 - y) * np.log(1 - p)
  return (1 - p_of_label) ** gamma * cross_entropy


def _cosine(a, b):
  return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


@dataclasses.dataclass(frozen=True)
class Case:
  """A loss, what to call it with, and its formula for one slice of data.

  `formula` is written from the definition, in NumPy and float64, and takes the
  included elements of a slice alone. A formula of an elementwise loss returns
  one number an element.
  """

  name: str
  data: tuple[Callable[..., np.ndarray], ...]
  formula: Callable[..., np.ndarray]
  axis: int | tuple[int, ...] = -1

  @property
  def loss(self) -> Callable[..., jax.Array]:
    return getattr(optax.losses, self.name)

  @property
  def original(self) -> Callable[..., jax.Array]:
    return getattr(upstream.losses, self.name)

  @property
  def elementwise(self) -> bool:
    return self.axis == ()

  @property
  def has_index(self) -> bool:
    return _index in self.data

  def arguments(
    self, dtype: str, shape: tuple[int, ...] = SHAPE, axis: Any = -1
  ) -> tuple[jax.Array, ...]:
    """Clean data for all arguments, the same at each call."""
    rng = np.random.default_rng(sum(map(ord, self.name)))
    arrays = [make(rng, shape, axis) for make in self.data]
    return tuple(
      jnp.asarray(a, "int32" if a.dtype.kind == "i" else dtype) for a in arrays
    )

  def floating(self) -> tuple[int, ...]:
    """Positions of the differentiable arguments."""
    return tuple(i for i, make in enumerate(self.data) if make is not _index)


CASES = (
  Case(
    "softmax_cross_entropy",
    (_logits, _soft_labels),
    lambda x, y: -np.sum(y * _log_softmax(x)),
  ),
  Case(
    "softmax_cross_entropy_with_integer_labels",
    (_logits, _index),
    lambda x, y: -_log_softmax(x)[y],
  ),
  Case(
    "kl_divergence",
    (_log_probabilities, _probabilities),
    lambda q, p: np.sum(p * (np.log(p) - q)),
  ),
  Case(
    "generalized_kl_divergence",
    (_logits, _soft_labels),
    lambda q, p: np.sum(p * (np.log(p) - q) + np.exp(q) - p),
  ),
  Case("cosine_similarity", (_logits, _logits), _cosine),
  Case("cosine_distance", (_logits, _logits), lambda a, b: 1 - _cosine(a, b)),
  Case("sigmoid_focal_loss", (_logits, _soft_labels), _focal, axis=()),
)

# Every function of this package's own among the losses.
MASKED = [
  name
  for name in sorted(optax.losses.__all__)
  if getattr(optax.losses, name).__module__.startswith("optax_masking.")
]

NAMED = [(case.name, case) for case in CASES]


def masks(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
  """Masks of the data's shape, of every kind."""
  rng = np.random.default_rng(7)
  kinds = {
    "nothing masked": np.ones(shape, bool),
    "everything masked": np.zeros(shape, bool),
    "one element": np.ones(shape, bool),
    "all but one element": np.zeros(shape, bool),
    "whole rows": np.ones(shape, bool),
    "whole classes": np.ones(shape, bool),
    "random": rng.uniform(size=shape) < 0.6,
    "random, sparse": rng.uniform(size=shape) < 0.2,
  }
  kinds["one element"].flat[1] = False
  kinds["all but one element"].flat[-1] = True
  kinds["whole rows"][::2] = False
  kinds["whole classes"][..., 1:3] = False
  return kinds


def float_poisons(dtype: str) -> tuple[jax.Array, ...]:
  """What a masked element of a floating argument may hold."""
  info = jnp.finfo(dtype)
  values = (
    np.nan,
    np.inf,
    -np.inf,
    info.max,
    info.min,
    -1e30,
    info.smallest_subnormal,
    0.0,
  )
  return tuple(jnp.asarray(v).astype(dtype) for v in values)


INDEX_POISONS = (-100, -1, SHAPE[-1], 2**31 - 1)
