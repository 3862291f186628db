"""The table of cases: every masked loss, its data and an independent formula.

A new loss is one row. Each property of the contract is one test over the table.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream

import optax_masking as optax

# float64 exists only where JAX is told so before it starts.
DTYPES = (
  ("float64",)
  if jax.config.jax_enable_x64
  else ("float32", "bfloat16", "float16")
)
SHAPE = (4, 5)


def tolerance(dtype: str, roundings: float = 16.0) -> dict[str, float]:
  """Room for some roundings at numbers of the size of the test data."""
  epsilon = roundings * float(jnp.finfo(dtype).eps)
  return {"rtol": epsilon, "atol": epsilon}


# NumPy by itself takes NaN for equal to NaN.
assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)


def assert_close(
  got, expected, dtype: str, message: str = "", roundings: float = 16.0
) -> None:
  """Compares numbers of a dtype, up to some roundings."""
  assert_allclose(
    np.asarray(got, "float64"),
    np.asarray(expected, "float64"),
    **tolerance(dtype, roundings),
    err_msg=message,
  )


def assert_equal(got, expected, message: str = "") -> None:
  """Compares finite numbers, exactly."""
  assert np.all(np.isfinite(np.asarray(got, "float64"))), message
  np.testing.assert_array_equal(got, expected, err_msg=message)


def _logits(rng, shape, axis):
  return rng.normal(size=shape) * 2


def _probabilities(rng, shape, axis):
  x = rng.uniform(0.5, 2.0, size=shape)
  return x / x.sum(axis, keepdims=True)


def _log_probabilities(rng, shape, axis):
  return np.log(_probabilities(rng, shape, axis))


def _soft_labels(rng, shape, axis):
  return rng.uniform(0.1, 0.9, size=shape)


def _index(rng, shape, axis):
  axes = np.arange(len(shape))[list(np.atleast_1d(axis))]
  classes = int(np.prod([shape[a] for a in axes]))
  batch = [s for a, s in enumerate(shape) if a not in axes]
  return rng.integers(0, classes, size=batch)


def _binary(rng, shape, axis):
  return rng.integers(0, 2, size=shape)


def _signs(rng, shape, axis):
  return rng.choice([-1.0, 1.0], size=shape)


def _log_softmax(x):
  return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _cross_entropy(x, y):
  return -np.sum(y * _log_softmax(x))


def _binary_cross_entropy(x, y):
  return -y * np.log(_sigmoid(x)) - (1 - y) * np.log(_sigmoid(-x))


def _sparse_plus(x, y):
  x = np.where(y, -x, x)
  return np.where(x < 1, np.where(x > -1, (x + 1) ** 2 / 4, 0), x)


def _hinge(x, y):
  return np.max(x + (np.arange(len(x)) != y)) - x[y]


def _sparsemax(x, y):
  """By the definition: the maximum over the simplex, at its projection."""
  # The threshold at which what is above adds up to 1, between these two.
  low, high = x.max() - 1, x.max()
  for _ in range(60):
    middle = (low + high) / 2
    above = np.sum(np.maximum(x - middle, 0)) > 1
    low, high = (middle, high) if above else (low, middle)
  p = np.maximum(x - low, 0)
  return p @ x + (1 - p @ p) / 2 - x[y]


def _huber(x, y):
  e = np.abs(x - y)
  return np.where(e <= 1, e**2 / 2, e - 1 / 2)


def _triplet(a, p, n):
  positive = np.sqrt((a - p) @ (a - p) + 1e-6)
  return np.maximum(positive - np.sqrt((a - n) @ (a - n) + 1e-6) + 1, 0)


def _focal(x, y, gamma=2.0):
  p_of_label = y * _sigmoid(x) + (1 - y) * _sigmoid(-x)
  return (1 - p_of_label) ** gamma * _binary_cross_entropy(x, y)


def _cosine(a, b):
  return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


# Losses of a whole batch, of the included elements alone. They are written from
# the definition, but differentiable, and take a mask of the data's shape.


def _smooth_labels(y, a, where):
  count = np.maximum(where.sum(-1, keepdims=True), 1)
  return jnp.where(where, (1 - a) * y + a / count, 0)


def _segments(x, where, axis):
  """The softmax over what is included of each pixel."""
  e = jnp.where(where, jnp.exp(x), 0)
  return e / jnp.maximum(e.sum(axis, keepdims=True), 1e-30)


def _dice_of_classes(p, t, where):
  """Of one image: a loss for each class of which something is included."""
  losses = []
  for c in np.flatnonzero(where.any(0)):
    (kept,) = np.nonzero(where[:, c])
    q, u = p[kept, c], t[kept, c]
    losses.append(1 - 2 * ((q * u).sum() + 1) / (q.sum() + u.sum() + 2))
  return losses


def _dice(x, t, where):
  p = _segments(x, where, -1)
  images = [_dice_of_classes(*image) for image in zip(p, t, where, strict=True)]
  return jnp.stack([jnp.mean(jnp.array(i or [0.0])) for i in images])


def _binary_dice(x, t, where):
  p = jax.nn.sigmoid(x)
  images = [
    _dice_of_classes(*(a[:, None] for a in image))
    for image in zip(p, t, where, strict=True)
  ]
  return jnp.stack([jnp.array(i or [0.0])[0] for i in images])


def _generalized_dice(x, t, where):
  classes = np.flatnonzero(where.any((0, 1)))
  frequencies = [t[..., c][where[..., c]].sum() for c in classes]
  weights = [1 / (f**2 + 1e-7) for f in frequencies]
  weights = {
    c: w / sum(weights) * len(classes)
    for c, w in zip(classes, weights, strict=True)
  }
  p = _segments(x, where, -1)
  losses = []
  for image in zip(p, t, where, strict=True):
    present = np.flatnonzero(image[2].any(0))
    for c, loss in zip(present, _dice_of_classes(*image), strict=True):
      losses.append(loss * weights[c])
  return jnp.mean(jnp.array(losses or [0.0]))


GROUPS = np.array([0, 1, 0, 1])  # Of the embeddings of `ntxent`.


def _ntxent(x, where):
  rows = np.flatnonzero(where.any(-1))
  # An entry that is not there adds nothing to a product.
  unit = [x[i][where[i]] / jnp.sqrt((x[i][where[i]] ** 2).sum()) for i in rows]
  whole = [
    jnp.zeros(x.shape[1]).at[where[i]].set(unit[k]) for k, i in enumerate(rows)
  ]
  losses = []
  for a, b in itertools.permutations(range(len(rows)), 2):
    if GROUPS[rows[a]] != GROUPS[rows[b]]:
      continue
    others = [k for k, i in enumerate(rows) if GROUPS[i] != GROUPS[rows[a]]]
    pair = whole[a] @ whole[b] / 0.07
    others = [whole[a] @ whole[k] / 0.07 for k in others]
    losses.append(jax.nn.logsumexp(jnp.array([pair, *others])) - pair)
  return jnp.mean(jnp.array(losses or [0.0]))


# Two sequences of `ctc_loss`: the second has a frame less, and a label less.
FRAMES = np.array([[0.0, 0, 0, 0], [0, 0, 0, 1]])
LABELS = np.array([[1, 2], [2, 0]])
LABEL_PADDINGS = np.array([[0.0, 0], [0, 1]])


def _ctc(x, where):
  """By the sum over all paths."""
  losses = []
  for i, kept in enumerate(where & (FRAMES == 0)[..., None]):
    frames = np.flatnonzero(kept.any(-1))
    target = [
      k for k, p in zip(LABELS[i], LABEL_PADDINGS[i], strict=True) if not p
    ]
    if not (len(frames) and kept[:, target].any(0).all()):
      losses.append(jnp.zeros(()))
      continue
    log_p = [
      jnp.where(kept[t], x[i, t] - jax.nn.logsumexp(x[i, t][kept[t]]), -1e5)
      for t in frames
    ]
    paths = [
      sum(log_p[t][k] for t, k in enumerate(path))
      for path in itertools.product(range(x.shape[-1]), repeat=len(frames))
      if [k for k, _ in itertools.groupby(path) if k != 0] == target
    ]
    total = jax.nn.logsumexp(jnp.array(paths)) if paths else jnp.array(-1e5)
    losses.append(-total)
  return jnp.stack(losses)


@dataclasses.dataclass(frozen=True)
class Case:
  """A loss, what to call it with, and its formula.

  `formula` is written from the definition, in NumPy and float64, and takes the
  included elements of a slice alone. A formula of an elementwise loss returns
  one number an element. A loss that is not one of slices has a formula `whole`
  instead, of the data and the mask. `adapt` makes of the function that Optax
  has one to be called with the data. `rounds` tells that under a mask that
  masks nothing the last bits are not Optax's.
  """

  name: str
  data: tuple[Callable[..., np.ndarray], ...]
  formula: Callable[..., np.ndarray] | None = None
  axis: int | tuple[int, ...] = -1
  shape: tuple[int, ...] = SHAPE
  whole: Callable[..., jax.Array] | None = None
  adapt: Callable[..., Callable[..., jax.Array]] = lambda loss: loss
  rounds: bool = False

  @functools.cached_property
  def loss(self) -> Callable[..., jax.Array]:
    return self.adapt(getattr(optax.losses, self.name))

  @functools.cached_property
  def original(self) -> Callable[..., jax.Array]:
    return self.adapt(getattr(upstream.losses, self.name))

  @property
  def elementwise(self) -> bool:
    return self.axis == ()

  @property
  def has_index(self) -> bool:
    return _index in self.data

  def arguments(
    self, dtype: str, shape: tuple[int, ...] | None = None, axis: Any = -1
  ) -> tuple[jax.Array, ...]:
    """Clean data for all arguments, the same at each call."""
    rng = np.random.default_rng(sum(map(ord, self.name)))
    arrays = [make(rng, shape or self.shape, axis) for make in self.data]
    return tuple(
      jnp.asarray(a, "int32" if a.dtype.kind == "i" else dtype) for a in arrays
    )

  def floating(self) -> tuple[int, ...]:
    """Positions of the differentiable arguments."""
    return tuple(
      i for i, make in enumerate(self.data) if make not in (_index, _binary)
    )

  def is_index(self, position: int) -> bool:
    return self.data[position] is _index

  def masked(self, position: int, where: np.ndarray) -> np.ndarray:
    """What a mask of the data's shape masks of an argument."""
    return ~where.any(-1) if self.is_index(position) else ~where


def _ranking(loss):
  return lambda x, y, w, **kwargs: loss(
    x, y, weights=w, reduce_fn=None, **kwargs
  )


def _of_groups(loss):
  return lambda x, **kwargs: loss(x, np.resize(GROUPS, len(x)), **kwargs)


def _of_sequences(loss):
  def losses(x, **kwargs):
    sequences = (FRAMES, LABELS, LABEL_PADDINGS)
    sequences = [np.resize(a, (len(x), a.shape[1])) for a in sequences]
    result = loss(x, *sequences, **kwargs)
    return result[0] if isinstance(result, tuple) else result

  return losses


CASES = (
  Case(
    "softmax_cross_entropy",
    (_logits, _soft_labels),
    _cross_entropy,
    rounds=True,
  ),
  Case(
    "softmax_cross_entropy_with_integer_labels",
    (_logits, _index),
    lambda x, y: -_log_softmax(x)[y],
    rounds=True,
  ),
  Case("safe_softmax_cross_entropy", (_logits, _soft_labels), _cross_entropy),
  Case(
    "poly_loss_cross_entropy",
    (_logits, _soft_labels),
    lambda x, y: np.sum(
      y * (2 * (1 - np.exp(_log_softmax(x))) - _log_softmax(x))
    ),
  ),
  Case(
    "ranking_softmax_loss",
    (_logits, _soft_labels, _soft_labels),
    lambda x, y, w: _cross_entropy(x, w * y),
    adapt=_ranking,
  ),
  Case("multiclass_hinge_loss", (_logits, _index), _hinge),
  Case(
    "multiclass_perceptron_loss", (_logits, _index), lambda x, y: x.max() - x[y]
  ),
  Case("multiclass_sparsemax_loss", (_logits, _index), _sparsemax, rounds=True),
  Case(
    "make_fenchel_young_loss",
    (_logits, _soft_labels),
    lambda x, y: np.log(np.sum(np.exp(x))) - y @ x,
    adapt=lambda make: make(jax.nn.logsumexp),
  ),
  Case(
    "kl_divergence",
    (_log_probabilities, _probabilities),
    lambda q, p: np.sum(p * (np.log(p) - q)),
  ),
  Case(
    "kl_divergence_with_log_targets",
    (_log_probabilities, _log_probabilities),
    lambda q, p: np.sum(np.exp(p) * (p - q)),
  ),
  Case(
    "generalized_kl_divergence",
    (_logits, _soft_labels),
    lambda q, p: np.sum(p * (np.log(p) - q) + np.exp(q) - p),
  ),
  Case("cosine_similarity", (_logits, _logits), _cosine),
  Case("cosine_distance", (_logits, _logits), lambda a, b: 1 - _cosine(a, b)),
  Case("triplet_margin_loss", (_logits, _logits, _logits), _triplet),
  Case(
    "sigmoid_binary_cross_entropy",
    (_logits, _soft_labels),
    _binary_cross_entropy,
    axis=(),
    rounds=True,
  ),
  Case("sigmoid_focal_loss", (_logits, _soft_labels), _focal, axis=()),
  Case(
    "hinge_loss",
    (_logits, _signs),
    lambda x, y: np.maximum(0, 1 - x * y),
    axis=(),
  ),
  Case(
    "perceptron_loss",
    (_logits, _signs),
    lambda x, y: np.maximum(0, -x * y),
    axis=(),
  ),
  Case("sparsemax_loss", (_logits, _binary), _sparse_plus, axis=()),
  Case("squared_error", (_logits, _logits), lambda x, y: (x - y) ** 2, axis=()),
  Case("l2_loss", (_logits, _logits), lambda x, y: (x - y) ** 2 / 2, axis=()),
  Case("huber_loss", (_logits, _logits), _huber, axis=()),
  Case(
    "log_cosh", (_logits, _logits), lambda x, y: np.log(np.cosh(x - y)), axis=()
  ),
  Case(
    "smooth_labels",
    (_soft_labels, _soft_labels),
    whole=_smooth_labels,
    rounds=True,
  ),
  Case(
    "dice_loss",
    (_logits, _soft_labels),
    whole=_dice,
    shape=(2, 4, 3),
    rounds=True,
  ),
  Case(
    "multiclass_generalized_dice_loss",
    (_logits, _soft_labels),
    whole=_generalized_dice,
    shape=(2, 4, 3),
    rounds=True,
  ),
  Case(
    "binary_dice_loss", (_logits, _soft_labels), whole=_binary_dice, rounds=True
  ),
  Case("ntxent", (_logits,), whole=_ntxent, adapt=_of_groups, rounds=True),
  Case(
    "ctc_loss", (_logits,), whole=_ctc, adapt=_of_sequences, shape=(2, 4, 3)
  ),
  Case(
    "ctc_loss_with_forward_probs",
    (_logits,),
    whole=_ctc,
    adapt=_of_sequences,
    shape=(2, 4, 3),
  ),
)

# Every function of this package's own among the losses.
MASKED = [
  name
  for name in sorted(optax.losses.__all__)
  if getattr(optax.losses, name).__module__.startswith("optax_masking.")
]

# The losses of Optax that this package passes through, each with a reason.
PASSED_THROUGH: dict[str, str] = {}

NAMED = [(case.name, case) for case in CASES]
BY_NAME = dict(NAMED)
SLICED = [(case.name, case) for case in CASES if case.whole is None]


def masks(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
  """Masks of the data's shape, of every kind."""
  rng = np.random.default_rng(7)
  kinds = {
    "nothing masked": np.ones(shape, bool),
    "everything masked": np.zeros(shape, bool),
    "one element": np.ones(shape, bool),
    "all but one element": np.zeros(shape, bool),
    "whole rows": np.ones(shape, bool),
    "whole classes": np.ones(shape, bool),
    "random": rng.uniform(size=shape) < 0.6,
    "random, sparse": rng.uniform(size=shape) < 0.2,
  }
  kinds["one element"].flat[1] = False
  kinds["all but one element"].flat[-1] = True
  kinds["whole rows"][::2] = False
  kinds["whole classes"][..., 1:3] = False
  return kinds


def row_masks(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
  """Masks of examples, with size 1 along the last axis."""
  shape = (*shape[:-1], 1)
  some = np.resize([True, False, False, True, True], shape)
  return {
    "no row masked": np.ones(shape, bool),
    "some rows masked": some,
    "all rows masked": np.zeros(shape, bool),
  }


def all_masks(case: Case, dtype: str = DTYPES[0]) -> dict[str, np.ndarray]:
  """Both; of one shape in half precision, which compiles once then."""
  rows = row_masks(case.shape)
  if dtype != DTYPES[0]:
    rows = {k: np.broadcast_to(row, case.shape) for k, row in rows.items()}
  return masks(case.shape) | rows


def float_poisons(dtype: str) -> tuple[jax.Array, ...]:
  """What a masked element of a floating argument may hold."""
  info = jnp.finfo(dtype)
  values = (
    np.nan,
    np.inf,
    -np.inf,
    info.max,
    info.min,
    -1e30,
    info.smallest_subnormal,
    0.0,
  )
  return tuple(jnp.asarray(v).astype(dtype) for v in values)


INDEX_POISONS = (-100, -1, SHAPE[-1], 2**31 - 1)
