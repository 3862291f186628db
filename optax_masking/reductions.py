"""Sums and means of what is included, with the denominator of the whole.

The mean over devices, hosts or microbatches is not the mean of their means:
each has its own number of included elements. Here numerators are added up, and
denominators are, before one is divided by the other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import Array, Shape, broadcasts, select, without
from optax_masking._mask import (
  Axis,
  Mask,
  Where,
  axes_to_insert,
  canonicalize_axes,
)

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
    values: Numbers to add up, such as losses; of any shape and dtype.
    where: Elements to include, True for included ones: as in
      :func:`optax_masking.masked_inputs`, so with the rank of ``values`` and
      broadcasting to it, or with that rank without ``axis``, or a scalar.
    axis: Axis or axes to reduce, as in ``jnp.sum``. None stands for all.
    weights: Factors of the values, in any of the shapes of ``where``. A weight
      of 0 is no mask: 0 times NaN is NaN. Negative weights are refused, but
      those that JAX traces, as in ``jit``, are not checked.
    axis_name: Name or names of mapped axes, inside ``shard_map``, ``pmap`` or
      ``vmap``. Each device adds up its own ``values``, and the result on all is
      the sum over these axes, too: see :func:`masked_mean`, for derivatives
      too.

  Returns:
    The sum, with the shape of ``values`` without ``axis``, and 0 where nothing
    is included. Floating ``values`` keep their dtype; half precision is added
    up in float32. Others get the dtype of ``jnp.sum``, promoted with that of
    the sum of the weights.

  Raises:
    TypeError: If ``where`` is not boolean, ``weights`` are, or ``axis`` is not
      made of ints.
    ValueError: If ``axis`` is out of range or repeated, ``where`` or
      ``weights`` do not fit, or might be meant in two ways, or a weight is
      negative.
    NameError: If ``axis_name`` names no mapped axis.

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
    values: Array to count, such as losses. Only its shape matters; to count
      a mask by itself, write ``masked_count(mask, mask)``.
    where: Elements to include, as in :func:`masked_sum`.
    axis: Axis or axes to reduce, as in :func:`masked_sum`.
    weights: Numbers to add up in the place of ones, as in :func:`masked_sum`.
    axis_name: Name or names of mapped axes to add up over, as in
      :func:`masked_sum`.

  Returns:
    The count, with the shape of ``values`` without ``axis``, in the default
    integer dtype. A sum of ``weights`` has the dtype of ``jnp.sum``, but
    float32 for half precision.

  Raises:
    TypeError: As :func:`masked_sum`; or if ``values`` are boolean and there is
      no ``where``, since they may be meant as the mask.
    ValueError: As :func:`masked_sum`.
    NameError: As :func:`masked_sum`.
    OverflowError: If there are more elements than the integer can count.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax_masking import reductions
    >>> losses = jnp.array([[1.0, 2.0, jnp.nan], [3.0, jnp.nan, jnp.nan]])
    >>> print(reductions.masked_count(losses, ~jnp.isnan(losses), axis=-1))
    [2 1]
  """
  terms = _Terms(values, where, axis, weights)
  if where is None and jnp.issubdtype(jnp.result_type(terms.values), jnp.bool):
    raise TypeError(
      "`values` is boolean and there is no `where`. Pass masked_count(mask,"
      " mask) for the number of True, or where=True to count all of them."
    )
  if weights is None and terms.size > _most():
    raise OverflowError(
      f"{terms.size} elements may be more than the default integer holds,"
      f" {_most()}. Set jax_enable_x64, or use masked_mean, which counts them."
    )
  return _over(axis_name, terms.count(int))


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

  and 0 where nothing is included. A ``denominator`` takes the place of the
  lower sum.

  With ``axis_name`` each device, or each element of a mapped axis, gives its
  own part of the values, of the mask, of the weights and of the denominator.
  Numerators and denominators are added up over all before the division, and
  each device gets the mean of the whole.

  The gradient of that mean, with respect to parameters that all devices share,
  is what ``jax.grad`` returns on each device of a ``jax.shard_map`` with its
  default ``check_vma=True``. Without these checks, in ``pmap`` and in ``vmap``
  it is ``jax.lax.pmean(gradients, axis_name)``. There JAX differentiates the
  sum of the results of all devices, and each of these results is the mean of
  the whole. For the same reason the gradient with respect to what one device
  has for itself, such as its values or its shard of the parameters, is as many
  times too large there as there are devices. A derivative that is taken outside
  of the map, or in forward mode, needs no correction.

  Args:
    values: Numbers to average, such as the losses of tokens, or a boolean array
      of which predictions are right; of any shape and dtype.
    where: Elements to include, as in :func:`masked_sum`. What a masked element
      holds changes neither the mean nor a derivative, and the derivatives with
      respect to it are 0.
    axis: Axis or axes to reduce, as in :func:`masked_sum`. None stands for all.
    weights: Weights of the elements, as in :func:`masked_sum`: not negative,
      and no mask. If they add up to 0, and so do the weighted values, the mean
      is 0.
    denominator: Divisor in the place of the count or of the sum of
      the weights: a number, or an array that broadcasts to the result. For a
      microbatch, give the count of its whole batch. With ``axis_name`` it is
      added up over the devices, as the count would be: give each device its own
      part, such as a :func:`masked_count` without ``axis_name``. 0 / 0 is 0,
      and other numbers divided by 0 are infinite.
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
    NameError: If ``axis_name`` names no mapped axis.

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
  total = terms.sum(dtype, axis_name)
  divisor = terms.denominator(denominator, total.dtype, axis_name)
  return _quotient(total, divisor).astype(dtype)


class RunningMean(NamedTuple):
  """A mean over the steps of an epoch, and over more than one device.

  It holds what is to be added up, a numerator and a denominator, so that a step
  with few included elements counts for few. Each is a float32 number and the
  rest that was rounded off, so that a sum of billions still grows by ones.

  It is a pytree of four arrays, as the states of Optax are: a carry of
  ``lax.scan``, an argument of ``jit``, a part of a checkpoint.

  On many devices, pass ``axis_name`` to :meth:`update`. Or let each device add
  up its own, and take ``jax.lax.psum(state, axis_name)`` once, after the last
  step. In ``jax.shard_map`` such a state begins as one that varies:
  ``jax.lax.pcast(RunningMean.empty(), axis_name, to="varying")``.

  To write it to a file, ``np.savez(file, **state._asdict())``, and to read it,
  ``RunningMean(**np.load(file))``.

  Attributes:
    numerator: Sum of the (weighted) values.
    denominator: Their number, or the sum of their weights.
    numerator_rest: Number that is still to be added to the numerator.
    denominator_rest: Number that is still to be added to the denominator.

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
  ) -> RunningMean:
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
  ) -> RunningMean:
    """Adds the values of a step.

    Of a step of which only the mean and the count are known, give the mean as
    the value and the count as its weight.

    Args:
      values: Numbers to average, as in :func:`masked_mean`.
      where: Elements to include, as in :func:`masked_mean`.
      axis: Axis or axes to reduce, as in :func:`masked_mean`.
      weights: Weights of the elements, as in :func:`masked_mean`.
      denominator: Divisor of the step, as in :func:`masked_mean`.
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
        f"`values` of shape {terms.shape} have a mean of shape"
        f" {terms.result_shape} over the axes {terms.axes}, but this state has"
        f" the shape {self.numerator.shape}. Begin with"
        f" RunningMean.empty({terms.result_shape}), or give another `axis`."
      )
    dtype = self.numerator.dtype
    of_values = _mean_dtype(terms.values)
    if jnp.issubdtype(of_values, jnp.complexfloating):
      raise TypeError(f"`values` must be real, but have dtype {of_values}.")
    with jax.numpy_dtype_promotion("standard"):
      sum_dtype = jnp.promote_types(of_values, dtype)
    numerator = terms.sum(sum_dtype, axis_name).astype(dtype)
    count = terms.denominator(denominator, dtype, axis_name)
    zero = jnp.zeros_like(numerator)
    return self.merge(
      RunningMean(numerator, jnp.broadcast_to(count, zero.shape), zero, zero)
    )

  def merge(self, other: RunningMean) -> RunningMean:
    """Adds what another state has seen, of other steps or another device.

    Args:
      other: A state of the same shape.

    Returns:
      The state of both.

    Raises:
      ValueError: If the shapes differ.
    """
    if self.numerator.shape != other.numerator.shape:
      raise ValueError(
        f"A mean of shape {self.numerator.shape} can't be merged with one of"
        f" shape {other.numerator.shape}."
      )
    numerator, numerator_rest = _sum_of_two(
      (self.numerator, self.numerator_rest),
      (other.numerator, other.numerator_rest),
    )
    denominator, denominator_rest = _sum_of_two(
      (self.denominator, self.denominator_rest),
      (other.denominator, other.denominator_rest),
    )
    return RunningMean(numerator, denominator, numerator_rest, denominator_rest)

  def mean(self) -> jax.Array:
    """The mean of what was included, 0 if nothing was."""
    return _quotient(
      self.numerator + self.numerator_rest,
      self.denominator + self.denominator_rest,
    )


class _Terms:
  """The terms of a sum, and what their mean is divided by."""

  def __init__(
    self,
    values: jax.typing.ArrayLike,
    where: Where,
    axis: Axis,
    weights: jax.typing.ArrayLike | None,
  ):
    # A conversion would be an operation on garbage.
    is_array = isinstance(values, Array | np.generic)
    self.values: Any = values if is_array else jnp.asarray(values)
    self.shape = jnp.shape(self.values)
    self.axes = canonicalize_axes(axis, self.shape)
    self.result_shape = without(self.shape, self.axes)
    self.size = math.prod(self.shape[a] for a in self.axes)
    self.where = None
    if where is not None:
      self.where = Mask(
        where, axis, self.values, refuse_ambiguous_where=True
      ).where
    self.weights = None
    if weights is not None:
      w = self._aligned(_real("weights", weights))
      # Once, since the two parts of its derivative almost cancel.
      self.weights = w.astype(_wide(_sum_dtype(w)))

  def _masked(self, x: Any) -> jax.Array:
    return jnp.asarray(x) if self.where is None else select(self.where, x, 0)

  def _aligned(self, weights: Array) -> jax.Array:
    """Weights with the rank of the values, 0 where they are masked."""
    axes = axes_to_insert("weights", weights.shape, self.shape, self.axes, True)
    if axes and self.where is not None:
      weights = select(jnp.any(self.where, axes), weights, 0)
    weights = self._masked(jnp.expand_dims(weights, axes))
    _check_not_negative(weights)
    return weights

  def sum(self, dtype: Any, axis_name: AxisName) -> jax.Array:
    """The sum, in a dtype or in one with more digits."""
    dtype = _wide(dtype)
    x = self._masked(self.values)
    if self.weights is not None:
      with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(dtype, self.weights.dtype)
      x = x.astype(dtype) * self.weights.astype(dtype)
    return _over(axis_name, jnp.sum(x, self.axes, dtype=dtype))

  def count(self, dtype: Any) -> jax.Array:
    """How many are included here, or what they weigh."""
    if self.weights is not None:
      return jnp.sum(jnp.broadcast_to(self.weights, self.shape), self.axes)
    if self.where is None:
      return jnp.full(self.result_shape, self.size, dtype)
    x = jnp.broadcast_to(self.where, self.shape)
    return jnp.sum(x, self.axes, dtype=dtype)

  def denominator(
    self, given: jax.typing.ArrayLike | None, dtype: Any, axis_name: AxisName
  ) -> jax.Array:
    """What is given to divide by, and else the count."""
    if given is None:
      return _over(axis_name, self.count(dtype).astype(dtype))
    x = _real("denominator", given)
    if not broadcasts(x.shape, self.result_shape):
      raise ValueError(
        f"`denominator` has shape {x.shape}, but must broadcast to"
        f" {self.result_shape}, the shape {self.shape} of `values` without the"
        f" axes {self.axes}."
      )
    return _over(axis_name, jnp.asarray(x).astype(dtype))


def _over(axis_name: AxisName, x: jax.Array) -> jax.Array:
  """Adds up over mapped axes."""
  if axis_name is None:
    return x
  # One by one: `shard_map` refuses several if `x` varies over some of them.
  for name in axis_name if isinstance(axis_name, tuple) else (axis_name,):
    try:
      jax.lax.psum(1, name)  # Its size is known, and no sum is made.
    except NameError:
      raise NameError(
        f"`axis_name` {name!r} names no mapped axis here. Call it inside of"
        " `shard_map`, `pmap` or `vmap`, and without `axis_name` elsewhere, as"
        " for sharded arrays under `jit`."
      ) from None
    x = jax.lax.psum(x, name)
  return x


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Divides; 0 / 0 is 0, and so are its derivatives."""
  included = (numerator != 0) | (denominator != 0)
  numerator = select(included, numerator, 0)
  denominator = select(included, denominator, 1)
  # JAX differentiates by the square of the denominator. That of a small one is
  # 0, and of a large one infinite, unless it is 1.
  regular = (denominator != 0) & jnp.isfinite(denominator)
  scale = jax.lax.stop_gradient(select(regular, denominator, 1))
  return (numerator / scale) / (denominator / scale)


Pair = tuple[jax.Array, jax.Array]


def _sum_of_two(x: Pair, y: Pair) -> Pair:
  """Adds numbers, each of which is given as a rounded one and the rest."""
  total, rest = _exact_sum(x[0], y[0])
  return _exact_sum(total, rest + x[1] + y[1])


def _exact_sum(x: jax.Array, y: jax.Array) -> Pair:
  """A rounded sum, and what was rounded off (Knuth's TwoSum)."""
  total = x + y
  of_y = total - x
  rest = (x - (total - of_y)) + (y - of_y)
  return total, select(jnp.isfinite(total), rest, 0)


def _real(name: str, x: jax.typing.ArrayLike) -> Array:
  if isinstance(x, int) and not isinstance(x, bool):
    x = float(x)  # It may be more than an integer of JAX holds.
  if not isinstance(x, Array):
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
  """Where they are known: not where JAX traces, nor on another host."""
  if isinstance(weights, jax.core.Tracer) or not weights.is_fully_addressable:
    return
  given = np.asarray(weights)  # All that JAX computes may be traced.
  if (given < 0).any():
    raise ValueError(
      f"`weights` must not be negative, but {given.min()} is among those that"
      " are included. Mask what is not to count, with `where`."
    )


def _most() -> int:
  """The largest count that the default integer holds."""
  return int(jnp.iinfo(jnp.result_type(int)).max)


def _wide(dtype: Any) -> Any:
  """What a sum of this dtype is computed in."""
  if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
    return jnp.dtype("float32")
  return jnp.dtype(dtype)


def _sum_dtype(x: Any) -> Any:
  dtype = jnp.result_type(x)
  if jnp.issubdtype(dtype, jnp.inexact):
    return dtype
  return jax.eval_shape(jnp.sum, x).dtype  # Of a size that holds a sum.


def _mean_dtype(x: Any) -> Any:
  dtype = jnp.result_type(x)
  return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.result_type(float)
