"""Sums and means of what is included, with the denominator of the whole.

The mean over devices, hosts or microbatches is not the mean of their means:
each has its own number of included elements. Here numerators are added up, and
denominators are, before one is divided by the other.
"""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_masking._arguments import (
  Axis,
  Where,
  aligned,
  canonicalize_axes,
  canonicalize_where,
)
from optax_masking.fills import Shape, select

__all__ = ["RunningMean", "masked_count", "masked_mean", "masked_sum"]

AxisName = Hashable | None


def masked_sum(
  values: jax.typing.ArrayLike,
  where: Where = None,
  axis: Axis = None,
  *,
  weights: jax.typing.ArrayLike | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Adds up what is included.

  What a masked element holds, NaN included, changes neither the sum nor a
  derivative, and its own derivatives are 0.

  Args:
    values: What to add up, such as losses; of any shape and dtype.
    where: Elements to include, True for included ones: as in
      :func:`optax_masking.masked_inputs`, so with the rank of ``values`` and
      broadcasting to it, or with that rank without ``axis``, or a scalar.
    axis: Axis or axes to reduce, as in ``jnp.sum``. None stands for all.
    weights: What to multiply by, not negative, in any of the shapes of
      ``where``. A weight of 0 is no mask: 0 times NaN is NaN. Negative ones are
      refused, but inside ``jit`` they can't be seen.
    axis_name: Name or names of mapped axes, inside ``shard_map``, ``pmap`` or
      ``vmap``. Each device adds up its own ``values``, and the result on all is
      the sum over these axes, too: see :func:`masked_mean`, for derivatives
      too.

  Returns:
    The sum, with the shape of ``values`` without ``axis``, and 0 where nothing
    is included. Its dtype is that of ``values`` if they are floating, and else
    what ``jnp.sum`` makes of them, or of them times the weights. Half precision
    is added up in float32.

  Raises:
    TypeError: If ``where`` is not boolean, ``weights`` are, or ``axis`` is not
      made of ints.
    ValueError: If ``axis`` is out of range or repeated, ``where`` or
      ``weights`` do not fit, or might be meant in two ways, or a weight is
      negative.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_masking import reductions
    >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
    >>> mask = jnp.array([[True, True, False], [True, False, False]])
    >>> print(reductions.masked_sum(losses, mask))
    6.0
    >>> print(reductions.masked_sum(losses, mask, axis=-1))
    [3. 3.]
  """
  terms = _Terms(values, where, axis, weights)
  dtype = _sum_dtype(terms.values)
  total = terms.sum(dtype, axis_name)
  return total.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else total


def masked_count(
  values: jax.typing.ArrayLike,
  where: Where = None,
  axis: Axis = None,
  *,
  weights: jax.typing.ArrayLike | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  """Counts what is included, or adds up its weights.

  It is what :func:`masked_mean` divides by.

  Args:
    values: What is counted; only its shape matters.
    where: Elements to include, as in :func:`masked_sum`.
    axis: Axis or axes to reduce, as in :func:`masked_sum`.
    weights: What to add up in the place of ones, as in :func:`masked_sum`.
    axis_name: Name or names of mapped axes to add up over, as in
      :func:`masked_sum`.

  Returns:
    The count, with the shape of ``values`` without ``axis``: of the default
    integer dtype, or in float32 (float64, if they are) with floating
    ``weights``.

  Raises:
    TypeError: As :func:`masked_sum`; or if ``values`` are boolean and there is
      no ``where``, since they may be meant as such.
    ValueError: As :func:`masked_sum`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_masking import reductions
    >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
    >>> print(reductions.masked_count(losses, ~jnp.isnan(losses), axis=-1))
    [2 1]
  """
  if where is None and jnp.issubdtype(jnp.result_type(values), jnp.bool):
    raise TypeError(
      "`values` is boolean and there is no `where`. Pass masked_count(mask,"
      " mask) for the number of True, or where=True to count all of them."
    )
  return _Terms(values, where, axis, weights).count(axis_name)


def masked_mean(
  values: jax.typing.ArrayLike,
  where: Where = None,
  axis: Axis = None,
  *,
  weights: jax.typing.ArrayLike | None = None,
  denominator: jax.typing.ArrayLike | None = None,
  axis_name: AxisName = None,
) -> jax.Array:
  r"""Averages what is included.

  For values :math:`x`, weights :math:`w`, which are 1 unless given, and the
  included elements :math:`I`,

  .. math::
    \frac{\sum_{i \in I} w_i x_i}{\sum_{i \in I} w_i} \,,

  and 0 where nothing is included. With a ``denominator`` that is what is
  divided by.

  With ``axis_name`` each device, or each element of a mapped axis, gives its
  own part of the values, of the mask, of the weights and of the denominator.
  Numerators and denominators are added up over all before the division, and
  each gets the mean of the whole.

  Differentiate on the devices and average the gradients with
  ``jax.lax.pmean(gradients, axis_name)``: that is the gradient of the mean of
  the whole, in every kind of map. In a ``jax.shard_map`` that keeps track of
  what varies (``check_vma``, the default) each device has that gradient
  without it. In ``pmap``, in ``vmap`` and in a ``shard_map`` without such
  checks JAX differentiates the sum of what all devices return, all of which
  are the same mean, and the average takes that factor away. Differentiated
  from outside of the map, and in forward mode, nothing is to be done.

  Args:
    values: What to average, such as the losses of tokens, or a boolean array of
      which predictions are right; of any shape and dtype.
    where: Elements to include, as in :func:`masked_sum`. What others hold
      changes neither the mean nor a derivative, and their own derivatives are
      0.
    axis: Axis or axes to reduce, as in :func:`masked_sum`. None stands for all.
    weights: Weights of the elements, as in :func:`masked_sum`: not negative,
      and no mask. If they add up to 0, and so do the weighted values, the mean
      is 0.
    denominator: What to divide by in the place of the count or of the sum of
      the weights: a number, or an array that broadcasts to the result. For a
      microbatch the count of its whole batch. With ``axis_name`` it is added
      up over the devices as the count would be: give each its own part. 0 / 0
      is 0, and another numerator over 0 infinite.
    axis_name: Name or names of mapped axes, inside ``shard_map``, ``pmap`` or
      ``vmap``. Under ``jit`` with sharded arrays nothing is needed: an array is
      the whole there, wherever it lies.

  Returns:
    The mean, with the shape of ``values`` without ``axis`` and their dtype, or
    the default floating dtype if they are integers or boolean. Half precision
    is averaged in float32.

  Raises:
    TypeError: If ``where`` is not boolean, ``weights`` or ``denominator`` are,
      or ``axis`` is not made of ints.
    ValueError: If ``axis`` is out of range or repeated, ``where``, ``weights``
      or ``denominator`` do not fit, or might be meant in two ways, or a weight
      is negative.

  Examples:
    A batch of which nothing is left is 0, and no NaN:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from optax_masking import reductions
    >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
    >>> mask = ~jnp.isnan(losses)
    >>> print(reductions.masked_mean(losses, mask))
    2.0
    >>> print(reductions.masked_mean(losses, mask & False))
    0.0

    With sample weights, one a row:

    >>> print(reductions.masked_mean(
    ...     losses, mask, weights=jnp.array([[1.0], [2.0]])))
    2.25

    Over a mapped axis each row gets the mean of all three elements, where the
    mean of the means of the rows would be 2.25:

    >>> def mean(losses, mask):
    ...   return reductions.masked_mean(losses, mask, axis_name="batch")
    >>> print(jax.vmap(mean, axis_name="batch")(losses, mask))
    [2. 2.]

    Microbatches add up to the mean of their batch:

    >>> count = reductions.masked_count(losses, mask)
    >>> print(sum(
    ...     reductions.masked_mean(x, m, denominator=count)
    ...     for x, m in zip(losses, mask)))
    2.0
  """
  terms = _Terms(values, where, axis, weights)
  dtype = _mean_dtype(terms.values)
  return _quotient(
    terms.sum(dtype, axis_name), terms.denominator(denominator, axis_name)
  ).astype(dtype)


class RunningMean(NamedTuple):
  """A mean over the steps of an epoch, and over more than one device.

  It holds what is to be added up, a numerator and a denominator, so that a step
  with few included elements counts for few. Each is a float32 number and the
  rest that was rounded off, which keeps counts of billions right.

  It is a pytree of four arrays, as the states of Optax are: a carry of
  ``lax.scan``, an argument of ``jit``, a part of a checkpoint. To add it up
  over the devices of a mapped axis is ``jax.lax.psum(state, axis_name)``.

  Attributes:
    numerator: Sum of the (weighted) values.
    denominator: Their number, or the sum of their weights.
    numerator_rest: What is to be added to the numerator.
    denominator_rest: What is to be added to the denominator.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_masking import reductions
    >>> accuracy = reductions.RunningMean.empty()
    >>> right = jnp.array([[True, False, True], [True, True, True]])
    >>> mask = jnp.array([[True, True, True], [True, False, False]])
    >>> for step in range(2):
    ...   accuracy = accuracy.update(right[step], mask[step])
    >>> print(accuracy.mean())
    0.75
  """

  numerator: jax.Array
  denominator: jax.Array
  numerator_rest: jax.Array
  denominator_rest: jax.Array

  @classmethod
  def empty(
    cls, shape: Shape = (), dtype: jax.typing.DTypeLike = "float32"
  ) -> "RunningMean":
    """What an epoch begins with, of which the mean is 0.

    Args:
      shape: Shape of the mean.
      dtype: Floating dtype of what is added up: float32 or float64.

    Returns:
      The state before the first step.

    Raises:
      TypeError: If the dtype is another one.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.float64):
      raise TypeError(f"`dtype` must be float32 or float64, not {dtype}.")
    return cls(*(jnp.zeros(shape, dtype) for _ in range(4)))

  def update(
    self,
    values: jax.typing.ArrayLike,
    where: Where = None,
    axis: Axis = None,
    *,
    weights: jax.typing.ArrayLike | None = None,
    denominator: jax.typing.ArrayLike | None = None,
    axis_name: AxisName = None,
  ) -> "RunningMean":
    """Adds the values of a step.

    Args:
      values: What to average, as in :func:`masked_mean`.
      where: Elements to include, as in :func:`masked_mean`.
      axis: Axis or axes to reduce, as in :func:`masked_mean`.
      weights: Weights of the elements, as in :func:`masked_mean`.
      denominator: What to count the step for, as in :func:`masked_mean`.
      axis_name: Name or names of mapped axes to add up over, as in
        :func:`masked_mean`.

    Returns:
      The state after the step, with the same dtype.

    Raises:
      TypeError: As :func:`masked_mean`.
      ValueError: As :func:`masked_mean`, or if the reduced values have another
        shape than this state.
    """
    terms = _Terms(values, where, axis, weights)
    if terms.result_shape != self.numerator.shape:
      raise ValueError(
        f"`values` of shape {terms.shape} have the shape"
        f" {terms.result_shape} without the axes {terms.axes}, but this mean"
        f" has the shape {self.numerator.shape}. Begin with"
        f" RunningMean.empty({terms.result_shape}), or reduce other axes."
      )
    dtype = self.numerator.dtype
    numerator = terms.sum(dtype, axis_name).astype(dtype)
    count = terms.denominator(denominator, axis_name).astype(dtype)
    zero = jnp.zeros_like(numerator)
    return self.merge(
      RunningMean(numerator, jnp.broadcast_to(count, zero.shape), zero, zero)
    )

  def merge(self, other: "RunningMean") -> "RunningMean":
    """Adds what another state has seen, of other steps or another device."""
    numerator, numerator_rest = _exact_sum(self.numerator, other.numerator)
    denominator, denominator_rest = _exact_sum(
      self.denominator, other.denominator
    )
    return RunningMean(
      numerator,
      denominator,
      self.numerator_rest + other.numerator_rest + numerator_rest,
      self.denominator_rest + other.denominator_rest + denominator_rest,
    )

  def mean(self) -> jax.Array:
    """The mean of what was included, 0 if nothing was."""
    return _quotient(
      self.numerator + self.numerator_rest,
      self.denominator + self.denominator_rest,
    )

  def __add__(self, other: "RunningMean") -> "RunningMean":  # type: ignore[override]
    """The same as :meth:`merge`, in place of the sum of two tuples."""
    return self.merge(other)


class _Terms:
  """The terms of a sum, masked, and what their mean is divided by."""

  def __init__(
    self,
    values: jax.typing.ArrayLike,
    where: Where,
    axis: Axis,
    weights: jax.typing.ArrayLike | None,
  ):
    x = jnp.asarray(values)
    self.shape = x.shape
    self.axes = canonicalize_axes(axis, x.shape)
    self.size = math.prod(x.shape[a] for a in self.axes)
    self.result_shape = tuple(
      s for a, s in enumerate(x.shape) if a not in self.axes
    )
    self.where = None
    if where is not None:
      self.where = canonicalize_where(where, x.shape, self.axes, True)
    self.values = self._masked(x)
    self.weights = None
    if weights is not None:
      w = _real("weights", weights)
      self.weights = self._masked(
        aligned("weights", w, x.shape, self.axes, True)
      )
      _check_not_negative(self.weights)

  def _masked(self, x: jax.Array) -> jax.Array:
    return x if self.where is None else select(self.where, x, 0)

  def sum(self, dtype: Any, axis_name: AxisName) -> jax.Array:
    """The sum, in a dtype or in one with more digits."""
    dtype = _wide(dtype)
    x = self.values
    if self.weights is not None:
      with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(dtype, _wide(self.weights.dtype))
      x = x.astype(dtype) * self.weights.astype(dtype)
    return _over(axis_name, jnp.sum(x, self.axes, dtype=dtype))

  def count(self, axis_name: AxisName) -> jax.Array:
    """How many are included, or what they weigh."""
    if self.weights is not None:
      dtype = _wide(_sum_dtype(self.weights))
      x = jnp.broadcast_to(self.weights, self.shape)
      return _over(axis_name, jnp.sum(x, self.axes, dtype=dtype))
    if self.where is None:
      return _over(axis_name, jnp.full(self.result_shape, self.size, int))
    x = jnp.broadcast_to(self.where, self.shape)
    return _over(axis_name, jnp.sum(x, self.axes, dtype=int))

  def denominator(
    self, given: jax.typing.ArrayLike | None, axis_name: AxisName
  ) -> jax.Array:
    """What is given to divide by, and else the count."""
    if given is None:
      return self.count(axis_name)
    x = _real("denominator", given)
    if not _broadcasts(x.shape, self.result_shape):
      raise ValueError(
        f"`denominator` has shape {x.shape}, but must broadcast to"
        f" {self.result_shape}, the shape {self.shape} of `values` without the"
        f" axes {self.axes}."
      )
    return _over(axis_name, x)


def _over(axis_name: AxisName, x: jax.Array) -> jax.Array:
  return x if axis_name is None else jax.lax.psum(x, axis_name)


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Divides; 0 / 0 is 0, and so are its derivatives."""
  denominator = denominator.astype(numerator.dtype)
  included = (numerator != 0) | (denominator != 0)
  return select(included, numerator, 0) / select(included, denominator, 1)


def _exact_sum(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """A rounded sum, and what was rounded off (Knuth's TwoSum)."""
  total = x + y
  of_y = total - x
  rest = (x - (total - of_y)) + (y - of_y)
  return total, select(jnp.isfinite(total), rest, 0)


def _real(name: str, x: jax.typing.ArrayLike) -> jax.Array:
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(
    x.dtype, jnp.integer
  ):
    raise TypeError(
      f"`{name}` must be floating or integer, but has dtype {x.dtype}."
      + (" Pass a mask as `where`." if x.dtype == bool else "")
    )
  return x


def _check_not_negative(weights: jax.Array) -> None:
  """Where the weights are known here: not in `jit`, nor on another host."""
  if isinstance(weights, jax.core.Tracer) or not weights.is_fully_addressable:
    return
  if weights.size and weights.min() < 0:
    raise ValueError(
      f"`weights` must not be negative, but {weights.min()} is among those that"
      " are included. Mask what is not to count, with `where`."
    )


def _broadcasts(shape: Shape, to: Shape) -> bool:
  return len(shape) <= len(to) and all(
    s in (1, t) for s, t in zip(reversed(shape), reversed(to), strict=False)
  )


def _wide(dtype: Any) -> Any:
  """What a sum of this dtype is computed in."""
  if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
    return jnp.dtype("float32")
  return jnp.dtype(dtype)


def _sum_dtype(x: jax.Array) -> Any:
  """The dtype of a sum: a default one for small integers and booleans."""
  return jax.eval_shape(jnp.sum, x).dtype


def _mean_dtype(x: jax.Array) -> Any:
  return jax.eval_shape(jnp.mean, x).dtype
