"""Optax, with `axis` and `where` for its losses.

`import optax_masking as optax` is `import optax`, but for the losses that this
package masks: every other name is Optax's own object, looked up in Optax when
it is asked for.
"""

import typing as _typing

import optax as _optax

from optax_masking._names import names_of as _names_of

if _typing.TYPE_CHECKING:
  # A type checker that skips Optax, which declares no types, as mypy does by
  # default, sees here some `__getattr__`, and takes each name for Any. One that
  # reads Optax sees a module that it can't call, and reports a misspelt name.
  import optax as __getattr__
  from optax import (  # These are not in its `__all__`.
    InjectStatefulHyperparamsState as InjectStatefulHyperparamsState,
    MaskedNode as MaskedNode,
    SnapshotState as SnapshotState,
    WrappedSchedule as WrappedSchedule,
    assignment as assignment,
    bias_correction as bias_correction,
    contrib as contrib,
    experimental as experimental,
    freeze as freeze,
    inject_stateful_hyperparams as inject_stateful_hyperparams,
    microbatching as microbatching,
    named_chain as named_chain,
    normalize_by_update_norm as normalize_by_update_norm,
    optimistic_adam as optimistic_adam,
    optimistic_adam_v2 as optimistic_adam_v2,
    optimistic_gradient_descent as optimistic_gradient_descent,
    perturbations as perturbations,
    projections as projections,
    scale_by_distance_over_gradients as scale_by_distance_over_gradients,
    scale_by_learning_rate as scale_by_learning_rate,
    scale_by_optimistic_gradient as scale_by_optimistic_gradient,
    schedules as schedules,
    second_order as second_order,
    selective_transform as selective_transform,
    snapshot as snapshot,
    transforms as transforms,
    tree as tree,
    tree_map_params as tree_map_params,
    tree_utils as tree_utils,
    update_infinity_moment as update_infinity_moment,
    update_moment as update_moment,
    update_moment_per_elem_norm as update_moment_per_elem_norm,
    warmup_constant_schedule as warmup_constant_schedule,
    with_extra_args_support as with_extra_args_support,
  )

  from optax_masking import losses as losses

  # Of two names mypy takes the first, and pyright the one not after `except`.
  try:
    from optax_masking.losses import *  # noqa: F403
  except ImportError:
    from optax import *  # noqa: F403
else:
  __getattr__ = _names_of(_optax, __name__)

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
