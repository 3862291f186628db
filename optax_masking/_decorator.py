"""The decorator that gives a loss `axis` and `where` by filling arguments."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import Shape, without
from optax_masking._mask import Axis, Mask, check_array
from optax_masking.fills import Fill, PerExample

P = ParamSpec("P")
R = TypeVar("R")


def masked_inputs(
  *unnamed: NoReturn,
  refuse_ambiguous_where: bool = False,
  **fills: Fill | PerExample,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Gives a loss NumPy's ``axis`` and ``where``, safe in every derivative.

  The decorated loss replaces masked elements by a neutral fill before it
  computes anything, and returns 0 where nothing is included. Without a mask it
  calls the undecorated loss.

  ``axis`` and ``where`` mean the same for every decorated loss. Let ``S`` be
  the shape that the array arguments broadcast to.

  * ``axis`` is an int, a tuple of ints, or None for all axes of ``S``.
  * ``where`` is boolean: an array or a list that has the rank of ``S`` and
    broadcasts to it, or that has the rank of ``S`` without ``axis`` and
    broadcasts to that (one entry an example), or a scalar.

  A loss whose ``axis`` defaults to ``()``, or that has no ``axis``, is
  elementwise: it returns the shape ``S``, and the decorator zeroes masked
  elements and sums over ``axis``. Any other loss reduces its ``axis`` itself,
  or keeps the shape ``S``, with 0 for masked elements. A loss that needs more
  than fills, such as the number of included elements or another formula, makes
  a :class:`Mask` in its body.

  Args:
    *unnamed: Refused, since each fill has the name of its argument.
    refuse_ambiguous_where: Whether to refuse a ``where`` of lower rank that
      fits the data both as one entry an example and, as NumPy broadcasts,
      aligned to the last axis. For a loss whose callers may mean the latter.
    **fills: For each array argument of the loss, by name, the fill of its
      masked elements. It has to keep the loss and its derivatives finite and,
      in a loss that reduces ``axis``, to add nothing to it. An argument that is
      not named keeps its garbage.

      * A number. For an argument of integers it is cut off to an integer.
      * A ``PerExample`` for an argument with one entry an example, so without
        ``axis``, such as a weight of the example.
      * For an argument that the loss normalizes along ``axis``, a function
        ``fill(x, where, axes)`` that returns the filled ``x``: for the logits
        of a softmax, the scores of a maximum, or a vector that is divided by
        its norm. ``where`` has the rank of ``S`` and broadcasts with ``x``.
        Where ``x`` has size 1 along one of ``axes``, ``where`` has too, and is
        False if all elements that ``x`` broadcasts to are masked.

      :mod:`optax_masking.fills` has those for the common cases.

      An argument of None is passed on as it is and, for a parameter whose
      default is a number, a Python scalar.

  Returns:
    A decorator. A loss without ``axis`` or ``where`` in its signature gets them
    as keywords; a type checker knows those that the signature declares. A loss
    with ``where`` in its signature is given None or the mask, in the shape
    ``S``.

  Raises:
    TypeError: From the decorated loss, if ``where`` is not boolean, ``axis`` is
      not made of ints, or an argument to fill is no array; from the decorator,
      if there is no fill, a fill names no parameter or has no name, or the
      parentheses of ``@masked_inputs(...)`` are missing.
    ValueError: From the decorated loss, if ``axis`` is out of range or
      repeated, if ``where`` has none of the accepted shapes or fits in two
      ways, or if the loss returns a shape that ``axis`` does not explain; from
      the decorator, if a fill is not finite.

  Examples:
    A loss of your own. At a fill of 0 and 0 the error is 0:

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

    A type checker accepts ``axis`` and ``where`` after two more lines, which
    change nothing else:

    >>> @optax.masked_inputs(predictions=0.0, targets=0.0)
    ... def absolute_error(
    ...     predictions: jax.Array,
    ...     targets: jax.Array,
    ...     *,
    ...     axis: int | tuple[int, ...] | None = (),
    ...     where: jax.typing.ArrayLike | None = None,
    ... ) -> jax.Array:
    ...   return jnp.abs(predictions - targets)
    >>> print(absolute_error(predictions, targets, where=~jnp.isnan(targets)))
    [2. 0. 1.]

    One that reduces an axis, of logits:

    >>> @optax.masked_inputs(logits=optax.fills.below_maximum)
    ... def entropy(logits, axis=-1, where=None):
    ...   p = jax.nn.softmax(logits, axis)
    ...   return -jnp.sum(p * jax.nn.log_softmax(logits, axis), axis)
    >>> print(entropy(
    ...     jnp.array([[0.0, 0.0, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]]),
    ...     where=jnp.array([[True, True, False], [False, False, False]])))
    [0.6931472 0.       ]
  """
  if unnamed:
    raise TypeError(
      f"masked_inputs takes fills by name, not {unnamed[0]!r}. To decorate a"
      " loss write @masked_inputs(predictions=0.0, targets=0.0), for example."
    )

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    _check_fills(loss, fills)
    undecorated = inspect.signature(loss)
    signature = _with_axis_and_where(undecorated)
    parameters = signature.parameters
    added = parameters.keys() - undecorated.parameters.keys()
    elementwise = parameters["axis"].default == ()
    axis_of = argument_getter("axis", signature)
    where_of = argument_getter("where", signature)

    def evaluate(call: inspect.BoundArguments, **changes: Any) -> Any:
      given = {**call.arguments, **changes}
      if elementwise:
        given["axis"] = ()  # The sum is taken here.
      given = {n: x for n, x in given.items() if n not in added}
      inner = inspect.BoundArguments(undecorated, given)
      return loss(*inner.args, **inner.kwargs)

    def unmasked(*args: Any, **kwargs: Any) -> Any:
      kwargs = {n: x for n, x in kwargs.items() if n not in added}
      return loss(*args, **kwargs)

    @functools.wraps(loss)
    def masked_loss(*args: Any, **kwargs: Any) -> Any:
      where, axis = where_of(args, kwargs), axis_of(args, kwargs)
      sums = elementwise and not _is_empty(axis)
      if where is None and not sums:
        return unmasked(*args, **kwargs)
      call = bound_arguments(signature, unmasked, args, kwargs)
      if where is None:
        return Mask(None, axis).sum(evaluate(call))
      given = {n: call.arguments[n] for n in fills}
      arrays = {n: x for n, x in given.items() if _is_array(x, parameters[n])}
      examples = [n for n in arrays if isinstance(fills[n], PerExample)]
      # Under a mask the data broadcast, and below an argument with one entry an
      # example is broadcast, too. The loss itself may refuse them.
      if len({np.shape(arrays[n]) for n in arrays.keys() - examples}) > 1:
        raise_as_unmasked(lambda: evaluate(call, where=None))
      mask = Mask(
        where,
        axis,
        *(x for n, x in arrays.items() if n not in examples),
        examples=tuple(arrays[n] for n in examples),
        refuse_ambiguous_where=refuse_ambiguous_where,
      )
      filled = {}
      for name, x in arrays.items():
        fill = fills[name]
        if isinstance(fill, PerExample):
          filled[name] = mask.example(x, fill.fill, name)
        else:
          filled[name] = mask(x, fill, name)
      if any(np.shape(filled[n]) != np.shape(arrays[n]) for n in examples):
        raise_as_unmasked(lambda: evaluate(call, where=None))
      whole = jnp.broadcast_to(mask.where, mask.shape)
      result = evaluate(call, **filled, where=whole)
      _check_result(np.shape(result), mask, elementwise)
      return mask.sum(result) if elementwise else mask.out(result)

    masked_loss.__signature__ = signature  # type: ignore[attr-defined]
    return masked_loss

  return decorate


def _is_empty(axis: Axis) -> bool:
  """Whether `axis` names no axis."""
  return isinstance(axis, tuple | list) and not axis


def _check_result(shape: Shape, mask: Mask, elementwise: bool) -> None:
  """Refuses a result that `axis` does not explain."""
  if shape == mask.shape:
    return
  if elementwise:
    expected = mask.shape
    rule = "that reduces an axis declares it in its signature: `axis=-1`."
  else:
    expected = without(mask.shape, mask.axes)
    rule = "reduces the `axis` that it declares, and no other."
  if shape != expected:
    raise ValueError(
      f"The loss returned the shape {shape} for data of shape {mask.shape},"
      f" not {expected}. A loss {rule} One that returns another shape makes a"
      " `Mask` in its body."
    )


def raise_as_unmasked(unmasked_call: Callable[[], Any]) -> None:
  """Raises the error, if any, that a call raises without its mask."""
  with contextlib.suppress(jax.errors.ConcretizationTypeError):
    jax.eval_shape(unmasked_call)


def bound_arguments(
  signature: inspect.Signature,
  loss: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
) -> inspect.BoundArguments:
  """Binds a call. One that does not fit is refused by the loss, in its name."""
  with contextlib.suppress(TypeError):
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound
  loss(*args, **kwargs)
  raise AssertionError("A loss took arguments that its signature does not.")


def _is_array(x: Any, parameter: inspect.Parameter) -> bool:
  """Whether an argument is to be filled."""
  if x is None:
    return False
  check_array(parameter.name, x)
  return not all(isinstance(n, float | int) for n in (x, parameter.default))


def _check_fills(loss: Callable[..., Any], fills: Mapping[str, Any]) -> None:
  """Refuses no fill, fills of unknown parameters and those of a wrong type."""
  names = [
    name
    for name, parameter in inspect.signature(loss).parameters.items()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    and name not in ("axis", "where")
  ]
  if not fills:
    raise TypeError(
      "Name a fill for each array argument of the loss, as in"
      f" @masked_inputs({', '.join(f'{name}=0.0' for name in names[:1])})."
    )
  for name, fill in fills.items():
    if name not in names:
      raise TypeError(
        f"There is no parameter {name!r} to fill; the parameters are {names}."
      )
    number = fill.fill if isinstance(fill, PerExample) else fill
    if not (callable(number) or isinstance(number, numbers.Real)):
      raise TypeError(
        f"The fill of `{name}` must be a number, a `PerExample` or a"
        f" function, not {number!r}."
      )
    if not (callable(number) or math.isfinite(number)):
      raise ValueError(
        f"The fill of `{name}` must be finite, not {number!r}: the derivative"
        " of a loss would be NaN."
      )


def _with_axis_and_where(signature: inspect.Signature) -> inspect.Signature:
  """Adds the keywords ``axis=()`` and ``where=None`` that a loss lacks."""
  keyword = inspect.Parameter.KEYWORD_ONLY
  added = [
    inspect.Parameter(name, keyword, default=default)
    for name, default in (("axis", ()), ("where", None))
    if name not in signature.parameters
  ]
  parameters = [*signature.parameters.values(), *added]
  return signature.replace(parameters=sorted(parameters, key=lambda p: p.kind))


def argument_getter(
  name: str, signature: inspect.Signature
) -> Callable[..., Any]:
  """Makes a function that looks up one argument of a call.

  To bind the whole call would take microseconds longer.
  """
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
