"""Fenchel-Young losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optax_masking._decorator import masked_inputs
from optax_masking._mask import Axis, Where, axes_last
from optax_masking.fills import far_below
from optax_masking.losses._original import original


def make_fenchel_young_loss(
  max_fun: Callable[..., jax.typing.ArrayLike],
) -> Callable[..., jax.Array]:
  r"""Makes a loss of a maximum, or of a smoothed one.

  For scores :math:`s`, targets :math:`t` and the included entries :math:`I`,
  the loss is

  .. math::
    \operatorname{max\_fun}(s_I) - \sum_{j \in I} t_j s_j \,.

  With the logarithm of a sum of exponentials, and targets that add up to 1, it
  is the cross-entropy of a softmax. The reference adds a term of the targets
  alone, which makes the least loss 0.

  Args:
    max_fun: Function of a vector of scores that returns a scalar: a convex
      conjugate over the simplex, such as ``jax.nn.logsumexp``. A score that is
      10,000 or more (in float16 128) below the largest must not change it: a
      sum, a mean or a norm won't do.

  Returns:
    A function ``fenchel_young_loss(scores, targets, *args, axis=-1, where=None,
    **kwargs)``. Scores and targets have shape ``[..., dim]``, the losses
    ``[...]``. ``axis`` and ``where`` are as in
    :func:`optax_masking.masked_inputs`: a mask of the scores' shape removes
    entries from the maximum and from the sum, a mask of shape ``[...]`` removes
    examples. An example with nothing left has loss 0. ``max_fun`` is given the
    masked entries, too: as scores far below the largest. Optax ignores further
    keywords and refuses further positions; bind arguments of ``max_fun`` to it
    with ``functools.partial``.

  Raises:
    TypeError: From the loss, if ``where`` is not boolean, or given with scores
      that are not floating.
    ValueError: From the loss, if ``axis`` or the shape of ``where`` does not
      fit.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> jnp.set_printoptions(precision=4)
    >>> loss = optax.losses.make_fenchel_young_loss(jax.nn.logsumexp)
    >>> scores = jnp.array([[0.0, 1.0, jnp.nan], [jnp.nan, 0.0, 0.0]])
    >>> targets = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]])
    >>> print(loss(scores, targets, where=~jnp.isnan(scores)))
    [0.3133 0.6931]

  References:
    Blondel et al., `Learning with Fenchel-Young Losses
    <https://arxiv.org/abs/1901.02324>`_, 2020.
  """
  loss = original.make_fenchel_young_loss(max_fun)

  # Targets need not add up to 1, so the scores must not be shifted.
  @masked_inputs(scores=far_below, targets=0.0)
  def fenchel_young_loss(
    scores: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
    *args: Any,
    axis: Axis = -1,
    where: Where = None,
    **kwargs: Any,
  ) -> jax.Array:
    """Computes ``max_fun(scores)`` less the product of targets and scores."""
    scores, targets = axes_last(axis, scores, targets)
    return loss(scores, targets, *args, **kwargs)

  return fenchel_young_loss
