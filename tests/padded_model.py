"""A small model, on rows of very uneven lengths with NaN in the padding."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_masking as optax
from optax_masking.reductions import masked_mean

FEATURES, CLASSES, LONGEST = 3, 4, 5


def data(rows: int, dtype: str) -> tuple[jax.Array, jax.Array]:
  """Parameters and a batch, of features and, last, labels.

  More than the first third of it is padding, and some rows later on.
  """
  rng = np.random.default_rng(1)
  lengths = rng.choice([0, 1, 5], rows, p=[0.4, 0.4, 0.2])
  lengths[: 3 * rows // 8] = 0
  lengths[-rows // 8 :] = LONGEST
  batch = rng.normal(size=(rows, LONGEST, FEATURES + 1))
  batch[..., -1] = rng.integers(0, CLASSES, size=batch.shape[:-1])
  batch[np.arange(LONGEST) >= lengths[:, None]] = np.nan
  params = rng.normal(size=(FEATURES, CLASSES))
  return jnp.asarray(params, dtype), jnp.asarray(batch, dtype)


def losses(params: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The loss of each element, garbage included, and the mask."""
  mask = ~jnp.isnan(batch[..., 0])
  # NaN in the inputs would be the model's own to mask.
  x = jnp.where(mask[..., None], batch[..., :-1], 0) @ params
  x = jnp.where(mask[..., None], x, jnp.nan)
  labels = jnp.where(mask, batch[..., -1], -100).astype(int)
  loss = optax.softmax_cross_entropy_with_integer_labels(x, labels, where=mask)
  return jnp.where(mask, loss, jnp.nan), mask


def mean_loss(
  params: jax.Array,
  batch: jax.Array,
  count: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  return masked_mean(
    *losses(params, batch), denominator=count, axis_name=axis_name
  )
