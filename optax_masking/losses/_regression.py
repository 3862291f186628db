from optax_masking._masking import masked_inputs
from optax_masking.fills import zero_unless_empty
from optax_masking.losses._original import original

@masked_inputs(predictions=zero_unless_empty, targets=zero_unless_empty, epsilon=zero_unless_empty, was_right_aligned=True)
def cosine_similarity(predictions, targets, *, epsilon=0.0, axis=-1, where=None):
  return original.cosine_similarity(predictions, targets, epsilon=epsilon, axis=axis)

@masked_inputs(predictions=zero_unless_empty, targets=zero_unless_empty, epsilon=zero_unless_empty, was_right_aligned=True)
def cosine_distance(predictions, targets, *, epsilon=0.0, axis=-1, where=None):
  return original.cosine_distance(predictions, targets, epsilon=epsilon, axis=axis)
