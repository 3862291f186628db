"""Smoothing of labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from optax_masking._classes import wide
from optax_masking._compiled import compiled
from optax_masking._derivatives import elementwise
from optax_masking._mask import Axis, Mask, Where
from optax_masking.losses._original import original

# Any finite fills will do, since masked elements are 0 in the output.
_smoothed = elementwise(
  lambda labels, alpha, share: (1 - alpha) * labels + alpha / 1 * share,
  lambda labels, alpha, share: 1 - alpha,
  # Not in the labels' dtype, which may be half precision.
  lambda labels, alpha, share: share - labels.astype(wide(labels.dtype)),
  fills=(0, 0.5, 1),
  recompute=True,
)


@compiled()
def smooth_labels(
  labels: jax.typing.ArrayLike,
  alpha: jax.typing.ArrayLike,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Mixes labels with the uniform distribution.

  For labels :math:`y` and the included classes :math:`I`, of which there are
  :math:`|I|`,

  .. math::
    (1 - \alpha) y_j + \frac{\alpha}{|I|} \,, \qquad j \in I \,.

  Args:
    labels: Probability of each class, for example one-hot, with shape ``[...,
      num_classes]`` and a floating dtype.
    alpha: Weight of the uniform distribution, in [0, 1]; broadcasts to the
      labels.
    axis: Class axis or axes, as in :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked class is 0 in the output, and gets no share of ``alpha``; a mask of
      shape ``[...]`` removes examples, which are 0 in the output. If the class
      of a one-hot label is masked, what is left adds up to ``alpha``: mask the
      example too, if it is not to count.

  Returns:
    The smoothed labels, with the broadcast shape, in Optax's dtype.

  Raises:
    TypeError: If the labels are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or a mask of
      shape ``[...]`` might as well be one of shape ``[num_classes]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> labels = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, jnp.nan]])
    >>> where = ~jnp.isnan(labels)
    >>> print(optax.smooth_labels(labels, 0.3, where=where))
    [[0.1  0.8  0.1 ]
     [0.85 0.15 0.  ]]

  References:
    Müller et al., `When Does Label Smoothing Help?
    <https://arxiv.org/abs/1906.02629>`_, 2019.
  """
  if where is None:
    return original.smooth_labels(labels, alpha, axis=axis)
  if not jnp.issubdtype(jnp.result_type(labels), jnp.floating):
    return original.smooth_labels(labels, alpha)  # Optax refuses these.
  mask = Mask(where, axis, labels, alpha, refuse_ambiguous_where=True)
  count = jnp.expand_dims(jnp.maximum(mask.count(), 1), mask.axes)
  # The reciprocal is weakly typed, so that the result has the dtype of alpha;
  # the count itself may overflow in float16. Under strict promotion it must not
  # be refused, since it is no argument of the caller. Dividing alpha by 1 makes
  # an integer a float, as Optax's division by the count does.
  with jax.numpy_dtype_promotion("standard"):
    reciprocal = 1.0 / count
  labels, alpha = mask.as_array(labels), mask.as_array(alpha)
  return mask.out(_smoothed(mask.where, labels, alpha, reciprocal))
