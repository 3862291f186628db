"""Regression losses."""

import jax

from optax_masking._arguments import Axis, Where
from optax_masking._masking import masked_inputs
from optax_masking.fills import zero_unless_empty
from optax_masking.losses._original import original


@masked_inputs(
  predictions=zero_unless_empty,
  targets=zero_unless_empty,
  epsilon=1.0,
  refuse_ambiguous_where=True,
)
def cosine_similarity(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  epsilon: jax.typing.ArrayLike = 0.0,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the cosine of the angle between predictions and targets.

  For vectors :math:`a` and :math:`b` of the included entries,

  .. math::
    \frac{a \cdot b}
    {\sqrt{\max(\|a\|^2, \epsilon)} \sqrt{\max(\|b\|^2, \epsilon)}} \,.

  Args:
    predictions: Vectors, with shape ``[..., dim]`` and a floating dtype.
    targets: Vectors, with a floating dtype; broadcast with ``predictions``.
    epsilon: Least value of a squared norm. With the default of 0 an included
      part that is the zero vector has a NaN similarity, as in Optax.
    axis: Axis or axes of the vectors, as in
      :func:`optax_masking.masked_inputs`.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the data's shape removes entries from the product and the norms;
      a mask of shape ``[...]`` removes examples. A vector with nothing left has
      similarity 0.

  Returns:
    The similarities, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If an argument is not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or a mask of
      shape ``[...]`` might as well be one of shape ``[dim]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> predictions = jnp.array([[3.0, 4.0, jnp.inf], [1.0, 2.0, 3.0]])
    >>> targets = jnp.array([[4.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    >>> where = jnp.array([[True, True, False], [False, False, False]])
    >>> print(optax.cosine_similarity(predictions, targets, where=where))
    [0.96 0.  ]

  References:
    `Cosine similarity <https://en.wikipedia.org/wiki/Cosine_similarity>`_,
    Wikipedia.
  """
  return original.cosine_similarity(
    predictions, targets, epsilon=epsilon, axis=axis
  )


@masked_inputs(
  predictions=zero_unless_empty,
  targets=zero_unless_empty,
  epsilon=1.0,
  refuse_ambiguous_where=True,
)
def cosine_distance(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  epsilon: jax.typing.ArrayLike = 0.0,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  """Computes 1 less the cosine of the angle between predictions and targets.

  Args:
    predictions: As in :func:`cosine_similarity`.
    targets: As in :func:`cosine_similarity`.
    epsilon: As in :func:`cosine_similarity`.
    axis: As in :func:`cosine_similarity`.
    where: As in :func:`cosine_similarity`, but a vector with nothing left has
      distance 0.

  Returns:
    The distances, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: As in :func:`cosine_similarity`.
    ValueError: As in :func:`cosine_similarity`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> predictions = jnp.array([[3.0, 4.0, jnp.inf], [1.0, 2.0, 3.0]])
    >>> targets = jnp.array([[4.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    >>> where = jnp.array([[True, True, False], [False, False, False]])
    >>> print(optax.cosine_distance(predictions, targets, where=where))
    [0.04 0.  ]

  References:
    `Cosine distance
    <https://en.wikipedia.org/wiki/Cosine_similarity#Cosine_distance>`_,
    Wikipedia.
  """
  return original.cosine_distance(
    predictions, targets, epsilon=epsilon, axis=axis
  )
