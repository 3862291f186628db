"""A program that a type checker has to accept: every form of import, and use.

Run by a test, too, so that what is accepted works.
"""

import jax
import jax.numpy as jnp

import optax_masking as optax
import optax_masking.contrib
import optax_masking.losses
from optax_masking import adamw, losses, tree_utils
from optax_masking.contrib import muon
from optax_masking.losses import hinge_loss, softmax_cross_entropy
from optax_masking.reductions import RunningMean, masked_mean
from optax_masking.schedules import constant_schedule
from optax_masking.testing import Report, assert_mask_safe


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


def main() -> None:
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
  total: jax.Array = softmax_cross_entropy(logits, logits, where=mask).sum()
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
