"""Losses as training code has them, with and without mistakes in their masks.

More rows for the checks that `planted_faults.py` describes: masks of tokens and
of pixels with one number as the result, masks under any name and in any place,
masks that are derived from data, and steps of parameters and a batch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import planted_faults
from planted_faults import (
  Correct,
  Fault,
  fill_zeros,
  included,
  label_entry,
  mask,
  mean_of,
  normal,
  uniform,
)

import optax_masking as optax

FAULTS: list[Fault] = []
CORRECT: list[Correct] = []

fault = functools.partial(planted_faults.fault, table=FAULTS)
correct = functools.partial(planted_faults.correct, table=CORRECT)

# The data: three sequences of four tokens, with two features, and five outputs
# or classes. All sizes are different.
X, Y, LOGITS = normal(31, 3, 4, 2), normal(32, 3, 4, 5), normal(33, 3, 4, 5)
NUMBERS, OTHERS = normal(34, 3, 4), normal(35, 3, 4)
LABELS = np.array([[1, 3, 0, 4], [0, 2, 2, 1], [4, 1, 3, 2]], "int32")
RAGGED = mask("1101", "0110", "1000")
PADDED = mask("1110", "1000", "1100")
# As tokenizers and data loaders mark what is missing.
MARKED = np.where(PADDED, LABELS, -100).astype("int32")
GAPS = np.where(RAGGED, NUMBERS, np.nan).astype("float32")
LENGTHS = np.array([3, 1, 2], "int32")

# Two images of three by four pixels, with five channels.
IMAGES, TARGETS = normal(36, 2, 3, 4, 5), normal(37, 2, 3, 4, 5)
PIXEL_LABELS = np.arange(24, dtype="int32").reshape(2, 3, 4) % 5
PIXELS = np.stack([mask("1101", "0111", "1000"), mask("0010", "1111", "0000")])

PARAMS = {"w": normal(38, 2, 5), "b": normal(39, 5)}
LINE = {"w": normal(40, 2), "b": np.array(0.5, "float32")}

# With no more than these a check takes a second. It calls the loss once by
# itself, too.
BRIEF = {
  "derivatives": ("value", "vjp"),
  "transforms": ("jit",),
  "samples": 2,
}


def batch_of(**arrays):
  """A batch of sequences, with a mask of tokens unless there is another one."""
  return {"x": X, "mask": RAGGED, **arrays}


def linear(params, x):
  """A model of one layer."""
  return x @ params["w"] + params["b"]


def squares(predictions, targets, m):
  """The sum of squared errors of each token, 0 where masked."""
  p, t = fill_zeros(m[..., None], predictions, targets)
  return jnp.sum(jnp.square(p - t), -1)


def cross_entropies(logits, labels, m):
  """The cross entropy of each token, 0 where masked."""
  (z,) = fill_zeros(m[..., None], logits)
  (labels,) = fill_zeros(m, labels)
  return jnp.where(m, -label_entry(jax.nn.log_softmax(z), labels), 0)


# Correct: masks of tokens and pixels, with any result.


@correct(
  (normal(41, 5), normal(42, 5)), np.array([True, False, True] + [True] * 2)
)
def mean_of_a_column(predictions, targets, where=None):
  m = included(where, predictions)
  return mean_of(jnp.square(jnp.where(m, predictions - targets, 0)), m)


@correct((LOGITS, Y), RAGGED)
def mean_of_tokens(predictions, targets, where):
  return mean_of(squares(predictions, targets, where), where)


@correct((LOGITS, Y), RAGGED)
def mean_of_token_elements(predictions, targets, where):
  loss = squares(predictions, targets, where)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(where) * Y.shape[-1], 1)


@correct((LOGITS, LABELS), RAGGED, where_name="mask")
def perplexity_of_tokens(logits, labels, mask):
  mean = mean_of(cross_entropies(logits, labels, mask), mask)
  return jnp.where(jnp.any(mask), jnp.exp(mean), 0)


@correct((LOGITS, LABELS), RAGGED)
def mean_of_each_sequence(logits, labels, where):
  return mean_of(cross_entropies(logits, labels, where), where, -1)


@correct((LOGITS, LABELS), PADDED)
def sum_of_each_sequence(logits, labels, where):
  return jnp.sum(cross_entropies(logits, labels, where), -1)


@correct((LOGITS, Y), RAGGED[..., None])
def mask_of_tokens_with_an_axis_of_one(predictions, targets, where):
  p, t = fill_zeros(where, predictions, targets)
  return mean_of(jnp.sum(jnp.abs(p - t), -1, keepdims=True), where)


@correct((IMAGES, TARGETS), PIXELS)
def mean_of_pixels(images, targets, where):
  return mean_of(squares(images, targets, where), where)


@correct((IMAGES, TARGETS), PIXELS)
def mean_of_each_image(images, targets, where):
  return mean_of(squares(images, targets, where), where, (1, 2))


@correct((IMAGES, PIXEL_LABELS), PIXELS)
def cross_entropy_of_each_pixel(logits, labels, where):
  return cross_entropies(logits, labels, where)


@correct((np.moveaxis(IMAGES, -1, 1), np.moveaxis(TARGETS, -1, 1)), PIXELS)
def channels_first(images, targets, where):
  p, t = fill_zeros(where[:, None], images, targets)
  return mean_of(jnp.sum(jnp.square(p - t), 1), where)


@correct((IMAGES, TARGETS), IMAGES > -0.5)
def mean_of_channels_of_pixels(images, targets, where):
  p, t = fill_zeros(where, images, targets)
  return mean_of(jnp.square(p - t), where)


# Correct: losses of tokens that are scaled, and arrays whose sizes mislead.


@correct((NUMBERS, OTHERS), RAGGED)
def losses_of_sequences_for_their_mean(predictions, targets, where):
  """Their mean is that of all tokens, and their number is part of each."""
  p, t = fill_zeros(where, predictions, targets)
  loss = jnp.sum(jnp.square(p - t), -1) * len(p)
  return loss / jnp.maximum(jnp.sum(where), 1)


@correct((LOGITS, LABELS, normal(47, 4)), RAGGED)
def gains_of_as_many_features(logits, labels, gains, where):
  """As many gains as a sequence has tokens, by chance."""
  loss = mean_of(cross_entropies(logits, labels, where), where)
  return loss * jnp.sum(jnp.square(gains))


@correct(
  (NUMBERS, OTHERS, np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 0, 1]])),
  RAGGED,
  axes={"order": None},
)
def matched_by_indices(predictions, targets, order, where):
  """Without some elements the indices of the others would be wrong."""
  p, t, m = (
    jnp.take_along_axis(x, order, -1) for x in (predictions, targets, where)
  )
  p, t = fill_zeros(m, p, t)
  return mean_of(jnp.square(p - t), m)


@correct((NUMBERS, OTHERS), RAGGED, output="loss")
def metric_of_nothing(predictions, targets, where):
  """A metric beside the loss may be 0/0."""
  p, t = fill_zeros(where, predictions, targets)
  error = jnp.square(p - t)
  metric = jnp.sum(error) / jnp.sum(where)
  return {"loss": mean_of(error, where), "metric": metric}


@correct(
  (NUMBERS, OTHERS), mask("1111", "1100", "1000"), masks=("given", "padded")
)
def sorted_sequences_along_the_first_axis(predictions, targets, where):
  """Counts by position, which must not grow: the rows are the positions."""
  p, t = fill_zeros(where, predictions, targets)
  loss = mean_of(jnp.square(p - t), where)
  counts = jnp.sum(where, -1)
  return jnp.where(jnp.all(counts[1:] <= counts[:-1]), loss, jnp.nan)


# Correct: what arrays of JAX can do, and those of NumPy can't.


@correct(
  (jnp.asarray(NUMBERS), jnp.asarray(OTHERS)),
  jnp.asarray(PADDED),
  masks=("given", "padded", "none"),
)
def without_the_first_token(predictions, targets, where):
  where = where.at[:, 0].set(False)
  p, t = fill_zeros(where, predictions, targets)
  return jnp.sum(jnp.square(p - t), -1)


@correct((jnp.asarray(NUMBERS), jnp.asarray(OTHERS)), jnp.asarray(RAGGED))
def loop_over_steps(predictions, targets, where):
  def step(i, total):
    error = jnp.where(where[:, i], predictions[:, i] - targets[:, i], 0)
    return total + jnp.square(error)

  start = jnp.zeros(predictions.shape[0], predictions.dtype)
  return jax.lax.fori_loop(0, predictions.shape[1], step, start)


@correct(
  (jnp.asarray(LOGITS), jnp.asarray(MARKED), jnp.asarray(uniform(43, 5))),
  jnp.asarray(PADDED),
)
def weights_of_marked_labels(logits, labels, weights, where):
  w = jnp.where(where, weights[labels], 0)
  loss = cross_entropies(logits, labels, where)
  return jnp.sum(w * loss) / jnp.where(jnp.any(where), jnp.sum(w), 1)


@correct(
  (jnp.asarray(NUMBERS), jnp.asarray(OTHERS)),
  jnp.asarray(RAGGED),
  derivatives=("value", "jvp"),
  untried=("honesty",),
)
def loop_up_to_the_last_step(predictions, targets, where):
  """The number of steps is known at run time alone: it has no reverse mode."""

  def step(i, total):
    error = jnp.where(where[:, i], predictions[:, i] - targets[:, i], 0)
    return total + jnp.square(error)

  steps = jnp.arange(1, predictions.shape[1] + 1)
  last = jnp.max(jnp.where(jnp.any(where, 0), steps, 0))
  start = jnp.zeros(predictions.shape[0], predictions.dtype)
  return jax.lax.fori_loop(0, last, step, start)


# Correct: the place of the mask.


@correct((LOGITS, Y), RAGGED, where_name="mask")
def mask_first(mask, predictions, targets):
  return mean_of(squares(predictions, targets, mask), mask)


@correct((LOGITS, Y, np.float32(0.7)), RAGGED)
def mask_in_the_middle(predictions, targets, where, delta):
  p, t = fill_zeros(where[..., None], predictions, targets)
  return jnp.sum(optax.huber_loss(p, t, delta=delta), -1)


@correct((LOGITS, Y), RAGGED, where_name="mask", power=3)
def keyword_only_mask(predictions, targets, *, mask, power=2):
  p, t = fill_zeros(mask[..., None], predictions, targets)
  return mean_of(jnp.sum(jnp.abs(p - t) ** power, -1), mask)


@correct((LOGITS, LABELS), RAGGED)
def positional_only_mask(logits, labels, where, /):
  return cross_entropies(logits, labels, where)


@correct((LOGITS, LABELS), RAGGED)
def positional_only_mask_in_the_middle(logits, where, labels, /):
  return jnp.sum(cross_entropies(logits, labels, where), -1)


class WithSmoothing:
  """A loss as an object with options."""

  def __init__(self, smoothing):
    self.smoothing = smoothing

  def __call__(self, logits, labels, where):
    (z,) = fill_zeros(where[..., None], logits)
    log_p = jax.nn.log_softmax(z)
    uniform_loss = jnp.where(where, -jnp.mean(log_p, -1), 0)
    loss = cross_entropies(logits, labels, where)
    loss = (1 - self.smoothing) * loss + self.smoothing * uniform_loss
    return mean_of(loss, where)


def _scaled(scale, predictions, where, targets, *, axis):
  return scale * jnp.sum(squares(predictions, targets, where), axis)


CORRECT += [
  Correct("loss_object", WithSmoothing(0.1), (LOGITS, LABELS), RAGGED),
  Correct(
    "partial_with_a_mask_in_the_middle",
    functools.partial(_scaled, 0.5, axis=-1),
    (LOGITS, Y),
    RAGGED,
  ),
  Correct(
    "partial_of_a_keyword",
    functools.partial(optax.softmax_cross_entropy, axis=-1),
    (LOGITS, np.abs(Y)),
    RAGGED,
  ),
]


# Correct: the next token.


@correct((LOGITS, LABELS), PADDED, masks=("given", "padded"))
def next_token(logits, tokens, where):
  """With other masks a loss may be that of a token after a masked one."""
  m = where[:, 1:]
  return mean_of(cross_entropies(logits[:, :-1], tokens[:, 1:], m), m)


@correct((LOGITS, LABELS), PADDED, masks=("given", "padded"))
def next_token_of_each_sequence(logits, tokens, where):
  m = where[:, 1:]
  loss = cross_entropies(logits[:, :-1], tokens[:, 1:], m)
  return mean_of(loss, m, -1)


@correct(
  (LOGITS, np.where(mask("0111", "0011", "0110"), LABELS, -100)),
  lambda labels: np.pad(labels[:, 1:] != -100, ((0, 0), (0, 1))),
)
def next_token_after_a_prompt(logits, labels):
  """The mask is that of the labels, shifted by one."""
  labels = labels[:, 1:]
  m = labels != -100
  return mean_of(cross_entropies(logits[:, :-1], labels, m), m)


@correct(
  (LOGITS, MARKED),
  lambda labels: (labels != -100).astype("float32"),
  numeric_where=True,
)
def derived_mask_in_numbers(logits, labels):
  """The mask that is derived has zeros and ones."""
  m = labels != -100
  return mean_of(cross_entropies(logits, labels, m), m)


# Correct: random numbers. They depend on the shape of the data.


@correct((LOGITS, Y, jax.random.key(0)), RAGGED, untried=("compaction",))
def dropout(predictions, targets, key, where):
  kept = jax.random.bernoulli(key, 0.75, predictions.shape)
  p = jnp.where(kept & where[..., None], predictions / 0.75, 0)
  return mean_of(squares(p, targets, where), where)


@correct(
  (PARAMS, batch_of(labels=LABELS), jax.random.PRNGKey(1)),
  "batch['mask']",
  untried=("compaction",),
)
def dropout_of_a_model(params, batch, key):
  """With a key as a pair of integers."""
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
  return mean_of(cross_entropies(linear(params, x), batch["labels"], m), m)


# Correct: infinity as a constant.


@correct((LOGITS, Y), LOGITS > -0.7)
def attention_with_infinite_fill(scores, values, where):
  any_left = jnp.any(where, -1, keepdims=True)
  z = jnp.where(where, scores, jnp.where(any_left, -jnp.inf, 0))
  (v,) = fill_zeros(where, values)
  return jnp.sum(jax.nn.softmax(z) * v, -1)


@correct((NUMBERS, planted_faults.distributions(44, 3, 4)), RAGGED)
def cross_entropy_with_infinite_fill(logits, labels, where=None):
  m = included(where, logits)
  z = jnp.where(
    m, logits, jnp.where(jnp.any(m, -1, keepdims=True), -jnp.inf, 0)
  )
  log_p = jnp.where(m, jax.nn.log_softmax(z), 0)
  return -jnp.sum(jnp.where(m, labels, 0) * log_p, -1)


@correct((uniform(45, 3, 4),), RAGGED)
def largest_error(errors, where=None):
  return jnp.max(errors, -1, where=included(where, errors), initial=0.0)


# Correct: a NaN in the data that the loss drops, also without a mask.


@correct((NUMBERS, OTHERS), RAGGED)
def mean_of_known_targets(predictions, targets, where=None):
  m = included(where, targets) & ~jnp.isnan(targets)
  p, t = fill_zeros(m, predictions, targets)
  return mean_of(jnp.square(p - t), m)


@correct((NUMBERS, OTHERS), RAGGED)
def nanmean_of_rows(predictions, targets, where=None):
  m = included(where, targets)
  m &= ~jnp.isnan(predictions - targets)
  p, t = fill_zeros(m, predictions, targets)
  return mean_of(jnp.abs(p - t), m, -1)


# Correct: training steps.


@correct((PARAMS, batch_of(y=Y)), "batch['mask']")
def regression_step(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(squares(linear(params, x), batch["y"], m), m)


@correct((PARAMS, batch_of(labels=LABELS)), "batch['mask']")
@jax.jit
def compiled_step(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(cross_entropies(linear(params, x), batch["labels"], m), m)


class TokenBatch(NamedTuple):
  """A batch as a tuple of names."""

  x: Any
  labels: Any
  mask: Any


@dataclasses.dataclass
class PlainBatch:
  """A batch that JAX does not take for a tree."""

  x: Any
  labels: Any
  mask: Any


@correct((PARAMS, TokenBatch(X, LABELS, RAGGED)), "batch.mask")
def step_of_a_named_tuple(params, batch):
  (x,) = fill_zeros(batch.mask[..., None], batch.x)
  loss = cross_entropies(linear(params, x), batch.labels, batch.mask)
  return mean_of(loss, batch.mask)


@correct((PARAMS, PlainBatch(X, LABELS, PADDED)), "batch.mask")
def step_of_a_dataclass(params, batch):
  (x,) = fill_zeros(batch.mask[..., None], batch.x)
  loss = cross_entropies(linear(params, x), batch.labels, batch.mask)
  return jnp.sum(loss, -1)


@correct(
  (PARAMS, (X, Y), {"attention": PADDED}),
  "extras['attention']",
)
def mask_beside_the_batch(params, batch, extras):
  x, y = batch
  (x,) = fill_zeros(extras["attention"][..., None], x)
  return squares(linear(params, x), y, extras["attention"])


@correct(
  (PARAMS, batch_of(y=Y, mask=RAGGED.astype("float32"))),
  "batch['mask']",
  numeric_where=True,
)
def step_with_a_float_mask(params, batch):
  mask = batch["mask"]
  x = jnp.where(mask[..., None] > 0, batch["x"], 0)
  loss = squares(linear(params, x), batch["y"], mask > 0)
  return jnp.sum(loss * mask) / jnp.maximum(jnp.sum(mask), 1)


@correct((LOGITS, LABELS), RAGGED.astype("int32"), numeric_where=True)
def integer_mask(logits, labels, where):
  loss = cross_entropies(logits, labels, where == 1)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(where), 1)


@correct(
  (PARAMS, batch_of(y=Y)), "batch['mask']", note="a penalty of weights alone"
)
def step_with_weight_decay(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  decay = sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))
  return mean_of(squares(linear(params, x), batch["y"], m), m) + 0.01 * decay


@correct(
  ({"kernel": normal(46, 2, 6, 7)}, batch_of(y=normal(47, 3, 4, 7))),
  "batch['mask']",
)
def step_of_several_heads(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  heads = jnp.einsum("btd,dhk->bthk", x, params["kernel"])
  return mean_of(squares(jnp.mean(jnp.tanh(heads), -2), batch["y"], m), m)


# As many features as sequences, and as many outputs as tokens.
@correct(
  (
    {"w": normal(48, 3, 4)},
    batch_of(x=normal(49, 3, 4, 3), y=normal(50, 3, 4, 4)),
  ),
  "batch['mask']",
)
def step_with_parameters_of_the_size_of_the_mask(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(squares(x @ params["w"], batch["y"], m), m)


@correct(
  (normal(48, 3, 4), normal(51, 3), normal(49, 3, 4, 3), normal(50, 3, 4, 4)),
  RAGGED,
  axes={"theta": None, "scales": None},
)
def parameters_by_another_name(theta, scales, x, y, where):
  (x,) = fill_zeros(where[..., None], x)
  return squares((x * scales) @ theta, y, where)


@correct((LINE, batch_of(y=NUMBERS)), "batch['mask']")
def loss_of_each_token(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return jnp.square(jnp.where(m, linear(params, x) - batch["y"], 0))


@correct((LINE, batch_of(y=NUMBERS)), "batch['mask']")
def loss_of_each_example(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  errors = jnp.where(m, linear(params, x) - batch["y"], 0)
  return mean_of(jnp.square(errors), m, -1)


@correct(
  (
    PARAMS,
    {"x": X[:, 0], "y": Y[:, 0], "valid": np.array([True, False, True])},
  ),
  "batch['valid']",
)
def step_with_a_mask_of_examples(params, batch):
  m = batch["valid"]
  (x,) = fill_zeros(m[:, None], batch["x"])
  return mean_of(squares(linear(params, x), batch["y"], m), m)


@correct(
  (
    {"w": normal(52, 5, 7)},
    {"x": IMAGES, "labels": PIXEL_LABELS, "seen": PIXELS},
  ),
  "batch['seen']",
)
def step_of_segmentation(params, batch):
  m = batch["seen"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(cross_entropies(x @ params["w"], batch["labels"], m), m)


@correct((PARAMS, batch_of(labels=LABELS)), "batch['mask']", has_aux=True)
def step_with_metrics(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  logits = linear(params, x)
  right = m & (jnp.argmax(logits, -1) == batch["labels"])
  loss = mean_of(cross_entropies(logits, batch["labels"], m), m)
  return loss, {"accuracy": mean_of(right, m), "tokens": jnp.sum(m)}


@correct((PARAMS, batch_of(y=Y)), "batch['mask']", output="loss")
def step_with_several_losses(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  error = mean_of(squares(linear(params, x), batch["y"], m), m)
  decay = jnp.sum(jnp.square(params["w"]))
  return {"loss": error + 0.1 * decay, "error": error, "decay": decay}


@correct(
  (PARAMS, batch_of(y=Y)),
  "batch['mask']",
  output=lambda losses: losses["errors"].sum(-1),
)
def step_with_a_loss_inside(params, batch):
  (x,) = fill_zeros(batch["mask"][..., None], batch["x"])
  return {"errors": squares(linear(params, x), batch["y"], batch["mask"])}


@correct(
  (PARAMS, {"x": X, "labels": MARKED}), lambda batch: batch["labels"] != -100
)
def step_with_marked_labels(params, batch):
  m = batch["labels"] != -100
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(cross_entropies(linear(params, x), batch["labels"], m), m)


@correct((LOGITS, MARKED), lambda labels: labels >= 0)
def loss_of_marked_labels(logits, labels):
  return cross_entropies(logits, labels, labels >= 0)


@correct(
  (PARAMS, {"x": X, "y": Y, "lengths": LENGTHS}),
  lambda batch: jnp.arange(4) < batch["lengths"][:, None],
)
def step_with_lengths(params, batch):
  m = jnp.arange(batch["x"].shape[1]) < batch["lengths"][:, None]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return mean_of(squares(linear(params, x), batch["y"], m), m)


@correct((LINE, {"x": X, "y": GAPS}), lambda batch: ~jnp.isnan(batch["y"]))
def step_with_missing_targets(params, batch):
  m = ~jnp.isnan(batch["y"])
  (x,) = fill_zeros(m[..., None], batch["x"])
  error = jnp.where(m, linear(params, x) - jnp.where(m, batch["y"], 0), 0)
  return mean_of(jnp.square(error), m)


def _with_parameters(params):
  def closure(x, labels, where=None):
    m = included(where, labels)
    (x,) = fill_zeros(m[..., None], x)
    return mean_of(cross_entropies(linear(params, x), labels, m), m)

  return closure


correct((X, LABELS), RAGGED)(_with_parameters(PARAMS))


@correct(
  (
    {
      "w1": normal(53, 2, 6),
      "b1": normal(54, 6),
      "w2": normal(55, 6),
      "b2": np.array(0.1, "float32"),
    },
    batch_of(y=NUMBERS),
  ),
  "batch['mask']",
)
def step_of_two_layers(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
  error = jnp.where(m, hidden @ params["w2"] + params["b2"] - batch["y"], 0)
  return mean_of(jnp.square(error), m)


EMBEDDED = {"embedding": normal(56, 7, 2), "w": normal(57, 2, 5)}
PROMPTED = {
  "tokens": np.array([[6, 0, 3, 5], [2, 2, 1, 4], [5, 3, 0, 6]], "int32"),
  "labels": LABELS,
  "loss_mask": mask("0011", "0111", "0001"),
}


@correct((EMBEDDED, PROMPTED), "batch['loss_mask']", note="never replaces")
def step_with_an_embedding(params, batch):
  """The mask is one of losses: it does not keep the model from its tokens."""
  m = batch["loss_mask"]
  logits = params["embedding"][batch["tokens"]] @ params["w"]
  return mean_of(cross_entropies(logits, batch["labels"], m), m)


# Without its prompt a sequence is another one.
@correct(
  (EMBEDDED, PROMPTED),
  "batch['loss_mask']",
  note="never replaces",
  skip=("compaction",),
)
def step_that_reads_a_prompt(params, batch):
  """Each token sees those before it, also the masked ones."""
  m = batch["loss_mask"]
  states = jnp.cumsum(params["embedding"][batch["tokens"]], 1)
  logits = jnp.tanh(states) @ params["w"]
  return mean_of(cross_entropies(logits, batch["labels"], m), m)


@correct((PARAMS, batch_of(y=Y)), "batch['mask']")
def step_in_small_batches(params, batch):
  """Sums and counts are gathered, and divided once."""

  def step(carry, row):
    total, count = carry
    (x,) = fill_zeros(row["mask"][..., None], row["x"])
    loss = squares(linear(params, x), row["y"], row["mask"])
    return (total + jnp.sum(loss), count + jnp.sum(row["mask"])), None

  start = (jnp.zeros((), batch["x"].dtype), 0)
  (total, count), _ = jax.lax.scan(step, start, batch)
  return total / jnp.maximum(count, 1)


@correct((PARAMS, batch_of(labels=LABELS)), "batch['mask']")
def step_with_vmap(params, batch):
  """A loss is written for one sequence, and its mean is of those not empty."""

  def of_sequence(x, labels, m):
    (x,) = fill_zeros(m[..., None], x)
    return mean_of(cross_entropies(linear(params, x), labels, m), m)

  m = batch["mask"]
  loss = jax.vmap(of_sequence)(batch["x"], batch["labels"], m)
  return mean_of(loss, jnp.any(m, -1))


@correct((PARAMS, batch_of(y=Y, weights=uniform(58, 3))), "batch['mask']")
def step_with_weights_of_examples(params, batch):
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  loss = jnp.sum(squares(linear(params, x), batch["y"], m), -1)
  weights = jnp.where(jnp.any(m, -1), batch["weights"], 0)
  total = jnp.where(jnp.any(m), jnp.sum(weights), 1)
  return jnp.sum(weights * loss) / total


@correct((PARAMS, batch_of(y=Y)), "batch['mask']")
def step_with_a_loss_of_optax(params, batch):
  m = batch["mask"][..., None]
  x = jnp.where(m, batch["x"], 0)
  loss = optax.squared_error(linear(params, x), batch["y"], where=m, axis=-1)
  return mean_of(loss, batch["mask"])


# Faults: denominators.


@fault((NUMBERS, OTHERS), RAGGED, ("compaction",))
def at_least_two(predictions, targets, where):
  """One element alone has half of its loss."""
  p, t = fill_zeros(where, predictions, targets)
  return jnp.sum(jnp.square(p - t)) / jnp.maximum(jnp.sum(where), 2)


@fault((LOGITS, Y), RAGGED, ("compaction",))
def rectangle_of_tokens(predictions, targets, where):
  """Sequences times the longest length, as if none were shorter."""
  count = jnp.sum(jnp.any(where, -1)) * jnp.max(jnp.sum(where, -1))
  return jnp.sum(squares(predictions, targets, where)) / jnp.maximum(count, 1)


@fault((LOGITS, Y), RAGGED, ("compaction",))
def mean_of_all_tokens(predictions, targets, where):
  """The mean counts masked tokens."""
  return jnp.mean(squares(predictions, targets, where))


@fault((IMAGES, TARGETS), PIXELS, ("compaction",))
def mean_of_all_pixels(images, targets, where):
  """The mean of an image counts masked pixels."""
  return jnp.mean(squares(images, targets, where), (1, 2))


@fault((PARAMS, batch_of(y=Y)), "batch['mask']", ("compaction",))
def step_over_all_tokens(params, batch):
  """The number of tokens of a batch is its size."""
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  return jnp.sum(squares(linear(params, x), batch["y"], m)) / m.size


@fault(
  (PARAMS, {"x": X, "labels": MARKED}),
  lambda batch: batch["labels"] != -100,
  ("compaction",),
)
def marked_labels_over_all_tokens(params, batch):
  """Tokens without a label count in the mean."""
  m = batch["labels"] != -100
  (x,) = fill_zeros(m[..., None], batch["x"])
  return jnp.mean(cross_entropies(linear(params, x), batch["labels"], m))


@fault((PARAMS, batch_of(y=Y)), "batch['mask']", ("empty",))
def all_tokens_if_none_is_included(params, batch):
  """An empty batch counts all of its tokens, whose data are zeros."""
  m = batch["mask"]
  x, y = fill_zeros(m[..., None], batch["x"], batch["y"])
  counted = jnp.where(jnp.any(m), m, True)
  loss = jnp.sum(jnp.square(linear(params, x) - y), -1)
  return jnp.sum(jnp.where(counted, loss, 0)) / jnp.sum(counted)


# Faults: gradients of parameters.


@fault(
  (PARAMS, batch_of(y=Y)),
  "batch['mask']",
  ("invariance", "zero_gradient"),
  "batch['y']",
)
def error_selected_at_the_end(params, batch):
  """A target of NaN makes the gradient of the bias 0 times NaN."""
  m = batch["mask"]
  (x,) = fill_zeros(m[..., None], batch["x"])
  loss = jnp.sum(jnp.square(linear(params, x) - batch["y"]), -1)
  return mean_of(jnp.where(m, loss, 0), m)


@fault(
  (LINE, {"x": X, "y": GAPS}),
  lambda batch: ~jnp.isnan(batch["y"]),
  ("invariance", "zero_gradient", "clean_arithmetic"),
)
def missing_targets_selected_at_the_end(params, batch):
  """The same, of a mask that the loss makes of its targets."""
  m = ~jnp.isnan(batch["y"])
  (x,) = fill_zeros(m[..., None], batch["x"])
  loss = jnp.square(linear(params, x) - batch["y"])
  return mean_of(jnp.where(m, loss, 0), m)


@fault((PARAMS, batch_of(y=Y)), "batch['mask']", ("invariance",), "batch['x']")
def inputs_not_masked(params, batch):
  """The gradient of the weights is an input of NaN times 0."""
  m = batch["mask"]
  return mean_of(squares(linear(params, batch["x"]), batch["y"], m), m)


@fault((PARAMS, batch_of(y=Y)), "batch['mask']", ("invariance",), "batch['x']")
def step_with_statistics_of_all(params, batch):
  """Masked tokens are in the mean that is subtracted."""
  m = batch["mask"]
  x = jnp.where(m[..., None], batch["x"] - jnp.mean(batch["x"], (0, 1)), 0)
  return mean_of(squares(linear(params, x), batch["y"], m), m)


@fault(
  (PARAMS, batch_of(y=Y, mask=RAGGED.astype("float32"))),
  "batch['mask']",
  ("invariance", "zero_gradient"),
  "batch['y']",
  numeric_where=True,
)
def product_with_a_float_mask(params, batch):
  """0 times a NaN is NaN."""
  mask = batch["mask"]
  x = jnp.where(mask[..., None] > 0, batch["x"], 0)
  loss = jnp.sum(jnp.abs(linear(params, x) - batch["y"]), -1)
  return jnp.sum(loss * mask) / jnp.maximum(jnp.sum(mask), 1)


# Faults: labels, neighbours, random numbers.


@fault((LOGITS, MARKED, uniform(43, 5)), PADDED, ("invariance",), "labels")
def weights_taken_by_marked_labels(logits, labels, weights, where):
  """Out of range jnp.take takes NaN, and 0 times that is NaN."""
  share = where.astype(logits.dtype) / jnp.maximum(jnp.sum(where), 1)
  loss = cross_entropies(logits, labels, where)
  return jnp.sum(share * jnp.take(weights, labels) * loss)


@fault((NUMBERS, OTHERS), RAGGED, ("invariance",), "predictions")
def smoothness_of_neighbours(predictions, targets, where):
  """A token is compared with the one before it, which may be masked."""
  p, t = fill_zeros(where, predictions, targets)
  steps = jnp.where(where[:, 1:], p[:, 1:] - predictions[:, :-1], 0)
  return jnp.square(p - t).at[:, 1:].add(jnp.square(steps))


@fault((LOGITS, Y), LOGITS > -0.7, ("invariance",), "values")
def values_of_attention(scores, values, where):
  """A weight of 0 times a value of NaN."""
  m = where | ~jnp.any(where, -1, keepdims=True)
  p = jax.nn.softmax(jnp.where(m, jnp.where(where, scores, 0), -jnp.inf))
  return jnp.where(jnp.any(where, -1), jnp.sum(p * values, -1), 0)


@fault(
  (LOGITS, Y, jax.random.key(0)),
  RAGGED,
  ("invariance", "zero_gradient"),
  "targets",
)
def dropout_without_masked_targets(predictions, targets, key, where):
  """Compaction can't be tried, other clauses can."""
  kept = jax.random.bernoulli(key, 0.75, predictions.shape)
  p = jnp.where(kept & where[..., None], predictions / 0.75, 0)
  loss = jnp.sum(jnp.square(p - targets), -1)
  return mean_of(jnp.where(where, loss, 0), where)


@fault((LOGITS, Y, jax.random.key(0)), RAGGED, ("empty", "clean_arithmetic"))
def dropout_of_an_empty_batch(predictions, targets, key, where):
  """0/0 with nothing included, where compaction can't be tried."""
  kept = jax.random.bernoulli(key, 0.75, predictions.shape)
  p = jnp.where(kept & where[..., None], predictions / 0.75, 0)
  return jnp.sum(squares(p, targets, where)) / jnp.sum(where)


@fault(
  (IMAGES[:, :, :3], TARGETS[:, :, :3]),
  PIXELS[:, :, :3],
  ("invariance",),
  "images",
)
def pixels_transposed(images, targets, where):
  """As many rows as columns: a transposed mask fits, too."""
  return squares(images, targets, jnp.swapaxes(where, 1, 2))


# What a review of the checks found.


@fault(
  (X, GAPS), lambda gaps: ~np.isnan(gaps), ("invariance", "zero_gradient"), "x"
)
def mask_by_numpy(x, gaps):
  """The inputs are not masked; the mask is derived by a function of NumPy."""
  m = ~jnp.isnan(gaps)
  error = jnp.where(m, jnp.sum(x, -1) - jnp.where(m, gaps, 0), 0)
  return jnp.sum(error**2 + 0 * jnp.sum(x**2, -1))


@correct((NUMBERS, np.ones(1, "float32")), RAGGED)
def shared_temperature(scores, temperature, where):
  """A parameter of one element is shared, and is no row of one example."""
  x = jnp.where(where, scores, 0) * temperature
  return jnp.sum(jnp.where(where, x, 0) ** 2)


@correct((NUMBERS,), RAGGED)
def squares_with_their_axis(x, where):
  """The result keeps the axis that is reduced."""
  return jnp.sum(jnp.where(where, x, 0) ** 2, -1, keepdims=True)


@correct((NUMBERS, np.int64(5)), RAGGED)
def sizes_of_numpy(x, size, where):
  """A number of NumPy is the size of an array."""
  grid = jnp.arange(size, dtype=x.dtype)
  return jnp.sum(jnp.where(where, x, 0)[..., None] * grid)


@correct((NUMBERS,), RAGGED.astype("float64"), numeric_where=True)
def mask_in_float64(x, where):
  """The mask is what `np.ones` gives."""
  return jnp.sum(jnp.where(where != 0, x, 0) ** 2)


@correct(
  ({"x": NUMBERS, "labels": MARKED, "length": LENGTHS},),
  lambda batch: (
    (batch["labels"] >= 0) & (jnp.arange(4) < batch["length"][:, None])
  ),
)
def mask_of_labels_and_lengths(batch):
  """Both decide which tokens count."""
  m = (batch["labels"] >= 0) & (jnp.arange(4) < batch["length"][:, None])
  x = jnp.where(m, batch["x"], 0)
  return jnp.sum(jnp.where(m, (x - jnp.where(m, batch["labels"], 0)) ** 2, 0))


# What a second review found.


_ATTENTION = {
  **{f"w_{name}": normal(60 + i, 4, 2) / 2 for i, name in enumerate("qkv")},
  **{f"b_{name}": np.zeros(2, "float32") for name in "qkv"},
}


@correct(
  (_ATTENTION, normal(63, 3, 5, 4), normal(64, 3, 5)),
  np.arange(5) < np.array([[5], [2], [3]]),
  axes={"params": None},
)
def attention_with_a_bias_of_keys(params, x, targets, where):
  """The gradient of the bias is 0 but for rounding: a softmax ignores it."""
  (x,) = fill_zeros(where[..., None], x)
  q, k, v = (x @ params[f"w_{name}"] + params[f"b_{name}"] for name in "qkv")
  scores = jnp.where(where[:, None], q @ jnp.swapaxes(k, 1, 2), -1e9)
  predictions = jnp.sum(jax.nn.softmax(scores) @ v, -1)
  error = jnp.where(where, predictions - jnp.where(where, targets, 0), 0)
  return mean_of(jnp.square(error), where)


@correct(
  (normal(53, 3, 2, 5),), normal(54, 3, 2, 5) > -1, masks=("given", "none")
)
def preferred_answers(scores, where):
  """An axis of two, the preferred answer and the other one."""
  chosen, rejected = jnp.moveaxis(jnp.where(where, scores, 0).sum(-1), 1, 0)
  m = jnp.any(where, (1, 2))
  return mean_of(jnp.where(m, jax.nn.softplus(rejected - chosen), 0), m)


@fault(
  (normal(56, 3, 5), normal(57, 3, 5)),
  mask("11010", "10111", "11000"),
  ("compaction",),
)
def at_least_the_batch_size(predictions, targets, where):
  """With fewer elements than rows the loss is too small."""
  p, t = fill_zeros(where, predictions, targets)
  count = jnp.maximum(jnp.sum(where), len(p))
  return jnp.sum(jnp.square(p - t)) / count


@jax.custom_vjp
def _sum_of_squares(x, m):
  return jnp.sum(jnp.where(m, x**2 + 0 * x, 0))


_sum_of_squares.defvjp(
  lambda x, m: (_sum_of_squares(x, m), (x, m)),
  lambda kept, t: (jnp.where(kept[1], 2 * t * kept[0], 0), None),
)


@fault((NUMBERS, OTHERS), RAGGED, ("clean_arithmetic",))
def infinity_in_a_backward_pass_by_hand(predictions, targets, where):
  """Zero times the infinity that fills, in a loss without forward mode."""
  error = jnp.where(where, predictions - targets, -jnp.inf)
  return _sum_of_squares(error, where)


@fault((NUMBERS,), RAGGED, ("clean_arithmetic",), masks=("elements", "rows"))
def infinity_times_no_weight(x, where):
  """XLA makes a select of the product, and JAX by itself a NaN."""
  filled = jnp.where(where, x, jnp.inf) * where.astype(x.dtype)
  return jnp.sum(jnp.where(where, filled, 0) ** 2)


_SCORES = normal(55, 3, 5)


@fault((_SCORES, LABELS[:, 0]), _SCORES > -1, ("masked_label",), "labels")
def least_number_for_masked_classes(logits, labels, where):
  """An example whose own class is masked has the largest loss."""
  filled = jnp.where(where, logits, jnp.finfo(jnp.float32).min)
  loss = -label_entry(jax.nn.log_softmax(filled), labels)
  return jnp.where(jnp.any(where, -1), loss, 0)
