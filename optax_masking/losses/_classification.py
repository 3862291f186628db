from optax_masking._masking import masked_inputs
from optax_masking.fills import class_index, below_maximum
from optax_masking.losses._original import original

@masked_inputs(logits=below_maximum, labels=0.0)
def softmax_cross_entropy(logits, labels, axis=-1, where=None):
  return original.softmax_cross_entropy(logits, labels, axis=axis)

@masked_inputs(logits=below_maximum, labels=class_index)
def softmax_cross_entropy_with_integer_labels(logits, labels, axis=-1, where=None):
  return original.softmax_cross_entropy_with_integer_labels(logits, labels, axis=axis)

@masked_inputs(log_predictions=0.0, targets=1.0, was_right_aligned=True)
def kl_divergence(log_predictions, targets, axis=-1, where=None):
  return original.kl_divergence(log_predictions, targets, axis=axis)

@masked_inputs(log_predictions=0.0, targets=1.0, was_right_aligned=True)
def generalized_kl_divergence(log_predictions, targets, axis=-1, where=None):
  return original.generalized_kl_divergence(log_predictions, targets, axis=axis)

@masked_inputs(logits=0.0, labels=0.5, alpha=0.5, gamma=0.0)
def sigmoid_focal_loss(logits, labels, *, alpha=None, gamma=2.0, axis=(), where=None):
  return original.sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)

def convex_kl_divergence(log_predictions, targets, axis=-1, where=None):
  import warnings
  warnings.warn("The function convex_kl_divergence is deprecated. Please use generalized_kl_divergence instead.", DeprecationWarning, stacklevel=2)
  return generalized_kl_divergence(log_predictions, targets, axis=axis, where=where)
