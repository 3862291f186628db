"""Neutral fills that no constant can be.

Each is a function of an argument `x`, the mask `where` and the reduced `axes`.
`where` has the rank of the data, and `x` broadcasts with it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["below_maximum", "class_index", "zero_unless_empty"]

Array = jax.Array | np.ndarray
Axes = tuple[int, ...]  # Canonical: none negative, none repeated.
Fill = float | Callable[[Array, jax.Array, Axes], jax.Array]


def select(where: jax.Array, x: Any, fill: float) -> jax.Array:
  """Replaces what is masked by a number, and keeps the dtype, weak or not."""
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jnp.bool):
    return jnp.where(where, x, bool(fill))
  kind = int if jnp.issubdtype(dtype, jnp.integer) else float
  return jnp.where(where, x, kind(fill))


def class_index(labels: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills integer class labels: a masked example gets class 0.

  The labels have size 1 along ``axes``, and so has ``where``.
  """
  return jnp.squeeze(select(where, labels, 0), axes)


def below_maximum(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills logits that only enter a softmax, which a shift does not change.

  Included logits are shifted so that the largest of a slice is 0, masked ones
  are put where an exponential is 0 and not much lower: their log probability
  multiplies the derivatives of the loss. Without the shift no constant would be
  below logits near the least finite number, and at the same time a finite
  distance below those near the largest. A slice with nothing included keeps its
  first class, at 0.
  """
  # Half precision is computed in float32, as a rule; in float64 an exponential
  # of this size is lost next to that of 0.
  underflow = 1.1 * math.log(float(jnp.finfo("float32").smallest_subnormal))
  if any(where.shape[a] != 1 for a in axes) and 0 not in jnp.shape(x):
    # A masked logit must not decide the maximum, nor may an infinite constant:
    # it is first replaced by 0 or the least included logit, the lower of them.
    constant = jax.lax.stop_gradient
    least = jnp.min(constant(jnp.where(where, x, 0)), axes, keepdims=True)
    x = jnp.where(where, x, least)
    top = jnp.max(constant(x), axes, keepdims=True)
    # An included logit of +inf is left for the loss to deal with.
    x = x - jnp.where(top > float(jnp.finfo(top.dtype).max), 0, top)
  return _keep_first(jnp.where(where, x, underflow), where, axes, 0.0)


def zero_unless_empty(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills vectors that are divided by their norm: 0 adds nothing to either.

  A vector with nothing included becomes the first unit vector, whose norm has
  finite derivatives.
  """
  return _keep_first(jnp.where(where, x, 0.0), where, axes, 1.0)


def _keep_first(
  filled: jax.Array, where: jax.Array, axes: Axes, value: float
) -> jax.Array:
  """Gives an empty slice one element other than the fill.

  One and not all: the sum of many would overflow in half precision.
  """
  empty = ~jnp.any(where, axes, keepdims=True)
  first = flat_index(filled.shape, axes) == 0
  return jnp.where(empty & first, value, filled)


def flat_index(shape: tuple[int, ...], axes: Axes) -> jax.Array:
  """The position of each element of a slice, counted in the order of axes."""
  sizes = tuple(s if a in axes else 1 for a, s in enumerate(shape))
  index = jnp.zeros(sizes, int)
  for a in axes:
    index = index * shape[a] + jax.lax.broadcasted_iota(index.dtype, sizes, a)
  return index
