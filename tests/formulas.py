"""The losses by their definitions, in NumPy, and their derivatives.

They are independent of JAX: of its arithmetic, and of its differentiation. A
formula takes real or complex numbers, as wide as NumPy has them. A complex step
gives the derivative to the last digit: that of `f` at `x` is the imaginary part
of `f(x + ih)` divided by `h`, in which nothing is subtracted. What cancels in a
formula is written so that it does not: `log(p)` as `-log1p(sum of ratios)`.
NumPy orders complex numbers by their real parts first, so a maximum takes its
derivative along.
"""

import itertools

import numpy as np

from optax_masking.losses import _table as table

WIDE = np.longdouble
STEP = WIDE(1e-30)
# How far second derivatives may be off, next to the largest terms.
UNCERTAINTY = 1e-10


def _abs(x):
  return np.where(x.real < 0, -x, x)


def _ratios(x):
  """For each class the sum of the probabilities of the others over its own."""
  d = x[None, :] - x[:, None]  # On the diagonal 0, or NaN.
  return np.sum(np.where(np.eye(len(x), dtype=bool), d, np.exp(d)), -1)


def _minus_log_softmax(x):
  return np.log1p(_ratios(x))


def _cross_entropy(x, y):
  return np.sum(y * _minus_log_softmax(x))


def _poly(x, y):
  ratios = _ratios(x)  # (1 - p) / p, so that 1 - p is it over 1 + it.
  return np.sum(y * (2 * ratios / (1 + ratios) + np.log1p(ratios)))


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _binary_cross_entropy(x, y):
  return y * np.log1p(np.exp(-x)) + (1 - y) * np.log1p(np.exp(x))


def _focal(x, y):
  missing = y * _sigmoid(-x) + (1 - y) * _sigmoid(x)
  return missing**2 * _binary_cross_entropy(x, y)


def _sparse_plus(x, y):
  x = np.where(y, -x, x)
  inside = (x + 1) ** 2 / 4
  return np.where(x.real < 1, np.where(x.real > -1, inside, 0), x)


def _multiclass_hinge(x, y):
  return np.max(x + (np.arange(len(x)) != y)) - x[y]


def _sparsemax(x, y):
  """By the definition: the maximum over the simplex, at its projection."""
  order = np.sort(x.real)[::-1]
  # As many of the largest as are above the threshold that they lead to.
  count = max(
    k for k in range(1, len(x) + 1) if order[:k].sum() - 1 < k * order[k - 1]
  )
  support = x.real >= order[count - 1]
  threshold = (np.sum(np.where(support, x, 0)) - 1) / count
  p = np.where(support, x - threshold, 0)
  return np.sum(p * (x - x[y])) + (1 - p @ p) / 2


def _huber(x, y):
  e = _abs(x - y)
  return np.where(e.real <= 1, e**2 / 2, e - WIDE(1) / 2)


def _log_cosh(x, y):
  e = _abs(x - y)
  return e + np.log1p(np.exp(-2 * e)) - np.log(WIDE(2))


def _distance(a, b):
  return np.sqrt((a - b) @ (a - b) + WIDE(1e-6))


def _triplet(a, p, n):
  return np.maximum(_distance(a, p) - _distance(a, n) + 1, 0)


def _cosine(a, b):
  return a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)


# Of the included elements of a slice, and what the slice has one of. The result
# is one number, or one an element.
OF_A_SLICE = {
  "softmax_cross_entropy": _cross_entropy,
  "softmax_cross_entropy_with_integer_labels": lambda x, y: _minus_log_softmax(
    x
  )[y],
  "safe_softmax_cross_entropy": _cross_entropy,
  "poly_loss_cross_entropy": _poly,
  "ranking_softmax_loss": lambda x, y, w: _cross_entropy(x, w * y),
  "multiclass_hinge_loss": _multiclass_hinge,
  "multiclass_perceptron_loss": lambda x, y: np.max(x) - x[y],
  "multiclass_sparsemax_loss": _sparsemax,
  "make_fenchel_young_loss": lambda x, y: (
    np.max(x) + np.log(np.sum(np.exp(x - np.max(x)))) - y @ x
  ),
  "kl_divergence": lambda q, p: np.sum(p * (np.log(p) - q)),
  "kl_divergence_with_log_targets": lambda q, p: np.sum(np.exp(p) * (p - q)),
  "generalized_kl_divergence": lambda q, p: np.sum(
    p * (np.log(p) - q) + np.exp(q) - p
  ),
  "cosine_similarity": _cosine,
  "cosine_distance": lambda a, b: 1 - _cosine(a, b),
  "triplet_margin_loss": _triplet,
  "sigmoid_binary_cross_entropy": _binary_cross_entropy,
  "sigmoid_focal_loss": _focal,
  "hinge_loss": lambda x, y: np.maximum(0, 1 - x * y),
  "perceptron_loss": lambda x, y: np.maximum(0, -x * y),
  "sparsemax_loss": _sparse_plus,
  "squared_error": lambda x, y: (x - y) ** 2,
  "l2_loss": lambda x, y: (x - y) ** 2 / 2,
  "huber_loss": _huber,
  "log_cosh": _log_cosh,
  "smooth_labels": lambda y, a: (1 - a) * y + a / len(y),
}


def _segments(x, where):
  """The softmax over what is included of each pixel."""
  e = np.where(where, np.exp(x), 0)
  return e / np.where(where.any(-1), e.sum(-1), 1)[..., None]


def _dice_of_classes(p, t, where):
  """Of an image: a loss for each class of which something is included."""
  losses = {}
  for c in np.flatnonzero(where.any(0)):
    q, u = p[where[:, c], c], t[where[:, c], c]
    losses[c] = 1 - 2 * ((q * u).sum() + 1) / (q.sum() + u.sum() + 2)
  return losses


def _mean(losses):
  losses = list(losses)
  return sum(losses) / len(losses) if losses else 0


def _dice(x, t, where):
  images = zip(_segments(x, where), t, where, strict=True)
  return np.array(
    [_mean(_dice_of_classes(*image).values()) for image in images]
  )


def _binary_dice(x, t, where):
  rows = zip(_sigmoid(x), t, where, strict=True)
  return np.array(
    [
      _mean(_dice_of_classes(*(a[:, None] for a in row)).values())
      for row in rows
    ]
  )


def _generalized_dice(x, t, where):
  weights = {
    c: 1 / (t[..., c][where[..., c]].sum() ** 2 + WIDE(1e-7))
    for c in np.flatnonzero(where.any((0, 1)))
  }
  images = zip(_segments(x, where), t, where, strict=True)
  return np.array(
    _mean(
      loss * weights[c] / _mean(weights.values())
      for image in images
      for c, loss in _dice_of_classes(*image).items()
    )
  )


def _ntxent(x, groups, where):
  temperature = WIDE(0.07)
  rows = np.flatnonzero(where.any(-1))
  x = np.where(where, x, 0)  # An entry that is not there adds to no product.
  unit = {i: x[i] / np.sqrt(x[i] @ x[i]) for i in rows}
  losses = []
  for a, b in itertools.permutations(rows, 2):
    if groups[a] == groups[b]:
      others = [unit[k] for k in rows if groups[k] != groups[a]]
      differences = [unit[a] @ (u - unit[b]) / temperature for u in others]
      losses.append(np.log1p(sum(np.exp(d) for d in differences)))
  return np.array(_mean(losses))


def _ctc(x, where):
  """By the sum over all paths."""
  labels, paddings = table.symbols(*x.shape[:2])
  losses = []
  for logits, kept, row in zip(
    x, where, np.where(paddings, 0, labels), strict=True
  ):
    frames = np.flatnonzero(kept.any(-1))
    target = row[row > 0].tolist()
    if not (len(frames) and kept[:, target].any(0).all()):
      losses.append(0)  # Nothing is left, or nothing of a label.
      continue
    log_p = np.full(logits.shape, -1e5, x.dtype)
    for t in frames:
      log_p[t, kept[t]] = -_minus_log_softmax(logits[t, kept[t]])
    paths = [
      sum(log_p[t, k] for t, k in zip(frames, path, strict=True))
      for path in itertools.product(range(x.shape[-1]), repeat=len(frames))
      if [k for k, _ in itertools.groupby(path) if k] == target
    ]
    best = max(paths, key=lambda p: p.real, default=-1e5)
    losses.append(
      -best - np.log(sum(np.exp(p - best) for p in paths or [best]))
    )
  return np.array(losses)


# Of all of the data and a mask: for losses that mix examples.
OF_THE_WHOLE = {
  "dice_loss": _dice,
  "multiclass_generalized_dice_loss": _generalized_dice,
  "binary_dice_loss": _binary_dice,
  "ntxent": _ntxent,
  "ctc_loss": _ctc,
  "ctc_loss_with_forward_probs": _ctc,
}


def _value(case, arguments, where):
  if not case.slices:
    return OF_THE_WHOLE[case.name](*arguments, where)
  keeps_shape = case.elementwise or case.keeps_shape
  out = np.zeros(
    where.shape if keeps_shape else where.shape[:1],
    np.result_type(*(arguments[p] for p in case.floating)),
  )
  for i, kept in enumerate(where):
    row = [x[i] for x in arguments]
    for p in case.positions(table.class_index):
      kept = kept & kept[row[p]]  # If not, the example is empty.
      row[p] = np.sum(kept[: row[p]])
    if kept.any():
      row = [x[kept] if np.ndim(x) else x for x in row]
      out[(i, kept) if keeps_shape else i] = OF_A_SLICE[case.name](*row)
  return out


def _gradients(case, arguments, where, weights):
  """Of the sum of the loss times weights, for all floating arguments."""
  # A slice depends on itself alone: a step is one in all of them.
  steps = np.ndindex(where.shape)
  if case.slices:
    steps = [(slice(None), c) for c in range(where.shape[1])]
  gradients = [np.zeros(where.shape, WIDE) for _ in case.floating]
  for step in steps:
    if not where[step].any():
      continue
    for gradient, p in zip(gradients, case.floating, strict=True):
      stepped = arguments[p].astype(np.clongdouble)
      stepped[step] += 1j * STEP
      got = _value(case, [*arguments[:p], stepped, *arguments[p + 1 :]], where)
      terms = got.imag * weights / STEP
      sums = np.sum(terms, tuple(range(int(case.slices), terms.ndim)))
      gradient[step] = np.where(where[step], sums, 0)
  return gradients


def value(case, arguments, where):
  """The loss of what is included, without what is not."""
  return _value(case, _wide(case, arguments), where)


def _wide(case, arguments):
  return [
    np.asarray(x, WIDE if p in case.floating else int)
    for p, x in enumerate(arguments)
  ]


def reference(case, arguments, where, weights, tangents):
  """The value, the gradients, and how both change along tangents.

  Args:
    case: Which loss.
    arguments: Its data, of two axes if it is one of slices.
    where: A mask of the shape of the data.
    weights: What the loss is multiplied by before it is summed and
      differentiated, of its shape.
    tangents: A direction for each floating argument.

  Returns:
    The value, the gradients, and their derivatives in that direction, in a
    dictionary. What is masked has a derivative of 0.
  """
  arguments = _wide(case, arguments)
  weights = np.asarray(weights, WIDE)
  tangents = [np.where(where, np.asarray(t, WIDE), 0) for t in tangents]

  def moved(step):
    floats = [arguments[p] for p in case.floating]
    moved = [x + step * t for x, t in zip(floats, tangents, strict=True)]
    return case.with_floats(arguments, moved)

  # Of exact gradients the central difference is good for 12 digits.
  h = WIDE(1e-6)
  plus, minus = (_gradients(case, moved(s), where, weights) for s in (h, -h))
  return {
    "value": _value(case, arguments, where),
    "vjp": _gradients(case, arguments, where, weights),
    "jvp": _value(case, moved(1j * STEP), where).imag / STEP,
    "hessian": [(a - b) / (2 * h) for a, b in zip(plus, minus, strict=True)],
  }
