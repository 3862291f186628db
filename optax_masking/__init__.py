"""Optax, with `axis` and `where` for its losses.

`import optax_masking as optax` is `import optax`, but for the losses that this
package masks: every other name is Optax's own object, looked up in Optax when
it is asked for.
"""

import functools as _functools
import typing as _typing

import optax as _optax

if _typing.TYPE_CHECKING:
  from optax import *  # noqa: F403  # The masked losses below replace its own.

  def __getattr__(name: str) -> _typing.Any: ...
else:
  # No frame of this package, for a deprecation to name the line of the caller.
  __getattr__ = _functools.partial(getattr, _optax)

from optax_masking import _submodules, fills as fills, losses as losses
from optax_masking._masking import masked_inputs as masked_inputs
from optax_masking.losses import (
  convex_kl_divergence as convex_kl_divergence,
  cosine_distance as cosine_distance,
  cosine_similarity as cosine_similarity,
  generalized_kl_divergence as generalized_kl_divergence,
  kl_divergence as kl_divergence,
  sigmoid_focal_loss as sigmoid_focal_loss,
  softmax_cross_entropy as softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
)

__version__ = "0.1.0"

__all__ = _optax.__all__  # `import *` gives the same names as Optax's.

_submodules.install()


def __dir__() -> list[str]:
  return sorted(globals().keys() | set(dir(_optax)))
