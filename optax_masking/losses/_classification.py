"""Classification losses."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from optax.projections import projection_simplex

from optax_masking._classes import (
  class_is_included,
  class_of_example,
  expanded,
  flat_index,
  select,
  take_class,
  wide,
)
from optax_masking._compiled import compiled
from optax_masking._cross_entropy import (
  sigmoid_cross_entropy,
  softmax_cross_entropy_of_class,
  softmax_cross_entropy_of_probabilities,
)
from optax_masking._decorator import masked_inputs
from optax_masking._derivatives import elementwise, with_partials
from optax_masking._mask import Axis, Mask, Where, axes_last, check_floating
from optax_masking.fills import below_maximum
from optax_masking.losses._original import original


@compiled()
def sigmoid_binary_cross_entropy(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the cross-entropy of independent binary predictions.

  With :math:`p` the sigmoid of a logit and :math:`y` its label,

  .. math::
    -y \log p - (1 - y) \log (1 - p) \,.

  Args:
    logits: Unnormalized log probabilities, of any shape and a floating dtype.
    labels: Labels in {0, 1} or probabilities in [0, 1]; broadcast with the
      logits.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The cross-entropies, with the broadcast shape less ``axis``, in Optax's
    dtype.

  Raises:
    TypeError: If the logits are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([0.0, 2.0, jnp.nan])
    >>> labels = jnp.array([1, 0, 0])
    >>> where = jnp.array([True, True, False])
    >>> print(optax.sigmoid_binary_cross_entropy(logits, labels, where=where))
    [0.6931 2.1269 0.    ]

  References:
    Goodfellow et al., `Deep Learning
    <https://www.deeplearningbook.org/contents/mlp.html>`_, 2016, section
    6.2.2.2.
  """
  mask = Mask(where, axis, logits, labels)
  if where is None:
    return mask.sum(original.sigmoid_binary_cross_entropy(logits, labels))
  losses = sigmoid_cross_entropy(mask, logits, labels)
  return mask.sum(losses, zeroed=True)


def _step(x):
  """The derivative of a maximum of x and 0, which is half of 1 at 0."""
  return jnp.where(x > 0, 1.0, jnp.where(x == 0, 0.5, 0.0))


# At 0 and 0 each derivative of the product x y is the other factor: 0.
_hinge_loss, _perceptron_loss = (
  elementwise(
    loss,
    # Negated last, since targets may be unsigned or boolean.
    lambda x, y, margin=margin: -(y * _step(margin - x * y)),
    None,
    fills=(0, 0),
    recompute=True,
  )
  for loss, margin in ((original.hinge_loss, 1), (original.perceptron_loss, 0))
)


def _loss_of_margin(loss, masked_loss, outputs, targets, *, axis, where):
  """Masks a loss of the product of outputs and targets."""
  mask = Mask(where, axis, outputs, targets)
  if where is None:
    return mask.sum(loss(outputs, targets))
  x, y = mask.as_array(outputs), mask.as_array(targets)
  return mask.sum(masked_loss(mask.where, x, y))


@compiled()
def hinge_loss(
  predictor_outputs: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the hinge loss of a binary classifier.

  For an output :math:`x` and a target :math:`y`, :math:`\max(0, 1 - x y)`.

  Args:
    predictor_outputs: Outputs of the decision function, of any shape.
    targets: Targets in {-1, 1}; broadcast with the outputs.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> outputs = jnp.array([0.5, 0.5, jnp.nan])
    >>> targets = jnp.array([1, -1, 0])
    >>> print(optax.hinge_loss(outputs, targets, where=targets != 0))
    [0.5 1.5 0. ]

  References:
    Cortes and Vapnik, `Support-Vector Networks
    <https://doi.org/10.1007/BF00994018>`_, 1995.
  """
  return _loss_of_margin(
    original.hinge_loss,
    _hinge_loss,
    predictor_outputs,
    targets,
    axis=axis,
    where=where,
  )


@compiled()
def perceptron_loss(
  predictor_outputs: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the perceptron loss of a binary classifier.

  For an output :math:`x` and a target :math:`y`, :math:`\max(0, -x y)`.

  Args:
    predictor_outputs: Outputs of the decision function, of any shape.
    targets: Targets in {-1, 1}; of the same shape.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the
      shapes of the arguments differ.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> outputs = jnp.array([0.5, 0.5, jnp.nan])
    >>> targets = jnp.array([1, -1, 0])
    >>> print(optax.losses.perceptron_loss(
    ...     outputs, targets, where=targets != 0))
    [0.  0.5 0. ]

  References:
    Rosenblatt, `The Perceptron: A Probabilistic Model for Information Storage
    and Organization in the Brain <https://doi.org/10.1037/h0042519>`_, 1958.
  """
  return _loss_of_margin(
    original.perceptron_loss,
    _perceptron_loss,
    predictor_outputs,
    targets,
    axis=axis,
    where=where,
  )


# Half way up the parabola, where both derivatives are finite.
@compiled()
@masked_inputs(logits=0.0, labels=0.0)
def sparsemax_loss(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the sparsemax loss of independent binary predictions.

  With :math:`m` the logit if the label is 0, and minus the logit if it is 1,
  the loss is 0 for :math:`m \le -1`, :math:`m` for :math:`m \ge 1`, and
  :math:`(m + 1)^2 / 4` in between.

  Args:
    logits: Scores, of any shape and a floating dtype.
    labels: Labels in {0, 1}; broadcast with the logits.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> logits = jnp.array([2.0, 0.5, jnp.nan])
    >>> labels = jnp.array([0, 1, -1])
    >>> print(optax.losses.sparsemax_loss(logits, labels, where=labels >= 0))
    [2.     0.0625 0.    ]

  References:
    Blondel et al., `Learning with Fenchel-Young Losses
    <https://arxiv.org/abs/1901.02324>`_, 2020, section 4.4.
  """
  return original.sparsemax_loss(logits, labels)


# At 0 and 0.5 every term and its derivatives are finite. At a label of 0 or 1
# a derivative with respect to it may be 0 times an infinity.
@compiled()
@masked_inputs(logits=0.0, labels=0.5, alpha=0.5, gamma=0.0)
def sigmoid_focal_loss(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  alpha: jax.typing.ArrayLike | None = None,
  gamma: jax.typing.ArrayLike = 2.0,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the focal loss, a cross-entropy that plays down easy elements.

  With :math:`p` the sigmoid of a logit, :math:`y` its label and :math:`p_t =
  y p + (1 - y) (1 - p)` the probability given to the label, an element's loss
  is

  .. math::
    \alpha_t (1 - p_t)^\gamma
    \bigl(-y \log p - (1 - y) \log (1 - p)\bigr), \qquad
    \alpha_t = y \alpha + (1 - y) (1 - \alpha) \,,

  and without :math:`\alpha_t` if ``alpha`` is None. For a label of 0 or 1 this
  is equation 5 of the reference.

  Args:
    logits: Unnormalized log probabilities, of any shape and a floating dtype.
    labels: Labels in {0, 1} or probabilities in [0, 1], broadcastable to the
      logits.
    alpha: Weight of the positive elements, in (0, 1), or None for no weights.
    gamma: Exponent, 0 for the plain cross-entropy. ``alpha`` and ``gamma`` may
      be arrays that broadcast with the logits.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If the logits are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[2.0, -1.0, jnp.nan], [0.5, 0.0, 3.0]])
    >>> labels = jnp.array([[1, 0, 0], [0, 1, 1]])
    >>> where = jnp.array([[True, True, False], [True, True, True]])
    >>> print(optax.sigmoid_focal_loss(logits, labels, where=where))
    [[1.8036e-03 2.2658e-02 0.0000e+00]
     [3.7741e-01 1.7329e-01 1.0928e-04]]
    >>> print(optax.sigmoid_focal_loss(logits, labels, axis=-1, where=where))
    [0.0245 0.5508]

  References:
    Lin et al., `Focal Loss for Dense Object Detection
    <https://arxiv.org/abs/1708.02002>`_, 2017.
  """
  return original.sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma)


@compiled()
def safe_softmax_cross_entropy(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  """Computes :func:`softmax_cross_entropy`, with 0 log 0 = 0.

  An included logit of minus infinity whose label is 0 adds 0 to the loss.

  Args:
    logits: Unnormalized log probabilities, with shape ``[..., num_classes]``
      and a floating dtype; minus infinity for a class that is impossible.
    labels: Probability of each class, for example one-hot; broadcasts with the
      logits.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the logits' shape removes classes, from the normalizer and from
      the sum; a mask of shape ``[...]`` removes examples. An example with no
      class left has loss 0.

  Returns:
    The cross-entropies, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If the logits are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[1.0, 2.0, -jnp.inf], [1.0, 2.0, jnp.nan]])
    >>> labels = jnp.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    >>> print(optax.safe_softmax_cross_entropy(
    ...     logits, labels, where=~jnp.isnan(logits)))
    [0.3133 0.8133]

  References:
    Goodfellow et al., `Deep Learning
    <https://www.deeplearningbook.org/contents/mlp.html>`_, 2016, section
    6.2.2.3.

  .. seealso::
    :func:`softmax_cross_entropy`
  """
  mask = Mask(where, axis, logits, labels)
  if where is None or 0 in mask.shape:
    x, y = axes_last(axis, logits, labels)
    return mask.out(original.safe_softmax_cross_entropy(x, y))
  return softmax_cross_entropy_of_probabilities(mask, logits, labels, safe=True)


@compiled()
def softmax_cross_entropy(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the cross-entropy of a softmax and target probabilities.

  For logits :math:`x`, labels :math:`y` and the included classes :math:`I`,

  .. math::
    -\sum_{j \in I} y_j \log \frac{\exp x_j}{\sum_{k \in I} \exp x_k} \,.

  Args:
    logits: Unnormalized log probabilities, with shape ``[..., num_classes]``
      and a floating dtype.
    labels: Probability of each class, for example one-hot; broadcasts with the
      logits. Labels of included classes are used as they are, not rescaled to
      sum to 1.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the logits' shape removes classes, from the normalizer and from
      the sum; a mask of shape ``[...]`` removes examples. An example with no
      class left has loss 0.

  Returns:
    The cross-entropies, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If the logits are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, jnp.nan]])
    >>> labels = jnp.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    >>> where = ~jnp.isnan(logits)
    >>> print(optax.softmax_cross_entropy(logits, labels, where=where))
    [1.4076 0.8133]
    >>> print(jax.grad(lambda x: optax.softmax_cross_entropy(
    ...     x, labels, where=where).sum())(logits))
    [[ 0.09   -0.7553  0.6652]
     [-0.2311  0.2311  0.    ]]

  References:
    Goodfellow et al., `Deep Learning
    <https://www.deeplearningbook.org/contents/mlp.html>`_, 2016, section
    6.2.2.3.

  .. seealso::
    :func:`softmax_cross_entropy_with_integer_labels`
  """
  mask = Mask(where, axis, logits, labels)
  if where is None or 0 in mask.shape:
    return mask.out(original.softmax_cross_entropy(logits, labels, axis=axis))
  return softmax_cross_entropy_of_probabilities(mask, logits, labels)


@compiled()
def softmax_cross_entropy_with_integer_labels(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  axis: int | tuple[int, ...] = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the cross-entropy of a softmax and integer class labels.

  For logits :math:`x`, a label :math:`y` and the included classes :math:`I`,

  .. math::
    -\log \frac{\exp x_y}{\sum_{k \in I} \exp x_k} \,.

  Args:
    logits: Unnormalized log probabilities, with shape ``[..., num_classes]``
      and a floating dtype.
    labels: Index of the class of each example, with shape ``[...]`` and an
      integer dtype. The label of a masked example may be any integer.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`, but
      not None. With several, a label is a flat index into them, in their order.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the logits' shape removes classes from the normalizer; a mask of
      shape ``[...]`` removes examples. An example whose own class is masked has
      no target left: its loss is 0, as it is with one-hot labels.

  Returns:
    The cross-entropies, with shape ``[...]``, in the dtype of the logits.

  Raises:
    TypeError: If the logits are not floating, the labels not integer, or
      ``where`` not boolean.
    ValueError: If ``axis`` is None or does not fit, or the shape of ``labels``
      or ``where`` does not.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[1.0, 2.0, 3.0], [jnp.nan, jnp.nan, jnp.nan]])
    >>> labels = jnp.array([1, -100])  # The second example is padding.
    >>> print(optax.softmax_cross_entropy_with_integer_labels(
    ...     logits, labels, where=labels >= 0))
    [1.4076 0.    ]

  References:
    Goodfellow et al., `Deep Learning
    <https://www.deeplearningbook.org/contents/mlp.html>`_, 2016, section
    6.2.2.3.

  .. seealso::
    :func:`softmax_cross_entropy`
  """
  mask = Mask(where, axis, logits, examples=labels)
  # Optax refuses axis=None.
  if where is None or 0 in mask.shape or axis is None:
    return mask.out(
      original.softmax_cross_entropy_with_integer_labels(
        logits, labels, axis=axis
      )
    )
  return softmax_cross_entropy_of_class(mask, logits, labels)


def _halves(scores, classes, where, margin, axes):
  """Half of each score plus its margin, and whether each class is the label.

  The label has no margin. Halves leave room for a fill below all that are
  finite. Half of a small float16 may lose a digit, so float16 is widened.
  """
  x = select(where, scores, 0)
  # Sharded as the scores are.
  is_label = jnp.zeros_like(x, int) + flat_index(x.shape, axes) == classes
  if margin or x.dtype == jnp.float16:
    x = x.astype(wide(x.dtype))
  if margin:
    x = jnp.where(is_label, x, x + margin)
  return jnp.where(where, x / 2, float(jnp.finfo(x.dtype).min)), is_label


def _maximum_value(axes, where, scores, classes, included, *, margin):
  where = where & included
  halves, _ = _halves(scores, classes, where, margin, axes)
  top = jnp.max(halves, axes, keepdims=True)
  some = jnp.any(where, axes, keepdims=True)
  # Where the fill is the largest, all that is included is minus infinity.
  none_finite = top <= jnp.finfo(top.dtype).min
  top = jnp.where(none_finite & some, -jnp.inf, top)
  largest = 2 * jnp.where(some, top, 0)
  named = classes < math.prod(scores.shape[a] for a in axes)
  own = take_class(scores, jnp.where(named, classes, 0), axes)
  own = jnp.where(some & named, own, 0)
  dtype = wide(scores.dtype)
  return jnp.where(some, largest.astype(dtype) - own.astype(dtype), 0), top


def _maximum_by_scores(axes, where, tangent, arrays, statistics, *, margin):
  scores, classes, included = arrays
  (top,) = statistics
  where = where & included
  halves, is_label = _halves(scores, classes, where, margin, axes)
  dtype = wide(top.dtype)
  # Scores that tie for the maximum share its derivative. With nothing included
  # all tie; if the maximum is NaN, then none does. XLA makes a select of the
  # quotient, which would hide 0 / 0, so NaN is added.
  is_top = (halves == top).astype(dtype)
  count = jnp.sum(is_top, axes, keepdims=True)
  slope = is_top / count - is_label.astype(dtype)
  slope += jnp.where(jnp.isnan(top), top, 0).astype(dtype)
  return jnp.sum(slope * select(where, tangent, 0), axes, keepdims=True)


_hinge_of_classes, _perceptron_of_classes = (
  with_partials(
    functools.partial(_maximum_value, margin=margin),
    functools.partial(_maximum_by_scores, margin=margin),
  )
  for margin in (1, 0)
)


def _maximum_above_label(loss, masked_loss, scores, labels, *, axis, where):
  """Masks the maximum of scores less that of the label."""
  if where is None:
    (x,) = axes_last(axis, scores)
    return loss(x, labels)
  labels = jnp.asarray(labels)
  if labels.dtype == bool:
    return loss(scores, labels)  # Optax refuses these.
  mask = Mask(where, axis, scores, examples=labels)
  scores = mask.as_array(scores)
  check_floating("scores", scores)
  axes, shape = mask.axes, mask.shape
  scores = jnp.broadcast_to(scores, shape)
  classes = class_of_example(labels, shape, axes)
  if jnp.issubdtype(labels.dtype, jnp.integer):
    labels = labels.astype(classes.dtype)
  # Optax makes one-hot vectors of labels, which name no class if they are
  # negative or have a fraction.
  named = expanded(labels, len(shape), axes) == classes.astype(labels.dtype)
  classes = jnp.where(named, classes, math.prod(shape[a] for a in axes))
  included = class_is_included(classes, mask.where, shape, axes)
  result, _ = masked_loss(axes, mask.where, scores, classes, included)
  # Optax's labels are one-hot, in the default dtype.
  dtype = jnp.promote_types(scores.dtype, jnp.zeros(()).dtype)
  return jnp.squeeze(result, axes).astype(dtype)


@compiled()
def multiclass_hinge_loss(
  scores: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the hinge loss of a classifier with several classes.

  For scores :math:`s`, a label :math:`y` and the included classes :math:`I`,

  .. math::
    \max_{j \in I} \bigl(s_j + [j \ne y]\bigr) - s_y \,.

  Args:
    scores: Scores of the classes, with shape ``[..., num_classes]`` and a
      floating dtype.
    labels: Index of the class of each example, with shape ``[...]`` and an
      integer dtype. The label of a masked example may be any integer.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`. With
      several, a label is a flat index into them, in their order.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the scores' shape removes classes; a mask of shape ``[...]``
      removes examples. An example whose own class is masked has loss 0.

  Returns:
    The losses, with shape ``[...]``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean, or given with scores that are not
      floating; or as Optax, if the shape of ``labels`` does not fit.
    ValueError: If ``axis`` or the shape of ``labels`` or ``where`` does not
      fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> scores = jnp.array([[1.0, 1.5, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    >>> labels = jnp.array([0, -100])
    >>> print(optax.losses.multiclass_hinge_loss(
    ...     scores, labels, where=~jnp.isnan(scores)))
    [1.5 0. ]

  References:
    Crammer and Singer, `On the Algorithmic Implementation of Multiclass
    Kernel-based Vector Machines
    <https://www.jmlr.org/papers/v2/crammer01a.html>`_, 2001.
  """
  return _maximum_above_label(
    original.multiclass_hinge_loss,
    _hinge_of_classes,
    scores,
    labels,
    axis=axis,
    where=where,
  )


@compiled()
def multiclass_perceptron_loss(
  scores: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the perceptron loss of a classifier with several classes.

  For scores :math:`s`, a label :math:`y` and the included classes :math:`I`,
  :math:`\max_{j \in I} s_j - s_y`.

  Args:
    scores: Scores of the classes, with shape ``[..., num_classes]`` and a
      floating dtype.
    labels: Index of the class of each example, with shape ``[...]`` and an
      integer dtype. The label of a masked example may be any integer.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`. With
      several, a label is a flat index into them, in their order.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the scores' shape removes classes; a mask of shape ``[...]``
      removes examples. An example whose own class is masked has loss 0.

  Returns:
    The losses, with shape ``[...]``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean, or given with scores that are not
      floating; or as Optax, if the shape of ``labels`` does not fit.
    ValueError: If ``axis`` or the shape of ``labels`` or ``where`` does not
      fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> scores = jnp.array([[1.0, 1.5, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    >>> labels = jnp.array([0, -100])
    >>> print(optax.losses.multiclass_perceptron_loss(
    ...     scores, labels, where=~jnp.isnan(scores)))
    [0.5 0. ]

  References:
    Collins, `Discriminative Training Methods for Hidden Markov Models
    <https://aclanthology.org/W02-1001>`_, 2002.
  """
  return _maximum_above_label(
    original.multiclass_perceptron_loss,
    _perceptron_of_classes,
    scores,
    labels,
    axis=axis,
    where=where,
  )


def _poly_value(axes, where, logits, labels, epsilon):
  mask = Mask(where, axes, logits, labels)  # Either may broadcast.
  # A masked class is not in the normalizer, and a label of 0 removes both of
  # its terms.
  x, y = mask(logits, below_maximum), mask(labels, 0)
  p = jnp.exp(jax.nn.log_softmax(x, axes))
  cross_entropy = original.softmax_cross_entropy(x, y, axes)
  return (cross_entropy + epsilon * jnp.sum(y * (1 - p), axes),)


_poly_loss = with_partials(_poly_value, None, None, None, recompute=True)


@compiled()
def poly_loss_cross_entropy(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  epsilon: jax.typing.ArrayLike = 2.0,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the cross-entropy of a softmax, and a multiple of the error.

  With :math:`p` the softmax of the logits over the included classes :math:`I`
  and :math:`y` the labels,

  .. math::
    \sum_{j \in I} y_j \bigl(-\log p_j + \epsilon (1 - p_j)\bigr) \,.

  Args:
    logits: Unnormalized log probabilities, with shape ``[..., num_classes]``
      and a floating dtype.
    labels: Probability of each class, for example one-hot, with a floating
      dtype; broadcasts with the logits.
    epsilon: Weight of the second term, a number or an array that broadcasts to
      the shape ``[...]``. The reference found 2 to be good for classifying
      images, and -1 for detecting objects.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the logits' shape removes classes, from the normalizer and from
      the sum; a mask of shape ``[...]`` removes examples. An example with no
      class left has loss 0.

  Returns:
    The losses, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If an argument is not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``epsilon`` or ``where`` does not
      fit, or a mask of shape ``[...]`` might as well be one of shape
      ``[num_classes]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[0.0, 0.0, jnp.nan], [1.0, 2.0, 3.0]])
    >>> labels = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> print(optax.losses.poly_loss_cross_entropy(  # log 2 + 2 (1 - 1/2)
    ...     logits, labels, where=~jnp.isnan(logits)))
    [1.6931 1.0771]

  References:
    Leng et al., `PolyLoss: A Polynomial Expansion Perspective of Classification
    Loss Functions <https://arxiv.org/abs/2204.12511>`_, 2022.
  """
  if where is None:
    return original.poly_loss_cross_entropy(
      logits, labels, epsilon=epsilon, axis=axis
    )
  mask = Mask(
    where,
    axis,
    logits,
    labels,
    examples=epsilon,
    refuse_ambiguous_where=True,
  )
  check_floating("logits", logits)
  check_floating("labels", labels)
  mask.check_axis_of(logits, "logits")
  mask.check_axis_of(labels, "labels")
  rank = len(mask.shape)
  x, y = mask.as_array(logits), mask.as_array(labels)
  x, y = (jnp.expand_dims(a, range(rank - a.ndim)) for a in (x, y))
  epsilon = mask.example(epsilon, 0, "epsilon")
  loss, *_ = _poly_loss(mask.axes, mask.where, x, y, jnp.asarray(epsilon))
  return mask.out(loss)


# 1 * (log 1 - 0) = 0, with finite derivatives; log 0 would not have them.
_kl_divergence = elementwise(
  functools.partial(original.kl_divergence, axis=()),
  lambda log_p, t: -t,
  None,  # At a target of 0 JAX's own is NaN in reverse mode alone.
  fills=(0, 1),
)
# exp(0) * (0 - 0) = 0.
_kl_divergence_with_log_targets = elementwise(
  functools.partial(original.kl_divergence_with_log_targets, axis=()),
  lambda log_p, log_t: -jnp.exp(log_t),
  lambda log_p, log_t: jnp.exp(log_t) * (log_t - log_p + 1),
  fills=(0, 0),
  recompute=True,
)
# 1 * (log 1 - 0) = 0, and exp(0) - 1 = 0.
_generalized_kl_divergence = elementwise(
  functools.partial(original.generalized_kl_divergence, axis=()),
  lambda log_p, t: jnp.exp(log_p) - t,
  None,
  fills=(0, 1),
)


def _divergence(loss, masked_loss, predictions, targets, *, axis, where):
  """Masks a sum over elements."""
  if where is None:
    return loss(predictions, targets, axis=axis)
  mask = Mask(where, axis, predictions, targets, refuse_ambiguous_where=True)
  x, y = mask.as_array(predictions), mask.as_array(targets)
  # Selected once more, for XLA to fuse all of it with the sum.
  return mask.sum(masked_loss(mask.where, x, y))


@compiled()
def kl_divergence(
  log_predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the Kullback-Leibler divergence of predictions from targets.

  For log predictions :math:`l`, targets :math:`t` and the included entries
  :math:`I`,

  .. math::
    \sum_{j \in I} t_j (\log t_j - l_j) \,.

  Args:
    log_predictions: Logarithms of the predicted probabilities, with shape
      ``[..., dim]`` and a floating dtype.
    targets: Target probabilities, positive, with a floating dtype; broadcast
      with ``log_predictions``. An included target of 0 adds 0 to the loss, and
      has a NaN gradient with respect to the targets, as in Optax.
    axis: Axis or axes of the distribution, as in
      :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the data's shape removes terms of the sum; a mask of shape
      ``[...]`` removes examples. Neither distribution is rescaled. An example
      with nothing left has divergence 0.

  Returns:
    The divergences, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If an argument is not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or a mask of
      shape ``[...]`` might as well be one of shape ``[dim]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> log_predictions = jnp.log(jnp.array([[0.5, 0.5], [0.1, 0.9]]))
    >>> targets = jnp.array([[0.25, 0.75], [0.0, jnp.nan]])
    >>> print(optax.kl_divergence(
    ...     log_predictions, targets, where=[[True, True], [False, False]]))
    [0.1308 0.    ]

  References:
    Kullback and Leibler, `On Information and Sufficiency
    <https://www.jstor.org/stable/2236703>`_, 1951.
  """
  return _divergence(
    original.kl_divergence,
    _kl_divergence,
    log_predictions,
    targets,
    axis=axis,
    where=where,
  )


@compiled()
def kl_divergence_with_log_targets(
  log_predictions: jax.typing.ArrayLike,
  log_targets: jax.typing.ArrayLike,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes :func:`kl_divergence` from the logarithms of the targets.

  For log predictions :math:`l`, log targets :math:`m` and the included entries
  :math:`I`,

  .. math::
    \sum_{j \in I} \exp(m_j) (m_j - l_j) \,.

  Args:
    log_predictions: As in :func:`kl_divergence`.
    log_targets: Logarithms of the target probabilities, finite, with a floating
      dtype; broadcast with ``log_predictions``.
    axis: As in :func:`kl_divergence`.
    where: As in :func:`kl_divergence`.

  Returns:
    The divergences, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: As in :func:`kl_divergence`.
    ValueError: As in :func:`kl_divergence`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> log_predictions = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    >>> log_targets = jnp.log(jnp.array([0.25, 0.75, 0.0]))
    >>> loss = optax.losses.kl_divergence_with_log_targets(
    ...     log_predictions, log_targets, where=[True, True, False])
    >>> print(f"{loss:.4f}")
    0.1308

  References:
    Kullback and Leibler, `On Information and Sufficiency
    <https://www.jstor.org/stable/2236703>`_, 1951.
  """
  return _divergence(
    original.kl_divergence_with_log_targets,
    _kl_divergence_with_log_targets,
    log_predictions,
    log_targets,
    axis=axis,
    where=where,
  )


@compiled()
def generalized_kl_divergence(
  log_predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the Kullback-Leibler divergence of unnormalized distributions.

  For log predictions :math:`l`, targets :math:`t` and the included entries
  :math:`I`,

  .. math::
    \sum_{j \in I} \left( t_j (\log t_j - l_j) + \exp l_j - t_j \right) \,.

  At a target of 0 a term is :math:`\exp l_j`, and ``where=targets > 0`` drops
  it. For predictions that need not add up to 1, add the sum of these terms.

  Args:
    log_predictions: Logarithms of the predicted measure, with shape
      ``[..., dim]`` and a floating dtype.
    targets: Target measure, positive, with a floating dtype; broadcasts with
      ``log_predictions``.
    axis: Axis or axes of the measure, as in
      :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the data's shape removes terms of the sum; a mask of shape
      ``[...]`` removes examples. An example with nothing left has divergence 0.

  Returns:
    The divergences, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If an argument is not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or a mask of
      shape ``[...]`` might as well be one of shape ``[dim]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> log_predictions = jnp.log(jnp.array([[1.0, 2.0, 3.0]]))
    >>> targets = jnp.array([[2.0, 2.0, 0.0]])
    >>> where = jnp.array([[True, True, False]])
    >>> print(optax.generalized_kl_divergence(
    ...     log_predictions, targets, where=where))  # 2 log 2 + 1 - 2
    [0.3863]

  References:
    Boyd and Vandenberghe, `Convex Optimization
    <https://stanford.edu/~boyd/cvxbook/bv_cvxbook.pdf>`_, 2004, page 90.
  """
  return _divergence(
    original.generalized_kl_divergence,
    _generalized_kl_divergence,
    log_predictions,
    targets,
    axis=axis,
    where=where,
  )


def convex_kl_divergence(
  log_predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  """Computes :func:`generalized_kl_divergence`, under its deprecated name.

  Args:
    log_predictions: As in :func:`generalized_kl_divergence`.
    targets: As in :func:`generalized_kl_divergence`.
    axis: As in :func:`generalized_kl_divergence`.
    where: As in :func:`generalized_kl_divergence`.

  Returns:
    As :func:`generalized_kl_divergence`, with a ``DeprecationWarning``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> print(optax.convex_kl_divergence(
    ...     jnp.zeros(3), jnp.array([1.0, 1.0, jnp.nan]),
    ...     where=jnp.array([True, True, False])))
    0.0
  """
  # Written out, so that the warning names the line of the caller.
  warnings.warn(
    "The function convex_kl_divergence is deprecated. Please use"
    " generalized_kl_divergence instead.",
    category=DeprecationWarning,
    stacklevel=2,
  )
  return generalized_kl_divergence(
    log_predictions, targets, axis=axis, where=where
  )


def _impossible_class(x, where, axes):
  """Fills logits so that masked classes are as good as impossible.

  Their log probability becomes the default of `log_epsilon`, which has no
  derivative.
  """
  masked = max(-1e5, float(jnp.finfo(x.dtype).min) / 2)
  return below_maximum(x, where, axes, masked=masked)


@compiled("blank_id")
def ctc_loss_with_forward_probs(
  logits: jax.typing.ArrayLike,
  logit_paddings: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  label_paddings: jax.typing.ArrayLike,
  *,
  blank_id: int = 0,
  log_epsilon: jax.typing.ArrayLike = -1e5,
  axis: Axis = -1,
  where: Where = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  r"""Computes :func:`ctc_loss`, and the forward probabilities.

  The forward probability of frame :math:`t` and position :math:`n` is that of
  all alignments of the frames up to :math:`t` with the labels before :math:`n`
  that end in a blank, or with those up to :math:`n` that end in label
  :math:`n`.

  Args:
    logits: As in :func:`ctc_loss`.
    logit_paddings: As in :func:`ctc_loss`.
    labels: As in :func:`ctc_loss`.
    label_paddings: As in :func:`ctc_loss`.
    blank_id: As in :func:`ctc_loss`.
    log_epsilon: As in :func:`ctc_loss`.
    axis: As in :func:`ctc_loss`.
    where: As in :func:`ctc_loss`.

  Returns:
    The losses, with shape ``[B]``; the logarithms of the forward probabilities
    that end in a blank, with shape ``[T, B, N + 1]``; and of those that end in
    a label, with shape ``[T, B, N]``. At an excluded frame they are those of
    the frame before. In the last frame the former count, as in Optax, also the
    alignments that end in the label before.

  Raises:
    TypeError: As in :func:`ctc_loss`.
    ValueError: As in :func:`ctc_loss`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[[0.0, 0.0], [jnp.nan, jnp.nan], [0.0, 0.0]]])
    >>> loss, blank, label = optax.ctc_loss_with_forward_probs(
    ...     logits, jnp.array([[0, 1, 0]]), jnp.array([[1]]), jnp.array([[0]]),
    ...     where=True)
    >>> print(loss)  # Of the 4 paths of 2 frames, 3 are of one label.
    [0.2877]
    >>> print(jnp.exp(label[:, 0, 0]))  # 1/2, then 1/2 from 3 quarters.
    [0.5 0.5 0.5]

  References:
    Graves et al., `Connectionist Temporal Classification: Labelling Unsegmented
    Sequence Data with Recurrent Neural Networks
    <https://doi.org/10.1145/1143844.1143891>`_, 2006.
  """
  mask = Mask(where, axis, logits, examples=logit_paddings)
  if where is not None:  # Padding masks, too.
    frames = jnp.expand_dims(jnp.asarray(logit_paddings) != 1, mask.axes)
    mask = mask.with_where(mask.where & frames)
  (x,) = axes_last(axis, mask(logits, _impossible_class, "logits"))
  loss = functools.partial(
    original.ctc_loss_with_forward_probs,
    x,
    mask.example(logit_paddings, 1),
    blank_id=blank_id,
    log_epsilon=log_epsilon,
  )
  if where is None:
    return loss(labels, label_paddings)
  padding = jnp.asarray(label_paddings) == 1
  # Optax compares the last label with the padding after it. A label is never a
  # blank, so blanks are put there.
  labels = jnp.where(padding, blank_id, labels)
  losses, *log_probs = loss(labels, label_paddings)
  # A sequence has no target if the class of a label is masked in all frames.
  (kept,) = axes_last(axis, mask.where)
  named = jax.nn.one_hot(labels, x.shape[-1], dtype=bool)
  lost = named & ~jnp.any(kept, 1)[:, None] & ~padding[..., None]
  included = jnp.any(kept, (1, 2)) & ~jnp.any(lost, (1, 2))
  return jnp.where(included, losses, 0.0), *log_probs


def ctc_loss(
  logits: jax.typing.ArrayLike,
  logit_paddings: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  label_paddings: jax.typing.ArrayLike,
  *,
  blank_id: int = 0,
  log_epsilon: jax.typing.ArrayLike = -1e5,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the loss of connectionist temporal classification.

  It is minus the logarithm of the probability of a sequence of labels, summed
  over all its alignments with the frames: paths of one class a frame that give
  the labels when repetitions are merged and blanks are dropped. With :math:`p`
  the softmax of the logits of a frame over its included classes, and the
  included frames :math:`t`,

  .. math::
    -\log \sum_{\pi} \prod_t p_{t, \pi_t} \,.

  Args:
    logits: Unnormalized log probabilities of the classes, the blank among them,
      with shape ``[B, T, K]`` and a floating dtype.
    logit_paddings: 1 for a frame of padding and else 0, with shape ``[B, T]``.
      With a ``where`` such a frame may hold anything; without one the program
      is Optax's, and NaN in it is NaN in the loss. ``where=True`` asks for
      this protection alone.
    labels: Indices of classes, with shape ``[B, N]`` and an integer dtype. With
      a ``where`` a label of padding may be any integer.
    label_paddings: 1 for a label of padding and else 0, with shape ``[B, N]``.
      Padding is at the end.
    blank_id: Index of the blank, a class that is never a label.
    log_epsilon: Stands for the logarithm of 0. The loss of a sequence whose
      labels have no alignment, such as one with more labels than frames, is
      about its negative, 1e5, with a gradient that teaches nothing: see the
      examples for how to drop such a sequence. The loss is also about 1e5, with
      derivatives of 0, if every alignment has a log probability below -1e5. A
      masked class has a log probability of -1e5 in its frame, so that the loss
      is about 1e5 if every alignment passes through one.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of shape ``[B, T]`` removes frames as padding does, one of shape
      ``[B, T, K]`` also classes from frames. A sequence with nothing left, if
      only for its paddings, has loss 0, and so has one with a label that is
      left in no frame.

  Returns:
    The losses, with shape ``[B]``.

  Raises:
    TypeError: If ``where`` is not boolean, or given with logits that are not
      floating.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the
      shapes of the other arguments do not.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[[0.0, 0.0], [jnp.nan, jnp.nan], [0.0, 0.0]]])
    >>> loss = optax.ctc_loss(
    ...     logits, jnp.zeros((1, 3)), jnp.array([[1]]), jnp.array([[0]]),
    ...     where=jnp.array([[True, False, True]]))
    >>> print(loss)  # Of the 4 paths of 2 frames, 3 are of one label.
    [0.2877]

    A sequence needs a frame for each label, and one for the blank between two
    that are equal. One with fewer has no alignment, and is masked as a whole:

    >>> logits, logit_paddings = jnp.zeros((2, 2, 3)), jnp.zeros((2, 2))
    >>> labels = jnp.array([[1, 0], [2, 2]])
    >>> label_paddings = jnp.array([[0, 1], [0, 0]])
    >>> counted = label_paddings == 0
    >>> equal = (labels[:, 1:] == labels[:, :-1]) & counted[:, 1:]
    >>> frames = jnp.sum(logit_paddings == 0, 1)
    >>> valid = jnp.sum(counted, 1) + jnp.sum(equal, 1) <= frames
    >>> print(optax.ctc_loss(  # log(9 / 3), and else 100,000 for the second.
    ...     logits, logit_paddings, labels, label_paddings,
    ...     where=valid[:, None, None]))
    [1.0986 0.    ]

  References:
    Graves et al., `Connectionist Temporal Classification: Labelling Unsegmented
    Sequence Data with Recurrent Neural Networks
    <https://doi.org/10.1145/1143844.1143891>`_, 2006.
  """
  losses, *_ = ctc_loss_with_forward_probs(
    logits,
    logit_paddings,
    labels,
    label_paddings,
    blank_id=blank_id,
    log_epsilon=log_epsilon,
    axis=axis,
    where=where,
  )
  return losses


def _wide_below_maximum(x, where, axes):
  """Fills scores that enter a projection, which a shift does not change.

  Sums over many scores need the digits of float32, which is the dtype of the
  result anyway. So does the shift: in float16 the difference of two scores may
  be infinite, while the loss of the lower one is finite.
  """
  # Selected before the conversion, so that no garbage is converted.
  x = jnp.where(where, x, 0).astype(jnp.promote_types(x.dtype, "float32"))
  # Scores above `largest` are not shifted: their differences may be infinite.
  return below_maximum(x, where, axes, masked=-2.0, largest=1e30)


def _sparsemax_value(axes, where, scores, labels):
  (x,) = axes_last(axes, _wide_below_maximum(scores, where, axes))
  return (_batched(original.multiclass_sparsemax_loss, x, labels),)


def _sparsemax_by_scores(axes, where, tangent, arrays, statistics):
  """The projection onto the simplex, less 1 for the label."""
  del statistics
  scores, labels = arrays
  filled = _wide_below_maximum(scores, where, axes)
  x, dx = axes_last(axes, filled, select(where, tangent, 0))
  project = jnp.vectorize(projection_simplex, signature="(n)->(n)")
  # Optax looks a label up: -1 is the last, and one too large is cut off.
  n = x.shape[-1]
  index = jnp.expand_dims(labels, -1).astype(int)
  index = jnp.clip(jnp.where(index < 0, index + n, index), 0, n - 1)
  is_label = flat_index(x.shape, (x.ndim - 1,)) == index
  p = project(x)
  # An infinite score of the label makes the derivatives of the support NaN.
  own = jnp.sum(jnp.where(is_label, x, 0), -1, keepdims=True)
  p = jnp.where(p == 0, 0, p + 0 * own)
  return jnp.sum((p - is_label) * dx, -1)


_sparsemax_loss = with_partials(_sparsemax_value, _sparsemax_by_scores)


@compiled()
def multiclass_sparsemax_loss(
  scores: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the sparsemax loss of a classifier with several classes.

  With :math:`p` the projection of the scores :math:`s` of the included classes
  onto the probability simplex and a label :math:`y`,

  .. math::
    \sum_{j} p_j (s_j - s_y) + \frac{1}{2} \Bigl(1 - \sum_j p_j^2\Bigr) \,.

  Args:
    scores: Scores of the classes, with shape ``[..., num_classes]`` and a
      floating dtype.
    labels: Index of the class of each example, with shape ``[...]`` and an
      integer dtype. The label of a masked example may be any integer.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`. With
      several, a label is a flat index into them, in their order.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the scores' shape removes classes; a mask of shape ``[...]``
      removes examples. An example whose own class is masked has loss 0.

  Returns:
    The losses, with shape ``[...]``, in Optax's dtype.

  Raises:
    TypeError: If ``where`` is not boolean, or given with scores that are not
      floating; or as Optax, if the shape of ``labels`` does not fit.
    ValueError: If ``axis`` or the shape of ``labels`` or ``where`` does not
      fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> scores = jnp.array([[1.0, 1.5, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]])
    >>> labels = jnp.array([0, -100])
    >>> print(optax.losses.multiclass_sparsemax_loss(
    ...     scores, labels, where=~jnp.isnan(scores)))
    [0.5625 0.    ]

  References:
    Martins and Astudillo, `From Softmax to Sparsemax: A Sparse Model of
    Attention and Multi-Label Classification
    <https://arxiv.org/abs/1602.02068>`_, 2016.
  """
  if where is None:
    (x,) = axes_last(axis, scores)
    return _batched(original.multiclass_sparsemax_loss, x, labels)
  mask = Mask(where, axis, scores, examples=labels).with_class(labels)
  scores, labels = mask.as_array(scores), mask.example(labels, 0)
  check_floating("scores", scores)
  # A score that is 1 or more below the maximum is outside of the support.
  loss, *_ = _sparsemax_loss(mask.axes, mask.where, scores, labels)
  return mask.out(loss)


def _batched(
  loss: Callable[..., jax.Array],
  scores: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
) -> jax.Array:
  """Calls a loss that takes one axis of examples with any number of them."""
  if np.ndim(labels) != np.ndim(scores) - 1:
    return loss(scores, labels)  # Optax refuses these shapes.
  if np.ndim(scores) == 1:
    return loss(jnp.expand_dims(scores, 0), jnp.expand_dims(labels, 0))[0]
  for _ in range(np.ndim(scores) - 2):
    loss = jax.vmap(loss)
  return loss(scores, labels)
