"""The mask contract, and what gives a loss `axis` and `where` under it.

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
constants. Where none will do, since the argument is normalized along the
reduced axes, the fill is a function of the included elements.

On the way out, a slice with nothing included is replaced by 0 (clause 4).

A loss may have another formula under a mask. It need not fill what it selects
elsewhere, and may compute with garbage that reaches no result. For the rest it
owes the same.

Not among the transformations of clause 8 is the Taylor mode of
`jax.experimental.jet`. It has no rule for `jnp.any` and none for a choice
between platforms, and does not look at custom derivatives; to count instead of
`jnp.any` would cost a sixth of the time of a `kl_divergence`. It takes any mask
of the elementwise losses that are Optax's of filled arguments (`hinge_loss`,
`perceptron_loss`, `sparsemax_loss`), of `make_fenchel_young_loss`, of
`smooth_labels` and of the Dice losses, and masks of examples of
`multiclass_hinge_loss` and `multiclass_perceptron_loss`. It takes no mask of
another loss.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from optax_masking._arguments import (
  arrays_to_fill,
  boolean_mask,
  canonicalize_axes,
  check_accepted,
  constants_and_inputs,
  dtype_without_sharding,
  fill_all,
  is_debugging,
)
from optax_masking._signatures import (
  accepting_axis_and_where,
  argument_reader,
  check_fills,
)
from optax_masking.fills import Fill, PerExample, select

P = ParamSpec("P")
R = TypeVar("R")


def masked_inputs(
  *,
  refuse_ambiguous_where: bool = False,
  reduces_batch: bool = False,
  formula: Callable[..., jax.Array] | None = None,
  compiled: bool = False,
  **fills: Fill | None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Gives a loss NumPy's ``axis`` and ``where``, safe in every derivative.

  The decorated loss replaces what ``where`` masks by a neutral fill before it
  computes anything, and returns 0 where nothing is included, unless a
  ``formula`` sees to that. Called without a mask, it is the undecorated loss.

  ``axis`` and ``where`` mean the same for every decorated loss. Let ``S`` be
  the shape that the array arguments broadcast to.

  * ``axis`` is an int, a tuple of ints, or None for all axes of ``S``.
  * ``where`` is boolean: an array or a list that has the rank of ``S`` and
    broadcasts to it, or that has the rank of ``S`` without ``axis`` and
    broadcasts to that (one entry an example), or a scalar.

  A loss whose ``axis`` defaults to ``()``, or that has no ``axis``, is
  elementwise: it returns the shape ``S``, and the decorator zeroes what is
  masked and sums over ``axis``. Any other loss takes ``axis`` and reduces it,
  or keeps the shape ``S`` and gets 0 where it is masked.

  Args:
    refuse_ambiguous_where: Whether to refuse a ``where`` of lower rank that
      fits the data both as one entry an example and, as NumPy broadcasts,
      aligned to the last axis. For a loss whose callers may mean the latter.
    reduces_batch: Whether the loss reduces more than ``axis``, such as by a
      mean over the examples. The decorator then leaves its result alone, and
      the loss has to use ``where`` for what it counts.
    formula: A function that takes the place of the loss under a mask, for a
      program that is cheaper than the loss of filled arguments. It is called
      with all arguments by name: those with a fill filled, ``axes`` (none
      negative) for ``axis``, and ``where`` with the rank of ``S``, to which it
      broadcasts: a mask of examples has size 1 along ``axes``. It returns the
      masked loss, 0 where nothing is included, in any floating dtype, which is
      rounded to that of the loss: with the shape ``S`` if the loss is
      elementwise (the decorator sums), or without ``axes``. What is not filled
      it masks by itself.
    compiled: Whether to compile the masked loss, for calls outside of ``jit``.
      It may then depend on nothing but its arguments: what else it reads stays
      what it was at the first call. One that can't be compiled is traced in
      vain, and run. Arrays, floats and, of parameters with a fill or with a
      default that is a float, integers are inputs of the program; None, other
      integers, strings and tuples are constants, with a program for each. A
      call with anything else, such as a function that is not the default, is
      not compiled.
    **fills: For each argument of the loss that is an array, by name, what
      stands in for its masked elements: something that keeps the loss and its
      derivatives finite and, in a loss that reduces ``axis``, adds nothing to
      it. An argument not named keeps its garbage.

      * A number. For an argument of integers it is cut off to one.
      * A ``PerExample`` for an argument with one entry an example, so without
        ``axis``, such as integer class labels.
      * For an argument that the loss normalizes along ``axis``, a function
        ``fill(x, where, axes)`` that returns the filled ``x``: for the logits
        of a softmax, the scores of a maximum, or what is divided by its norm.
        ``where`` has the rank of ``S``, size 1 along those of ``axes`` where
        ``x`` has, and ``x`` broadcasts with it. An ``x`` that broadcasts along
        ``axis`` is masked where all that it meets is.

      Those of :mod:`optax_masking.fills` are for the common cases.

      An argument of None is passed on as it is and, for a parameter whose
      default is a number, a Python scalar. With a ``formula`` a fill may be
      None, or ``PerExample(None)``, for an argument that it masks by itself.

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

    One whose formula selects the error, and not both arguments:

    >>> def masked_error(predictions, targets, *, where, axes):
    ...   return jnp.abs(jnp.where(where, predictions - targets, 0.0))
    >>> @optax.masked_inputs(
    ...     predictions=None, targets=None, formula=masked_error, compiled=True)
    ... def absolute_error(predictions, targets):
    ...   return jnp.abs(predictions - targets)
    >>> print(absolute_error(predictions, targets, where=~jnp.isnan(targets)))
    [2. 0. 1.]
  """

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    check_fills(loss, fills, formula)
    inner: Callable[..., Any] = accepting_axis_and_where(loss)
    signature = inspect.signature(inner)
    axis_of = argument_reader("axis", signature)
    where_of = argument_reader("where", signature)
    elementwise = signature.parameters["axis"].default == ()

    def masked(arguments, to_fill, where):
      return _masked_call(
        inner,
        signature,
        arguments,
        to_fill,
        where,
        fills,
        formula,
        refuse_ambiguous_where,
        reduces_batch,
      )

    # A search for NaN has programs of its own, which do not outlive it.
    @functools.partial(jax.jit, static_argnums=(0, 2, 4), inline=True)
    def masked_and_compiled(constants, inputs, to_fill, where, _debugging):
      given = {name: x for name, x, _ in constants}
      return masked({**given, **inputs}, to_fill, where)

    @functools.wraps(loss)
    def masked_loss(*args, **kwargs):
      if where_of(args, kwargs) is not None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        try:
          arrays = arrays_to_fill(call, fills)
          arguments = {**call.arguments, **arrays}
          where = boolean_mask(arguments.pop("where"))
          if compiled:
            divided = constants_and_inputs(arguments, arrays, fills, signature)
            if divided is not None:
              # What it refuses is refused once more, without JAX's frames.
              with contextlib.suppress(TypeError, ValueError, AssertionError):
                return masked_and_compiled(
                  *divided, tuple(arrays), where, is_debugging()
                )
          return masked(arguments, arrays, where)
        except Exception:
          call.arguments["where"] = None
          if elementwise:
            call.arguments["axis"] = ()
          try:
            check_accepted(lambda: inner(*call.args, **call.kwargs))
          except Exception as refusal:
            raise refusal from None
          raise
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
  signature: inspect.Signature,
  arguments: Mapping[str, Any],
  to_fill: Collection[str],
  where: jax.Array,
  fills: Mapping[str, Fill | None],
  formula: Callable[..., jax.Array] | None,
  refuse_ambiguous_where: bool,
  reduces_batch: bool,
) -> Any:
  """Calls a loss on filled arguments and zeroes what is masked."""
  axis = arguments["axis"]
  elementwise = signature.parameters["axis"].default == ()
  if elementwise:
    arguments = {**arguments, "axis": ()}  # The sum is taken here.
  arrays = {name: arguments[name] for name in to_fill}

  def evaluate(**changes):
    call = inspect.BoundArguments(signature, {**arguments, **changes})
    return loss(*call.args, **call.kwargs)

  shape, axes, where, filled = fill_all(
    arrays, fills, axis, where, refuse_ambiguous_where
  )
  examples = tuple(s for a, s in enumerate(shape) if a not in axes)
  if 0 in shape:
    formula = None  # There is nothing to fill.
  if formula is not None:
    given = {n: x for n, x in {**arguments, **filled}.items() if n != "axis"}
    result = formula(**given, where=where, axes=axes)
    dtype = dtype_without_sharding(evaluate, arrays)
    if result.dtype != dtype:  # If not, a weak one stays weak.
      result = result.astype(dtype)
  else:
    # It may not broadcast what a fill has broadcast.
    if any(
      getattr(x, "shape", None)
      != (examples if isinstance(fills[name], PerExample) else shape)
      for name, x in arrays.items()
    ):
      check_accepted(lambda: evaluate(where=None))
    result = evaluate(**filled, where=jnp.broadcast_to(where, shape))

  if reduces_batch:
    return result
  if jnp.shape(result) == shape:
    if formula is None:
      result = select(where, result, 0)
    return jnp.sum(result, axes) if elementwise and axes else result
  if elementwise or jnp.shape(result) != examples:
    written = inspect.unwrap(loss) if formula is None else formula
    raise ValueError(
      f"{getattr(written, '__name__', written)} returned the shape"
      f" {jnp.shape(result)} for data of shape {shape}, not"
      f" {shape if elementwise else examples}. A loss to be masked reduces"
      " the `axis` that it declares; without one it returns a value for each"
      " element. One that reduces more needs `reduces_batch=True`."
    )
  if formula is not None:
    return result
  return select(jnp.any(where, axes), result, 0)
