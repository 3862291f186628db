"""A program that a type checker has to accept: every form of import, and use.

Run by a test, too, so that what is accepted works.
"""

from typing import TYPE_CHECKING, assert_type

import jax
import jax.numpy as jnp
import optax as plain

import optax_masking as optax
import optax_masking.contrib
import optax_masking.losses
from optax_masking import adamw, losses, tree_utils
from optax_masking.contrib import muon
from optax_masking.losses import hinge_loss, softmax_cross_entropy
from optax_masking.reductions import RunningMean, masked_mean
from optax_masking.schedules import constant_schedule
from optax_masking.testing import Report, assert_mask_safe
from optax_masking.transforms import MaskedNode


def loss(logits: jax.Array, mask: jax.Array | None) -> jax.Array:
  labels = jnp.zeros(logits.shape[:-1], int)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, labels, axis=-1, where=mask
  ).sum()


@optax.masked_inputs(x=0.0, y=optax.fills.below_maximum)
def own_loss(
  x: jax.Array,
  y: jax.Array,
  axis: int = -1,
  where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  return jnp.sum(x - y, axis)


@optax.masked_inputs(predictions=0.0, targets=0.0)
def absolute_error(
  predictions: jax.Array,
  targets: jax.Array,
  *,
  axis: int | tuple[int, ...] | None = (),
  where: jax.typing.ArrayLike | None = None,
) -> jax.Array:
  return jnp.abs(predictions - targets)


def types_of_optax() -> None:
  """Whoever reads Optax knows a type for each of its names, and no other."""
  assert_type(optax.adam(1e-3), plain.GradientTransformationExtraArgs)
  # Optax's `__all__` leaves this one out.
  assert_type(optax.named_chain(), plain.GradientTransformationExtraArgs)
  assert_type(optax.contrib.muon(1e-3), plain.GradientTransformation)
  assert_type(optax_masking.contrib.muon(1e-3), plain.GradientTransformation)
  assert_type(muon(1e-3), plain.GradientTransformation)
  assert_type(constant_schedule(1.0), plain.Schedule)
  assert_type(optax.schedules.constant_schedule(1.0), plain.Schedule)
  assert_type(MaskedNode(), plain.MaskedNode)
  if TYPE_CHECKING:
    _ = optax.adamm  # pyright: ignore[reportAttributeAccessIssue]
    _ = optax.contrib.muonn  # pyright: ignore[reportAttributeAccessIssue]
    _ = optax.losses.l2_los  # pyright: ignore[reportAttributeAccessIssue]
    from optax_masking.contrib import (
      muonn as muonn,  # pyright: ignore[reportAttributeAccessIssue]
    )


def main() -> None:
  types_of_optax()
  logits = jnp.ones((3, 4))
  mask = jnp.array([True, False, True])
  optimizer = optax.chain(optax.clip(1.0), adamw(constant_schedule(1e-3)))
  state = optimizer.init(logits)
  grads = jax.grad(loss)(logits, mask)
  updates, state = optimizer.update(grads, state, logits)
  optax.apply_updates(logits, updates)
  tree_utils.tree_sum(state)
  muon(1e-3)
  optax_masking.contrib.muon(1e-3)
  total = softmax_cross_entropy(logits, logits, where=mask).sum()
  assert_type(optax.kl_divergence(logits, logits, where=mask), jax.Array)
  total += losses.cosine_distance(logits, logits, epsilon=1e-6, axis=(0, 1))
  total += optax_masking.losses.kl_divergence(logits, logits, where=True).sum()
  total += hinge_loss(logits, logits, where=mask[:, None]).sum()
  total += losses.dice_loss(logits, logits, reduction="sum", where=True).sum()
  total += losses.make_fenchel_young_loss(jax.nn.logsumexp)(
    logits, logits, where=mask
  ).sum()
  total += optax.ntxent(logits, jnp.array([0, 0, 1]), where=mask)
  total += optax.smooth_labels(logits, 0.1, where=mask).sum()
  total += own_loss(logits, logits, where=mask).sum()
  error = absolute_error(logits, 2 * logits, axis=-1, where=mask)
  assert_type(error, jax.Array)
  assert error.tolist() == [4.0, 0.0, 4.0]
  total += masked_mean(logits, mask, -1, weights=2.0, axis_name=None).sum()
  running: RunningMean = RunningMean.empty((4,)).update(logits, axis=0)
  running = running.merge(running)
  total += optax.reductions.masked_count(logits) * running.mean().sum()
  with optax.patch("kl_divergence"):
    total += optax.kl_divergence(logits, logits).sum()
  report: Report = assert_mask_safe(
    optax.squared_error, logits, 2 * logits, where=mask[:, None], samples=2
  )
  assert report.cases > 0


if __name__ == "__main__":
  main()
