"""Neutral fills that depend on the data.

Each is called with an argument `x`, the mask `where` and the reduced `axes`.
`where` has the rank of the data, and `x` broadcasts with it.

* `below_maximum` is for the logits of a softmax, `far_below` for the scores of
  a maximum, `zero_unless_empty` for vectors that are divided by their norm.
* `PerExample(number)` is for an argument with one entry an example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_masking._classes import (
  UNDERFLOW,
  Array,
  Axes,
  flat_index,
  varies_along,
)

__all__ = [
  "PerExample",
  "below_maximum",
  "far_below",
  "zero_unless_empty",
]

Fill = float | Callable[[Array, jax.Array, Axes], jax.Array]


@dataclasses.dataclass(frozen=True)
class PerExample:
  """Fills an argument that has one entry an example, and none of ``axis``.

  Attributes:
    fill: The number that replaces the entry of a masked example.
  """

  fill: float


def below_maximum(
  x: Array,
  where: jax.Array,
  axes: Axes,
  *,
  masked: float = UNDERFLOW,
  largest: float = math.inf,
) -> jax.Array:
  """Fills logits that enter a softmax, which a shift does not change.

  Included logits are shifted so that the largest of a slice is 0, masked ones
  are put where an exponential is 0 and not much lower: their log probability
  multiplies the derivatives of the loss. Without the shift no constant would be
  below logits near the least finite number, and at the same time a finite
  distance below those near the largest. A slice with nothing included keeps its
  first class, at 0, and one with a larger logit than `largest` is not shifted.
  """
  if varies_along(where, axes) and 0 not in jnp.shape(x):
    top = _maximum(x, where, axes)
    # An included logit of +inf is left for the loss to deal with.
    largest = min(largest, float(jnp.finfo(top.dtype).max))
    top = jnp.where(top > largest, 0, top)
    x = jnp.where(where, x, top) - top
  return _keep_first(jnp.where(where, x, masked), where, axes, 0.0)


def far_below(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills scores that enter a maximum, or a smooth one, without a shift.

  It is for losses that a shift does change, such as by targets that need not
  add up to 1. Masked scores are put below the largest of a slice by 10,000 (128
  in float16) and an eighth of its size, which is apart from it at every
  precision; if the largest is near the least finite number, they are put there.
  If the largest is that number itself, included scores are raised to the next
  one, so that none ties with a masked one and shares its gradient.
  """
  if 0 in jnp.shape(x):
    return jnp.asarray(x)
  info = jnp.finfo(jnp.result_type(x))
  least = float(info.min)
  if not varies_along(where, axes):
    x = jnp.where(where, x, -min(1e4, float(info.max) / 512))
    return _keep_first(x, where, axes, 0.0)
  top = _maximum(x, where, axes)
  finite = jnp.clip(top, least / 2, -least)
  # An eighth is more than bfloat16 rounds off; float16 has no room for 10,000.
  lower = finite - jnp.abs(finite) / 8 - min(1e4, float(info.max) / 512)
  lower = jnp.where(top > least / 2, lower, jnp.minimum(top, least))
  filled = _keep_first(jnp.where(where, x, lower), where, axes, 0.0)
  last_digit = 2.0 ** int(info.maxexp - info.nmant - 1)  # Of the least number.
  return filled + jnp.where(where & (top == least), last_digit, 0.0)


def zero_unless_empty(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills vectors that are divided by their norm: 0 adds nothing to either.

  A vector with nothing included becomes the first unit vector, whose norm has
  finite derivatives.
  """
  return _keep_first(jnp.where(where, x, 0.0), where, axes, 1.0)


def _maximum(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """The largest included element of each slice, or 0 if nothing is included.

  Quarters leave room for a number below all that are finite.
  """
  quarters = jnp.where(where, jax.lax.stop_gradient(x), 0) / 4
  least = 0.75 * float(jnp.finfo(quarters.dtype).min)
  top = jnp.max(jnp.where(where, quarters, least), axes, keepdims=True)
  none_finite = top <= least
  some = jnp.any(where, axes, keepdims=True)
  top = 4 * jnp.where(none_finite, 0, top)
  return jnp.where(none_finite & some, -jnp.inf, top)


def _keep_first(
  filled: jax.Array, where: jax.Array, axes: Axes, value: float
) -> jax.Array:
  """Gives an empty slice one element other than the fill.

  One and not all: the sum of many would overflow in half precision.
  """
  empty = ~jnp.any(where, axes, keepdims=True)
  first = flat_index(filled.shape, axes) == 0
  return jnp.where(empty & first, value, filled)
