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
  from optax_masking.losses import (
    convex_kl_divergence as convex_kl_divergence,
    cosine_distance as cosine_distance,
    cosine_similarity as cosine_similarity,
    ctc_loss as ctc_loss,
    ctc_loss_with_forward_probs as ctc_loss_with_forward_probs,
    generalized_kl_divergence as generalized_kl_divergence,
    hinge_loss as hinge_loss,
    huber_loss as huber_loss,
    kl_divergence as kl_divergence,
    l2_loss as l2_loss,
    log_cosh as log_cosh,
    ntxent as ntxent,
    safe_softmax_cross_entropy as safe_softmax_cross_entropy,
    sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy,
    sigmoid_focal_loss as sigmoid_focal_loss,
    smooth_labels as smooth_labels,
    softmax_cross_entropy as softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
    squared_error as squared_error,
  )

  def __getattr__(name: str) -> _typing.Any: ...
else:
  # No frame of this package, for a deprecation to name the line of the caller.
  __getattr__ = _functools.partial(getattr, _optax)

from optax_masking import (
  _submodules,
  fills as fills,
  reductions as reductions,
)
from optax_masking._masking import masked_inputs as masked_inputs
from optax_masking._patch import patch as patch
from optax_masking.losses import __all__ as _names

# The masked losses, those of them that Optax has at its top.
globals().update({n: getattr(losses, n) for n in _names if n in vars(_optax)})

__version__ = "0.1.0"

__all__ = _optax.__all__  # `import *` gives the same names as Optax's.

_submodules.install()


def __dir__() -> list[str]:
  return sorted(globals().keys() | set(dir(_optax)))
