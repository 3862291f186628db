"""The losses of `optax.losses`, with `axis` and `where`.

Other names are looked up in Optax when they are used.
"""

import collections as _collections
import importlib as _importlib
import typing as _typing

import optax.losses as _optax_losses

from optax_masking._names import names_of as _names_of
from optax_masking.losses._table import ROWS as _ROWS

if _typing.TYPE_CHECKING:
  import optax.losses as __getattr__  # See the package itself, for `try`, too.

  try:
    from optax_masking.losses._classification import *  # noqa: F403
    from optax_masking.losses._fenchel_young import *  # noqa: F403
    from optax_masking.losses._ranking import *  # noqa: F403
    from optax_masking.losses._regression import *  # noqa: F403
    from optax_masking.losses._segmentation import *  # noqa: F403
    from optax_masking.losses._self_supervised import *  # noqa: F403
    from optax_masking.losses._smoothing import *  # noqa: F403
  except ImportError:
    from optax.losses import *  # noqa: F403
else:
  __getattr__ = _names_of(_optax_losses, __name__)
  __all__ = tuple(n for n in dir(_optax_losses) if not n.startswith("_"))

_modules = [
  _importlib.import_module(f"{__name__}.{name}")
  for name in (
    "_classification",
    "_fenchel_young",
    "_ranking",
    "_regression",
    "_segmentation",
    "_self_supervised",
    "_smoothing",
  )
]
_defined = _collections.ChainMap(*map(vars, _modules))
# A loss that a newer Optax has removed, such as a deprecated name, is not here
# either.
globals().update(
  (name, _defined[name]) for name in _ROWS if hasattr(_optax_losses, name)
)


def __dir__() -> list[str]:
  return sorted(globals().keys() | set(dir(_optax_losses)))
