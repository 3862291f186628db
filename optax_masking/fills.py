"""Neutral fills that depend on the data.

Each is called with an argument `x`, the mask `where` and the reduced `axes`.
`where` has the rank of the data, and `x` broadcasts with it.

* `below_maximum` is for the logits of a softmax, `far_below` for the scores of
  a maximum, `zero_unless_empty` for vectors that are divided by their norm.
* `PerExample(number)` is for an argument with one entry an example.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
  "PerExample",
  "below_maximum",
  "far_below",
  "zero_unless_empty",
]

Array = jax.Array | np.ndarray
Axes = tuple[int, ...]  # Canonical: none negative, none repeated.
Shape = tuple[int, ...]
Fill = float | Callable[[Array, jax.Array, Axes], jax.Array]

# An exponential of this size is 0 in float32, in which half precision is
# computed as a rule; in float64 it is lost next to that of 0.
_UNDERFLOW = 1.1 * math.log(float(jnp.finfo("float32").smallest_subnormal))


def select(where: jax.Array, x: Any, fill: float) -> jax.Array:
  """Replaces masked elements by a number, and keeps the dtype, weak or not."""
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jnp.bool):
    return jnp.where(where, x, bool(fill))
  kind = int if jnp.issubdtype(dtype, jnp.integer) else float
  return jnp.where(where, x, kind(fill))


@dataclasses.dataclass(frozen=True)
class PerExample:
  """Fills an argument that has one entry an example, and none of ``axis``.

  Attributes:
    fill: The number that replaces the entry of a masked example.
  """

  fill: float


def varies_along(x: Array, axes: Axes) -> bool:
  """Whether an array has more than one element along any of the axes.

  A mask that has not is one of whole examples, and is never expanded.
  """
  return any(x.shape[a] != 1 for a in axes)


def expanded(x: Array, rank: int, axes: Axes) -> jax.Array:
  """Gives an array with one entry an example the rank of the data."""
  missing = rank - len(axes) - jnp.ndim(x)
  return jnp.expand_dims(jnp.expand_dims(x, range(missing)), axes)


def class_number(labels: Array, classes: int) -> jax.Array:
  """The class of each label, counted from 0; `classes` if it names none."""
  labels = jnp.asarray(labels).astype(int)
  labels = jnp.where(labels < 0, labels + classes, labels)  # -1 is the last.
  return jnp.where((labels >= 0) & (labels < classes), labels, classes)


def take_class(x: jax.Array, labels: jax.Array, axes: Axes) -> jax.Array:
  """Looks up the element of `x` that belongs to the class of each example.

  The labels are class numbers, with the rank of `x`. A label that names no
  class gives NaN, and True for a boolean `x`.
  """
  classes = math.prod(x.shape[a] for a in axes)

  def compare(x, labels):
    named = flat_index(x.shape, axes) == labels
    if x.dtype == bool:
      return ~jnp.any(named & ~x, axes, keepdims=True)
    found = jnp.sum(jnp.where(named, x, 0), axes, keepdims=True)
    # Divides 0 by 0, since a constant NaN would be reported by debug tools.
    return found / (labels < classes).astype(x.dtype)

  def gather(x, labels):
    if x.dtype == bool:
      found = jnp.take_along_axis(x, jnp.minimum(labels, classes - 1), axes[0])
      return found | (labels == classes)
    return jnp.take_along_axis(x, labels, axes[0])  # NaN if out of range.

  # An explicit mesh refuses to gather from an axis that it shards.
  if len(axes) != 1 or _is_sharded(x, axes[0]):
    return compare(x, labels)
  # Except on CPUs, the comparison is fused with a loop that is there anyway.
  return on_cpus(gather, compare, x, labels)


def on_cpus(
  function: Callable[..., jax.Array],
  otherwise: Callable[..., jax.Array],
  *arguments: jax.Array,
) -> jax.Array:
  """Calls `function` if the program runs on CPUs, and else `otherwise`."""
  # The `shard_map` of older versions refuses a choice between platforms.
  if not hasattr(jax, "shard_map"):
    return otherwise(*arguments)
  return jax.lax.platform_dependent(*arguments, cpu=function, default=otherwise)


def _is_sharded(x: Array, axis: int) -> bool:
  """Whether an axis is sharded over an explicit mesh."""
  spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
  return len(spec) > axis and spec[axis] is not None


def class_is_included(
  labels: Array, where: jax.Array, shape: Shape, axes: Axes
) -> jax.Array:
  """Whether the class of each example is included.

  An example with a label that names no class counts as included, so that the
  loss reports the label as it does without a mask.
  """
  if not varies_along(where, axes):
    return where
  labels = class_number(labels, math.prod(shape[a] for a in axes))
  batch = tuple(1 if a in axes else s for a, s in enumerate(shape))
  labels = jnp.broadcast_to(expanded(labels, len(shape), axes), batch)
  return take_class(jnp.broadcast_to(where, shape), labels, axes)


def below_maximum(
  x: Array,
  where: jax.Array,
  axes: Axes,
  *,
  masked: float = _UNDERFLOW,
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
    x = _not_maximum(x, where, axes)
    top = jnp.max(jax.lax.stop_gradient(x), axes, keepdims=True)
    # An included logit of +inf is left for the loss to deal with.
    largest = min(largest, float(jnp.finfo(top.dtype).max))
    x = x - jnp.where(top > largest, 0, top)
  return _keep_first(jnp.where(where, x, masked), where, axes, 0.0)


def far_below(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Fills scores that enter a maximum, or a smooth one, without a shift.

  It is for losses that a shift does change, such as by targets that need not
  add up to 1. Masked scores are put below the largest of a slice by 10,000 (128
  in float16) and an eighth of its size, which is apart from it at every
  precision; if the largest is near the least finite number, they are put there.
  """
  if 0 in jnp.shape(x):
    return jnp.asarray(x)
  info = jnp.finfo(jnp.result_type(x))
  least = float(info.min)
  included = jax.lax.stop_gradient(_not_maximum(x, where, axes))
  top = jnp.max(included, axes, keepdims=True)
  finite = jnp.clip(top, least / 2, -least)
  # An eighth is more than bfloat16 rounds off; float16 has no room for 10,000.
  lower = finite - jnp.abs(finite) / 8 - min(1e4, float(info.max) / 512)
  lower = jnp.where(top > least / 2, lower, jnp.minimum(top, least))
  return _keep_first(jnp.where(where, x, lower), where, axes, 0.0)


def _not_maximum(x: Array, where: jax.Array, axes: Axes) -> jax.Array:
  """Keeps masked elements from deciding the maximum of a slice.

  Nor may an infinite constant: they are replaced by 0 or the least included
  element, the lower of them.
  """
  included = jax.lax.stop_gradient(jnp.where(where, x, 0))
  return jnp.where(where, x, jnp.min(included, axes, keepdims=True))


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
