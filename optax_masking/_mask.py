"""The mask contract, and what keeps masked elements out of a loss.

What a masked loss promises, for every boolean mask and every derivative:

1. Invariance. What a masked element holds changes no bit of the result.
2. Zero gradient. Derivatives with respect to masked elements are exactly 0.
3. Compaction. The rest is what the loss gives without the masked elements.
4. Empty. A slice with nothing included is 0 and has zero gradient.
5. Identity. Without a mask the loss is the program that it was.
6. Honesty. NaN or inf in an included element comes out.
7. Clean arithmetic. No NaN or inf is computed because of a mask.
8. Transforms. All of this under every JAX transformation and floating dtype.

Multiplying a loss by its mask is not enough: in the backward pass `0 * NaN` is
NaN, and a large masked logit still enters a normalizer. The way out is to mask
twice, with a select each time.

On the way in, a masked element is replaced: `select(where, x, fill)`. The value
of `x` is then unreachable, and so is its gradient, since the derivative of a
select sends 0 to the branch that was not taken. Clauses 1 and 2 hold by
construction, whatever the loss. What is left to choose for each argument of a
loss is the *neutral fill*: one that adds nothing to the result (clause 3) and
keeps every intermediate value and derivative finite (clause 7). Most fills are
numbers. Where none will do, since the argument is normalized along the reduced
axes, the fill is a function of the included elements.

On the way out, a slice with nothing included is replaced by 0 (clause 4).

A mask has the rank of the data, or it lacks the axes that the loss reduces, or
it is a scalar. For data of shape [B, C], with B and C different and not 1:

  axis=-1    [B, C], [B, 1], [1, C], or [B] with one entry an example;
             [C] is an error.
  axis=()    [B, C], [B, 1], [1, C]; [B] and [C] are errors.
  axis=None  [B, C], [B, 1], [1, C]; [B] and [C] are errors.

If B equals C, then [B] with axis=-1 has one entry an example. A loss whose
callers may mean classes by it refuses it (`refuse_ambiguous_where`).

Clause 8 leaves out the Taylor mode of `jax.experimental.jet`. This mode has no
rule for `jnp.any`, none for a choice between platforms, and ignores custom
derivatives. A count instead of `jnp.any` would add a sixth to the time of a
`kl_divergence`. The Taylor mode takes any mask of `sparsemax_loss`, whose
masked form is Optax's loss of filled arguments, and of
`make_fenchel_young_loss`. It takes no mask of another loss.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import (
  Axes,
  Shape,
  broadcasts,
  class_is_included,
  class_of_example,
  inserted,
  padded,
  select,
  shape_of_expanded,
  varies_along,
  without,
)
from optax_masking.fills import Fill

Axis = int | tuple[int, ...] | None
Where = jax.typing.ArrayLike | Sequence[Any] | None


@dataclasses.dataclass(frozen=True, init=False, eq=False, match_args=False)
class Mask:
  """The elements that ``where`` includes of the data of one call of a loss.

  A loss that needs more than :func:`masked_inputs` makes a mask, fills each
  argument with it, computes, and ends with :meth:`sum` or :meth:`out`, which
  zero the result. A mean divides by ``jnp.maximum(mask.count(), 1)``. With
  ``where=None`` each of these returns its argument as it is, so that the loss
  is the program that it was. A mask is made where it is used: it holds the
  shapes of one call, and is no argument of ``jit`` or ``vmap``.

  Attributes:
    where: The mask, with the rank of the data and broadcastable to them, or
      None.
    axes: The axes that the loss reduces, counted from the start; ``()`` without
      a mask.
    shape: The shape of the data; ``()`` without a mask.

  Examples:
    The mean absolute error of each example. At a fill of 0 and 0 it is 0:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> def mean_absolute_error(predictions, targets, axis=-1, where=None):
    ...   mask = optax.Mask(where, axis, predictions, targets)
    ...   x, y = mask(predictions, 0.0), mask(targets, 0.0)
    ...   total = mask.sum(jnp.abs(x - y))
    ...   return total / jnp.maximum(mask.count(), 1)
    >>> print(mean_absolute_error(
    ...     jnp.array([[1.0, 2.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]]),
    ...     jnp.zeros((2, 3)),
    ...     where=jnp.array([[True, True, False], [False, False, False]])))
    [1.5 0. ]

    The probability that a classifier gives to all but the class of an example:

    >>> def improbability(logits, labels, axis=-1, where=None):
    ...   mask = optax.Mask(where, axis, logits, examples=labels)
    ...   mask = mask.with_class(labels)
    ...   p = jax.nn.softmax(mask(logits, optax.fills.below_maximum), axis)
    ...   labels = jnp.expand_dims(mask.example(labels, 0), axis)
    ...   p = jnp.squeeze(jnp.take_along_axis(p, labels, axis), axis)
    ...   return mask.out(1 - p)
    >>> print(improbability(
    ...     jnp.array([[0.0, 0.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]]),
    ...     jnp.array([1, -100]),
    ...     where=jnp.array([[True, True, False], [False, False, False]])))
    [0.5 0. ]
  """

  where: Any  # An array, or None without a mask.
  axes: Axes
  shape: Shape
  _axis: Axis = dataclasses.field(repr=False)
  _data: tuple[Any, Any] = dataclasses.field(repr=False)  # And the examples.

  def __init__(
    self,
    where: Where,
    axis: Axis,
    *data: Any,
    examples: Any = None,
    refuse_ambiguous_where: bool = False,
  ):
    """Checks a mask against the data.

    Args:
      where: As in :func:`masked_inputs`, for the shape of the data.
      axis: The axes that the loss reduces: an int, a tuple of ints, or None for
        all. ``()`` for a loss with a number for each element.
      *data: Arrays and numbers that together broadcast to the shape of the
        data; None is left out.
      examples: An array with one entry an example, so without ``axis``, such
        as class labels; or a tuple of them.
      refuse_ambiguous_where: As in :func:`masked_inputs`.

    Raises:
      TypeError: If ``where`` is not boolean, ``axis`` not made of ints, or
        there are no data.
      ValueError: If ``axis`` is out of range or repeated, if ``where`` has none
        of the accepted shapes or fits in two ways, or if the data or the
        examples do not broadcast.
    """
    fields = vars(self)  # A frozen class refuses assignments.
    fields.update(where=None, axes=(), shape=(), _axis=axis)
    fields.update(_data=(data, examples))
    if where is None:
      return
    mask = boolean(where)
    axes, shape = _axes_and_shape(axis, data, examples)
    new = axes_to_insert(
      "where", mask.shape, shape, axes, refuse_ambiguous_where
    )
    # Even to add no axis takes microseconds.
    mask = jnp.expand_dims(mask, new) if new else mask
    fields.update(where=mask, axes=axes, shape=shape)

  def __call__(self, x: Any, fill: Fill, name: str = "x") -> Any:
    """Replaces the masked elements of an argument.

    Args:
      x: An argument that broadcasts to the data; None is returned as it is.
      fill: A number to replace masked elements by, which is cut off to an
        integer for integers. Or a function ``fill(x, where, axes)`` that
        returns the filled ``x``, such as ``fills.below_maximum``. Where ``x``
        has size 1 along one of ``axes``, ``where`` has too, and is False if all
        elements that ``x`` broadcasts to are masked.
      name: The name of ``x`` in an error.

    Returns:
      The filled argument.

    Raises:
      TypeError: If ``fill`` is a function and ``x`` is not floating.
      ValueError: If ``x`` does not broadcast to the data; or if ``fill`` is a
        function, and ``axis`` is counted from the start but not the same axis
        in ``x`` as in the data.
    """
    if self.where is None or x is None:
      return x
    if not broadcasts(np.shape(x), self.shape):
      raise ValueError(
        f"`{name}` has shape {np.shape(x)}, but must broadcast to that of the"
        f" data, {self.shape}."
      )
    if is_debugging():
      x = _without_garbage(x, self.where, 0 if callable(fill) else fill)
    if not callable(fill):
      return select(self.where, x, fill)
    check_floating(name, x)
    self.check_axis_of(x, name)
    shape = padded(np.shape(x), len(self.shape))
    broadcast = tuple(a for a in self.axes if shape[a] == 1 != self.shape[a])
    where = self.where
    if varies_along(where, broadcast):
      where = jnp.any(where, broadcast, keepdims=True)
    return fill(x, where, self.axes)

  def example(self, x: Any, fill: float, name: str = "x") -> Any:
    """Replaces the entries of examples of which nothing is included.

    Args:
      x: An argument with one entry an example, that broadcasts to the shape of
        the data without ``axis``; None is returned as it is.
      fill: A number to replace these entries by, which is cut off to an integer
        for integers.
      name: The name of ``x`` in an error.

    Returns:
      The filled argument.

    Raises:
      ValueError: If ``x`` does not broadcast to that shape.
    """
    if self.where is None or x is None:
      return x
    shape = without(self.shape, self.axes)
    if not broadcasts(np.shape(x), shape):
      raise ValueError(
        f"`{name}` has shape {np.shape(x)}, but for"
        f" {_described(self.shape, self.axes)} it must broadcast to {shape}."
      )
    if is_debugging():
      x = _without_garbage(x, self.any, fill)
    return select(self.any, x, fill)

  @property
  def any(self) -> jax.Array:
    """Whether anything is included of each example."""
    if self.where is None:
      return jnp.asarray(True)
    if any(self.shape[a] == 0 for a in self.axes):  # `where` may have size 1.
      return jnp.zeros(without(self.where.shape, self.axes), bool)
    return jnp.any(self.where, self.axes)

  def count(self) -> jax.Array:
    """The number of included elements of each example.

    Returns:
      Integers, with the shape of the data without ``axis``; 0 or 1 for each
      element if ``axis`` is ``()``. Without a mask, all elements are included.
    """
    if self.where is None:
      axes, shape = _axes_and_shape(self._axis, *self._data)
      size = math.prod(shape[a] for a in axes)
      return jnp.full(without(shape, axes), size, int)
    sizes = zip(self.where.shape, self.shape, strict=True)
    repeats = [s if w == 1 else 1 for w, s in sizes]
    count = jnp.sum(self.where, self.axes, dtype=int)
    count *= math.prod(repeats[a] for a in self.axes)
    return jnp.broadcast_to(count, without(self.shape, self.axes))

  def with_class(self, labels: Any) -> Mask:
    """A mask without the examples whose own class is masked.

    Args:
      labels: Integer class labels, one an example. With several axes a label is
        a flat index into them. A label that names no class leaves its example
        included.
    """
    if self.where is None or not varies_along(self.where, self.axes):
      return self
    classes = class_of_example(labels, self.shape, self.axes)
    included = class_is_included(classes, self.where, self.shape, self.axes)
    return self.with_where(self.where & included)

  def with_where(self, where: jax.Array) -> Mask:
    """The mask of the same data with another array.

    Args:
      where: A boolean array that broadcasts to the data, of their rank.
    """
    other = copy.copy(self)
    vars(other)["where"] = where
    return other

  def out(self, result: jax.Array) -> jax.Array:
    """Zeroes a result where nothing is included.

    Args:
      result: Of the shape of the data, or of that shape without the axes.

    Raises:
      ValueError: If it has neither shape.
    """
    if self.where is None:
      return result
    if np.shape(result) == self.shape:
      return select(self.where, result, 0)
    shape = without(self.shape, self.axes)
    if np.shape(result) != shape:
      raise ValueError(
        f"`Mask.out` was given the shape {np.shape(result)}, but for"
        f" {_described(self.shape, self.axes)} it takes"
        f" {' or '.join(map(str, dict.fromkeys((shape, self.shape))))}."
      )
    return select(self.any, result, 0)

  def sum(self, losses: jax.Array, *, zeroed: bool = False) -> jax.Array:
    """Zeroes masked elements of the losses, and sums over ``axis``.

    Args:
      losses: A number for each element, in the shape of the data.
      zeroed: Whether masked elements are 0 already.

    Raises:
      ValueError: If they have another shape, or ``axis`` does not fit it.
    """
    if self.where is None:
      axes = canonicalize_axes(self._axis, np.shape(losses))
    else:
      axes = self.axes
      if np.shape(losses) != self.shape:
        raise ValueError(
          f"`Mask.sum` was given the shape {np.shape(losses)}, but takes that"
          f" of the data, {self.shape}."
        )
      losses = losses if zeroed else select(self.where, losses, 0)
    return jnp.sum(losses, axes) if axes else losses

  def as_array(self, x: Any) -> Any:
    """Converts an argument of a formula that replaces masked elements itself.

    Masked elements keep their values, but not while JAX inspects each operation
    for NaN: then masked elements are 0, so that JAX finds no NaN in them.
    """
    if self.where is None or x is None:
      return x
    if is_debugging():
      x = _without_garbage(x, self.where, 0)
    return jnp.asarray(x)

  def check_axis_of(self, x: Any, name: str) -> None:
    """Refuses an axis counted from the start, if `x` lacks axes of the data.

    Axes of the same number are then different axes of `x` and of the data.

    Args:
      x: An argument of the loss.
      name: The name of ``x`` in the error.

    Raises:
      ValueError: If there is such an axis.
    """
    axis, shape = self._axis, np.shape(x)
    given = axis if isinstance(axis, Sequence) else (axis,)
    if 0 < len(shape) < len(self.shape) and any(
      a is not None and a >= 0 for a in given
    ):
      raise ValueError(
        f"`axis` {axis} is not the same in `{name}`, of shape {shape}, as in"
        f" the data, of shape {self.shape}. Count it from the end, or give"
        f" `{name}` {len(self.shape)} axes."
      )


def is_debugging() -> bool:
  """Whether JAX inspects the result of each operation.

  JAX would then report an operation on the garbage of a masked element, and
  not the mistake that the user looks for.
  """
  flags = ("jax_debug_nans", "jax_debug_infs", "jax_disable_jit")
  return any(getattr(jax.config, flag) for flag in flags)


def _without_garbage(x: Any, where: jax.Array, fill: float) -> Any:
  """Replaces masked elements before any other operation on an argument.

  No result depends on the number that replaces them. `jnp.where` will not do:
  it converts and broadcasts its arguments, which are operations on garbage.
  """
  in_numpy = isinstance(x, np.ndarray) and not isinstance(
    where, jax.core.Tracer
  )
  if not (in_numpy or isinstance(x, jax.Array)):
    return x
  # An element of size 1 is masked if all elements that it broadcasts to are.
  shape = padded(x.shape, where.ndim)
  broadcast = tuple(a for a, size in enumerate(shape) if size == 1)
  kept = jnp.any(where, broadcast, keepdims=True)
  kept = jnp.squeeze(kept, tuple(range(where.ndim - x.ndim)))
  if jnp.issubdtype(x.dtype, jnp.integer):
    fill = int(fill)
  if in_numpy:  # To put it on a device would be an operation.
    return np.where(kept, x, np.asarray(fill, x.dtype))
  kept = jnp.broadcast_to(kept, x.shape)
  return jax.lax.select(kept, x, jax.lax.full_like(x, fill))


def check_array(name: str, x: Any) -> None:
  """Refuses an argument that is neither an array nor a number."""
  if not (hasattr(x, "shape") or isinstance(x, float | int)):
    raise TypeError(
      f"`{name}` must be an array, not {type(x).__name__}."
      f" Pass jnp.asarray({name})."
    )


def check_floating(name: str, x: Any) -> None:
  """Refuses an argument of another dtype."""
  dtype = jnp.result_type(x)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but has dtype {dtype}.")


def boolean(where: Where) -> jax.Array:
  """Checks the dtype of a mask."""
  mask = where
  if not isinstance(mask, jax.Array):  # A conversion costs microseconds.
    try:
      mask = jnp.asarray(mask)
    except (TypeError, ValueError):
      written = textwrap.shorten(repr(where), 80)
      raise TypeError(
        f"`where` must be a boolean array, but is {written}."
      ) from None
  if mask.dtype == bool:
    return mask
  if isinstance(where, Sequence):
    if mask.size == 0:  # An empty list has no dtype of its own.
      return mask.astype(bool)
    fix = "`jnp.asarray(mask) != 0`"  # A list never equals 0.
  else:
    fix = "`mask != 0`"
  raise TypeError(
    f"`where` must be boolean, but has dtype {mask.dtype}. Pass {fix}."
  )


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


def axes_to_insert(
  name: str,
  x_shape: Shape,
  shape: Shape,
  axes: Axes,
  refuse_ambiguous: bool,
) -> Axes:
  """The axes that give a mask, or weights like it, the rank of the data.

  The docstring of this module lists the shapes that fit.

  Raises:
    ValueError: If the shape does not fit, or fits in two ways.
  """
  rank = len(shape)
  if not x_shape:
    return tuple(range(rank))

  def fits(new_axes: Axes) -> bool:
    return len(x_shape) + len(new_axes) == rank and all(
      x in (1, s)
      for x, s in zip(inserted(x_shape, new_axes), shape, strict=True)
    )

  if fits(()):
    return ()
  left_aligned = tuple(range(len(x_shape), rank))
  right_aligned = tuple(range(rank - len(x_shape)))
  if not fits(axes):
    fixes = [
      name + _indexed(new_axes, rank)
      for new_axes in dict.fromkeys((left_aligned, right_aligned))
      if new_axes and fits(new_axes)
    ]
    accepted = "".join(
      f"have rank {len(target)} and broadcast to {target}, or "
      for target in dict.fromkeys((shape, without(shape, axes)))
      if target
    )
    raise ValueError(
      f"`{name}` has shape {x_shape}, but for {_described(shape, axes)} it"
      f" must {accepted}be a scalar."
      + (f" Did you mean {' or '.join(fixes)}?" if fixes else "")
    )
  if (
    refuse_ambiguous
    and fits(right_aligned)
    and inserted(x_shape, axes) != inserted(x_shape, right_aligned)
  ):
    raise ValueError(
      f"`{name}` of shape {x_shape} fits data of shape {shape} in two ways:"
      f" as one entry an example, {name}{_indexed(axes, rank)}, and aligned"
      f" to the last axis, {name}{_indexed(right_aligned, rank)}. Write the"
      " one that you mean."
    )
  return axes


def _described(shape: Shape, axes: Axes) -> str:
  """Describes the data and the reduced axes in an error."""
  reduced = f"`axis` reduces {axes}" if axes else "no axis is reduced"
  return f"data of shape {shape}, of which {reduced},"


def _indexed(new_axes: Axes, rank: int) -> str:
  """The index that gives a mask these new axes."""
  kept = [a for a in range(rank) if a not in new_axes]
  if kept == list(range(len(kept))):
    return f"[{', '.join(['...'] + ['None'] * len(new_axes))}]"
  index = ["None" if a in new_axes else ":" for a in range(kept[-1] + 1)]
  return f"[{', '.join(index)}]"


def _axes_and_shape(
  axis: Axis, data: Sequence[Any], examples: Any
) -> tuple[Axes, Shape]:
  """The reduced axes, and the shape of the data and the examples."""
  shape = _shape_of_data(data)
  axes = canonicalize_axes(axis, shape)
  for x in examples if isinstance(examples, tuple) else (examples,):
    if x is not None:
      shape = _broadcast_with_examples(shape, np.shape(x), axes)
  return axes, shape


def _shape_of_data(data: Sequence[Any]) -> Shape:
  """The shape that arrays, or None, broadcast to."""
  shapes = [np.shape(x) for x in data if x is not None]
  if not shapes:
    raise TypeError(
      "`Mask` needs the data, for their shape: at least one array after"
      " `axis`, as in Mask(where, axis, predictions, targets)."
    )
  try:
    return jnp.broadcast_shapes(*shapes)
  except ValueError:
    raise ValueError(
      f"The data have the shapes {' and '.join(map(str, shapes))}, which do"
      " not broadcast."
    ) from None


def _broadcast_with_examples(shape: Shape, given: Shape, axes: Axes) -> Shape:
  """Broadcasts the data with an array that has one entry an example."""
  rank = len(shape)
  if len(given) > rank - len(axes):
    raise ValueError(
      f"An array with one entry an example has shape {given}, but must have"
      f" the rank of {shape} without the axes {axes}."
    )
  try:
    return jnp.broadcast_shapes(shape, shape_of_expanded(given, rank, axes))
  except ValueError:
    raise ValueError(
      f"An array with one entry an example has shape {given}, but for"
      f" {_described(shape, axes)} it must broadcast with"
      f" {without(shape, axes)}."
    ) from None


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
    if varies_along(x, axes):  # If not, it broadcasts later.
      sizes = [shape[a] if a in axes else s for a, s in enumerate(x.shape)]
      x = jnp.broadcast_to(x, sizes)
    x = jnp.moveaxis(x, axes, range(batch, x.ndim))
    return jnp.reshape(x, (*x.shape[:batch], math.prod(x.shape[batch:])))

  return [moved(x) for x in arrays]
