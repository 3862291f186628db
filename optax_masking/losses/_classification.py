"""Classification losses."""

import warnings

import jax

from optax_masking._arguments import Axis, Where
from optax_masking._masking import masked_inputs
from optax_masking.fills import below_maximum, class_index
from optax_masking.losses._original import original


# At 0 and 0.5 every term and its derivatives are finite. At a hard label, and
# integer labels know no other, Optax weights an infinity by 0.
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
    The losses, with the shape of the logits less ``axis``, in their dtype.

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


# exp(logit) is 0 and so is its derivative: the class is not in the normalizer.
# Its log probability is finite, so that a label of 0 removes it from the sum.
@masked_inputs(logits=below_maximum, labels=0.0)
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
  return original.softmax_cross_entropy(logits, labels, axis=axis)


@masked_inputs(logits=below_maximum, labels=class_index)
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
  return original.softmax_cross_entropy_with_integer_labels(
    logits, labels, axis=axis
  )


# 1 * (log 1 - 0) = 0, with finite derivatives; log 0 would not have them.
@masked_inputs(log_predictions=0.0, targets=1.0, refuse_ambiguous_where=True)
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
  return original.kl_divergence(log_predictions, targets, axis=axis)


# As for kl_divergence, and exp(0) - 1 = 0.
@masked_inputs(log_predictions=0.0, targets=1.0, refuse_ambiguous_where=True)
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
    \sum_{j \in I} t_j (\log t_j - l_j) + \exp l_j - t_j \,.

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
  return original.generalized_kl_divergence(log_predictions, targets, axis=axis)


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
  # Written out, for the warning to name the line of the caller.
  warnings.warn(
    "The function convex_kl_divergence is deprecated. Please use"
    " generalized_kl_divergence instead.",
    category=DeprecationWarning,
    stacklevel=2,
  )
  return generalized_kl_divergence(
    log_predictions, targets, axis=axis, where=where
  )
