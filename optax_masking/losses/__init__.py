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
  ctc_loss as ctc_loss,
  ctc_loss_with_forward_probs as ctc_loss_with_forward_probs,
  generalized_kl_divergence as generalized_kl_divergence,
  hinge_loss as hinge_loss,
  kl_divergence as kl_divergence,
  kl_divergence_with_log_targets as kl_divergence_with_log_targets,
  multiclass_hinge_loss as multiclass_hinge_loss,
  multiclass_perceptron_loss as multiclass_perceptron_loss,
  multiclass_sparsemax_loss as multiclass_sparsemax_loss,
  perceptron_loss as perceptron_loss,
  poly_loss_cross_entropy as poly_loss_cross_entropy,
  safe_softmax_cross_entropy as safe_softmax_cross_entropy,
  sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy,
  sigmoid_focal_loss as sigmoid_focal_loss,
  softmax_cross_entropy as softmax_cross_entropy,
  softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,  # noqa: E501
  sparsemax_loss as sparsemax_loss,
)
from optax_masking.losses._fenchel_young import (
  make_fenchel_young_loss as make_fenchel_young_loss,
)
from optax_masking.losses._ranking import (
  ranking_softmax_loss as ranking_softmax_loss,
)
from optax_masking.losses._regression import (
  cosine_distance as cosine_distance,
  cosine_similarity as cosine_similarity,
  huber_loss as huber_loss,
  l2_loss as l2_loss,
  log_cosh as log_cosh,
  squared_error as squared_error,
)
from optax_masking.losses._segmentation import (
  binary_dice_loss as binary_dice_loss,
  dice_loss as dice_loss,
  multiclass_generalized_dice_loss as multiclass_generalized_dice_loss,
)
from optax_masking.losses._self_supervised import (
  ntxent as ntxent,
  triplet_margin_loss as triplet_margin_loss,
)
from optax_masking.losses._smoothing import (
  smooth_labels as smooth_labels,
)

# An older Optax may lack a loss; then it is lacking here.
for _name in globals().keys() - set(dir(_optax_losses)):
  if not _name.startswith("_"):
    del globals()[_name]

__all__ = tuple(n for n in dir(_optax_losses) if not n.startswith("_"))


def __dir__() -> list[str]:
  return sorted(globals().keys() | set(dir(_optax_losses)))
