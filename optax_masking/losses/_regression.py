"""Regression losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import select, varies_along, wide
from optax_masking._compiled import compiled
from optax_masking._decorator import masked_inputs
from optax_masking._derivatives import with_partials
from optax_masking._mask import Axis, Mask, Where, check_floating
from optax_masking.losses._original import original


def _of_error(loss, slope, *, select_again=False):
  """Masks a loss of the error, by its derivative.

  At an error of 0 these losses and their slopes are 0. So masked elements need
  no select behind the loss. Unlike `elementwise` it can select the error a
  second time: XLA then writes it once, if it is the gradient as well.
  """

  def error(where, x, y=0):
    return select(where, x, 0) - select(where, y, 0)

  def value(axes, where, *arrays):
    del axes
    e = error(where, *arrays)
    return (loss(select(where, e, 0) if select_again else e),)

  def derivative(axes, where, tangent, arrays, statistics):
    del axes, statistics
    return slope(error(where, *arrays)) * select(where, tangent, 0)

  masked_loss = with_partials(
    value, derivative, lambda *arguments: -derivative(*arguments)
  )
  return lambda where, *arrays: masked_loss((), where, *arrays)[0]


_squared_error = _of_error(original.squared_error, lambda error: 2 * error)
_l2_loss = _of_error(original.l2_loss, lambda error: error, select_again=True)
_log_cosh = _of_error(original.log_cosh, jnp.tanh)


def _loss_of_error(loss, masked_loss, predictions, targets, *, axis, where):
  """Masks a loss of the error, with targets of 0 if there are none."""
  mask = Mask(where, axis, predictions, targets)
  if where is None:
    return mask.sum(loss(predictions, targets))
  x, y = mask.as_array(predictions), mask.as_array(targets)
  check_floating("predictions", x)
  if y is not None and not jnp.issubdtype(y.dtype, jnp.floating):
    # A sum, unlike a conversion, is weak where Optax's difference is.
    y = jnp.zeros_like(x, shape=()) + y
  arrays = (x,) if y is None else (x, y)
  return mask.sum(masked_loss(mask.where, *arrays), zeroed=True)


@compiled()
def squared_error(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike | None = None,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the square of the difference of predictions and targets.

  For a prediction :math:`x` and a target :math:`y`, :math:`(x - y)^2`.

  Args:
    predictions: Values of any shape and a floating dtype.
    targets: Values of the same shape, or None for 0.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If the predictions are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the
      targets have another shape than the predictions.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> predictions = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> targets = jnp.array([[0.0, jnp.nan], [1.0, 1.0]])
    >>> where = ~jnp.isnan(targets)
    >>> print(optax.squared_error(predictions, targets, where=where))
    [[1. 0.]
     [4. 9.]]
    >>> print(optax.squared_error(predictions, targets, axis=None, where=where))
    14.0

  References:
    Hastie et al., `The Elements of Statistical Learning
    <https://hastie.su.domains/ElemStatLearn/>`_, 2009, section 2.4.
  """
  return _loss_of_error(
    original.squared_error,
    _squared_error,
    predictions,
    targets,
    axis=axis,
    where=where,
  )


@compiled()
def l2_loss(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike | None = None,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes half the square of the difference of predictions and targets.

  For a prediction :math:`x` and a target :math:`y`, :math:`(x - y)^2 / 2`.

  Args:
    predictions: Values of any shape and a floating dtype.
    targets: Values of the same shape, or None for 0.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If the predictions are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the
      targets have another shape than the predictions.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> predictions = jnp.array([1.0, 2.0, 3.0])
    >>> targets = jnp.array([0.0, jnp.nan, 1.0])
    >>> print(optax.l2_loss(predictions, targets, where=~jnp.isnan(targets)))
    [0.5 0.  2. ]

  References:
    Bishop, `Pattern Recognition and Machine Learning
    <https://www.microsoft.com/en-us/research/publication/pattern-recognition-machine-learning/>`_,
    2006, section 1.1.
  """
  return _loss_of_error(
    original.l2_loss,
    _l2_loss,
    predictions,
    targets,
    axis=axis,
    where=where,
  )


# At an error of 0 the loss and its derivatives are 0. At a delta of 1, which is
# a factor, the derivatives are finite.
@compiled()
@masked_inputs(predictions=0.0, targets=0.0, delta=1.0)
def huber_loss(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike | None = None,
  *,
  delta: jax.typing.ArrayLike = 1.0,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes a loss quadratic in small errors and linear in large ones.

  For the difference :math:`e` of prediction and target,

  .. math::
    \frac{e^2}{2} \text{ if } |e| \le \delta, \qquad
    \delta \Bigl(|e| - \frac{\delta}{2}\Bigr) \text{ otherwise.}

  Args:
    predictions: Values of any shape and a floating dtype.
    targets: Values that broadcast with the predictions, or None for 0.
    delta: Error at which the loss becomes linear, positive; a number or an
      array that broadcasts with the predictions.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If the predictions are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> predictions = jnp.array([0.5, 3.0, jnp.inf])
    >>> where = jnp.array([True, True, False])
    >>> print(optax.huber_loss(predictions, where=where))
    [0.125 2.5   0.   ]

  References:
    Huber, `Robust Estimation of a Location Parameter
    <https://doi.org/10.1214/aoms/1177703732>`_, 1964.
  """
  return original.huber_loss(predictions, targets, delta=delta)


@compiled()
def log_cosh(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike | None = None,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  r"""Computes the logarithm of the hyperbolic cosine of the error.

  For the difference :math:`e` of prediction and target, :math:`\log \cosh e`:
  about :math:`e^2 / 2` if it is small and :math:`|e| - \log 2` if it is large.

  Args:
    predictions: Values of any shape and a floating dtype.
    targets: Values that broadcast with the predictions, or None for 0.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Raises:
    TypeError: If the predictions are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> predictions = jnp.array([0.0, 1.0, jnp.nan])
    >>> where = jnp.array([True, True, False])
    >>> print(optax.log_cosh(predictions, where=where))
    [0.     0.4338 0.    ]

  References:
    Chen et al., `Log Hyperbolic Cosine Loss Improves Variational Auto-Encoder
    <https://openreview.net/pdf?id=rkglvsC9Ym>`_, 2019.
  """
  return _loss_of_error(
    original.log_cosh,
    _log_cosh,
    predictions,
    targets,
    axis=axis,
    where=where,
  )


def _cosines(predictions, targets, epsilon, axis, where):
  """The cosines of vectors, 0 for those with nothing included, and the mask."""
  mask = Mask(
    where, axis, predictions, targets, epsilon, refuse_ambiguous_where=True
  )

  def zeros(x, where, axes):
    del axes
    return jnp.where(where, x, 0)

  # 0 adds nothing to the product or the norms. The least norm of a vector with
  # nothing included is 1.
  x = mask(predictions, zeros, "predictions")
  y = mask(targets, zeros, "targets")
  if np.ndim(epsilon):
    epsilon = mask(epsilon, 1.0)
  else:  # A number holds for each vector.
    epsilon = jnp.expand_dims(mask.example(epsilon, 1.0), mask.axes)
  dtype = jnp.result_type(x, y, epsilon)
  x, y = x.astype(wide(dtype)), y.astype(wide(dtype))

  def norm(v):
    squared = jnp.sum(v * v, mask.axes, keepdims=True)
    return jnp.sqrt(jnp.maximum(squared, epsilon))

  norms = norm(x), norm(y)
  if varies_along(norms[0], mask.axes):  # An epsilon for each element.
    cosines = jnp.sum(x / norms[0] * (y / norms[1]), mask.axes)
  else:  # One after the other: the square of their product could overflow.
    cosines = jnp.sum(x * y, mask.axes)
    for n in norms:
      cosines = cosines / jnp.squeeze(n, mask.axes)
  return cosines.astype(dtype), mask


@compiled()
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
  if where is None:
    return original.cosine_similarity(
      predictions, targets, epsilon=epsilon, axis=axis
    )
  cosines, mask = _cosines(predictions, targets, epsilon, axis, where)
  return mask.out(cosines)


@compiled()
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
  if where is None:
    return original.cosine_distance(
      predictions, targets, epsilon=epsilon, axis=axis
    )
  cosines, mask = _cosines(predictions, targets, epsilon, axis, where)
  return mask.out(1 - cosines)
