"""Class labels, axes, and the choice between CPUs and others."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
Axes = tuple[int, ...]  # Canonical: none negative, none repeated.
Shape = tuple[int, ...]

# In float32, in which half precision is computed as a rule, the exponential of
# this number is 0. In float64 it is too small to change a sum that has exp(0).
UNDERFLOW = 1.1 * math.log(float(jnp.finfo("float32").smallest_subnormal))


def select(where: jax.Array, x: Any, fill: float) -> jax.Array:
  """Replaces masked elements by a number, and keeps the dtype, weak or not."""
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jnp.bool):
    return jnp.where(where, x, bool(fill))
  kind = int if jnp.issubdtype(dtype, jnp.integer) else float
  return jnp.where(where, x, kind(fill))


def wide(dtype: Any) -> Any:
  """The dtype to compute in."""
  return jnp.dtype("float32") if jnp.finfo(dtype).bits < 32 else dtype


def varies_along(x: Array, axes: Axes) -> bool:
  """Whether an array has more than one element along any of the axes.

  A mask that has not is one of whole examples, and is never expanded.
  """
  return any(x.shape[a] != 1 for a in axes)


def without(shape: Shape, axes: Axes) -> Shape:
  """The shape that is left without these axes."""
  return tuple(s for a, s in enumerate(shape) if a not in axes)


def broadcasts(shape: Shape, to: Shape) -> bool:
  """Whether an array of a shape broadcasts to another, which it leaves."""
  return len(shape) <= len(to) and all(
    s in (1, t) for s, t in zip(reversed(shape), reversed(to), strict=False)
  )


def padded(shape: Shape, rank: int) -> Shape:
  """The shape with axes of size 1 in front, up to this rank."""
  return (1,) * (rank - len(shape)) + shape


def inserted(shape: Shape, axes: Axes) -> Shape:
  """The shape after `jnp.expand_dims(x, axes)`."""
  sizes = iter(shape)
  rank = len(shape) + len(axes)
  return tuple(1 if a in axes else next(sizes) for a in range(rank))


def expanded(x: Array, rank: int, axes: Axes) -> jax.Array:
  """Gives an array with one entry an example the rank of the data."""
  missing = rank - len(axes) - jnp.ndim(x)
  return jnp.expand_dims(jnp.expand_dims(x, range(missing)), axes)


def shape_of_expanded(shape: Shape, rank: int, axes: Axes) -> Shape:
  """The shape after `expanded(x, rank, axes)`."""
  return inserted(padded(shape, rank - len(axes)), axes)


def flat_index(shape: tuple[int, ...], axes: Axes) -> jax.Array:
  """The position of each element of a slice, counted in the order of axes."""
  sizes = tuple(s if a in axes else 1 for a, s in enumerate(shape))
  index = jnp.zeros(sizes, int)
  for a in axes:
    index = index * shape[a] + jax.lax.broadcasted_iota(index.dtype, sizes, a)
  return index


def class_number(labels: Array, classes: int) -> jax.Array:
  """The class of each label, counted from 0; `classes` if it names none."""
  labels = jnp.asarray(labels).astype(int)
  labels = jnp.where(labels < 0, labels + classes, labels)  # -1 is the last.
  return jnp.where((labels >= 0) & (labels < classes), labels, classes)


def class_of_example(labels: Array, shape: Shape, axes: Axes) -> jax.Array:
  """The class number of each example, with the rank of the data."""
  labels = class_number(labels, math.prod(shape[a] for a in axes))
  labels = expanded(labels, len(shape), axes)
  return jnp.broadcast_to(labels, inserted(without(shape, axes), axes))


def class_is_included(
  classes: jax.Array, where: jax.Array, shape: Shape, axes: Axes
) -> jax.Array:
  """Whether the class of each example is included.

  The classes are those of `class_of_example`. An example with a label that
  names no class counts as included, so that the loss reports the label as it
  does without a mask.
  """
  if not varies_along(where, axes):
    return where
  return take_class(jnp.broadcast_to(where, shape), classes, axes)


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
  if len(axes) != 1 or is_sharded(x, axes[0]):
    return compare(x, labels)
  # Except on CPUs, the comparison is fused with a loop that is there anyway.
  return on_cpus(gather, compare, x, labels)


def on_cpus(
  function: Callable[..., Any],
  otherwise: Callable[..., Any],
  *arguments: Any,
) -> Any:
  """Calls `function` if the program runs on CPUs, and else `otherwise`."""
  # The `shard_map` of older versions refuses a choice between platforms.
  if not hasattr(jax, "shard_map"):
    return otherwise(*arguments)
  return jax.lax.platform_dependent(*arguments, cpu=function, default=otherwise)


def is_sharded(x: Array, axis: int) -> bool:
  """Whether an axis is sharded over an explicit mesh."""
  spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
  return len(spec) > axis and spec[axis] is not None
