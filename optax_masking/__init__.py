"""Optax, with `axis` and `where` for its losses.

`import optax_masking as optax` is `import optax`, but for the losses that this
package masks: every other name is Optax's own object, looked up in Optax when
it is asked for.
"""

import functools as _functools
import typing as _typing

import optax as _optax

if _typing.TYPE_CHECKING:
  from optax import *  # noqa: F403  # The masked losses replace its own.

  from optax_masking import losses as losses
  from optax_masking.losses import *  # noqa: F403

  def __getattr__(name: str) -> _typing.Any: ...
else:
  # No frame of this package, for a deprecation to name the line of the caller.
  __getattr__ = _functools.partial(getattr, _optax)

from optax_masking import (
  _submodules,
  fills as fills,
  reductions as reductions,
)
from optax_masking._decorator import masked_inputs as masked_inputs
from optax_masking._mask import Mask as Mask
from optax_masking._patch import patch as patch
from optax_masking.losses._table import ROWS as _ROWS

globals().update(
  (name, getattr(losses, name)) for name, row in _ROWS.items() if row.at_top
)

__version__ = "0.1.0"

__all__ = _optax.__all__  # `import *` gives the same names as Optax's.

_submodules.install()


def __dir__() -> list[str]:
  # No name that pytest gives to the modules of a plugin, as `@py_builtins`.
  return sorted(filter(str.isidentifier, {*globals(), *dir(_optax)}))
