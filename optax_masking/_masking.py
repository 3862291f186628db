"""The mask contract and the decorator that gives a loss `axis` and `where`.

What a masked loss promises, for every boolean mask and every derivative:

1. Invariance. What a masked element holds changes no bit of the result.
2. Zero gradient. Derivatives with respect to masked elements are exactly 0.
3. Compaction. The rest is what the loss gives without the masked elements.
4. Empty. A slice with nothing included is 0 and has zero gradient.
5. Identity. Without a mask the loss is the undecorated program.
6. Honesty. NaN or inf in an included element comes out.
7. Clean arithmetic. No NaN or inf is computed because of a mask.
8. Transforms. All of this under every JAX transformation and floating dtype.

Multiplying a loss by its mask keeps none of the first four: in the backward
pass `0 * NaN` is NaN, and a large masked logit still enters a normalizer. The
way out is to mask twice, with a select each time.

On the way in, a masked element is replaced: `select(where, x, fill)`. The value
of `x` is then unreachable, and so is its gradient, since the derivative of a
select sends 0 to the branch that was not taken. Clauses 1 and 2 hold by
construction, whatever the loss. What is left to choose for each argument of a
loss is the *neutral fill*: one that adds nothing to the result (clause 3) and
keeps every intermediate value and derivative finite (clause 7). Most fills are
constants. Where none will do, since the argument is normalized along the
reduced axes, the fill is a function of the included elements: `below_maximum`
for a softmax, `zero_unless_empty` for a norm.

On the way out, a slice with nothing included is replaced by 0 (clause 4).
"""

import contextlib
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._arguments import (
  canonicalize_axes,
  canonicalize_where,
  check_axis_of,
  expand_labels,
  own_class,
)
from optax_masking._signatures import accepting_axis_and_where, reader
from optax_masking.fills import Array, Axes, Fill, class_index, select

P = ParamSpec("P")
R = TypeVar("R")


def masked_inputs(
  *, refuse_ambiguous_where: bool = False, **fills: Fill
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Gives a loss NumPy's ``axis`` and ``where``, safe in every derivative.

  The decorated loss replaces what ``where`` masks by a neutral fill before it
  computes anything, and returns 0 where nothing is included. Called without a
  mask, it is the undecorated loss.

  ``axis`` and ``where`` mean the same for every decorated loss. Let ``S`` be
  the shape that the array arguments broadcast to.

  * ``axis`` is an int, a tuple of ints, or None for all axes of ``S``.
  * ``where`` is boolean: an array or a list that has the rank of ``S`` and
    broadcasts to it, or that has the rank of ``S`` without ``axis`` and
    broadcasts to that (one entry an example), or a scalar.

  A loss whose ``axis`` defaults to ``()``, or that has no ``axis``, is
  elementwise: it returns the shape ``S``, and the decorator zeroes what is
  masked and sums over ``axis``. Any other loss takes ``axis`` and reduces it.

  Args:
    refuse_ambiguous_where: Whether to refuse a ``where`` of lower rank that
      fits the data both as one entry an example and, as NumPy broadcasts,
      aligned to the last axis. For a loss whose callers may mean the latter.
    **fills: For each argument of the loss that is an array, by name, what
      stands in for its masked elements: something that keeps the loss and its
      derivatives finite and, in a loss that reduces ``axis``, adds nothing to
      it. An argument not named keeps its garbage.

      * A number. For an argument of integers it is cut off to one.
      * :func:`optax_masking.fills.class_index` for integer class labels, which
        have no ``axis``. A masked example gets class 0, and an example whose
        own class is masked counts as masked.
      * For an argument that the loss normalizes along ``axis``, a function
        ``fill(x, where, axes)`` that returns the filled ``x``, such as
        :func:`optax_masking.fills.below_maximum` for the logits of a softmax
        and :func:`optax_masking.fills.zero_unless_empty` for what is divided by
        its norm. ``where`` has the rank of ``S``, size 1 along those of
        ``axes`` where ``x`` has, and ``x`` broadcasts with it.

      None is passed on as it is and, for a parameter with a default, a Python
      scalar.

  Returns:
    A decorator. A loss without ``axis`` or ``where`` in its signature gets them
    as keywords (write them out, for a type checker to know them). A loss with
    ``where`` in its signature is given None or the mask, in the shape ``S``, in
    case its formula has to count; the count may be 0. It may be traced once
    more, without the mask, to see whether it accepts shapes that differ.

  Raises:
    TypeError: From the decorated loss, if ``where`` is not boolean, ``axis`` is
      not made of ints, or an argument to fill is no array; from the decorator,
      if a fill names no parameter.
    ValueError: From the decorated loss, if ``axis`` is out of range or
      repeated, if ``where`` has none of the accepted shapes or fits in two
      ways, or if the loss returns a shape that ``axis`` does not explain.

  Examples:
    A loss of one's own. At a fill of 0 and 0 the error is 0:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> @optax.masked_inputs(predictions=0.0, targets=0.0)
    ... def absolute_error(predictions, targets):
    ...   return jnp.abs(predictions - targets)
    >>> predictions = jnp.array([1.0, 2.0, 4.0])
    >>> targets = jnp.array([3.0, jnp.nan, 5.0])
    >>> print(absolute_error(predictions, targets, where=~jnp.isnan(targets)))
    [2. 0. 1.]
    >>> print(jax.grad(absolute_error)(
    ...     predictions, targets, axis=-1, where=~jnp.isnan(targets)))
    [-1.  0. -1.]

    One that reduces an axis, from logits and integer labels:

    >>> @optax.masked_inputs(
    ...     logits=optax.fills.below_maximum, labels=optax.fills.class_index)
    ... def label_improbability(logits, labels, axis=-1, where=None):
    ...   p = jax.nn.softmax(logits, axis)
    ...   label_p = jnp.take_along_axis(p, jnp.expand_dims(labels, axis), axis)
    ...   return 1 - jnp.squeeze(label_p, axis)
    >>> print(label_improbability(
    ...     jnp.array([[0.0, 0.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]]),
    ...     jnp.array([1, -100]),
    ...     where=jnp.array([[True, True, False], [False, False, False]])))
    [0.5 0. ]
  """

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    parameters = inspect.signature(loss).parameters
    one_value = [
      name
      for name, parameter in parameters.items()
      if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
      and name not in ("axis", "where")
    ]
    if not fills or not fills.keys() <= set(one_value):
      raise TypeError(
        f"There are fills for {list(fills)}; the parameters are {one_value}."
        " Name a fill for each that is an array."
      )
    for name, fill in fills.items():
      if not (callable(fill) or isinstance(fill, numbers.Real)):
        raise TypeError(f"The fill of `{name}` is no number, but {fill!r}.")
    inner: Callable[..., Any] = accepting_axis_and_where(loss)
    signature = inspect.signature(inner)
    axis_of = reader("axis", signature)
    where_of = reader("where", signature)
    elementwise = signature.parameters["axis"].default == ()

    @functools.wraps(loss)
    def masked_loss(*args, **kwargs):
      if where_of(args, kwargs) is not None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return _masked_call(inner, call, fills, refuse_ambiguous_where)
      if not elementwise:
        return inner(*args, **kwargs)
      axis = axis_of(args, kwargs)
      if isinstance(axis, tuple | list) and not axis:
        return inner(*args, **kwargs)
      call = signature.bind(*args, **kwargs)
      call.arguments["axis"] = ()
      result = inner(*call.args, **call.kwargs)
      return jnp.sum(result, canonicalize_axes(axis, jnp.shape(result)))

    masked_loss.__signature__ = signature  # type: ignore[attr-defined]
    return masked_loss

  return decorate


def _masked_call(
  loss: Callable[..., Any],
  call: inspect.BoundArguments,
  fills: Mapping[str, Fill],
  refuse_ambiguous_where: bool,
) -> jax.Array:
  """Calls a loss on filled arguments and zeroes what is masked."""
  given = dict(call.arguments)
  axis = given["axis"]
  elementwise = call.signature.parameters["axis"].default == ()
  if elementwise:
    given["axis"] = ()  # The sum is taken here.

  def evaluate(**changes):
    call.arguments.update(given | changes)
    return loss(*call.args, **call.kwargs)

  def check_without_mask():
    """What a loss refuses without a mask it refuses with one, in its words."""
    with contextlib.suppress(jax.errors.ConcretizationTypeError):
      jax.eval_shape(lambda: evaluate(where=None))

  try:
    arrays = _arrays(call, fills)
    labels = {n: x for n, x in arrays.items() if fills[n] is class_index}
    data = {n: x for n, x in arrays.items() if n not in labels}
    shape = jnp.broadcast_shapes(*map(jnp.shape, data.values()))
    axes = canonicalize_axes(axis, shape)
    for name, x in data.items():
      if callable(fills[name]):
        check_axis_of(name, jnp.shape(x), shape, axis)
    for name, x in labels.items():
      labels[name] = expand_labels(name, x, shape, axes)
    shape = jnp.broadcast_shapes(shape, *map(jnp.shape, labels.values()))
    where = canonicalize_where(
      given["where"], shape, axes, refuse_ambiguous_where
    )
    for x in labels.values():
      where = where & own_class(where, x, shape, axes)
    filled = {
      name: _fill(name, x, where, fills[name], axes)
      for name, x in (data | labels).items()
    }
  except (TypeError, ValueError):
    try:
      check_without_mask()
    except Exception as refusal:
      raise refusal from None
    raise
  if len({getattr(x, "shape", None) for x in data.values()} | {shape}) > 1:
    check_without_mask()  # It may not broadcast what a fill has broadcast.

  result = evaluate(**filled, where=jnp.broadcast_to(where, shape))
  reduced = () if elementwise else axes
  expected = tuple(s for a, s in enumerate(shape) if a not in reduced)
  if jnp.shape(result) != expected:
    written = inspect.unwrap(loss)
    raise ValueError(
      f"{getattr(written, '__name__', written)} returned the shape"
      f" {jnp.shape(result)} for data of shape {shape}, not {expected}. A loss"
      " to be masked reduces the `axis` that it declares; without one it"
      " returns a value for each element."
    )
  result = select(jnp.any(where, reduced), result, 0)
  return jnp.sum(result, axes) if elementwise and axes else result


def _arrays(
  call: inspect.BoundArguments, fills: Mapping[str, Fill]
) -> dict[str, Any]:
  """The arguments to fill. A Python scalar is data, but not as a parameter."""
  arrays: dict[str, Any] = {}
  for name in fills:
    x = call.arguments[name]
    default = call.signature.parameters[name].default
    if isinstance(x, Array | np.generic):
      arrays[name] = x
    elif hasattr(x, "shape"):
      arrays[name] = jnp.asarray(x)
    elif isinstance(x, float | int):
      if default is inspect.Parameter.empty:
        arrays[name] = x
    elif x is not None:
      raise TypeError(f"`{name}` must be an array, not {type(x).__name__}.")
  return arrays


def _fill(
  name: str, x: Any, where: jax.Array, fill: Fill, axes: Axes
) -> jax.Array:
  """Replaces the masked elements of an argument.

  The select comes first: any other operation, a conversion even, would be one
  on garbage.
  """
  if not callable(fill):
    return select(where, x, fill)
  dtype = jnp.result_type(x)
  if fill is not class_index and not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but has dtype {dtype}.")
  # An element that is broadcast along a reduced axis is masked where all that
  # it meets is masked.
  shape = (1,) * (where.ndim - jnp.ndim(x)) + jnp.shape(x)
  broadcast = tuple(a for a in axes if shape[a] == 1 != where.shape[a])
  if broadcast:
    where = jnp.any(where, broadcast, keepdims=True)
  return fill(x, where, axes)
