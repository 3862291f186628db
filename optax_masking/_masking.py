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

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from optax_masking._arguments import (
  align,
  canonicalize_axes,
  canonicalize_where,
  own_class,
)
from optax_masking.fills import Array, Axes, Fill, class_index

P = ParamSpec("P")
R = TypeVar("R")


def masked_inputs(
  *, was_right_aligned: bool = False, **fills: Fill
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Gives a loss NumPy's ``axis`` and ``where``, safe in every derivative.

  The decorated loss replaces what ``where`` masks by a neutral fill before it
  computes anything, and returns 0 where nothing is included. Called without a
  mask, it is the undecorated loss.

  ``axis`` and ``where`` mean the same for every decorated loss. Let ``S`` be
  the shape that the array arguments broadcast to.

  * ``axis`` is an int, a tuple of ints, or None for all axes of ``S``.
  * ``where`` is boolean. It broadcasts to ``S``, or it has the rank of ``S``
    without ``axis`` and broadcasts to that (one entry an example), or it is a
    scalar.

  A loss whose ``axis`` defaults to ``()``, or that has no ``axis``, is
  elementwise: it returns the shape ``S``, and the decorator zeroes what is
  masked and sums over ``axis``. Any other loss takes ``axis`` and reduces it.

  Args:
    was_right_aligned: Whether this loss used to broadcast a ``where`` of lower
      rank as NumPy does, aligned to the last axis. If so, a mask that fits both
      that way and as one entry an example is refused.
    **fills: For each array argument of the loss, by name, what stands in for
      its masked elements. A number is a constant fill. ``class_index`` says
      that the argument holds integer class labels, without the reduced axes: a
      masked example gets class 0, and an example whose own class is masked
      counts as masked. For an argument that the loss normalizes along ``axis``,
      a function ``fill(x, where, axes) -> filled x``, such as
      :func:`below_maximum` or :func:`zero_unless_empty`; ``x`` and ``where``
      then have the rank of ``S``, and ``where`` has size 1 along those of
      ``axes`` where ``x`` has. An argument not named is passed on as it is, and
      so are None and, for a parameter with a default, a Python scalar.

  Returns:
    A decorator. A loss without ``axis`` or ``where`` in its signature gets them
    as keywords; a loss with ``where`` in its signature is given the mask, as a
    boolean array of the rank of ``S``, in case its formula has to count.

  Raises:
    TypeError: From the decorated loss, if ``where`` is not boolean or ``axis``
      is not made of ints; from the decorator, if a fill names no parameter.
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
  """

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    parameters = inspect.signature(loss).parameters
    if unknown := sorted(fills.keys() - parameters.keys()):
      raise TypeError(
        f"There is no parameter {unknown} to fill in {loss}: its parameters are"
        f" {list(parameters)}."
      )
    inner: Callable[..., Any] = _accepting_axis_and_where(loss)
    signature = inspect.signature(inner)
    axis_of = _reader("axis", signature)
    where_of = _reader("where", signature)
    elementwise = signature.parameters["axis"].default == ()

    @functools.wraps(loss)
    def masked_loss(*args, **kwargs):
      if where_of(args, kwargs) is not None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return _masked_call(inner, call, fills, was_right_aligned)
      result = inner(*args, **kwargs)
      if elementwise and (axis := axis_of(args, kwargs)) != ():
        return jnp.sum(result, canonicalize_axes(axis, jnp.shape(result)))
      return result

    masked_loss.__signature__ = signature  # type: ignore[attr-defined]
    return masked_loss

  return decorate


def _accepting_axis_and_where(loss: Callable[..., R]) -> Callable[..., R]:
  """Adds the keywords ``axis=()`` and ``where=None`` that a loss lacks."""
  signature = inspect.signature(loss)
  keyword = inspect.Parameter.KEYWORD_ONLY
  added = [
    inspect.Parameter(name, keyword, default=default)
    for name, default in (("axis", ()), ("where", None))
    if name not in signature.parameters
  ]
  if not added:
    return loss

  @functools.wraps(loss)
  def accepting(*args, **kwargs):
    for parameter in added:
      kwargs.pop(parameter.name, None)
    return loss(*args, **kwargs)

  parameters = sorted(
    [*signature.parameters.values(), *added], key=lambda p: p.kind
  )
  accepting.__signature__ = signature.replace(  # type: ignore[attr-defined]
    parameters=parameters
  )
  return accepting


def _reader(name: str, signature: inspect.Signature) -> Callable[..., Any]:
  """Looks one argument up, without the microseconds of binding a whole call."""
  parameter = signature.parameters[name]
  default = parameter.default
  position = sys.maxsize
  if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
    position = list(signature.parameters).index(name)

  def read(args, kwargs):
    if len(args) > position:
      return args[position]
    return kwargs.get(name, default)

  return read


def _masked_call(
  loss: Callable[..., Any],
  call: inspect.BoundArguments,
  fills: Mapping[str, Fill],
  was_right_aligned: bool,
) -> jax.Array:
  """Calls a loss on filled arguments and zeroes what is masked."""
  parameters = call.signature.parameters
  elementwise = parameters["axis"].default == ()
  given = dict(call.arguments)
  axis = given["axis"]

  def evaluate(**changes):
    call.arguments.update(given | changes)
    return loss(*call.args, **call.kwargs)

  arrays: dict[str, Array] = {}
  for name in fills:
    x = given[name]
    if isinstance(x, Array):
      arrays[name] = x  # A conversion would be an operation on its garbage.
    elif hasattr(x, "shape") or (
      isinstance(x, float | int)
      and parameters[name].default is inspect.Parameter.empty
    ):
      arrays[name] = jnp.asarray(x)
  shapes = {x.shape for n, x in arrays.items() if fills[n] is not class_index}
  problem = None
  try:
    shape = jnp.broadcast_shapes(*shapes)
    axes = canonicalize_axes(axis, shape)
    aligned = {
      name: align(name, x, fills[name], shape, axis, axes)
      for name, x in arrays.items()
    }
    shape = jnp.broadcast_shapes(shape, *(x.shape for x in aligned.values()))
    where = canonicalize_where(given["where"], shape, axes, was_right_aligned)
    for name, x in aligned.items():
      if fills[name] is class_index:
        where = where & own_class(where, x, shape, axes)
    filled = {
      name: _fill(name, x, where, fills[name], axes)
      for name, x in aligned.items()
    }
  except (TypeError, ValueError) as error:
    problem = error
  if problem or len(shapes) > 1:
    # What a loss refuses without a mask it refuses with one, in its own words:
    # a dtype, an axis, shapes that it will not broadcast.
    jax.eval_shape(lambda: evaluate(where=None))
  if problem:
    raise problem

  result = evaluate(**filled, where=where)
  reduced = () if elementwise else axes
  expected = tuple(s for a, s in enumerate(shape) if a not in reduced)
  if jnp.shape(result) != expected:
    raise ValueError(
      f"{loss} returned the shape {jnp.shape(result)} for data of shape"
      f" {shape}, not {expected}. A masked loss reduces the `axis` that it is"
      " given, or nothing if its `axis` defaults to ()."
    )
  result = jnp.where(jnp.any(where, reduced), result, 0)
  return jnp.sum(result, axes) if elementwise and axes else result


def _fill(
  name: str, x: Array, where: jax.Array, fill: Fill, axes: Axes
) -> jax.Array:
  """Replaces the masked elements of an argument."""
  if callable(fill):
    if fill is not class_index and not jnp.issubdtype(x.dtype, jnp.floating):
      raise TypeError(f"`{name}` must be floating, but has dtype {x.dtype}.")
    # An element that is broadcast along a reduced axis is masked where all that
    # it meets is masked.
    broadcast = tuple(a for a in axes if x.shape[a] == 1 != where.shape[a])
    if broadcast:
      where = jnp.any(where, broadcast, keepdims=True)
    return fill(x, where, axes)
  # A Python scalar of its own kind keeps the dtype, weak or not.
  is_integer = jnp.issubdtype(x.dtype, jnp.integer)
  kind = bool if x.dtype == bool else int if is_integer else float
  return jnp.where(where, x, kind(fill))
