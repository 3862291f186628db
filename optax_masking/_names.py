"""Looks up in a module of Optax each name that a module here lacks."""

import functools
import sys
import types
from collections.abc import Callable
from typing import Any


def names_of(original: types.ModuleType, here: str) -> Callable[[str], Any]:
  """Makes the `__getattr__` of the module `here`.

  A function would do, but for the warnings of Optax: they name the line that
  asked for a deprecated name, and find it by counting frames, so that there
  must be no frame in between. An error has to pass through one, to name the
  module that the caller asked. Python calls the two methods below in this
  order, and only after an AttributeError the second; the first is C alone.
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
