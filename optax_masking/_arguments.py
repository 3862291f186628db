"""The rules of `axis` and `where`, one for all losses."""

import contextlib
import inspect
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.fills import (
  Array,
  Axes,
  Fill,
  PerExample,
  Shape,
  select,
)

Axis = int | tuple[int, ...] | None
Where = jax.typing.ArrayLike | Sequence[Any] | None
Tracer = jax.core.Tracer


def arrays_to_fill(
  call: inspect.BoundArguments, fills: Mapping[str, Fill | None]
) -> dict[str, Any]:
  """The arguments to fill: a Python scalar too, unless one is the default."""
  arrays: dict[str, Any] = {}
  for name in fills:
    x = call.arguments[name]
    default = call.signature.parameters[name].default
    if isinstance(x, Array | np.generic):
      arrays[name] = x
    elif hasattr(x, "shape"):
      arrays[name] = jnp.asarray(x)
    elif isinstance(x, float | int):
      if default in (inspect.Parameter.empty, None):
        arrays[name] = x
    elif x is not None:
      raise TypeError(f"`{name}` must be an array, not {type(x).__name__}.")
  return arrays


def constants_and_inputs(
  arguments: Mapping[str, Any],
  to_fill: Collection[str],
  fills: Mapping[str, Fill | None],
  signature: inspect.Signature,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
  """Divides arguments into constants of a compiled program and its inputs.

  None, if one should be neither: a function, unless it is the default, may be
  another one at each call, and so may an index, and each would be compiled. A
  number in the place of the data is for the loss to refuse. An integer may be
  the structure of a program, such as an index or an exponent, but not where the
  default is a float, or a fill says that an array may stand.
  """
  constants: list[tuple[str, Any, Any]] = []
  inputs: dict[str, Any] = {}
  for name, x in arguments.items():
    is_array = isinstance(x, Array | np.generic)
    default = signature.parameters[name].default
    may_be_float = name in fills or isinstance(default, float)
    is_number = isinstance(x, float) or (may_be_float and _is_int32(x))
    if name in to_fill:
      is_input = is_array or (is_number and bool(inputs))
    else:
      is_input = name != "axis" and (
        is_number or (is_array and not _may_be_index(x))
      )
    if is_input:
      inputs[name] = x
    elif (
      name not in to_fill
      and not is_array
      and (isinstance(x, int | str | tuple | None) or x is default)
      and _is_hashable(x)
    ):
      # Which is a key, in which 1 is equal to True.
      types = tuple(map(type, x)) if isinstance(x, tuple) else type(x)
      constants.append((name, x, types))
    else:
      return None
  return tuple(constants), inputs


def _is_int32(x: Any) -> bool:
  """Whether it is a Python integer, and no boolean, that an input can hold."""
  return type(x) is int and -(2**31) <= x < 2**31


def _may_be_index(x: Any) -> bool:
  return np.ndim(x) == 0 and not jnp.issubdtype(x.dtype, jnp.floating)


def _is_hashable(x: Any) -> bool:
  try:
    hash(x)
  except TypeError:
    return False
  return True


def check_accepted(call: Callable[[], Any]) -> None:
  """What a loss refuses without a mask it refuses with one, in its words."""
  with contextlib.suppress(jax.errors.ConcretizationTypeError):
    jax.eval_shape(call)


def dtype_without_sharding(
  call: Callable[..., jax.Array], arrays: Mapping[str, Any]
) -> Any:
  """The dtype of a loss without a mask, or its refusal.

  A loss may gather from its logits, which is refused if their classes are
  sharded over an explicit mesh. That is no matter of the arguments.
  """
  structs = {
    name: jax.ShapeDtypeStruct(
      jnp.shape(x),
      jnp.result_type(x),
      weak_type=getattr(x, "weak_type", False),
    )
    for name, x in arrays.items()
    if hasattr(x, "shape")
  }
  result = jax.eval_shape(lambda x: call(**x, where=None), structs)
  return result.dtype


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


def boolean_mask(where: Where) -> jax.Array:
  """Checks the dtype of a mask."""
  fix = "`mask != 0`"
  if isinstance(where, Sequence):  # Not equal to 0, whatever is in it.
    fix = "`jnp.asarray(mask) != 0`"
  if not isinstance(where, jax.Array):  # A conversion costs microseconds.
    where = jnp.asarray(where)
  if where.dtype != bool:
    raise TypeError(
      f"`where` must be boolean, but has dtype {where.dtype}. Pass {fix}."
    )
  return where


def canonicalize_where(
  where: Where,
  shape: Shape,
  axes: Axes,
  refuse_ambiguous: bool,
) -> jax.Array:
  """Checks a mask against the shape of the data and gives it the same rank."""
  where = boolean_mask(where)
  missing = missing_axes("where", where.shape, shape, axes, refuse_ambiguous)
  # One of the same rank is passed on: even to add no axis takes microseconds.
  return jnp.expand_dims(where, missing) if missing else where


def missing_axes(
  name: str,
  x_shape: Shape,
  shape: Shape,
  axes: Axes,
  refuse_ambiguous: bool,
) -> Axes:
  """The axes that a mask, or what has the shape of one, lacks of the data."""
  rank = len(shape)
  if not x_shape:
    return tuple(range(rank))

  def padded(new_axes: Axes) -> Shape:
    sizes = iter(x_shape)
    return tuple(1 if a in new_axes else next(sizes) for a in range(rank))

  def fits(new_axes: Axes) -> bool:
    return len(x_shape) + len(new_axes) == rank and all(
      w in (1, s) for w, s in zip(padded(new_axes), shape, strict=True)
    )

  if fits(()):
    return ()
  left_aligned = tuple(range(len(x_shape), rank))
  right_aligned = tuple(range(rank - len(x_shape)))
  if not fits(axes):
    batch = tuple(s for a, s in enumerate(shape) if a not in axes)
    fixes = [
      name + _indexed(new_axes, rank)
      for new_axes in dict.fromkeys((left_aligned, right_aligned))
      if new_axes and fits(new_axes)
    ]
    accepted = "".join(
      f"have rank {len(target)} and broadcast to {target}, or "
      for target in dict.fromkeys((shape, batch))
      if target
    )
    raise ValueError(
      f"`{name}` has shape {x_shape}, but for data of shape {shape} and the"
      f" axes {axes} it must {accepted}be a scalar."
      + (f" Did you mean {' or '.join(fixes)}?" if fixes else "")
    )
  if (
    refuse_ambiguous
    and fits(right_aligned)
    and padded(axes) != padded(right_aligned)
  ):
    raise ValueError(
      f"`{name}` of shape {x_shape} fits data of shape {shape} in two ways:"
      f" as one entry an example, {name}{_indexed(axes, rank)}, and aligned"
      f" to the last axis, {name}{_indexed(right_aligned, rank)}. Pass one of"
      " the two."
    )
  return axes


def _indexed(new_axes: Axes, rank: int) -> str:
  """The index that gives a mask these new axes."""
  kept = [a for a in range(rank) if a not in new_axes]
  if kept == list(range(len(kept))):
    return f"[{', '.join(['...'] + ['None'] * len(new_axes))}]"
  index = ["None" if a in new_axes else ":" for a in range(kept[-1] + 1)]
  return f"[{', '.join(index)}]"


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


def shape_of_examples(name: str, x: Any, shape: Shape, axes: Axes) -> Shape:
  """The shape of an argument with one entry an example, in the data's rank."""
  given = jnp.shape(x)
  missing = len(shape) - len(axes) - len(given)
  if missing < 0:
    raise ValueError(
      f"`{name}` has shape {given}, but must have the rank of {shape} without"
      f" the axes {axes}."
    )
  sizes = iter((1,) * missing + given)
  return tuple(1 if a in axes else next(sizes) for a in range(len(shape)))


def fill_all(
  arrays: Mapping[str, Any],
  fills: Mapping[str, Fill | None],
  axis: Axis,
  where: jax.Array,
  refuse_ambiguous: bool,
) -> tuple[Shape, Axes, jax.Array, dict[str, jax.Array]]:
  """Replaces the masked elements of all arguments.

  Returns the shape of the data, the axes, the mask with the rank of the data,
  and the filled arguments.
  """
  data = {
    n: x for n, x in arrays.items() if not isinstance(fills[n], PerExample)
  }
  shape = jnp.broadcast_shapes(*map(jnp.shape, data.values()))
  axes = canonicalize_axes(axis, shape)
  for name, x in data.items():
    if callable(fills[name]) or fills[name] is None:
      check_axis_of(name, jnp.shape(x), shape, axis)
  per_example = {n: x for n, x in arrays.items() if n not in data}
  shape = jnp.broadcast_shapes(
    shape,
    *(shape_of_examples(n, x, shape, axes) for n, x in per_example.items()),
  )
  where = canonicalize_where(where, shape, axes, refuse_ambiguous)
  for name, x in per_example.items():
    fill = fills[name]
    if isinstance(fill, PerExample) and fill.keeps is not None:
      where = where & fill.keeps(x, where, shape, axes)
  if is_debugging():
    examples = jnp.any(where, axes)
    arrays = {
      name: without_garbage(
        x, examples if name in per_example else where, fills[name]
      )
      for name, x in arrays.items()
    }
  filled = {
    name: fill_masked(name, x, where, fills[name], axes)
    for name, x in arrays.items()
  }
  return shape, axes, where, filled


def is_debugging() -> bool:
  """Whether JAX looks for NaN or infinity, or runs operation by operation.

  Then each operation on garbage would be reported, or hide the one that is to
  be found.
  """
  flags = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
  return any(getattr(jax.config, flag) for flag in flags)


def without_garbage(x: Any, where: jax.Array, fill: Fill | None = 0) -> Any:
  """Replaces what is masked before any other operation on an argument.

  By a finite number, which no result depends on. It takes the select itself:
  `jnp.where` converts what it is given, and broadcasts it.
  """
  in_numpy = isinstance(x, np.ndarray) and not isinstance(where, Tracer)
  if not (in_numpy or isinstance(x, jax.Array)):
    return x
  if isinstance(fill, PerExample):
    fill = fill.fill
  if fill is None or callable(fill):
    fill = 0
  # An element that is broadcast is masked where all that it meets is masked.
  new = where.ndim - x.ndim
  shape = (1,) * new + x.shape
  met = tuple(a for a, size in enumerate(shape) if size == 1)
  kept = jnp.squeeze(jnp.any(where, met, keepdims=True), tuple(range(new)))
  if jnp.issubdtype(x.dtype, jnp.integer):
    fill = int(fill)
  if in_numpy:  # To put it on a device would be an operation.
    return np.where(kept, x, np.asarray(fill, x.dtype))
  kept = jnp.broadcast_to(kept, x.shape)
  return jax.lax.select(kept, x, jax.lax.full_like(x, fill))


def fill_masked(
  name: str, x: Any, where: jax.Array, fill: Fill | None, axes: Axes
) -> jax.Array:
  """Replaces the masked elements of an argument.

  The select comes first: any other operation, a conversion even, would be one
  on garbage.
  """
  if isinstance(fill, PerExample):
    return fill(x, where, axes)
  if fill is None:
    return jnp.asarray(x)
  if not callable(fill):
    return select(where, x, fill)
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but has dtype {dtype}.")
  # An element that is broadcast along a reduced axis is masked where all that
  # it meets is masked.
  shape = (1,) * (where.ndim - jnp.ndim(x)) + jnp.shape(x)
  broadcast = tuple(a for a in axes if shape[a] == 1 != where.shape[a])
  if broadcast:
    where = jnp.any(where, broadcast, keepdims=True)
  return fill(x, where, axes)


def axes_last(axis: Axis, *arrays: Any) -> list[Any]:
  """Moves axes to the end and flattens them, for a loss that has no `axis`.

  The arrays broadcast; None is passed on.
  """
  if axis == -1:
    return list(arrays)
  shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in arrays if x is not None))
  axes = canonicalize_axes(axis, shape)
  batch = len(shape) - len(axes)

  def moved(x):
    if x is None:
      return None
    x = jnp.expand_dims(x, range(len(shape) - jnp.ndim(x)))
    if any(x.shape[a] != 1 for a in axes):  # If not, it broadcasts later.
      sizes = [shape[a] if a in axes else s for a, s in enumerate(x.shape)]
      x = jnp.broadcast_to(x, sizes)
    x = jnp.moveaxis(x, axes, range(batch, x.ndim))
    return jnp.reshape(x, (*x.shape[:batch], math.prod(x.shape[batch:])))

  return [moved(x) for x in arrays]
