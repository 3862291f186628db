"""Puts the masked losses into the imported Optax itself."""

import collections
import contextlib
import importlib
import sys
import threading
import types
from collections.abc import Collection, Mapping

import optax_masking.losses as masked_losses
from optax_masking.losses._original import original

# The masked losses by name, without those that are Optax's own.
_MASKED_LOSSES = {
  name: getattr(masked_losses, name)
  for name in masked_losses.__all__
  if getattr(masked_losses, name) is not getattr(original, name)
}
_LOCK = threading.RLock()
_PATCH_COUNTS: collections.Counter[str] = collections.Counter()


def patch(*names: str, permanent: bool = False) -> "_Patch":
  """Puts the masked losses into Optax itself, for code that imports it.

  Wherever a module of Optax holds one of its losses (``optax``,
  ``optax.losses`` and the private modules), it holds the masked loss instead,
  in all threads. Modules of Optax that are imported meanwhile hold the masked
  losses, too. At the end the originals come back.

  A patch is a context manager and a decorator, can be nested, and can be used
  more than once: the original of a loss comes back when the last patch that has
  named it ends.

  A patch reaches neither losses that other modules have taken out of Optax
  before, as ``from optax import kl_divergence`` does, nor programs that JAX has
  compiled: a function that was called under ``jit`` keeps the losses that it
  was traced with, before the patch and after it.

  Args:
    *names: Losses to replace, such as ``"kl_divergence"``; by default all.
    permanent: Whether to replace the losses at once, and for the rest of the
      process.

  Returns:
    The context manager.

  Raises:
    ValueError: If a name is not that of a loss that can be replaced.
    TypeError: If a name is no string. In ``@patch``, the parentheses of
      ``@patch()`` are missing.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_masking
    >>> predictions, targets = jnp.ones(2), jnp.array([3.0, jnp.nan])
    >>> with optax_masking.patch():
    ...   print(optax.squared_error(
    ...       predictions, targets, where=~jnp.isnan(targets)))
    [4. 0.]

    A test, say, of a library that calls ``optax.kl_divergence``:

    >>> @optax_masking.patch("kl_divergence")
    ... def test_of_library():
    ...   assert optax.kl_divergence is optax_masking.kl_divergence
    >>> test_of_library()
    >>> assert optax.kl_divergence is not optax_masking.kl_divergence
  """
  for name in names:
    if not isinstance(name, str):
      raise TypeError(
        f"patch takes names of losses, not {name!r}. To decorate a function"
        " write @patch()."
      )
    if name not in _MASKED_LOSSES:
      raise ValueError(
        f"{name!r} is no loss that can be replaced. These are:"
        f" {', '.join(sorted(_MASKED_LOSSES))}."
      )
  replacement = _Patch(frozenset(names or _MASKED_LOSSES))
  if permanent:
    replacement.__enter__()
  return replacement


class _Patch(contextlib.ContextDecorator):
  """The context manager. It has no state, so that threads can share it."""

  def __init__(self, names: Collection[str]):
    self._names = names

  def __enter__(self) -> None:
    with _LOCK:
      _replace(
        {
          getattr(original, name): _MASKED_LOSSES[name]
          for name in self._names
          if not _PATCH_COUNTS[name]
        }
      )
      _PATCH_COUNTS.update(self._names)

  def __exit__(self, *exception: object) -> None:
    with _LOCK:
      _PATCH_COUNTS.subtract(self._names)
      _replace(
        {
          _MASKED_LOSSES[name]: getattr(original, name)
          for name in self._names
          if not _PATCH_COUNTS[name]
        }
      )


def _replace(replacements: Mapping[object, object]) -> None:
  """Replaces functions in the modules of Optax."""
  for module in _optax_modules():
    for name, value in vars(module).copy().items():
      if isinstance(value, types.FunctionType) and value in replacements:
        setattr(module, name, replacements[value])


def _optax_modules() -> list[types.ModuleType]:
  """The loaded modules of Optax. Waits for imports in other threads."""
  names = [n for n in sys.modules.copy() if n.partition(".")[0] == "optax"]
  for name in names:
    # If another thread is importing the module, this import waits for it.
    with contextlib.suppress(Exception):  # The other thread raises the error.
      importlib.import_module(name)
  return [sys.modules[name] for name in names if name in sys.modules]
