"""Ways to mask a loss: Optax's, those that people write, and this package's.

A variant takes a case, and returns a function of the case's arguments and,
last, a mask or None. The function raises for a mask that it does not support.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import optax_masking
from benchmarks.cases import INTEGER_LABELS, Case

Masked = Callable[..., jax.Array]


def optax_alone(case: Case) -> Masked:
  """The floor: no mask at all."""
  loss = case.of(optax)
  return lambda *arguments: loss(*arguments[:-1])


def optax_where(case: Case) -> Masked:
  """Optax with its own mask, where it has one."""
  if not case.takes_where:
    raise TypeError(f"Optax's {case.name} has no `where`")
  loss = case.of(optax)
  return lambda *arguments: loss(*arguments[:-1], where=arguments[-1])


def loss_times_mask(case: Case) -> Masked:
  """The loss, times the mask."""
  loss = case.of(optax)

  def masked(*arguments):
    losses = loss(*arguments[:-1])
    return losses * _mask_of_losses(arguments[-1], losses, case)

  return masked


def sanitise(case: Case) -> Masked:
  """Selects zeros for masked elements, before and after the loss.

  For a mask of classes this is another loss than that of the included classes:
  a logit of zero still counts in the normalizer.
  """
  loss = case.of(optax)

  def masked(*arguments):
    *arrays, where = arguments
    cleaned = [
      jnp.where(where, x, 0)
      if x.ndim == where.ndim and jnp.issubdtype(x.dtype, jnp.floating)
      else x
      for x in arrays
    ]
    losses = loss(*cleaned)
    if losses.ndim < where.ndim:
      where = jnp.any(where, case.axis, keepdims=True)
    return jnp.where(_mask_of_losses(where, losses, case), losses, 0)

  return masked


def one_hot(case: Case) -> Masked:
  """One-hot labels, multiplied by the mask."""

  def masked(logits, labels, where):
    targets = _one_hot(logits, labels, case.axis, logits.dtype) * where
    return optax.losses.softmax_cross_entropy(logits, targets, axis=case.axis)

  return masked


def t5x(case: Case) -> Masked:
  """T5X keeps the exponentials and the log probabilities, without a z loss.

  https://github.com/google-research/t5x/blob/08058ed/t5x/losses.py
  """
  return _saved_softmax(case, keeps_log_probs=True)


def maxtext(case: Case) -> Masked:
  """MaxText does as T5X, but has no derivative for the labels.

  https://github.com/AI-Hypercomputer/maxtext/blob/404e5cf/src/maxtext/utils/max_utils.py
  """
  return _saved_softmax(case, keeps_log_probs=False)


def easylm(case: Case) -> Masked:
  """EasyLM picks the log probability of the label, in float32.

  https://github.com/young-geng/EasyLM/blob/fe5b2c3/EasyLM/jax_utils.py
  """

  def masked(logits, labels, where):
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), case.axis)
    index = jnp.expand_dims(labels, case.axis)
    picked = jnp.take_along_axis(log_probs, index, case.axis)
    picked = jnp.squeeze(picked, case.axis)
    return -jnp.where(_mask_of_losses(where, picked, case), picked, 0)

  return masked


def haliax(case: Case) -> Masked:
  """Haliax contracts one-hot labels with the negative log probabilities.

  https://github.com/stanford-crfm/haliax/blob/2811dfa/src/haliax/nn/loss.py
  """

  def masked(logits, labels, where):
    targets = _one_hot(logits, labels, case.axis, logits.dtype)
    normalizers = jax.nn.logsumexp(logits, case.axis, keepdims=True)
    axes = list(range(logits.ndim))
    rest = axes.copy()
    rest.pop(case.axis)
    losses = jnp.einsum(targets, axes, normalizers - logits, axes, rest)
    return jnp.where(_mask_of_losses(where, losses, case), losses, 0)

  return masked


def this_package(case: Case) -> Masked:
  """This package."""
  loss = case.of(optax_masking)
  return lambda *arguments: loss(*arguments[:-1], where=arguments[-1])


FLOOR = "optax"
OURS = "optax_masking"
VARIANTS: dict[str, Callable[[Case], Masked]] = {
  FLOOR: optax_alone,
  "optax, where=": optax_where,
  "loss * mask": loss_times_mask,
  "sanitise": sanitise,
  "one-hot": one_hot,
  "t5x": t5x,
  "MaxText": maxtext,
  "EasyLM": easylm,
  "haliax": haliax,
  OURS: this_package,
}
_INTEGER_LABEL_VARIANTS = ("one-hot", "t5x", "MaxText", "EasyLM", "haliax")


def is_measured(mask: str, variant: str, loss: str) -> bool:
  """Whether a kind of mask is measured for a variant of a loss."""
  if variant == FLOOR:  # Each table has one row of it anyway.
    return False
  if mask == "none":
    return variant == OURS
  return loss == INTEGER_LABELS or variant not in _INTEGER_LABEL_VARIANTS


def _saved_softmax(case, keeps_log_probs):
  axis = case.axis

  @jax.custom_vjp
  def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits, axis), axis)

  def forward(logits, targets):
    shifted = logits - jnp.max(logits, axis, keepdims=True)
    exp = jnp.exp(shifted)
    total = jnp.sum(exp, axis, keepdims=True)
    log_probs = shifted - jnp.log(total)
    saved = logits, targets, exp, total, log_probs if keeps_log_probs else None
    return -jnp.sum(targets * log_probs, axis), saved

  def backward(saved, cotangent):
    logits, targets, exp, total, log_probs = saved
    cotangent = jnp.expand_dims(cotangent, axis)
    logits_gradient = cotangent * (exp / total - targets)
    targets_gradient = None if log_probs is None else -cotangent * log_probs
    return logits_gradient.astype(logits.dtype), targets_gradient

  cross_entropy.defvjp(forward, backward)

  def masked(logits, labels, where):
    targets = _one_hot(logits, labels, axis, jnp.float32)
    losses = cross_entropy(logits, targets)
    return losses * _mask_of_losses(where, losses, case)

  return masked


def _one_hot(logits, labels, axis, dtype):
  return jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=dtype)


def _mask_of_losses(where, losses, case):
  """A mask in the shape of the losses: without the class axis, of size 1."""
  if losses.ndim < where.ndim:
    if where.shape[case.axis] != 1:
      raise ValueError("a loss of examples can't be masked by classes")
    where = jnp.squeeze(where, case.axis)
  if where.ndim != losses.ndim:
    raise ValueError("there is no loss for each entry of the mask")
  return where
