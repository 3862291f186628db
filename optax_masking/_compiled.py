"""Masked calls outside of `jit`: compiled, and refused in Optax's words."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._decorator import P, R, reader
from optax_masking._mask import boolean, canonicalize_axes, is_debugging


def compiled(*static: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Compiles the calls of a loss that have a mask.

  It is `jax.jit` with static arguments. There is a program for each value of
  `axis` and of the parameters named here, and for each shape and dtype of the
  other arguments, among them numbers. A call without a mask is one of the loss
  itself, and so is one with a static argument that can't be hashed or a number
  that no input can hold.

  What the loss refuses without a mask it refuses with one, in the same words.
  It has to be a loss with `where=None`, too.

  Args:
    *static: Parameters that are the structure of the program, such as flags.
  """

  def decorate(loss: Callable[P, R]) -> Callable[P, R]:
    function: Callable[..., Any] = loss
    signature = inspect.signature(loss)
    where_of = reader("where", signature)
    data = [
      name
      for name, parameter in signature.parameters.items()
      if parameter.default in (parameter.empty, None)
      and name not in ("axis", "where", *static)
    ]

    def unmasked(arguments):
      with contextlib.suppress(jax.errors.ConcretizationTypeError):
        jax.eval_shape(lambda: function(**{**arguments, "where": None}))

    def masked(arguments):
      # What a fill broadcasts, the loss itself may refuse to.
      if _have_unequal_shapes([arguments[n] for n in data], arguments["axis"]):
        unmasked(arguments)
      return function(**arguments)

    # A search for NaN has programs of its own, which do not outlive it.
    @functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
    def program(constants, inputs, _debugging):
      return masked({**inputs, **{name: x for name, x, _ in constants}})

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
      if where_of(args, kwargs) is None:
        return loss(*args, **kwargs)
      bound = signature.bind(*args, **kwargs)
      bound.apply_defaults()
      arguments = dict(bound.arguments)
      try:
        arguments["where"] = boolean(arguments["where"])
        for name in data:
          x = arguments[name]
          if name == data[0] and not hasattr(x, "shape"):
            unmasked(arguments)  # A number as data: Optax's losses take none.
          arguments[name] = _array(name, x)
        inputs = dict(arguments)
        constants = [(n, inputs.pop(n)) for n in ("axis", *static)]
        # As keys 1, True and 1.0 are equal.
        keys = tuple((name, x, _types(x)) for name, x in constants)
        with contextlib.suppress(OverflowError):
          if _is_hashable(keys):
            return program(keys, inputs, is_debugging())
        return masked(arguments)
      except Exception as error:
        try:
          unmasked(arguments)
        except Exception as refusal:
          raise refusal from None
        # What JAX adds about its frames is longer than the message.
        getattr(error, "__notes__", []).clear()
        raise

    return call

  return decorate


def _array(name, x):
  """Converts what is like an array, and refuses what is neither."""
  if x is None or isinstance(x, jax.Array | np.ndarray | np.generic):
    return x
  if hasattr(x, "shape"):
    return jnp.asarray(x)
  if not isinstance(x, float | int):
    raise TypeError(f"`{name}` must be an array, not {type(x).__name__}.")
  return x


def _have_unequal_shapes(arrays, axis):
  """Whether one has neither the shape of the data nor one entry an example."""
  shapes = [np.shape(x) for x in arrays if x is not None]
  shape = max(shapes, key=len)
  axes = canonicalize_axes(axis, shape)
  batch = tuple(s for a, s in enumerate(shape) if a not in axes)
  return not all(s in (shape, batch) for s in shapes)


def _is_hashable(x):
  try:
    hash(x)
  except TypeError:
    return False
  return True


def _types(x):
  return tuple(map(type, x)) if isinstance(x, tuple) else type(x)
