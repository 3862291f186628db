"""Optax, with `axis` and `where` for its losses.

`import optax_masking as optax` is `import optax`, but for the losses that this
package masks: every other name is Optax's own object, looked up in Optax when
it is asked for.
"""

import typing as _typing

import optax as _optax

from optax_masking._names import names_of as _names_of

if _typing.TYPE_CHECKING:
  # mypy skips Optax, which ships no types: by this `__getattr__` each name that
  # is not defined here is Any for it. pyright reads Optax: `__getattr__` is a
  # module, which it can't call, and so it reports a misspelt name.
  import optax as __getattr__

  from optax_masking import losses as losses
  from optax_masking._unlisted import *  # noqa: F403

  # Both define the losses. mypy keeps the first definition, pyright the one
  # that is not after `except`.
  try:
    from optax_masking.losses import *  # noqa: F403
  except ImportError:
    from optax import *  # noqa: F403
else:
  __getattr__ = _names_of(_optax, __name__)

from optax_masking import (
  _submodules,
  fills as fills,
  linear_cross_entropy as linear_cross_entropy,
  reductions as reductions,
)
from optax_masking._decorator import masked_inputs as masked_inputs
from optax_masking._mask import Mask as Mask
from optax_masking._patch import patch as patch
from optax_masking.linear_cross_entropy import (  # Optax has no such loss.
  linear_softmax_cross_entropy_with_integer_labels as linear_softmax_cross_entropy_with_integer_labels,  # noqa: E501
)
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
