"""Neutral fills that no constant can be."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Axes = tuple[int, ...]  # Canonical: none negative, none repeated.
Fill = float | Callable[[Array, jax.Array, Axes], jax.Array]


def class_index(labels: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills integer class labels: a masked example gets class 0.

  The labels have size 1 along ``axes``, and so has ``where``.
  """
  return jnp.squeeze(jnp.where(where, labels, 0), axes)


def below_maximum(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills logits that only enter a softmax, which a shift does not change.

  Included logits are shifted so that the largest of a slice is 0, masked ones
  are put so far below that their exponential underflows to 0. Without the
  shift no constant would be far below logits near the least finite number and
  at the same time a finite distance below those near the largest.
  """
  if all(where.shape[a] == 1 for a in axes) or x.size == 0:
    return jnp.where(where, x, 0)  # Whole examples: any logits do.
  # A masked logit must not decide the maximum, nor may an infinite constant: so
  # it is first replaced by 0 or the least included logit, whichever is lower.
  least = jnp.min(jnp.where(where, x, 0), axes, keepdims=True)
  included = jnp.where(where, x, jax.lax.stop_gradient(least))
  top = jax.lax.stop_gradient(jnp.max(included, axes, keepdims=True))
  # An included logit of +inf is left for the loss to deal with.
  limit = float(jnp.finfo(top.dtype).max)
  top = jnp.where(top > limit, 0, top)
  return jnp.where(where, included - top, -limit / 2)


def zero_unless_empty(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills vectors that are divided by their norm: 0 adds nothing to either.

  A vector with nothing included becomes a unit vector, whose norm has finite
  derivatives.
  """
  unit = max(math.prod(x.shape[a] for a in axes), 1) ** -0.5
  empty = ~jnp.any(where, axes, keepdims=True)
  return jnp.where(where, x, jnp.where(empty, unit, 0.0))
