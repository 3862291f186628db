"""Self-supervised losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking._classes import (
  UNDERFLOW,
  is_sharded,
  on_cpus,
  padded,
  select,
  wide,
)
from optax_masking._compiled import compiled
from optax_masking._mask import (
  Axis,
  Mask,
  Where,
  axes_last,
  canonicalize_axes,
  check_floating,
)
from optax_masking.fills import zero_unless_empty
from optax_masking.losses._original import original


# The backward pass computes them again, and keeps nothing but the vectors.
@jax.checkpoint
def _similarities(vectors):
  """The cosines of all pairs of vectors, none of which is 0 by a mask."""
  least = float(jnp.finfo(vectors.dtype).eps)

  def product(vectors):
    v = vectors.astype(wide(vectors.dtype))
    squared = jnp.sum(v * v, -1, keepdims=True)
    v = v / jnp.sqrt(jnp.maximum(squared, least))
    return jnp.matmul(v, v.T, precision="highest").astype(vectors.dtype)

  # Compilers for CPUs would make an array of the products of all pairs.
  def elsewhere(vectors):
    return original.cosine_similarity(
      vectors[None], vectors[:, None], epsilon=least
    )

  if is_sharded(vectors, 1):  # An explicit mesh refuses the product.
    return elsewhere(vectors)
  return on_cpus(product, elsewhere, vectors)


@compiled()
def ntxent(
  embeddings: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  temperature: jax.typing.ArrayLike = 0.07,
  *,
  axis: Axis = -1,
  where: Where = None,
) -> jax.Array:
  r"""Computes the normalized temperature-scaled cross-entropy of a batch.

  A positive pair is one of two embeddings of the same label, a negative pair
  one of different labels. With :math:`x_{ij}` their cosine similarity divided
  by the temperature, the loss is the mean over the positive pairs of

  .. math::
    -\log \frac{\exp x_{ij}}{\exp x_{ij} + \sum_{k \in N_i} \exp x_{ik}} \,,

  where :math:`N_i` are those that form a negative pair with :math:`i`.

  Args:
    embeddings: Vectors, with shape ``[batch, dim]`` and a floating dtype.
    labels: Group of each embedding, with shape ``[batch]``.
    temperature: Divides the similarities, positive.
    axis: Feature axis or axes, as in :func:`optax_masking.masked_inputs`; one
      axis has to be left.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of shape ``[batch]`` gives the loss of the embeddings that are left,
      one of shape ``[batch, dim]`` also removes entries of vectors. If no
      positive pair is left the loss is 0.

  Returns:
    The loss, a scalar, in the dtype of the embeddings.

  Raises:
    TypeError: If the embeddings are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the
      embeddings and the labels are not as many.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> embeddings = jnp.array([[1.0, 0], [2, 0], [0, 1], [jnp.nan, jnp.nan]])
    >>> labels = jnp.array([0, 0, 1, 1])
    >>> where = jnp.array([True, True, True, False])
    >>> loss = optax.ntxent(embeddings, labels, 1.0, where=where)
    >>> print(f"{loss:.4f}")  # log(1 + exp(0) / exp(1))
    0.3133

  References:
    Chen et al., `A Simple Framework for Contrastive Learning of Visual
    Representations <https://arxiv.org/abs/2002.05709>`_, 2020.
  """
  mask = Mask(where, axis, embeddings, examples=labels)
  # 0 adds nothing to a product or a norm. An empty vector is filled by a unit
  # vector: Optax's least norm is so small that second derivatives overflow.
  x = mask(embeddings, zero_unless_empty, "embeddings")
  (vectors,) = axes_last(axis, x)
  if where is None:
    return original.ntxent(vectors, labels, temperature)
  labels = mask.example(labels, 0)
  if vectors.ndim != 2:
    raise ValueError(
      f"`embeddings` must have one axis besides the feature axes {axis}, but"
      f" have shape {vectors.shape} with these at the end."
    )
  check_floating("embeddings", vectors)
  included = mask.any
  x = _similarities(vectors) / temperature
  pairs = included[:, None] & included[None] & ~jnp.eye(len(x), dtype=bool)
  same = jnp.expand_dims(labels, 1) == jnp.expand_dims(labels, 0)
  positive, negative = pairs & same, pairs & ~same
  any_negative = jnp.any(negative, -1, keepdims=True)
  # Only differences enter the loss. Below the largest of the negative pairs
  # exponentials do not overflow, and half precision has more digits.
  least = float(jnp.finfo(x.dtype).min)
  top = jnp.max(jnp.where(negative, x, least), -1, keepdims=True)
  x -= jax.lax.stop_gradient(jnp.where(any_negative, top, 0))
  exponentials = jnp.exp(select(negative, x, UNDERFLOW))
  total = jnp.sum(exponentials, -1, keepdims=True)
  losses = jax.nn.softplus(jnp.log(jnp.where(any_negative, total, 1)) - x)
  # Without a negative pair the loss is 0, or NaN if x is.
  losses = jnp.where(any_negative, losses, 0 * x)
  losses = select(positive, losses, 0)
  return jnp.sum(losses) / jnp.maximum(jnp.sum(positive), 1)


@compiled("norm_degree")
def triplet_margin_loss(
  anchors: jax.typing.ArrayLike,
  positives: jax.typing.ArrayLike,
  negatives: jax.typing.ArrayLike,
  axis: Axis = -1,
  norm_degree: jax.typing.ArrayLike = 2,
  margin: jax.typing.ArrayLike = 1.0,
  eps: jax.typing.ArrayLike = 1e-6,
  *,
  where: Where = None,
) -> jax.Array:
  r"""Computes how much closer negatives are to anchors than they should be.

  For an anchor :math:`a`, a positive :math:`p`, a negative :math:`n` and the
  included entries :math:`I`,

  .. math::
    \max\bigl(d(a, p) - d(a, n) + \text{margin}, 0\bigr), \qquad
    d(a, b) = \Bigl(\sum_{j \in I} (a_j - b_j)^k + \epsilon\Bigr)^{1 / k} \,.

  Args:
    anchors: Vectors, with shape ``[..., dim]`` and a floating dtype.
    positives: Vectors to be near the anchors, with a floating dtype; broadcast
      with them.
    negatives: Vectors to be far from the anchors, with a floating dtype;
      broadcast with them. With a mask all three must have the same size along
      ``axis``.
    axis: Axis or axes of the vectors, as in
      :func:`optax_masking.masked_inputs`.
    norm_degree: Exponent :math:`k` of the norm, an even number: no absolute
      value is taken.
    margin: By how much a negative should be farther away; a number or an array
      that broadcasts to the shape ``[...]``.
    eps: Keeps the derivative of the norm finite; a number or an array, as
      ``margin``.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      mask of the data's shape removes entries of the vectors; a mask of shape
      ``[...]`` removes examples. An example with nothing left has loss 0.

  Returns:
    The losses, with shape ``[...]``, in the dtype of the arguments.

  Raises:
    TypeError: If a vector is not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or the sizes
      along ``axis`` differ and there is a mask.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> anchors = jnp.array([[0.0, 0.0, jnp.nan], [0.0, 0.0, 0.0]])
    >>> positives = jnp.array([[0.0, 2.0, jnp.nan], [1.0, 1.0, 1.0]])
    >>> negatives = jnp.array([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    >>> where = jnp.array([[True, True, False], [False, False, False]])
    >>> print(optax.losses.triplet_margin_loss(  # 2 - 5 + 4
    ...     anchors, positives, negatives, margin=4.0, where=where))
    [1. 0.]

  References:
    Balntas et al., `Learning Shallow Convolutional Feature Descriptors with
    Triplet Losses
    <https://bmva-archive.org.uk/bmvc/2016/papers/paper119/index.html>`_, 2016.
  """
  vectors = (anchors, positives, negatives)
  dtypes = map(jnp.result_type, vectors)
  if where is None or not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
    return original.triplet_margin_loss(  # Optax refuses integers.
      *vectors, axis, norm_degree, margin, eps
    )
  _check_sizes(*vectors, axis)
  mask = Mask(where, axis, *vectors, examples=(margin, eps))
  # With `eps` of 0 the norm of an empty slice would have infinite derivatives.
  margin, eps = mask.example(margin, 1.0), mask.example(eps, 1.0)
  a, p, n = (mask(x, 0.0) for x in vectors)

  def distance(x, y):
    # At 1 a power has finite derivatives of any order.
    powers = jnp.power(mask(x - y, 1.0), norm_degree)
    return (jnp.sum(mask(powers, 0.0), axis) + eps) ** (1 / norm_degree)

  return mask.out(jnp.maximum(distance(a, p) - distance(a, n) + margin, 0))


def _check_sizes(anchors, positives, negatives, axis):
  """Refuses vectors that broadcast along the axis.

  Without a mask Optax sums each distance over the entries of its two vectors,
  which a mask of the broadcast shape can't describe.
  """
  shapes = [np.shape(x) for x in (anchors, positives, negatives)]
  try:
    shape = jnp.broadcast_shapes(*shapes)
    axes = canonicalize_axes(axis, shape)
  except (TypeError, ValueError):
    return  # `Mask` reports these.
  for given in shapes:
    sizes = padded(given, len(shape))
    if any(sizes[a] != shape[a] for a in axes):
      raise ValueError(
        "With a mask `anchors`, `positives` and `negatives` must have the"
        f" same size along the axes {axes}, but their shapes are {shapes}."
        " Broadcast them."
      )
