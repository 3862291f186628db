"""Segmentation losses."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import select, varies_along
from optax_masking._compiled import compiled
from optax_masking._derivatives import with_partials
from optax_masking._mask import Axis, Mask, Where, canonicalize_axes
from optax_masking.fills import below_maximum
from optax_masking.losses._original import original


def dice_loss(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  class_weights: jax.typing.ArrayLike | None = None,
  smooth: jax.typing.ArrayLike = 1.0,
  alpha: jax.typing.ArrayLike = 0.5,
  beta: jax.typing.ArrayLike = 0.5,
  apply_softmax: bool = True,
  reduction: str = "mean",
  ignore_background: bool = False,
  axis: Axis = None,
  where: Where = None,
) -> jax.Array:
  r"""Computes how little predicted and true segments overlap.

  For a class with predicted probabilities :math:`p_i` and targets :math:`t_i`
  of the included pixels :math:`i`, with :math:`I = \sum_i p_i t_i` the
  intersection and :math:`s` the smoothing,

  .. math::
    1 - \frac{I + s}{I + \alpha \bigl(\sum_i p_i - I\bigr)
    + \beta \bigl(\sum_i t_i - I\bigr) + s} \,.

  With :math:`\alpha = \beta = 1/2` it is 1 less the Dice coefficient, with
  others 1 less the Tversky index.

  Args:
    predictions: Logits, with shape ``[batch, ..., num_classes]`` and a floating
      dtype. If there is one class, or no class axis where the targets have one,
      the probability is the sigmoid of a logit, and else the softmax.
    targets: Probability of each class, for example one-hot, with the same
      shape.
    class_weights: Weights of the classes, with shape ``[num_classes]``, or
      None.
    smooth: Keeps the quotient of small segments from being noise.
    alpha: Weight of what is predicted and not true.
    beta: Weight of what is true and not predicted.
    apply_softmax: False if the predictions are probabilities. These must add up
      to 1 for each pixel. Optax's check of that can't be compiled; with a mask,
      such as ``where=True``, values that ``jit`` traces are not checked, nor
      pixels of which a class is masked, nor a single class.
    reduction: ``"mean"`` or ``"sum"`` over the classes, or ``"none"``. The mean
      is over the classes of which something is included.
    ignore_background: Whether to leave out the first class, if there are more.
    axis: Axis or axes of the pixels, of the predictions with their class axis;
      None for all but the first and the last.
    where: Elements to include, boolean: a mask of the shape of the pixels, so
      of the predictions' without the class axis, one of the predictions' shape,
      or what broadcasts to them with their rank, or a scalar. A masked pixel is
      in no sum. A masked class of a pixel is in none either, and not in the
      pixel's softmax.

  Returns:
    The losses, with shape ``[batch]``, and ``[batch, num_classes]`` without a
    reduction, in the dtype of the arguments; 0 where nothing is included.

  Raises:
    TypeError: If ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, the shapes
      of the arguments differ, ``reduction`` is unknown, or the predictions are
      not probabilities and are said to be.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> predictions = jnp.array([[[1.0, 0.0], [0.0, 1.0], [jnp.nan, jnp.nan]]])
    >>> targets = jnp.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    >>> where = jnp.array([[True, True, False]])
    >>> print(optax.losses.dice_loss(  # 1 - 2 / (2 + 1/2), 1 - 1 / (1 + 1/2)
    ...     predictions, targets, apply_softmax=False, reduction="none",
    ...     where=where))
    [[0.2    0.3333]]

  References:
    Milletari et al., `V-Net: Fully Convolutional Neural Networks for Volumetric
    Medical Image Segmentation <https://arxiv.org/abs/1606.04797>`_, 2016, and
    Salehi et al., `Tversky Loss Function for Image Segmentation Using 3D Fully
    Convolutional Deep Networks <https://arxiv.org/abs/1706.05721>`_, 2017.
  """
  if where is not None and not apply_softmax:
    _check_probabilities(predictions, targets, where)
  return _dice_loss(
    predictions,
    targets,
    class_weights=class_weights,
    smooth=smooth,
    alpha=alpha,
    beta=beta,
    apply_softmax=apply_softmax,
    reduction=reduction,
    ignore_background=ignore_background,
    axis=axis,
    where=where,
  )


def _softmax_value(axes, where, logits):
  # The probabilities of a pixel that is masked as a whole become 0 below, so
  # that its logits need no fill.
  if varies_along(where, axes):
    logits = below_maximum(logits, where, axes)
  return (select(where, jax.nn.softmax(logits, axes), 0),)


def _softmax_by_logits(axes, where, tangent, arrays, statistics):
  del statistics
  # Not `_softmax_value`: its derivative would read masked pixels.
  (p,) = _softmax(axes, where, *arrays)
  dx = select(where, tangent, 0)
  return p * (dx - jnp.sum(p * dx, axes, keepdims=True))


_softmax = with_partials(_softmax_value, _softmax_by_logits)


class _Sums(NamedTuple):
  """Sums over the pixels of each class, and whether there is a pixel."""

  intersection: jax.Array
  predictions: jax.Array
  targets: jax.Array
  included: jax.Array


def _sums_over_pixels(
  predictions, targets, where, axis, apply_softmax, *, channel=False
):
  """Sums probabilities and targets, which are 0 where masked.

  With `channel`, both get an axis for their only class.
  """
  shape = _shape_of_pixels(predictions, targets, channel)
  mask = Mask(where, -1, jax.ShapeDtypeStruct(shape, bool))
  if axis is None:
    axis = tuple(range(1, len(shape) - 1))

  def masked(x):
    if np.ndim(x) == len(shape):
      return mask(x, 0)
    pixels = Mask(jnp.squeeze(mask.where, -1), (), x)
    return jnp.expand_dims(pixels(x, 0), -1)

  def probabilities(x):
    if not apply_softmax:
      return masked(x)
    if shape[-1] == 1:
      return mask(jax.nn.sigmoid(masked(x)), 0)
    x = mask.as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      x = x.astype(float)
    return _softmax(mask.axes, mask.where, x)[0]

  # The backward pass computes the probabilities again, and does not keep them.
  @jax.checkpoint
  def sums(x, t):
    p, t = probabilities(x), masked(t)
    return jnp.sum(p * t, axis), jnp.sum(p, axis), jnp.sum(t, axis)

  included = jnp.any(jnp.broadcast_to(mask.where, shape), axis)
  intersection, p, t = sums(predictions, targets)
  return _Sums(intersection, p, t, included)


def _shape_of_pixels(predictions, targets, channel=False):
  shape = max(np.shape(predictions), np.shape(targets), key=len)
  return (*shape, 1) if channel else shape


def _losses_of_classes(
  sums,
  smooth,
  *,
  alpha=0.5,
  beta=0.5,
  class_weights=None,
  ignore_background=False,
):
  """The loss of each class, 0 without a pixel, and whether there is one."""
  intersection, included = sums.intersection, sums.included
  # A class without a pixel: all sums are 0, so smooth = 1 makes it 1 - 1/1 = 0.
  smooth = select(included, smooth, 1)
  alpha = select(included, alpha, 1)
  beta = select(included, beta, 1)
  false_positives = sums.predictions - intersection
  false_negatives = sums.targets - intersection
  losses = 1 - (intersection + smooth) / (
    intersection + alpha * false_positives + beta * false_negatives + smooth
  )
  if class_weights is not None:
    losses = losses * select(included, class_weights, 1)
  if ignore_background and losses.shape[-1] > 1:
    losses, included = losses[..., 1:], included[..., 1:]
  return losses, included


def _check_probabilities(predictions, targets, where):
  """Checks the pixels without a masked class, unless JAX traces the values."""
  sums = jax.lax.stop_gradient(_sums(predictions, targets, where=where))
  with contextlib.suppress(jax.errors.ConcretizationTypeError):
    if not jnp.allclose(sums, 1.0, rtol=1e-5):
      raise ValueError(
        "With apply_softmax=False the predictions must be probabilities that"
        " add up to 1 along the last axis, but the sums are between"
        f" {jnp.min(sums):.6f} and {jnp.max(sums):.6f}."
      )


@compiled()
def _sums(predictions, targets, axis=-1, *, where):
  """The sum of the probabilities of each pixel, or 1 if a class is masked."""
  shape = _shape_of_pixels(predictions, targets)
  mask = Mask(where, axis, jax.ShapeDtypeStruct(shape, bool))
  if where is None or np.ndim(predictions) < len(shape) or shape[-1] == 1:
    return jnp.ones(())
  complete = jnp.all(mask.where, -1)
  return select(complete, jnp.sum(mask(predictions, 0), -1), 1)


def _count(included, axis, dtype):
  """The divisor of a mean, 1 if nothing is included."""
  return jnp.maximum(jnp.sum(included, axis), 1).astype(dtype)


@compiled("apply_softmax", "reduction", "ignore_background")
def _dice_loss(
  predictions,
  targets,
  *,
  class_weights=None,
  smooth=1.0,
  alpha=0.5,
  beta=0.5,
  apply_softmax,
  reduction,
  ignore_background,
  axis,
  where,
):
  loss = functools.partial(
    original.dice_loss,
    class_weights=class_weights,
    smooth=smooth,
    alpha=alpha,
    beta=beta,
    reduction=reduction,
    ignore_background=ignore_background,
    axis=axis,
  )
  if where is None:
    return loss(predictions, targets, apply_softmax=apply_softmax)
  sums = _sums_over_pixels(predictions, targets, where, axis, apply_softmax)
  losses, included = _losses_of_classes(
    sums,
    smooth,
    alpha=alpha,
    beta=beta,
    class_weights=class_weights,
    ignore_background=ignore_background,
  )
  if reduction == "none":
    return losses
  if reduction not in ("mean", "sum"):
    return loss(predictions, targets)  # Optax refuses others.
  total = jnp.sum(losses, -1)
  if reduction == "sum":
    return total
  return total / _count(included, -1, total.dtype)


def _pixel_axes(axis, shape):
  """Checks the axes, and refuses the class axis."""
  axes = canonicalize_axes(axis, shape)
  if len(shape) - 1 in axes:
    raise ValueError(
      f"axis {axis} names the class axis, the last of the shape {shape}."
    )
  return axes


def multiclass_generalized_dice_loss(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  smooth: jax.typing.ArrayLike = 1.0,
  apply_softmax: bool = True,
  ignore_background: bool = False,
  axis: Axis = None,
  where: Where = None,
) -> jax.Array:
  r"""Computes :func:`dice_loss`, with rare classes weighted more.

  The weight of a class is proportional to :math:`1 / (f^2 + 10^{-7})`, with
  :math:`f` the sum of its targets over the included pixels of the batch, and
  the weights add up to the number of classes.

  Args:
    predictions: As in :func:`dice_loss`, with a class axis.
    targets: As in :func:`dice_loss`, with the shape of the predictions.
    smooth: As in :func:`dice_loss`.
    apply_softmax: As in :func:`dice_loss`.
    ignore_background: As in :func:`dice_loss`.
    axis: As in :func:`dice_loss`.
    where: As in :func:`dice_loss`. A class of which nothing is included has no
      weight, and does not count.

  Returns:
    The mean over the classes and the batch, of those of which something is
    included; a scalar, in the dtype of the arguments; 0 if nothing is.

  Raises:
    TypeError: As in :func:`dice_loss`.
    ValueError: As in :func:`dice_loss`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> predictions = jnp.array([[[1.0, 0.0], [0.0, 1.0], [jnp.nan, jnp.nan]]])
    >>> targets = jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    >>> print(optax.losses.multiclass_generalized_dice_loss(
    ...     predictions, targets, apply_softmax=False,
    ...     where=jnp.array([[True, True, False]])))
    0.0

  References:
    Sudre et al., `Generalised Dice Overlap as a Deep Learning Loss Function for
    Highly Unbalanced Segmentations <https://arxiv.org/abs/1707.03237>`_, 2017.
  """
  if where is None and axis is not None:
    where = True
  if where is not None and not apply_softmax:
    _check_probabilities(predictions, targets, where)
  return _generalized_dice_loss(
    predictions,
    targets,
    smooth,
    apply_softmax=apply_softmax,
    ignore_background=ignore_background,
    axis=axis,
    where=where,
  )


@compiled("apply_softmax", "ignore_background")
def _generalized_dice_loss(
  predictions,
  targets,
  smooth=1.0,
  *,
  apply_softmax,
  ignore_background,
  axis,
  where,
):
  loss = functools.partial(
    original.multiclass_generalized_dice_loss,
    smooth=smooth,
    ignore_background=ignore_background,
  )
  if where is None:
    return loss(predictions, targets, apply_softmax=apply_softmax)
  if axis is not None:
    axis = _pixel_axes(axis, jnp.shape(predictions))
  sums = _sums_over_pixels(predictions, targets, where, axis, apply_softmax)
  others = tuple(range(sums.targets.ndim - 1))
  # Without the barrier XLA would sum the targets a second time, and not the
  # sums of each example.
  targets, included = jax.lax.optimization_barrier(
    (sums.targets, sums.included)
  )
  present = jnp.any(included, others)
  frequencies = select(present, jnp.sum(targets, others), 1)
  weights = 1 / (frequencies**2 + 1e-7)
  weights = select(present, weights, 0)
  total = select(jnp.any(present), jnp.sum(weights), 1)
  losses, included = _losses_of_classes(
    sums,
    smooth,
    class_weights=weights / total * _count(present, None, weights.dtype),
    ignore_background=ignore_background,
  )
  return jnp.sum(losses) / _count(included, None, losses.dtype)


@compiled("apply_sigmoid")
def binary_dice_loss(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  smooth: jax.typing.ArrayLike = 1.0,
  apply_sigmoid: bool = True,
  axis: Axis = None,
  where: Where = None,
) -> jax.Array:
  """Computes :func:`dice_loss` of one class.

  Args:
    predictions: Logits, with shape ``[batch, ...]`` or ``[batch, ..., 1]`` and
      a floating dtype.
    targets: Labels in {0, 1}, with the same shape.
    smooth: As in :func:`dice_loss`.
    apply_sigmoid: False if the predictions are probabilities. Optax refuses
      any other than 1; with a mask, or an ``axis``, any is accepted.
    axis: Axis or axes of the pixels; None for all but the first.
    where: Elements to include, boolean: a mask of the shape of the predictions,
      with or without a last axis of size 1, or what broadcasts to it with its
      rank, or a scalar. A masked pixel is in no sum.

  Returns:
    The losses, with shape ``[batch]``, in the dtype of the arguments; 0 where
    nothing is included.

  Raises:
    TypeError: As in :func:`dice_loss`.
    ValueError: As in :func:`dice_loss`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> predictions = jnp.array([[jnp.inf, -jnp.inf, jnp.nan]])
    >>> targets = jnp.array([[1.0, 1.0, 0.0]])
    >>> print(optax.losses.binary_dice_loss(  # 1 - (1 + 1) / (1 + 1/2 + 1)
    ...     predictions, targets, where=~jnp.isnan(predictions)))
    [0.2]

  References:
    Milletari et al., `V-Net: Fully Convolutional Neural Networks for Volumetric
    Medical Image Segmentation <https://arxiv.org/abs/1606.04797>`_, 2016.
  """
  loss = functools.partial(original.binary_dice_loss, smooth=smooth)
  if where is None and axis is None:
    return loss(predictions, targets, apply_sigmoid=apply_sigmoid)
  channel = (
    jnp.ndim(predictions) == jnp.ndim(targets)
    and jnp.shape(predictions)[-1] != 1
  )
  if axis is not None:
    shape = jnp.shape(predictions)
    to_axes = canonicalize_axes if channel else _pixel_axes
    axis = to_axes(axis, shape)
  where = True if where is None else where
  sums = _sums_over_pixels(
    predictions, targets, where, axis, apply_sigmoid, channel=channel
  )
  losses, _ = _losses_of_classes(sums, smooth)
  return losses[..., 0]
