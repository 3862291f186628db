import optax.transforms as __getattr__
from optax.transforms import *
from optax.transforms import (  # These are not in its `__all__`.
  ConditionFn as ConditionFn,
  MaskedNode as MaskedNode,
  per_example_global_norm_clip as per_example_global_norm_clip,
  per_example_layer_norm_clip as per_example_layer_norm_clip,
  unitwise_clip as unitwise_clip,
  unitwise_norm as unitwise_norm,
)
