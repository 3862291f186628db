"""Small losses with known mistakes in their masks, and others without any.

They test the checks of `optax_masking.testing`: each of `FAULTS` has to be
found, with the clause that it breaks and the argument that is at fault, and
nothing may be found in any of `CORRECT`.

Without a mask all are ordinary losses. The docstring of a fault describes the
mistake.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Fault:
  """A loss with a mistake.

  Attributes:
    name: The name of the function.
    loss: The function.
    args: Its positional arguments.
    where: Its mask, as an array, by its name or as a function.
    clauses: The report has to name at least one of these clauses.
    argument: The argument that the report has to name, None if it is the mask
      or a denominator that is wrong.
    options: Further keywords of the check.
  """

  name: str
  loss: Callable[..., Any]
  args: tuple[Any, ...]
  where: Any
  clauses: tuple[str, ...]
  argument: str | None
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Correct:
  """A loss that keeps the mask contract.

  Attributes:
    name: The name of the function.
    loss: The function.
    args: Its positional arguments.
    where: Its mask, as an array, by its name or as a function.
    options: Further keywords of the check, or of the loss.
    untried: The clauses that can't be tried on it, and have to be reported so.
    note: A part of a note that the report has to have.
  """

  name: str
  loss: Callable[..., Any]
  args: tuple[Any, ...]
  where: Any
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  untried: tuple[str, ...] = ()
  note: str = ""


FAULTS: list[Fault] = []
CORRECT: list[Correct] = []


def fault(args, where, clauses, argument=None, *, table=FAULTS, **options):
  """Adds the decorated loss to `FAULTS`, or to another table."""

  def add(loss):
    name = loss.__name__
    table.append(Fault(name, loss, args, where, clauses, argument, options))
    return loss

  return add


def correct(args, where, *, table=CORRECT, untried=(), note="", **options):
  """Adds the decorated loss to `CORRECT`, or to another table."""

  def add(loss):
    name = loss.__name__
    table.append(Correct(name, loss, args, where, options, untried, note))
    return loss

  return add


# The data: four examples of five classes or features, as a rule.


def normal(seed, *shape):
  """Numbers of either sign."""
  return np.random.default_rng(seed).normal(size=shape).astype("float32")


def uniform(seed, *shape):
  """Numbers in (0.1, 0.9)."""
  rng = np.random.default_rng(seed)
  return rng.uniform(0.1, 0.9, size=shape).astype("float32")


def distributions(seed, *shape):
  """Positive numbers with a sum of 1 along the last axis."""
  x = uniform(seed, *shape)
  return x / x.sum(-1, keepdims=True)


def mask(*rows):
  """A mask from rows of zeros and ones."""
  return np.array([[c == "1" for c in row] for row in rows])


PREDICTIONS, TARGETS, LOGITS = (normal(seed, 4, 5) for seed in (1, 2, 3))
PAIR = (PREDICTIONS, TARGETS)
PROBABILITIES, LABELS = uniform(4, 4, 5), distributions(5, 4, 5)
BINARY = np.array([[0, 1, 1, 0, 1]] * 4, "float32")
INDEX = np.array([1, 2, 3, 4], "int32")
WEIGHTS = uniform(6, 4)
VECTORS, OTHERS = normal(7, 4, 3), normal(8, 4, 3)

# Sequences: three of two tokens of a vocabulary of four.
TOKEN_LOGITS = normal(9, 3, 2, 4)
TOKENS = np.array([[1, 3], [0, 2], [2, 1]], "int32")

EXAMPLES = np.array([True, False, True, True])
ELEMENTS = mask("11010", "00000", "10111", "01101")
TOKEN_MASK = mask("11", "10", "00")


# Helpers of faults and of correct losses.


def included(where, x):
  """The mask in the shape of the data, all True without one."""
  return jnp.broadcast_to(True if where is None else where, jnp.shape(x))


def fill_zeros(m, *arrays):
  """The arrays with 0 where they are masked."""
  return [jnp.where(m, x, 0) for x in arrays]


def masked_squares(predictions, targets, m):
  """Squared errors, 0 where masked. There is no fault in it."""
  p, t = fill_zeros(m, predictions, targets)
  return jnp.square(p - t)


def mean_of(values, m, axis=None):
  """The mean of included values, 0 without any. Masked values have to be 0."""
  return jnp.sum(values, axis) / jnp.maximum(jnp.sum(m, axis), 1)


def label_entry(x, labels):
  """The entry of each example that its integer label names."""
  labels = jnp.expand_dims(labels, -1)
  return jnp.take_along_axis(x, labels, -1, mode="clip")[..., 0]


def masked_max(x, m):
  """The largest included entry along the last axis, 0 if there is none."""
  # A fill below all that is included: a tie would share the gradient with it.
  lowest = jax.lax.stop_gradient(jnp.min(jnp.where(m, x, 0), -1, keepdims=True))
  return jnp.where(jnp.any(m, -1), jnp.max(jnp.where(m, x, lowest - 1), -1), 0)


def masked_logsumexp(x, m):
  """The logsumexp of included entries of the last axis, 0 without any."""
  top = jax.lax.stop_gradient(masked_max(x, m))
  shifted = jnp.where(m, x - top[..., None], 0)
  total = jnp.sum(jnp.where(m, jnp.exp(shifted), 0), -1)
  return jnp.log(jnp.where(jnp.any(m, -1), total, 1)) + top


# Faults: masked elements get through.


@fault(PAIR, ELEMENTS, ("invariance", "zero_gradient"), "predictions")
def multiply_by_mask(predictions, targets, where):
  """0 times NaN is NaN: in the gradient, if XLA selects in the value."""
  return jnp.square(predictions - targets) * where


@fault(PAIR, ELEMENTS, ("invariance",), "targets", where_name="mask")
def multiply_by_float_mask(predictions, targets, mask):
  """The same, of the targets alone, and in the value: jit may select."""
  weights = mask.astype(predictions.dtype)
  (p,) = fill_zeros(mask, predictions)
  return jnp.sum(jnp.abs(p - targets) * weights)


@fault((PROBABILITIES,), ELEMENTS, ("invariance", "zero_gradient"), "probs")
def select_after_log(probs, where):
  """The gradient is 0 divided by a masked element."""
  return jnp.where(where, -jnp.log(probs), 0)


@fault((LOGITS, BINARY), ELEMENTS, ("invariance", "zero_gradient"), "logits")
def log_with_epsilon(logits, labels, where):
  """The epsilon keeps log(0) away, but not NaN."""
  p = jax.nn.sigmoid(logits)
  loss = -labels * jnp.log(p + 1e-7) - (1 - labels) * jnp.log(1 - p + 1e-7)
  return jnp.where(where, loss, 0)


@fault(PAIR, ELEMENTS, ("invariance", "zero_gradient"), "targets")
def targets_not_masked(predictions, targets, where):
  """Only the predictions are filled: the targets' gradient is NaN."""
  (p,) = fill_zeros(where, predictions)
  return jnp.where(where, jnp.square(p - targets), 0)


@fault(PAIR, ELEMENTS, ("invariance", "zero_gradient"), "predictions")
def mean_with_where(predictions, targets, where):
  """The `where` of jnp.mean comes too late for the gradient."""
  return jnp.mean(jnp.square(predictions - targets), where=where)


@fault(PAIR, ELEMENTS, ("invariance",), "predictions")
def filled_with_times_zero(predictions, targets, where):
  """The fill is the masked element times 0, which is NaN for NaN."""
  p = jnp.where(where, predictions, predictions * 0)
  (t,) = fill_zeros(where, targets)
  return jnp.square(p - t)


@fault(PAIR, ELEMENTS, ("invariance",), "predictions")
def inverted_mask(predictions, targets, where):
  """The mask is inverted."""
  return masked_squares(predictions, targets, ~where)


@fault(PAIR, ELEMENTS, ("invariance",), "predictions")
def shifted_mask(predictions, targets, where):
  """The mask is off by one position, as if it were for the next token."""
  return masked_squares(predictions, targets, jnp.roll(where, 1, -1))


@fault(
  (PROBABILITIES, BINARY), ELEMENTS, ("invariance", "zero_gradient"), "probs"
)
def clipped_input(probs, labels, where):
  """A clip bounds infinity and keeps NaN."""
  (y,) = fill_zeros(where, labels)
  p = jnp.clip(probs, 0.01, 0.99)
  return jnp.where(where, -y * jnp.log(p) - (1 - y) * jnp.log(1 - p), 0)


@fault((PROBABILITIES,), ELEMENTS, ("invariance", "zero_gradient"), "energies")
def square_root(energies, where):
  """The slope of the square root of 0 is infinite, and 0 times that NaN."""
  return jnp.where(where, jnp.sqrt(energies), 0)


@fault(
  (LABELS, LABELS[::-1]), ELEMENTS, ("invariance", "zero_gradient"), "targets"
)
def kl_of_zero_targets(predictions, targets, where):
  """Optax's: its own test for 0 is at the targets, its mask at the sum."""
  log_p = jnp.log(jnp.where(where, predictions, 1))
  log_t = jnp.log(jnp.where(targets == 0, 1, targets))
  return jnp.sum(jnp.where(where, targets * (log_t - log_p), 0), -1)


@fault((LOGITS, LABELS), ELEMENTS, ("zero_gradient",), "labels")
def gradient_of_labels(logits, labels, where):
  """Optax's: the log probability of a masked class is 0 times -inf."""
  filled = jnp.where(where, logits, -jnp.inf)
  log_p = filled - masked_logsumexp(logits, where)[:, None]
  return jnp.sum(jnp.where(where, -labels * log_p, 0), -1)


@fault(({"x": PREDICTIONS, "y": TARGETS},), EXAMPLES, ("invariance",), "batch")
def dictionary(batch, where):
  """One array of the dictionary is not masked."""
  m = where[:, None]
  return jnp.sum(jnp.abs(jnp.where(m, batch["x"], 0) - batch["y"]) * m, -1)


@fault(
  (VECTORS, OTHERS, normal(10, 4, 3)), EXAMPLES, ("invariance",), "negatives"
)
def triplet(anchors, positives, negatives, where):
  """Two of three arguments are masked."""
  a, p = fill_zeros(where[:, None], anchors, positives)
  near = jnp.sum(jnp.square(a - p), -1)
  return jnp.maximum(near - jnp.sum(jnp.square(a - negatives), -1) + 1, 0)


# Faults: results of included elements depend on masked ones.


@fault(PAIR, ELEMENTS, ("invariance",), "predictions")
def weights_without_gradient(predictions, targets, where):
  """Errors are weighted relative to the largest of all, without gradient."""
  errors = jax.lax.stop_gradient(jnp.abs(predictions - targets))
  weights = jnp.where(where, errors / jnp.max(errors), 0)
  return weights * masked_squares(predictions, targets, where)


@fault((LOGITS, INDEX), EXAMPLES, ("invariance",), "logits")
def temperature_of_all(logits, labels, where):
  """The logits are scaled by the deviation of all, without gradient."""
  scale = jax.lax.stop_gradient(jnp.std(logits))
  (z,) = fill_zeros(where[:, None], logits)
  log_p = jax.nn.log_softmax(z / scale)
  return jnp.where(where, -label_entry(log_p, jnp.where(where, labels, 0)), 0)


@fault(PAIR, ELEMENTS, ("invariance",), "predictions")
def huber_delta_of_all(predictions, targets, where):
  """Delta is a fifth of the largest error, masked ones too (BerHu)."""
  p, t = fill_zeros(where, predictions, targets)
  delta = jnp.max(jnp.abs(predictions - t)) / 5
  linear = jnp.abs(p - t)
  quadratic = jnp.minimum(linear, delta)
  return quadratic**2 / 2 + delta * (linear - quadratic)


@fault((PREDICTIONS,), ELEMENTS, ("invariance",), "predictions")
def filled_with_mean(predictions, where):
  """The fill is the mean of all elements, masked ones too."""
  x = jnp.where(where, predictions, jnp.mean(predictions))
  return jnp.where(where, jnp.square(x - jnp.mean(x)), 0)


@fault((VECTORS, OTHERS), EXAMPLES, ("invariance",), "features")
def batch_statistics(features, targets, where):
  """Masked examples are in the mean and the deviation of the batch."""
  x = (features - jnp.mean(features, 0)) / jnp.std(features, 0)
  m = where[:, None]
  return jnp.sum(jnp.square(jnp.where(m, x - jnp.where(m, targets, 0), 0)), -1)


@fault((*PAIR, WEIGHTS), EXAMPLES, ("invariance",), "weights")
def weights_normalized_over_all(predictions, targets, weights, where):
  """The weights of all examples add up to 1, masked ones too."""
  loss = jnp.sum(masked_squares(predictions, targets, where[:, None]), -1)
  return jnp.sum(jnp.where(where, weights / jnp.sum(weights), 0) * loss)


@fault((LOGITS,), ELEMENTS, ("invariance",), "scores")
def maximum_of_all(scores, where):
  """The maximum is over masked classes, too."""
  (x,) = fill_zeros(where, scores)
  margins = jnp.max(scores, -1, keepdims=True) - x
  return jnp.sum(jnp.where(where, margins, 0), -1)


@fault((VECTORS, OTHERS), EXAMPLES, ("invariance",), "others")
def hardest_negative_of_all(vectors, others, where):
  """The nearest of the other examples may be a masked one."""
  (a,) = fill_zeros(where[:, None], vectors)
  distances = jnp.sum(jnp.square(a[:, None] - others[None]), -1)
  distances += 100 * jnp.eye(len(a), dtype=a.dtype)
  nearest = label_entry(distances, jnp.argmin(distances, -1))
  return jnp.where(where, jnp.maximum(0, 4 - nearest), 0)


@fault((VECTORS, OTHERS), EXAMPLES, ("invariance",), "keys")
def negatives_in_batch(queries, keys, where):
  """Masked examples are negatives of the others."""
  (q,) = fill_zeros(where[:, None], queries)
  log_p = jax.nn.log_softmax(q @ keys.T)
  return jnp.where(where, -jnp.diagonal(log_p), 0)


@fault((*PAIR, LOGITS), ELEMENTS, ("invariance",), "inputs")
def state_of_masked_steps(predictions, targets, inputs, where):
  """Errors are weighted by a running sum that takes in masked steps."""
  weights = jnp.abs(jnp.cumsum(inputs, -1))
  return jnp.where(where, weights, 0) * masked_squares(
    predictions, targets, where
  )


@fault((PROBABILITIES, LABELS), ELEMENTS, ("invariance",), "targets")
def union_of_all(predictions, targets, where):
  """The intersection is masked, one term of the union is not (Dice)."""
  p, t = fill_zeros(where, predictions, targets)
  union = jnp.sum(p, -1) + jnp.sum(targets, -1)
  loss = 1 - (2 * jnp.sum(p * t, -1) + 1) / (union + 1)
  return jnp.where(jnp.any(where, -1), loss, 0)


# Faults: other numbers than for the data without masked elements.


@fault(PAIR, ELEMENTS, ("compaction",))
def mean_over_all(predictions, targets, where=None):
  """The denominator counts masked elements."""
  m = included(where, predictions)
  return jnp.mean(masked_squares(predictions, targets, m))


@fault(
  (1e-6 * PREDICTIONS, 1e-6 * TARGETS),
  EXAMPLES,
  ("compaction",),
  dtypes=("float32",),
)
def mean_of_tiny_errors(predictions, targets, where=None):
  """A mean over all, of numbers that an absolute tolerance takes for 0."""
  m = included(where, predictions[:, 0])
  loss = masked_squares(predictions, targets, m[:, None])
  return jnp.mean(jnp.sum(loss, -1))


@fault((TOKEN_LOGITS, TOKENS), TOKEN_MASK, ("compaction",))
def mean_over_time(logits, labels, where=None):
  """The loss of a sequence is divided by its padded length."""
  m = included(where, labels)
  log_p = jax.nn.log_softmax(jnp.where(m[..., None], logits, 0))
  return jnp.mean(
    jnp.where(m, -label_entry(log_p, jnp.where(m, labels, 0)), 0), -1
  )


@fault(PAIR, ELEMENTS, ("compaction",))
def mean_over_empty_rows(predictions, targets, where=None):
  """Rows without an included element count in the mean of the rows' means."""
  m = included(where, predictions)
  return jnp.mean(mean_of(masked_squares(predictions, targets, m), m, -1))


@fault(PAIR, ELEMENTS, ("identity", "compaction"))
def epsilon_in_denominator(predictions, targets, where=None):
  """The epsilon against 0/0 changes the mean."""
  loss = jnp.abs(predictions - targets)
  if where is None:
    return jnp.mean(loss)
  p, t = fill_zeros(where, predictions, targets)
  return jnp.sum(jnp.abs(p - t)) / (jnp.sum(where) + 0.1)


@fault(PAIR, ELEMENTS, ("compaction", "empty"))
def fill_with_a_loss(predictions, targets, where=None):
  """The fills of the two arguments are a half apart: a loss of 1/4."""
  m = included(where, predictions)
  p, t = jnp.where(m, predictions, 0.5), jnp.where(m, targets, 0)
  return jnp.sum(jnp.square(p - t), -1)


@fault((LOGITS, LABELS), ELEMENTS, ("compaction",))
def zero_in_normalizer(logits, labels, where=None):
  """A logit of 0 is as probable as any other."""
  z, y = fill_zeros(included(where, logits), logits, labels)
  return jnp.sum(-y * jax.nn.log_softmax(z), -1)


@fault((LOGITS - 8, LABELS), ELEMENTS, ("compaction",))
def minus_ten_in_normalizer(logits, labels, where=None):
  """The fill is not far below logits of that size."""
  m = included(where, logits)
  log_p = jax.nn.log_softmax(jnp.where(m, logits, -10))
  return jnp.sum(-jnp.where(m, labels, 0) * log_p, -1)


@fault((LOGITS, INDEX), ELEMENTS, ("compaction",))
def smoothing_over_all_classes(logits, labels, where=None):
  """Masked classes keep their share of the smoothing."""
  m = included(where, logits)
  labels = jnp.where(jnp.any(m, -1), labels, 0)
  m &= label_entry(m, labels)[:, None]
  log_p = jnp.where(m, logits, 0) - masked_logsumexp(logits, m)[:, None]
  n = logits.shape[-1]
  smooth = 0.8 * jax.nn.one_hot(labels, n, dtype=log_p.dtype) + 0.2 / n
  return jnp.sum(jnp.where(m, -smooth * jnp.where(m, log_p, 0), 0), -1)


TIED = np.array(
  [[3, 1, 2, 0, 1], [1, 2, 3, 4, 5], [1, 2, 1, 0, 2], [0, 2, 2, 1, 2]],
  "float32",
)


@fault((TIED,), ELEMENTS, ("compaction",), "scores")
def tie_with_the_fill(scores, where=None):
  """The fill is the mean: if all are equal, it takes half of the gradient."""
  m = included(where, scores)
  (x,) = fill_zeros(m, scores)
  mean = jax.lax.stop_gradient(mean_of(x, m, -1))
  return jnp.max(jnp.where(m, scores, mean[:, None]), -1)


@fault(PAIR, ELEMENTS, ("compaction",))
def discount_of_masked_steps(predictions, targets, where=None):
  """The discount counts masked steps."""
  steps = jnp.arange(predictions.shape[-1])
  m = included(where, predictions)
  return jnp.sum(masked_squares(predictions, targets, m) * 0.5**steps, -1)


# Faults: nothing is left.


@fault(PAIR, EXAMPLES, ("empty", "clean_arithmetic"))
def mean_of_empty_batch(predictions, targets, where):
  """0/0 if all examples are masked."""
  loss = jnp.sum(masked_squares(predictions, targets, where[:, None]), -1)
  return jnp.sum(loss) / jnp.sum(where)


@fault(PAIR, ELEMENTS, ("empty", "clean_arithmetic"))
def mean_of_empty_row(predictions, targets, where):
  """0/0 in a row with nothing included."""
  loss = masked_squares(predictions, targets, where)
  return jnp.sum(loss, -1) / jnp.sum(where, -1)


@fault(PAIR, ELEMENTS, ("empty", "clean_arithmetic"))
def nanmean_of_empty_row(predictions, targets, where):
  """Masked losses are NaN: the nanmean of a masked row is NaN, too."""
  loss = masked_squares(predictions, targets, where)
  return jnp.nanmean(jnp.where(where, loss, jnp.nan), -1)


@fault((LOGITS,), ELEMENTS, ("empty",))
def entropy_of_nothing(logits, where=None):
  """A row with nothing included has the entropy of the fills, log(5)."""
  m = included(where, logits)
  p = jax.nn.softmax(jnp.where(m, logits, -1e4))
  return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)


@fault((LOGITS,), ELEMENTS, ("empty", "clean_arithmetic"))
def logsumexp_of_nothing(logits, where):
  """The maximum of nothing is -inf."""
  return jax.nn.logsumexp(logits, axis=-1, where=where)


@fault((PREDICTIONS, TARGETS), ELEMENTS, ("empty", "clean_arithmetic"))
def cosine_of_nothing(predictions, targets, where):
  """The norm of an empty row is 0, and 0/0 its cosine."""
  p, t = fill_zeros(where, predictions, targets)
  norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(t, axis=-1)
  return jnp.sum(p * t, -1) / norms


@fault((PREDICTIONS, TARGETS), ELEMENTS, ("empty",))
def distance_of_nothing(predictions, targets, where):
  """With an epsilon the cosine of an empty row is 0, and its distance 1."""
  p, t = fill_zeros(where, predictions, targets)
  norms = jnp.sum(p * p, -1) * jnp.sum(t * t, -1)
  return 1 - jnp.sum(p * t, -1) / jnp.sqrt(jnp.maximum(norms, 1e-3))


# Faults: integer labels.


@fault(
  (LOGITS, INDEX),
  ELEMENTS,
  ("masked_label", "invariance", "zero_gradient"),
  "logits",
)
def logit_of_masked_label(logits, labels, where):
  """Optax's: the logit of the label may be a masked one."""
  any_left = jnp.any(where, -1)
  label_logit = label_entry(logits, jnp.where(any_left, labels, 0))
  return jnp.where(any_left, masked_logsumexp(logits, where) - label_logit, 0)


@fault((LOGITS, INDEX), ELEMENTS, ("masked_label",))
def fill_as_label_logit(logits, labels, where):
  """An example whose own class is masked has a loss of 10,000."""
  z = jnp.where(where, logits, -1e4)
  any_left = jnp.any(where, -1)
  log_p = jax.nn.log_softmax(z)
  return jnp.where(
    any_left, -label_entry(log_p, jnp.where(any_left, labels, 0)), 0
  )


@fault((LOGITS, INDEX), EXAMPLES, ("invariance",), "labels")
def take_out_of_range(logits, labels, where):
  """A label out of range takes NaN, the default of jnp, and 0 times that."""
  log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0))
  label_log_p = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
  weights = where.astype(log_p.dtype) / jnp.maximum(jnp.sum(where), 1)
  return jnp.sum(-label_log_p * weights)


@fault((LOGITS, INDEX), EXAMPLES, ("clean_arithmetic",))
def take_and_select(logits, labels, where):
  """A label out of range takes NaN, which a select replaces by 0."""
  log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0))
  label_log_p = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
  return jnp.where(where, -label_log_p, 0)


@fault((LOGITS, INDEX), EXAMPLES, ("invariance",), "labels")
def count_of_one_hot(logits, labels, where):
  """The one-hot label of a masked example counts, if it is within range."""
  one_hot = jax.nn.one_hot(labels, 5, dtype=logits.dtype)
  log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0))
  loss = jnp.where(where[:, None], -one_hot * log_p, 0)
  return jnp.sum(loss) / jnp.maximum(jnp.sum(one_hot), 1)


# Faults: the axes of the mask.


@fault((normal(11, 4, 4), INDEX - 1), EXAMPLES, ("invariance",), "logits")
def mask_along_classes(logits, labels, where):
  """As many classes as examples: a mask of examples masks classes."""
  log_p = jax.nn.log_softmax(jnp.where(where, logits, -1e4))
  return -label_entry(log_p, jnp.clip(labels, 0, 3))


@fault(
  (normal(12, 3, 3, 4), np.array([[1, 3, 0], [0, 2, 1], [2, 1, 3]], "int32")),
  np.array([True, False, True]),
  ("invariance",),
  "logits",
)
def mask_along_time(logits, labels, where):
  """As many tokens as sequences: a mask of sequences masks tokens."""
  log_p = jax.nn.log_softmax(jnp.where(where[:, None], logits, 0))
  return jnp.where(where, -label_entry(log_p, jnp.where(where, labels, 0)), 0)


@fault((TOKEN_LOGITS, TOKENS), np.array([True, False, True]), ("accepts",))
def mask_that_does_not_broadcast(logits, labels, where):
  """A mask of three sequences meets the losses of two tokens each."""
  return jnp.where(where, -label_entry(jax.nn.log_softmax(logits), labels), 0)


# Faults: NaN of an included element is dropped.


@fault(PAIR, ELEMENTS, ("honesty",), "predictions")
def nan_to_num_of_input(predictions, targets, where=None):
  """Predictions of NaN become 0."""
  if where is None:
    return jnp.square(predictions - targets)
  return masked_squares(jnp.nan_to_num(predictions), targets, where)


@fault(
  PAIR,
  ELEMENTS,
  ("honesty", "invariance", "zero_gradient"),
  "predictions",
)
def nan_to_num_of_loss(predictions, targets, where=None):
  """A loss of NaN becomes 0, while its gradient stays NaN."""
  loss = jnp.square(predictions - targets)
  return loss if where is None else jnp.nan_to_num(loss) * where


@fault(PAIR, ELEMENTS, ("honesty",), "predictions")
def nansum(predictions, targets, where=None):
  """Masked losses are NaN, and nansum drops any other NaN with them."""
  if where is None:
    return jnp.sum(jnp.square(predictions - targets), -1)
  loss = masked_squares(predictions, targets, where)
  return jnp.nansum(jnp.where(where, loss, jnp.nan), -1)


@fault(PAIR, ELEMENTS, ("honesty",), "predictions")
def non_finite_dropped(predictions, targets, where=None):
  """Errors that are not finite are taken out of the mean."""
  if where is None:
    return jnp.mean(jnp.square(predictions - targets))
  where &= jnp.isfinite(predictions - targets)
  return mean_of(masked_squares(predictions, targets, where), where)


# Faults: intermediate NaN or infinity.


@fault((PROBABILITIES,), ELEMENTS, ("clean_arithmetic",))
def log_of_the_fill(probs, where):
  """The fill is 0, its logarithm is selected away again."""
  (p,) = fill_zeros(where, probs)
  return jnp.where(where, -jnp.log(p), 0)


@fault((VECTORS,), EXAMPLES, ("clean_arithmetic", "zero_gradient", "empty"))
def norm_of_the_fill(vectors, where):
  """The norm of 0 has no gradient: NaN, selected away in reverse mode."""
  (x,) = fill_zeros(where[:, None], vectors)
  return jnp.linalg.norm(x, axis=-1)


@fault((LOGITS, LABELS), ELEMENTS, ("clean_arithmetic", "compaction", "empty"))
def infinite_fill(logits, labels, where):
  """A label of 0 times a log probability of -inf."""
  log_p = jax.nn.log_softmax(jnp.where(where, logits, -jnp.inf))
  return jnp.sum(-jnp.where(where, labels, 0) * log_p, -1)


# Faults: in one dtype.


@fault(
  (LOGITS, LABELS),
  ELEMENTS,
  ("clean_arithmetic", "compaction", "empty"),
  dtypes=("float16",),
)
def fill_overflows(logits, labels, where=None):
  """In float16 -1e9 is -inf."""
  m = included(where, logits)
  log_p = jax.nn.log_softmax(jnp.where(m, logits, -1e9))
  return jnp.sum(-jnp.where(m, labels, 0) * log_p, -1)


@fault(PAIR, ELEMENTS, ("clean_arithmetic", "empty"), dtypes=("float16",))
def epsilon_underflows(predictions, targets, where=None):
  """In float16 1e-8 is 0."""
  m = included(where, predictions)
  loss = jnp.sum(masked_squares(predictions, targets, m), -1)
  return loss / (jnp.sum(m, -1).astype(loss.dtype) + 1e-8)


@fault(
  (LOGITS,), ELEMENTS, ("clean_arithmetic", "compaction"), dtypes=("float16",)
)
def square_of_fill_overflows(logits, where=None):
  """The fill fits into float16, its square is infinite, and 0 times NaN."""
  m = included(where, logits)
  z = jnp.where(m, logits, -1e4)
  weights = m.astype(z.dtype) / jnp.maximum(jnp.sum(m, -1, keepdims=True), 1)
  return jnp.sum(jnp.square(z) * weights, -1)


@fault(
  (LOGITS,), ELEMENTS, ("clean_arithmetic", "compaction"), dtypes=("float16",)
)
def sum_of_fills_overflows(logits, where=None):
  """The sum of three fills, to be subtracted again, is infinite."""
  m = included(where, logits)
  z = jnp.where(m, logits, -3e4)
  masked = jnp.sum(jnp.where(m, 0, z), -1)
  return jnp.sum(z, -1) - masked


@fault(PAIR, ELEMENTS, ("transforms", "identity"), dtypes=("bfloat16",))
def float32_from_bfloat16(predictions, targets, where=None):
  """A mask in float32 makes the loss float32."""
  m = included(where, predictions)
  loss = masked_squares(predictions, targets, m)
  return loss if where is None else loss * m.astype("float32")


@fault(PAIR, ELEMENTS, ("transforms", "identity"), dtypes=("float32",))
def bfloat16_from_float32(predictions, targets, where=None):
  """The masked loss is rounded."""
  loss = masked_squares(predictions, targets, included(where, predictions))
  return loss if where is None else loss.astype("bfloat16")


# Faults: under a transformation.


@fault(PAIR, ELEMENTS, ("accepts", "transforms"))
def branch_of_python(predictions, targets, where):
  """A Python branch on a traced mask raises."""
  if not where.any():
    return jnp.zeros((), predictions.dtype)
  return mean_of(masked_squares(predictions, targets, where), where)


@fault(PAIR, ELEMENTS, ("accepts", "transforms"))
def boolean_index(predictions, targets, where):
  """Under jit the number of included elements is unknown."""
  return jnp.sum(jnp.square(predictions[where] - targets[where]))


@fault(PAIR, ELEMENTS, ("transforms", "invariance"))
def mask_ignored_if_traced(predictions, targets, where):
  """A traced mask is ignored."""
  if isinstance(where, jax.core.Tracer):
    return jnp.square(predictions - targets)
  return masked_squares(predictions, targets, where)


def _conditional_mean(values, m):
  """The mean of included errors, 0 without any."""
  count = jnp.sum(m)
  return jax.lax.cond(
    count > 0,
    lambda: jnp.sum(values) / count,
    lambda: jnp.zeros((), values.dtype),
  )


@fault(PAIR, ELEMENTS, ("clean_arithmetic",))
def conditional_in_vmap(predictions, targets, where):
  """Under vmap both branches of the mean run: 0/0 is computed."""
  loss = masked_squares(predictions, targets, where)
  return jax.vmap(_conditional_mean)(loss, where)


@jax.custom_batching.custom_vmap
def _count(m):
  return jnp.sum(m)


@_count.def_vmap
def _(size, batched, m):
  return jnp.sum(m), False


@fault(PAIR, ELEMENTS, ("transforms",))
def count_over_vmap(predictions, targets, where):
  """The custom rule for vmap also counts over the mapped axis."""
  loss = jnp.sum(masked_squares(predictions, targets, where))
  return loss / jnp.maximum(_count(jnp.asarray(where)), 1)


# Faults: in custom derivatives.


@jax.custom_jvp
def _log_forward(x, m):
  return jnp.where(m, jnp.log(jnp.where(m, x, 1)), 0)


@_log_forward.defjvp
def _(primals, tangents):
  x, m = primals
  return _log_forward(x, m), jnp.where(m, tangents[0], 0) / x


@fault((PROBABILITIES,), ELEMENTS, ("invariance", "zero_gradient"), "probs")
def tangent_by_hand(probs, where):
  """The tangent is 0 divided by a masked element. Reverse mode is correct."""
  return -_log_forward(probs, where)


@jax.custom_jvp
def _log_output(x, m):
  return jnp.where(m, jnp.log(jnp.where(m, x, 1)), 0)


@_log_output.defjvp
def _(primals, tangents):
  x, m = primals
  t = jnp.where(m, tangents[0], 0) / jnp.where(m, x, 1)
  return jnp.log(x), t


@fault((PROBABILITIES,), ELEMENTS, ("invariance",), "probs")
def output_by_hand(probs, where):
  """The value that comes with the derivative is not masked."""
  return -_log_output(probs, where)


@jax.custom_jvp
def _slope(x, m):
  return jnp.where(m, 1 / jnp.where(m, x, 1), 0)


_slope.defjvps(lambda t, _, x, m: -t / (1 + x * x), None)


@jax.custom_jvp
def _log_second(x, m):
  return jnp.where(m, jnp.log(jnp.where(m, x, 1)), 0)


_log_second.defjvps(lambda t, _, x, m: t * _slope(x, m), None)


@fault((PROBABILITIES,), ELEMENTS, ("invariance", "zero_gradient"), "probs")
def second_derivative_by_hand(probs, where):
  """The slope is masked, its own derivative is not."""
  return -_log_second(probs, where)


@jax.custom_jvp
def _log_cosh(x, m):
  x = jnp.where(m, x, 0)
  return jnp.logaddexp(x, -x) - jnp.where(m, jnp.log(2.0).astype(x.dtype), 0)


_log_cosh.defjvps(lambda t, _, x, m: t * jnp.where(m, jnp.tanh(x), 0), None)


@fault((PREDICTIONS,), ELEMENTS, ("invariance", "zero_gradient"), "errors")
def reverse_over_reverse(errors, where):
  """The slope is masked after tanh: its gradient is 0 times NaN."""
  return jnp.where(where, _log_cosh(errors, where), 0)


@jax.custom_vjp
def _square(x, m):
  return jnp.square(jnp.where(m, x, 0))


_square.defvjp(lambda x, m: (_square(x, m), x), lambda x, g: (2 * x * g, None))


@fault(
  (PREDICTIONS,),
  ELEMENTS,
  ("zero_gradient",),
  "errors",
  derivatives=("value", "vjp"),
)
def backward_by_hand(errors, where):
  """The value is masked, the custom gradient is not."""
  return _square(errors, where)


# Correct: elementwise losses, and reductions of them.


@correct(PAIR, ELEMENTS)
def squared_error(predictions, targets, where=None):
  return masked_squares(predictions, targets, included(where, predictions))


@correct((normal(13, 2, 3, 4), normal(14, 2, 3, 4)), normal(15, 2, 3, 4) > 0)
def squared_error_of_volumes(predictions, targets, where=None):
  m = included(where, predictions)
  return jnp.sum(masked_squares(predictions, targets, m), (-1, -2))


@correct((1e-6 * PREDICTIONS, 1e-6 * TARGETS), ELEMENTS)
def squared_error_of_tiny_numbers(predictions, targets, where=None):
  m = included(where, predictions)
  return mean_of(masked_squares(predictions, targets, m), m)


@correct((np.array([[1, 2, 0, 1, 3]] * 4, "float32"), TIED), ELEMENTS)
def absolute_error_at_zero(predictions, targets, where=None):
  p, t = fill_zeros(included(where, predictions), predictions, targets)
  return jnp.abs(p - t)


@correct(
  (np.array([[1, -1, 2, 0, 1]] * 4, "float32"), 2 * BINARY - 1), ELEMENTS
)
def hinge_at_the_margin(scores, labels, where=None):
  m = included(where, scores)
  x, y = fill_zeros(m, scores, labels)
  return jnp.where(m, jnp.maximum(0, 1 - x * y), 0)


@correct((np.array([[1, 2, 3, 4, -1]] * 4, "float32"), BINARY), ELEMENTS)
def huber_at_delta(predictions, targets, where=None):
  p, t = fill_zeros(included(where, predictions), predictions, targets)
  linear = jnp.abs(p - t)
  quadratic = jnp.minimum(linear, 1)
  return quadratic**2 / 2 + linear - quadratic


@correct((np.array([[0, 1, -1, 0, 2]] * 4, "float32"),), ELEMENTS)
def relu_at_zero(x, where=None):
  return jax.nn.relu(*fill_zeros(included(where, x), x))


@correct((PROBABILITIES, BINARY), ELEMENTS)
def binary_cross_entropy(probs, labels, where=None):
  m = included(where, probs)
  p, y = jnp.where(m, probs, 0.5), jnp.where(m, labels, 0)
  return jnp.where(m, -y * jnp.log(p) - (1 - y) * jnp.log(1 - p), 0)


@correct((LOGITS, BINARY), ELEMENTS, gamma=2.0, reduction="mean")
def focal_loss(logits, labels, where=None, *, gamma=1.0, reduction="none"):
  m = included(where, logits)
  z, y = fill_zeros(m, logits, labels)
  z = z * (1 - 2 * y)
  loss = jax.nn.sigmoid(z) ** gamma * jax.nn.softplus(z)
  loss = jnp.where(m, loss, 0)
  return mean_of(loss, m) if reduction == "mean" else loss


@correct((*PAIR, normal(16, 4, 5)), ELEMENTS)
def gaussian_likelihood(predictions, targets, log_variances, where=None):
  m = included(where, predictions)
  (v,) = fill_zeros(m, log_variances)
  return (masked_squares(predictions, targets, m) * jnp.exp(-v) + v) / 2


@correct((LOGITS, np.abs(TARGETS)), ELEMENTS)
def poisson_likelihood(log_rates, counts, where=None):
  m = included(where, log_rates)
  rate, k = fill_zeros(m, log_rates, counts)
  return jnp.sum(jnp.where(m, jnp.exp(rate) - k * rate, 0), -1)


@correct(PAIR, ELEMENTS)
def quantile_loss(predictions, targets, where=None):
  p, t = fill_zeros(included(where, predictions), predictions, targets)
  return jnp.maximum(0.9 * (t - p), 0.1 * (p - t))


@correct(PAIR, ELEMENTS)
def mean_of_elements(predictions, targets, where=None):
  m = included(where, predictions)
  return mean_of(masked_squares(predictions, targets, m), m)


@correct(PAIR, ELEMENTS)
def mean_of_means_of_rows(predictions, targets, where=None):
  m = included(where, predictions)
  rows = mean_of(masked_squares(predictions, targets, m), m, -1)
  return mean_of(rows, jnp.any(m, -1))


@correct(PAIR, ELEMENTS, where_name="mask")
def mask_by_another_name(predictions, targets, mask):
  return jnp.sum(masked_squares(predictions, targets, mask), -1)


@correct(PAIR, EXAMPLES[:, None])
def mask_with_an_axis_of_one(predictions, targets, where=None):
  m = included(where, predictions)
  return jnp.sum(masked_squares(predictions, targets, m), -1)


@correct(({"x": PREDICTIONS, "y": TARGETS},), EXAMPLES)
def dictionary_of_arrays(batch, where=None):
  m = included(where, batch["x"][:, 0])
  loss = masked_squares(batch["x"], batch["y"], m[:, None])
  return mean_of(jnp.sum(loss, -1), m)


@correct((*PAIR, WEIGHTS), EXAMPLES)
def weights_of_examples(predictions, targets, weights, where=None):
  m = included(where, weights)
  (w,) = fill_zeros(m, weights)
  loss = jnp.sum(masked_squares(predictions, targets, m[:, None]), -1)
  return jnp.sum(w * loss) / jnp.where(jnp.any(m), jnp.sum(w), 1)


@correct((*PAIR, uniform(17, 5)), ELEMENTS)
def weights_of_features(predictions, targets, weights, where=None):
  m = included(where, predictions)
  return jnp.where(m, weights, 0) * masked_squares(predictions, targets, m)


@correct((*PAIR, np.array([0, 2, 0, 1], "int32")), EXAMPLES)
def means_of_groups(predictions, targets, groups, where=None):
  m = included(where, groups)
  loss = jnp.sum(masked_squares(predictions, targets, m[:, None]), -1)
  groups = jnp.where(m, groups, 0)
  sums = jax.ops.segment_sum(loss, groups, 3)
  counts = jax.ops.segment_sum(m.astype(loss.dtype), groups, 3)
  return jnp.sum(sums / jnp.maximum(counts, 1))


# To a check the groups may look like the classes that labels name.
@correct(
  (*PAIR, np.array([0, 2, 0, 1], "int32")), ELEMENTS, skip=("masked_label",)
)
def scales_of_groups(predictions, targets, groups, where=None):
  m = included(where, predictions)
  scales = jnp.asarray([1.0, 2.0, 4.0], predictions.dtype)
  scales = scales[jnp.where(jnp.any(m, -1), groups, 0)]
  return jnp.sum(masked_squares(predictions, targets, m), -1) * scales


# Correct: losses with an axis of classes or features.


@correct((LOGITS, LABELS), ELEMENTS)
def cross_entropy(logits, labels, where=None):
  m = included(where, logits)
  z, y = fill_zeros(m, logits, labels)
  log_p = jnp.where(m, z - masked_logsumexp(z, m)[..., None], 0)
  return jnp.sum(-y * log_p, -1)


@correct((LOGITS, LABELS), EXAMPLES)
def cross_entropy_of_examples(logits, labels, where=None):
  m = included(where, logits[:, 0])[:, None]
  z, y = fill_zeros(m, logits, labels)
  return jnp.sum(-y * jax.nn.log_softmax(z), -1)


@correct((LOGITS, INDEX), EXAMPLES)
def cross_entropy_of_integer_labels(logits, labels, where=None):
  m = included(where, labels)
  (z,) = fill_zeros(m[:, None], logits)
  (labels,) = fill_zeros(m, labels)
  return jnp.where(m, -label_entry(jax.nn.log_softmax(z), labels), 0)


@correct((LOGITS, INDEX), ELEMENTS)
def cross_entropy_of_included_classes(logits, labels, where=None):
  m = included(where, logits)
  (labels,) = fill_zeros(jnp.any(m, -1), labels)
  kept = label_entry(m, labels)
  m &= kept[:, None]  # A masked class is no target.
  (z,) = fill_zeros(m, logits)
  return jnp.where(kept, masked_logsumexp(z, m) - label_entry(z, labels), 0)


@correct((LOGITS, INDEX, uniform(18, 5)), EXAMPLES)
def weights_of_classes(logits, labels, weights, where=None):
  m = included(where, labels)
  (labels,) = fill_zeros(m, labels)
  log_p = jax.nn.log_softmax(*fill_zeros(m[:, None], logits))
  w = jnp.where(m, weights[labels], 0)
  return jnp.sum(-w * label_entry(log_p, labels)) / jnp.where(
    jnp.any(m), jnp.sum(w), 1
  )


@correct((LOGITS, INDEX, np.array(0.5, "float32")), EXAMPLES)
def scalar_temperature(logits, labels, temperature, where=None):
  m = included(where, labels)
  (labels,) = fill_zeros(m, labels)
  log_p = jax.nn.log_softmax(jnp.where(m[:, None], logits, 0) / temperature)
  return mean_of(jnp.where(m, -label_entry(log_p, labels), 0), m)


@correct((TOKEN_LOGITS, TOKENS), TOKEN_MASK)
def language_model(logits, labels, where=None):
  m = included(where, labels)
  (labels,) = fill_zeros(m, labels)
  log_p = jax.nn.log_softmax(jnp.where(m[..., None], logits, 0))
  return mean_of(jnp.where(m, -label_entry(log_p, labels), 0), m)


@correct((TIED, np.array([1, 2, 3, 4], "int32")), ELEMENTS)
def multiclass_hinge_of_ties(scores, labels, where=None):
  m = included(where, scores)
  (labels,) = fill_zeros(jnp.any(m, -1), labels)
  kept = label_entry(m, labels)
  m &= kept[:, None]
  (x,) = fill_zeros(m, scores)
  margins = x + (jnp.arange(x.shape[-1]) != labels[:, None])
  return jnp.where(kept, masked_max(margins, m) - label_entry(x, labels), 0)


@correct((LOGITS / 2, LABELS), ELEMENTS)
def sparsemax(scores, labels, where=None):
  m = included(where, scores)
  z, y = fill_zeros(m, scores, labels)
  lowest = jnp.min(z, -1, keepdims=True)
  z_sorted = -jnp.sort(-jnp.where(m, z, lowest), -1)
  k = jnp.arange(1, z.shape[-1] + 1)
  inside = k <= jnp.sum(m, -1, keepdims=True)
  inside &= 1 + k * z_sorted > jnp.cumsum(z_sorted, -1)
  count = jnp.maximum(jnp.sum(inside, -1, keepdims=True), 1)
  top = jnp.sum(jnp.where(inside, z_sorted, 0), -1, keepdims=True)
  p = jnp.where(m, jnp.maximum(z - (top - 1) / count, 0), 0)
  loss = jnp.sum(p * z - p * p / 2 - y * z, -1) + 0.5
  return jnp.where(jnp.any(m, -1), loss, 0)


@correct((LABELS, distributions(19, 4, 5)), ELEMENTS)
def kl_divergence(predictions, targets, where=None):
  m = included(where, predictions)
  p, t = (jnp.where(m, x, 1) for x in (predictions, targets))
  return jnp.sum(t * (jnp.log(t) - jnp.log(p)), -1)


# Far from 0, where its second derivatives are infinite.
@correct(
  (1 + PROBABILITIES, (1 + uniform(21, 4, 5)) * (2 * BINARY - 1)), ELEMENTS
)
def cosine_distance(predictions, targets, where=None):
  m = included(where, predictions)
  left = jnp.any(m, -1)
  p, t = fill_zeros(m, predictions, targets)
  squares = jnp.sum(p * p, -1) * jnp.sum(t * t, -1)
  norms = jnp.sqrt(jnp.where(left, squares, 1))
  return jnp.where(left, 1 - jnp.sum(p * t, -1) / norms, 0)


@correct((PROBABILITIES, BINARY), ELEMENTS)
def dice(probs, labels, where=None):
  m = included(where, probs)
  p, y = fill_zeros(m, probs, labels)
  # With nothing left it is 1 - 1/1.
  return 1 - (2 * jnp.sum(p * y, -1) + 1) / (jnp.sum(p + y, -1) + 1)


@correct((LOGITS, uniform(20, 4, 5)), ELEMENTS)
def pairwise_ranking(scores, relevances, where=None):
  m = included(where, scores)
  pairs = m[..., :, None] & m[..., None, :]
  differences, gains = (
    jnp.where(pairs, x[..., :, None] - x[..., None, :], 0)
    for x in fill_zeros(m, scores, relevances)
  )
  loss = jnp.maximum(gains, 0) * jax.nn.softplus(-differences)
  return jnp.sum(loss, (-1, -2))


# Correct: losses that mix examples.


@correct((VECTORS, OTHERS), EXAMPLES)
def contrastive(queries, keys, where=None):
  m = included(where, queries[:, 0])
  q, k = fill_zeros(m[:, None], queries, keys)
  pairs = m[:, None] & m[None, :]
  similarities = jnp.where(pairs, q @ k.T, 0)
  loss = masked_logsumexp(similarities, pairs) - jnp.diagonal(similarities)
  return mean_of(loss, m)


@correct((VECTORS, OTHERS), EXAMPLES)
def error_of_standardized(features, targets, where=None):
  m = included(where, features[:, 0])[:, None]
  x, t = fill_zeros(m, features, targets)
  centered = jnp.where(m, x - mean_of(x, m, 0), 0)
  variance = mean_of(jnp.square(centered), m, 0)
  x = centered / jnp.sqrt(variance + 0.01)
  return jnp.sum(jnp.square(x - t), -1)


@correct((PREDICTIONS,), ELEMENTS)
def variance_of_rows(x, where=None):
  m = included(where, x)
  (x,) = fill_zeros(m, x)
  centered = jnp.where(m, x - mean_of(x, m, -1)[..., None], 0)
  return mean_of(jnp.square(centered), m, -1)


# Correct: loops, branches and custom derivatives.


@correct(PAIR, ELEMENTS)
def scan_over_time(predictions, targets, where=None):
  m = included(where, predictions)
  p, t = fill_zeros(m, predictions, targets)

  def step(state, inputs):
    p, t, kept = inputs
    state = jnp.where(kept, 0.5 * state + p, state)
    return state, jnp.square(jnp.where(kept, state - t, 0))

  _, loss = jax.lax.scan(step, jnp.zeros_like(p[:, 0]), (p.T, t.T, m.T))
  return jnp.sum(loss, 0)


@correct(PAIR, ELEMENTS)
def rematerialized(predictions, targets, where=None):
  m = included(where, predictions)
  p, t = fill_zeros(m, predictions, targets)
  return jax.checkpoint(lambda p, t: jnp.sum(jnp.sin(p - t) ** 2, -1))(p, t)


@correct(PAIR, ELEMENTS)
def conditional_mean(predictions, targets, where=None):
  m = included(where, predictions)
  total, count = jnp.sum(masked_squares(predictions, targets, m)), jnp.sum(m)
  return jax.lax.cond(
    count > 0,
    lambda: total / jnp.maximum(count, 1),  # Under vmap, it runs for 0, too.
    lambda: jnp.zeros_like(total),
  )


@jax.custom_jvp
def _softplus(x):
  return jnp.logaddexp(x, 0)


_softplus.defjvps(lambda t, _, x: t * jax.nn.sigmoid(x))


@correct((LOGITS,), ELEMENTS)
def derivative_by_hand(logits, where=None):
  m = included(where, logits)
  return jnp.where(m, _softplus(*fill_zeros(m, logits)), 0)


@jax.custom_vjp
def _half_square(x):
  return x * x / 2


_half_square.defvjp(lambda x: (x * x / 2, x), lambda x, g: (x * g,))


@correct((PREDICTIONS,), ELEMENTS, derivatives=("value", "vjp"))
def gradient_by_hand(errors, where=None):
  return _half_square(*fill_zeros(included(where, errors), errors))


@correct(PAIR, ELEMENTS, dtypes=("bfloat16",))
def sum_in_float32(predictions, targets, where=None):
  m = included(where, predictions)
  p, t = fill_zeros(
    m, *(jnp.asarray(x, "float32") for x in (predictions, targets))
  )
  return jnp.sum(jnp.square(p - t), -1).astype(predictions.dtype)


@correct(PAIR, EXAMPLES)
@jax.jit
def compiled(predictions, targets, where=None):
  m = included(where, predictions[:, 0])
  return jnp.sum(masked_squares(predictions, targets, m[:, None]), -1)


CORRECT.append(
  Correct(
    "partial",
    functools.partial(focal_loss, gamma=1.0, reduction="none"),
    (LOGITS, BINARY),
    ELEMENTS,
  )
)
