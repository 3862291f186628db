"""Ranking losses."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_masking._classes import without
from optax_masking._compiled import compiled
from optax_masking._cross_entropy import softmax_cross_entropy_of_probabilities
from optax_masking._mask import Axis, Mask, Where, axes_last, check_floating
from optax_masking.losses._original import original


def ranking_softmax_loss(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  where: Where = None,
  weights: jax.typing.ArrayLike | None = None,
  reduce_fn: Callable[..., jax.typing.ArrayLike] | None = jnp.mean,
  axis: Axis = -1,
) -> jax.Array:
  r"""Computes the cross-entropy of relevances and a softmax of scores.

  For the scores :math:`s` of a list, relevances :math:`y`, weights :math:`w`
  and the included items :math:`I`, the loss of the list is

  .. math::
    -\sum_{i \in I} w_i y_i \log \frac{\exp s_i}{\sum_{j \in I} \exp s_j} \,.

  Args:
    logits: Scores of the items, with shape ``[..., list_size]`` and a floating
      dtype.
    labels: Relevances of the items; broadcast with the logits.
    where: Items to include, as in :func:`optax_masking.masked_inputs`. A mask
      of the logits' shape removes items; a mask of shape ``[...]`` removes
      lists. A list with no item left has loss 0, and is masked for
      ``reduce_fn``.
    weights: Weights of the items, that broadcast with the logits, or None.
    reduce_fn: How to reduce the losses of the lists: a function of an array and
      the keyword ``where``, such as ``jnp.sum``, ``jnp.mean`` or a
      ``functools.partial`` of them, or None for no reduction. A mean of no list
      at all is 0.
    axis: List axis or axes, as in :func:`optax_masking.masked_inputs`.

  Returns:
    What ``reduce_fn`` makes of the losses, or the losses with shape ``[...]``.

  Raises:
    TypeError: If the logits are not floating or ``where`` is not boolean.
    ValueError: If ``axis`` or the shape of ``where`` does not fit, or a mask of
      shape ``[...]`` might as well be one of shape ``[list_size]``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> logits = jnp.array([[2.0, 1.0, jnp.nan], [1.0, 0.5, 1.5]])
    >>> labels = jnp.array([[1.0, 0.0, jnp.nan], [0.0, 0.0, 1.0]])
    >>> where = ~jnp.isnan(labels)
    >>> print(optax.losses.ranking_softmax_loss(
    ...     logits, labels, where=where, reduce_fn=None))
    [0.3133 0.6803]
    >>> loss = optax.losses.ranking_softmax_loss(logits, labels, where=where)
    >>> print(f"{loss:.4f}")
    0.4968

  References:
    Cao et al., `Learning to Rank: From Pairwise Approach to Listwise Approach
    <https://doi.org/10.1145/1273496.1273513>`_, 2007, with the top one
    probability model.
  """
  if where is None:
    return _unmasked(logits, labels, weights, axis, reduce_fn)
  losses, included = _losses_of_lists(
    logits, labels, weights, axis=axis, where=where
  )
  if reduce_fn is None:
    return losses
  # A reduction over no list would be 0/0, so it includes zeros instead.
  over = getattr(reduce_fn, "keywords", {}).get("axis")
  nothing = ~jnp.any(included, over, keepdims=True)
  reduced = reduce_fn(losses, where=included | nothing)
  # Another function hides which axis it reduces. Where it includes nothing, it
  # is NaN for ones, too.
  ones = reduce_fn(jnp.ones_like(losses), where=included | nothing)
  return jnp.where(jnp.isnan(reduced) & jnp.isnan(ones), 0.0, reduced)


def _unmasked(logits, labels, weights, axis, reduce_fn):
  x, y, w = axes_last(axis, logits, labels, weights)
  return original.ranking_softmax_loss(x, y, weights=w, reduce_fn=reduce_fn)


@compiled()
def _losses_of_lists(logits, labels, weights=None, *, axis, where):
  """The losses, and whether anything of each list is included."""
  if where is None:  # To raise Optax's errors.
    return _unmasked(logits, labels, weights, axis, None)
  mask = Mask(
    where,
    axis,
    logits,
    labels,
    weights,
    refuse_ambiguous_where=True,
  )
  x = mask.as_array(logits)
  check_floating("logits", x)
  y = jnp.asarray(mask(labels, 0.0)).astype(x.dtype)  # As Optax does.
  if weights is not None:
    y = y * mask(weights, 0.0)
  if 0 in mask.shape:
    losses = jnp.zeros(without(mask.shape, mask.axes), y.dtype)
  else:
    losses = softmax_cross_entropy_of_probabilities(mask, x, y)
  return losses, jnp.broadcast_to(mask.any, losses.shape)
