"""The rules of `axis` and `where`, one for all losses."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_masking.fills import Array, Axes, flat_index

Axis = int | tuple[int, ...] | None
Where = jax.typing.ArrayLike | Sequence[Any] | None
Shape = tuple[int, ...]


def canonicalize_axes(axis: Axis, shape: Shape) -> Axes:
  """Checks `axis` against the shape of the data; counts it from the start."""
  if axis is None:
    return tuple(range(len(shape)))
  axes: list[int] = []
  for given in axis if isinstance(axis, Sequence) else (axis,):
    try:
      a = operator.index(given)
    except TypeError:
      raise TypeError(
        f"`axis` must be an int, a tuple of ints or None, not {axis!r}."
      ) from None
    if not -len(shape) <= a < len(shape):
      raise ValueError(f"axis {a} is out of range for the shape {shape}.")
    if a % len(shape) in axes:
      raise ValueError(f"axis {a} of the shape {shape} is repeated in {axis}.")
    axes.append(a % len(shape))
  return tuple(axes)


def canonicalize_where(
  where: Where,
  shape: Shape,
  axes: Axes,
  refuse_ambiguous: bool,
) -> jax.Array:
  """Checks a mask against the shape of the data and gives it the same rank."""
  where = jnp.asarray(where)
  if where.dtype != bool:
    raise TypeError(
      f"`where` must be boolean, but has dtype {where.dtype}. Pass `mask != 0`."
    )
  rank = len(shape)
  if where.ndim == 0:
    return jnp.reshape(where, (1,) * rank)

  def expanded(new_axes: Axes) -> Shape:
    sizes = iter(where.shape)
    return tuple(1 if a in new_axes else next(sizes) for a in range(rank))

  def fits(new_axes: Axes) -> bool:
    return where.ndim + len(new_axes) == rank and all(
      w in (1, s) for w, s in zip(expanded(new_axes), shape, strict=True)
    )

  if fits(()):
    return where
  left_aligned = tuple(range(where.ndim, rank))
  right_aligned = tuple(range(rank - where.ndim))
  if not fits(axes):
    batch = tuple(s for a, s in enumerate(shape) if a not in axes)
    fixes = [
      _indexed(new_axes, rank)
      for new_axes in dict.fromkeys((left_aligned, right_aligned))
      if new_axes and fits(new_axes)
    ]
    accepted = "".join(
      f"have rank {len(target)} and broadcast to {target}, or "
      for target in dict.fromkeys((shape, batch))
      if target
    )
    raise ValueError(
      f"`where` has shape {where.shape}, but for data of shape {shape} and the"
      f" axes {axes} it must {accepted}be a scalar."
      + (f" Did you mean {' or '.join(fixes)}?" if fixes else "")
    )
  if (
    refuse_ambiguous
    and fits(right_aligned)
    and expanded(axes) != expanded(right_aligned)
  ):
    raise ValueError(
      f"`where` of shape {where.shape} fits data of shape {shape} in two ways:"
      f" as one entry an example, {_indexed(axes, rank)}, and aligned to the"
      f" last axis, {_indexed(right_aligned, rank)}. Pass one of the two."
    )
  return jnp.expand_dims(where, axes)


def _indexed(new_axes: Axes, rank: int) -> str:
  """The expression that gives `where` these new axes."""
  kept = [a for a in range(rank) if a not in new_axes]
  if kept == list(range(len(kept))):
    return f"where[{', '.join(['...'] + ['None'] * len(new_axes))}]"
  index = ["None" if a in new_axes else ":" for a in range(kept[-1] + 1)]
  return f"where[{', '.join(index)}]"


def check_axis_of(name: str, x_shape: Shape, shape: Shape, axis: Axis) -> None:
  """Refuses an axis that is not the same in an argument as in the data."""
  given = axis if isinstance(axis, Sequence) else (axis,)
  if 0 < len(x_shape) < len(shape) and any(
    a is not None and a >= 0 for a in given
  ):
    raise ValueError(
      f"`axis` {axis} is not the same in `{name}`, of shape {x_shape}, as in"
      f" the data, of shape {shape}. Count it from the end, or give `{name}`"
      f" {len(shape)} axes."
    )


def expand_labels(
  name: str, labels: Array, shape: Shape, axes: Axes
) -> jax.Array:
  """Gives integer labels the rank of the data."""
  if jnp.ndim(labels) != len(shape) - len(axes):
    raise ValueError(
      f"`{name}` has shape {jnp.shape(labels)}, but must have the rank of"
      f" {shape} without the axes {axes}."
    )
  return jnp.expand_dims(labels, axes)


def own_class(
  where: jax.Array, labels: jax.Array, shape: Shape, axes: Axes
) -> jax.Array:
  """Whether the class that an integer label names is included.

  A label that names no class is left for the loss to deal with.
  """
  if all(where.shape[a] == 1 for a in axes):
    return where
  index = flat_index(shape, axes)
  labels = labels.astype(index.dtype)
  classes = math.prod(shape[a] for a in axes)
  named = (index == labels) | (index - classes == labels)  # -1 is the last.
  return ~jnp.any(named & ~where, axes, keepdims=True)
