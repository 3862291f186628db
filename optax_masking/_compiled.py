"""Masked calls outside of `jit`: compiled, with Optax's own errors."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import without
from optax_masking._decorator import (
  P,
  R,
  argument_getter,
  bound_arguments,
  raise_as_unmasked,
)
from optax_masking._mask import (
  boolean,
  canonicalize_axes,
  check_array,
  is_debugging,
)


def compiled(*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Compiles the calls of a loss that have a mask.

  This is `jax.jit` with static arguments. There is one program for each value
  of `axis` and of the `static` parameters, and for each shape and dtype of the
  other arguments, numbers included. A call is not compiled if it has no mask, a
  static argument that can't be hashed, or a number too large for an array.

  Arguments that the loss refuses without a mask raise the same error with one.
  To find that error, the loss is also called with `where=None`.

  Args:
    *static: Parameters that determine the structure of the program, such as
      flags.
  """

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    function: Callable[..., Any] = loss
    signature = inspect.signature(loss)
    where_of = argument_getter("where", signature)
    data = [
      name
      for name, parameter in signature.parameters.items()
      if parameter.default in (parameter.empty, None)
      and name not in ("axis", "where", *static)
    ]

    def unmasked(arguments):
      raise_as_unmasked(lambda: function(**{**arguments, "where": None}))

    def masked(arguments):
      # A fill may broadcast arguments that the loss itself would refuse.
      if _have_unequal_shapes([arguments[n] for n in data], arguments["axis"]):
        unmasked(arguments)
      return function(**arguments)

    # While JAX searches for NaN there are other programs, hence the last key.
    @functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
    def program(constants, inputs, _debugging):
      return masked({**inputs, **{name: x for name, _, x in constants}})

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
      if where_of(args, kwargs) is None:
        return loss(*args, **kwargs)
      bound = bound_arguments(signature, loss, args, kwargs)
      arguments = dict(bound.arguments)
      try:
        arguments["where"] = boolean(arguments["where"])
        for name in data:
          x = arguments[name]
          if name == data[0] and not hasattr(x, "shape"):
            unmasked(arguments)  # Optax's losses take no number as data.
          arguments[name] = _array(name, x)
        inputs = dict(arguments)
        constants = [(n, inputs.pop(n)) for n in ("axis", *static)]
        # The type is part of the key, since 1, True and 1.0 are equal. It comes
        # first: a tuple and a number of NumPy are compared as arrays.
        keys = tuple((name, _type_of(x), x) for name, x in constants)
        with contextlib.suppress(OverflowError):
          if _is_hashable(keys):
            return program(keys, inputs, is_debugging())
        return masked(arguments)
      except Exception as error:
        try:
          unmasked(arguments)
        except Exception as refusal:
          raise refusal from None
        # JAX's note about hidden frames is longer than the message.
        getattr(error, "__notes__", []).clear()
        raise

    return call

  return decorate


def _array(name, x):
  """Converts an argument to an array, unless it is one, a number or None."""
  if x is None or isinstance(x, jax.Array | np.ndarray | np.generic):
    return x
  if hasattr(x, "shape"):
    return jnp.asarray(x)
  check_array(name, x)
  return x


def _have_unequal_shapes(arrays, axis):
  """Whether an array has neither the data's shape nor one entry an example."""
  shapes = [np.shape(x) for x in arrays if x is not None]
  shape = max(shapes, key=len)
  axes = canonicalize_axes(axis, shape)
  return not all(s in (shape, without(shape, axes)) for s in shapes)


def _is_hashable(x):
  try:
    hash(x)
  except TypeError:
    return False
  return True


def _type_of(x):
  return tuple(map(type, x)) if isinstance(x, tuple) else type(x)
