"""The losses of `optax.losses`, with `axis` and `where`.

What is not imported here is looked up in Optax, when it is asked for.
"""

import functools as _functools
import typing as _typing

import optax.losses as _optax_losses

if _typing.TYPE_CHECKING:
  from optax.losses import *  # noqa: F403  # The masked losses below replace its own.

  def __getattr__(name: str) -> _typing.Any: ...
else:
  # No frame of this package, for a deprecation to name the line of the caller.
  __getattr__ = _functools.partial(getattr, _optax_losses)

from optax_masking.losses._classification import (
  convex_kl_divergence as convex_kl_divergence,
  generalized_kl_divergence as generalized_kl_divergence,
  kl_divergence as kl_divergence,
  sigmoid_focal_loss as sigmoid_focal_loss,
  softmax_cross_entropy as softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
)
from optax_masking.losses._regression import (
  cosine_distance as cosine_distance,
  cosine_similarity as cosine_similarity,
)

__all__ = tuple(n for n in dir(_optax_losses) if not n.startswith("_"))


def __dir__() -> list[str]:
  return sorted(globals().keys() | set(dir(_optax_losses)))
