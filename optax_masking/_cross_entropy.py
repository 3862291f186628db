"""Cross-entropies under a mask, at the cost of the unmasked ones.

Half precision is computed in float32, where it does not round or overflow, but
for the formulas of other platforms than CPUs: these keep Optax's dtype.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_masking._classes import (
  class_is_included,
  class_of_example,
  flat_index,
  take_class,
  varies_along,
  wide,
)
from optax_masking._derivatives import elementwise, with_partials
from optax_masking._mask import Mask
from optax_masking.fills import below_maximum
from optax_masking.losses._original import original


def softmax_cross_entropy_of_class(
  mask: Mask, logits: Any, labels: Any
) -> jax.Array:
  r"""Cross-entropy of a softmax and class indices.

  With :math:`m` and :math:`s` of `_normalizer` it is :math:`\log s - (x_y - m)`
  for a class :math:`y`, and its derivative
  :math:`\sum_j (p_j - [j = y]) \, dx_j`.
  """
  where, axes, shape = mask.where, mask.axes, mask.shape
  logits = mask.as_array(logits)
  dtype = logits.dtype
  logits = jnp.broadcast_to(logits, shape)
  labels = jnp.asarray(labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f"`labels` must be integers, not {labels.dtype}.")
  classes = class_of_example(labels, shape, axes)
  # An example whose own class is masked counts as masked.
  included = class_is_included(classes, where, shape, axes)
  loss, *_ = _class_loss(axes, where & included, logits, classes, included)
  # The tangent of an example that is masked as a whole may be NaN.
  return _rounded(jnp.squeeze(jnp.where(included, loss, 0), axes), dtype)


def softmax_cross_entropy_of_probabilities(
  mask: Mask, logits: Any, labels: Any, *, safe: bool = False
) -> jax.Array:
  r"""Cross-entropy of a softmax and probabilities.

  With :math:`\log p_j` of `_normalizer` it is :math:`-\sum_j y_j \log p_j`, and
  its derivative
  :math:`\sum_j (p_j \sum_k y_k - y_j) \, dx_j - \sum_j \log p_j \, dy_j`.
  If it is `safe`, a label of 0 adds 0 for a logit of minus infinity, too.
  """
  where, axes, shape = mask.where, mask.axes, mask.shape
  mask.check_axis_of(logits, "logits")
  mask.check_axis_of(labels, "labels")
  logits, labels = mask.as_array(logits), mask.as_array(labels)
  dtype = jnp.result_type(logits, labels)
  if safe:  # Optax's custom derivative makes weak types strong.
    dtype = jnp.promote_types(logits.dtype, labels.dtype)
  if jnp.issubdtype(labels.dtype, jnp.complexfloating):
    raise TypeError(f"`labels` must be real, but has dtype {labels.dtype}.")
  if not jnp.issubdtype(labels.dtype, jnp.floating):
    labels = labels.astype(wide(logits.dtype))
  logits = jnp.expand_dims(logits, range(len(shape) - logits.ndim))
  # Logits that broadcast along a class axis are one class for several labels.
  one = tuple(a for a in axes if logits.shape[a] == 1 != shape[a])
  if one:
    labels = jnp.sum(jnp.where(where, labels, 0), one, keepdims=True)
    where = jnp.any(where, one, keepdims=True)
    shape = jnp.broadcast_shapes(logits.shape, labels.shape)
  logits = jnp.broadcast_to(logits, shape)
  labels = jnp.broadcast_to(labels, shape)
  if jnp.finfo(labels.dtype).bits > 32:  # In the wider of the two.
    logits = logits.astype(labels.dtype)
  masked_loss = _safe_loss if safe else _probabilities_loss
  loss, *_ = masked_loss(axes, where, logits, labels)
  included = jnp.any(where, axes, keepdims=True)
  return _rounded(jnp.squeeze(jnp.where(included, loss, 0), axes), dtype)


def sigmoid_cross_entropy(mask: Mask, logits: Any, labels: Any) -> jax.Array:
  r"""Cross-entropy of a sigmoid and probabilities.

  With :math:`\log p = -\log(1 + \exp(-x))` and
  :math:`\log(1 - p) = -\log(1 + \exp x)` it is
  :math:`-y \log p - (1 - y) \log (1 - p)`, and its derivative
  :math:`((1 - y) p - y (1 - p)) \, dx - x \, dy`.
  """
  logits, labels = mask.as_array(logits), mask.as_array(labels)
  dtype = logits.dtype  # To which Optax converts the labels.
  logits, labels = jnp.broadcast_arrays(logits, labels)
  if not jnp.issubdtype(labels.dtype, jnp.floating):
    labels = labels.astype(wide(logits.dtype))
  losses = mask.out(_binary_loss(mask.where, logits, labels))
  return _rounded(losses, dtype)


def _rounded(loss, dtype):
  """Converts a loss to Optax's dtype; one that has it may stay weak."""
  return loss if loss.dtype == dtype else loss.astype(dtype)


def _class_value(axes, where, logits, labels, included):
  top, total = _normalizer(logits, where, axes)
  if varies_along(where, axes):
    # A label that names no class makes the loss NaN, but not if none is left.
    named = labels < math.prod(logits.shape[a] for a in axes)
    included = included & (named | (total != 0))
  total = jnp.where(included, total, 1)
  labels = jnp.where(included, labels, 0)
  label_logits = take_class(logits, labels, axes).astype(top.dtype)
  loss = jnp.log(total) - (label_logits - top)
  return jnp.where(included, loss, 0), top, total


def _class_by_logits(axes, where, tangent, arrays, statistics):
  logits, labels, _ = arrays
  p = _softmax(logits, *statistics, where, axes)
  is_label = (flat_index(logits.shape, axes) == labels) & where
  dx = _replace_masked_classes(tangent, where, axes, 0, p.dtype)
  return jnp.sum((p - is_label.astype(p.dtype)) * dx, axes, keepdims=True)


def _probabilities_value(axes, where, logits, labels, *, safe=False):
  top, total = _normalizer(logits, where, axes)
  total = jnp.where(jnp.any(where, axes, keepdims=True), total, 1)
  total += 0 * jnp.log(total)  # NaN if a logit is infinite.
  # Without barriers XLA would write the terms that two sums share.
  barrier = jax.lax.optimization_barrier
  shifted = _shifted(logits, barrier(top), where, axes)
  labels = _replace_masked_classes(labels, where, axes, 0, top.dtype)
  if safe:
    shifted = jnp.where(labels == 0, 0, shifted)
  terms = labels * (barrier(jnp.log(total)) - shifted)
  # Selected last, for XLA to write these and not both factors.
  terms = _replace_masked_classes(terms, where, axes, 0, top.dtype)
  return jnp.sum(terms, axes, keepdims=True), top, total


def _probabilities_by_logits(axes, where, tangent, arrays, statistics):
  @jax.checkpoint  # With its barriers XLA computes more, and writes less.
  def derivative(dx, logits, labels, weight, top, total):
    p = _softmax(logits, top, total, where, axes)
    labels = jnp.where(where, labels, 0).astype(p.dtype)
    dx = _replace_masked_classes(dx, where, axes, 0, p.dtype)
    mean = weight * jnp.sum(p * dx, axes, keepdims=True)
    return mean - jnp.sum(labels * dx, axes, keepdims=True)

  logits, labels = arrays
  included = jnp.any(where, axes, keepdims=True)
  dtype = statistics[0].dtype
  weight = _replace_masked_classes(labels, where, axes, 0, dtype)
  weight = jnp.where(included, jnp.sum(weight, axes, keepdims=True), 0)
  return derivative(tangent, logits, labels, weight, *statistics)


def _probabilities_by_labels(axes, where, tangent, arrays, statistics):
  @jax.checkpoint
  def derivative(dy, logits, top, total):
    log_p = _log_softmax(logits, top, total, where, axes)
    dy = _replace_masked_classes(dy, where, axes, 0, log_p.dtype)
    return -jnp.sum(log_p * dy, axes, keepdims=True)

  logits, _ = arrays
  return derivative(tangent, logits, *statistics)


# Compilers for GPUs fuse these as well as they fuse Optax's losses.
def _probabilities_formula(axes, where, logits, labels):
  x, y = below_maximum(logits, where, axes), jnp.where(where, labels, 0)
  loss = original.softmax_cross_entropy(x, y, axes)
  return jnp.expand_dims(loss, axes)


# Optax's formula takes one more kernel on a GPU in half precision.
def _safe_formula(axes, where, logits, labels):
  x, y = below_maximum(logits, where, axes), jnp.where(where, labels, 0)
  terms = _safe_product(y, jax.nn.log_softmax(x, axes))
  return -jnp.sum(terms, axes, keepdims=True)


@jax.custom_jvp
def _safe_product(y, log_p):
  """A product that is 0 at a label of 0; the derivatives are a product's.

  In forward mode these are NaN at a logit of minus infinity, as in Optax.
  """
  return jnp.where(y == 0, 0, y * log_p)


_safe_product.defjvps(
  lambda dy, product, y, log_p: dy * log_p,
  lambda dlog_p, product, y, log_p: y * dlog_p,
)


def _class_formula(axes, where, logits, labels, included):
  x = below_maximum(logits, where, axes)
  # As in `log_softmax`: compilers fuse the maximum with the sum.
  x -= jax.lax.stop_gradient(jnp.max(x, axes, keepdims=True))
  normalizer = jnp.log(jnp.sum(jnp.exp(x), axes, keepdims=True))
  is_label = (flat_index(x.shape, axes) == labels) & where
  own = jnp.sum(jnp.where(is_label, x, 0), axes, keepdims=True)
  return jnp.where(included, normalizer - own, 0)


_class_loss = with_partials(
  _class_value, _class_by_logits, formula=_class_formula
)
_probabilities_loss, _safe_loss = (
  with_partials(
    value, _probabilities_by_logits, _probabilities_by_labels, formula=formula
  )
  for value, formula in (
    (_probabilities_value, _probabilities_formula),
    (functools.partial(_probabilities_value, safe=True), _safe_formula),
  )
)


def _normalizer(logits, where, axes):
  r"""The maximum, and the sum of exponentials below it.

  Of the included classes, :math:`m = \max_j x_j` and
  :math:`s = \sum_j \exp(x_j - m)`: of the softmax,
  :math:`\log p_j = x_j - m - \log s`. Where the maximum is infinite, or there
  is none, 0 takes its place.
  """
  scaled, scale, least = _scaled(logits, where, axes)
  top = jnp.max(scaled, axes, keepdims=True).astype(wide(logits.dtype))
  top = jnp.where((least < top) & (top < jnp.inf), top, 0) * scale
  terms = _exponentials(logits, top, where, axes)
  return top, jnp.sum(terms, axes, keepdims=True)


def _exponentials(logits, top, where, axes):
  """Exponentials below the maximum, 0 for masked classes."""
  scaled, scale, _ = _scaled(logits, where, axes)
  return jnp.exp(scaled.astype(top.dtype) - top / scale) ** scale


def _scaled(logits, where, axes):
  """Scaled logits in which masked classes are below all others.

  Returns them with their scale, and with a number that finite ones are above.
  Quarters of the logits leave room for a fill below the least of them, from
  which no difference overflows.
  """
  if not varies_along(where, axes):
    return logits, 1, -jnp.inf
  dtype = wide(logits.dtype)
  quarters = _replace_masked_classes(logits, where, axes, 0, dtype) / 4
  least = 0.75 * float(jnp.finfo(dtype).min)
  return jnp.where(where, quarters, least), 4, least


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _softmax(logits, top, total, where, axes):
  """The softmax, and 0 for masked elements.

  They are selected, since a cotangent of 0 times NaN is NaN.
  """
  p = _exponentials(logits, top, where, axes) * (1 / total)
  return p if varies_along(where, axes) else jnp.where(where, p, 0)


@_softmax.defjvp
def _(axes, primals, tangents):
  p = _softmax(*primals, axes)
  return p, p * _log_softmax_derivative(p, tangents[0], primals[-1], axes)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _log_softmax(logits, top, total, where, axes):
  r"""The logarithms of the softmax, and 0 for masked elements.

  The custom derivative, :math:`dx_j - \sum_k p_k \, dx_k`, reads no masked
  element.
  """
  shifted = _shifted(logits, top, where, axes)
  return jnp.where(where, shifted - jnp.log(total), 0)


@_log_softmax.defjvp
def _(axes, primals, tangents):
  p = _softmax(*primals, axes)
  derivative = _log_softmax_derivative(p, tangents[0], primals[-1], axes)
  return _log_softmax(*primals, axes), derivative


def _log_softmax_derivative(p, dx, where, axes):
  dx = jnp.where(where, dx, 0).astype(p.dtype)
  return jnp.where(where, dx - jnp.sum(p * dx, axes, keepdims=True), 0)


def _shifted(logits, top, where, axes):
  """The logits less the largest, and 0 for masked classes."""
  return _replace_masked_classes(logits, where, axes, top, top.dtype) - top


def _replace_masked_classes(x, where, axes, fill, dtype):
  """Replaces masked classes, and leaves examples that are masked as a whole.

  On CPUs XLA fuses an exponential with a sum, but not a select: it would write
  all of the logits. Such an example is therefore computed like any other, and
  its loss dropped. Tools that inspect each operation, such as checkify's NaN
  checks, see its garbage.
  """
  if not varies_along(where, axes):
    return x.astype(dtype)
  if x.dtype != dtype:  # A conversion would be an operation on garbage.
    x = jnp.where(where, x, 0).astype(dtype)
  return jnp.where(where, x, fill)


@jax.custom_jvp
def _sigmoids(logits):
  r"""The sigmoids of logits and of their negatives.

  Both are quotients of the exponential that the loss has computed, and none is
  1 less the other: each keeps its digits where it is small. The derivative is
  their product, :math:`p (1 - p)`, which keeps them for the same reason.
  """
  exponential = jnp.exp(-jnp.abs(logits))
  larger = 1 / (1 + exponential)
  smaller = exponential * larger
  return (
    jnp.where(logits < 0, smaller, larger),
    jnp.where(logits < 0, larger, smaller),
  )


@_sigmoids.defjvp
def _(primals, tangents):
  p, not_p = _sigmoids(*primals)
  derivative = p * not_p * tangents[0]
  return (p, not_p), (derivative, -derivative)


def _binary_cross_entropy(logits, labels):
  x, y = _widened(logits, labels)
  softplus = jnp.log1p(jnp.exp(-jnp.abs(x)))
  minus_log_p = jnp.maximum(-x, 0) + softplus
  minus_log_not_p = jnp.maximum(x, 0) + softplus
  return y * minus_log_p + (1 - y) * minus_log_not_p


def _slope_by_logits(logits, labels):
  x, y = _widened(logits, labels)
  p, not_p = _sigmoids(x)
  # p - y would cancel: at a label of 1 it is -not_p, which may be 1e-9.
  return (1 - y) * p - y * not_p


def _slope_by_labels(logits, labels):
  return -_widened(logits, labels)[0]


def _widened(logits, labels):
  dtypes = wide(logits.dtype), wide(labels.dtype)
  dtype = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
  return logits.astype(dtype), labels.astype(dtype)


_binary_loss = elementwise(
  _binary_cross_entropy, _slope_by_logits, _slope_by_labels, fills=(0, 0)
)
