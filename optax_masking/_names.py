"""Looks up in a module of Optax each name that a module here lacks."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any


def names_of(original: types.ModuleType, here: str) -> Callable[[str], Any]:
  """Makes the `__getattr__` of the module `here`.

  Optax warns of deprecated names with `stacklevel=2`, so no Python frame may
  lie between the caller and Optax: the first look-up is `getattr` in C. Only if
  it fails does Python call `__getattr__`, which names this module in the error.
  """

  class Names:
    __getattribute__ = staticmethod(functools.partial(getattr, original))

    def __getattr__(self, name: str) -> Any:
      try:
        return getattr(original, name)
      except AttributeError as error:
        # Optax says of a name that it removed what to use instead.
        text = str(error).replace(repr(original.__name__), repr(here))
        module = sys.modules.get(here)  # Python looks in it for similar names.
        raise AttributeError(text, name=name, obj=module) from None

  return functools.partial(getattr, Names())
