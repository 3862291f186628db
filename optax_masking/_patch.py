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

# By name, each loss that this package has one of its own for.
_MASKED = {
  name: getattr(masked_losses, name)
  for name in masked_losses.__all__
  if getattr(masked_losses, name) is not getattr(original, name)
}
_LOCK = threading.RLock()
_DEPTHS: collections.Counter[str] = collections.Counter()


def patch(*names: str, permanent: bool = False) -> "_Patch":
  """Puts the masked losses into Optax itself, for code that imports it.

  Wherever a module of Optax holds one of its losses (``optax``,
  ``optax.losses`` and the private modules), it holds the masked one instead, in
  all threads. Modules of Optax that are imported meanwhile get them too. At the
  end the originals come back.

  It is a context manager and a decorator, can be nested, and can be used more
  than once: the originals come back when the last one that has named a loss
  ends.

  What it can't reach is what others have taken out of Optax before, as ``from
  optax import kl_divergence`` does, and what JAX has compiled: a function that
  was called under ``jit`` keeps the losses that it was traced with, before the
  patch and after it.

  Args:
    *names: Losses to replace, such as ``"kl_divergence"``. All of them, if none
      is named.
    permanent: Whether to replace them at once, and for the rest of the process.

  Returns:
    The context manager.

  Raises:
    ValueError: If a name is none of a loss of Optax.
    TypeError: If a name is no string, as where the parentheses of ``@patch()``
      are missing.

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
    if name not in _MASKED:
      raise ValueError(
        f"{name!r} is no loss that can be replaced. These are:"
        f" {', '.join(sorted(_MASKED))}."
      )
  replacement = _Patch(frozenset(names or _MASKED))
  if permanent:
    replacement.__enter__()
  return replacement


class _Patch(contextlib.ContextDecorator):
  """The context manager. It has no state of its own, for use by many."""

  def __init__(self, names: Collection[str]):
    self._names = names

  def __enter__(self) -> None:
    with _LOCK:
      _replace(
        {
          getattr(original, name): _MASKED[name]
          for name in self._names
          if not _DEPTHS[name]
        }
      )
      _DEPTHS.update(self._names)

  def __exit__(self, *exception: object) -> None:
    with _LOCK:
      _DEPTHS.subtract(self._names)
      _replace(
        {
          _MASKED[name]: getattr(original, name)
          for name in self._names
          if not _DEPTHS[name]
        }
      )


def _replace(replacements: Mapping[object, object]) -> None:
  """Changes what the modules of Optax hold."""
  for module in _modules():
    for name, held in vars(module).copy().items():
      if isinstance(held, types.FunctionType) and held in replacements:
        setattr(module, name, replacements[held])


def _modules() -> list[types.ModuleType]:
  """The loaded modules of Optax, with those that others import right now."""
  names = [n for n in sys.modules.copy() if n.partition(".")[0] == "optax"]
  for name in names:
    # To import what another thread is importing is to wait for it.
    with contextlib.suppress(Exception):  # It fails there, too.
      importlib.import_module(name)
  return [sys.modules[name] for name in names if name in sys.modules]
