"""One program for all properties of a loss.

To compile takes most of the time of a test of JAX, and to run next to nothing.
So there is one program for each loss, dtype and kind of mask: the value, the
gradients, and the derivatives of both along a direction, for a batch of lanes.
A lane is a mask with data and tangents: clean ones, ones with a poison in what
is masked, with NaN in an included element, confident ones. The tests of the
properties compare lanes with each other, with Optax and with `formulas.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
  AS_USERS_DO,
  INDEX_POISONS,
  KINDS,
  Case,
  float_poisons,
)
from formulas import reference

from optax_masking.losses import _table as table

# Of the accuracy: scales of the logits, and how often there are data of each.
SCALES = (1.0, 10.0, 40.0)
SAMPLES = 6
# The masks whose lanes are compared with Optax's loss of what they include.
ACCURATE = {
  True: ("one class", "some rows masked"),
  False: ("nothing masked", "no row masked"),
}


@dataclasses.dataclass
class Lane:
  """What a program is given, and what it returns.

  Attributes:
    role: What the lane is for: "clean", "garbage" in what is masked,
      "direction" for a tangent of what is masked alone, "honesty" for NaN in an
      included element, or "accuracy".
    what: What is particular to the lane, for a message.
    mask: The name of the mask.
    where: The mask, of the shape of the data.
    arguments: The data.
    tangents: A direction for each floating argument.
    clean: The lane of the same mask with clean data.
    included: Where an included element is NaN.
    outputs: The value and its derivatives: "value", "jvp" and, for each
      floating argument, "vjp" and "hessian", the change of the gradient along
      the direction.
  """

  role: str
  what: str
  mask: str
  where: np.ndarray
  arguments: list[np.ndarray]
  tangents: list[np.ndarray]
  clean: "Lane | None" = None
  included: tuple[int, ...] | None = None
  outputs: dict = dataclasses.field(default_factory=dict)


def weights(shape: tuple[int, ...]) -> np.ndarray:
  """What a loss is multiplied by, so that no two of its elements are alike.

  Every dtype has them exactly.
  """
  return 0.5 + np.arange(np.prod(shape)).reshape(shape) % 64 / 64


def derivatives(case: Case, loss, arguments, where, tangents):
  """All derivatives of a loss, for lanes."""

  def lane(arguments, where, tangents):
    keywords = {} if where is None else {"where": where}

    def total(floats):
      value = loss(*case.with_floats(arguments, floats), **keywords)
      return jnp.sum(value * weights(value.shape).astype(value.dtype)), value

    gradient = jax.grad(total, has_aux=True)
    floats = [arguments[p] for p in case.floating]
    (vjp, value), (hessian, jvp) = jax.jvp(gradient, (floats,), (tangents,))
    return {"value": value, "jvp": jvp, "vjp": vjp, "hessian": hessian}

  return jax.vmap(lane)(arguments, where, tangents)


def run(case: Case, loss, lanes: list[Lane], wheres) -> None:
  """Runs the program for lanes, and gives each its outputs."""
  arguments = [
    np.stack(x) for x in zip(*(x.arguments for x in lanes), strict=True)
  ]
  tangents = [
    np.stack(x) for x in zip(*(x.tangents for x in lanes), strict=True)
  ]
  where = None if wheres is None else np.stack(wheres)
  program = jax.jit(
    derivatives, static_argnums=(0, 1), compiler_options=AS_USERS_DO
  )
  outputs = program(case, loss, arguments, where, tangents)
  outputs = jax.tree.map(np.asarray, outputs)
  for i, lane in enumerate(lanes):
    lane.outputs = jax.tree.map(lambda x, i=i: x[i], outputs)


def directions(case: Case, arguments) -> list[np.ndarray]:
  """A tangent for each floating argument, without zeros."""
  rng = np.random.default_rng(3)
  return [
    rng.uniform(0.5, 1.5, arguments[p].shape).astype(arguments[p].dtype)
    for p in case.floating
  ]


def data(case: Case, dtype: str, **options) -> list[np.ndarray]:
  return [np.asarray(x) for x in case.arguments(dtype, **options)]


def of_label(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """What an array of classes has for the class of each example."""
  return np.take_along_axis(x, labels[:, None], -1)


def first_included(case: Case, where: np.ndarray, arguments):
  """An element that counts: not one of an example without its own class."""
  for p in case.positions(table.class_index):
    where = where & of_label(where, arguments[p])
  found = np.argwhere(where)
  return tuple(found[0]) if len(found) else None


def of_mask(case: Case, dtype: str, name: str, where: np.ndarray) -> list[Lane]:
  """The lanes of one mask."""
  arguments = data(case, dtype)
  tangents = directions(case, arguments)
  clean = Lane("clean", "clean", name, where, arguments, tangents)
  first = first_included(case, where, arguments)
  lanes = [clean]

  def add(role, what):
    """A lane whose data and tangents may be replaced."""
    lane = Lane(role, what, name, where, list(arguments), list(tangents), clean)
    lanes.append(lane)
    return lane

  for p, x in enumerate(arguments):
    masked = case.masked(p, where)
    is_float = p in case.floating
    for poison in float_poisons(dtype) if is_float else INDEX_POISONS:
      lane = add("garbage", f"{poison} in argument {p}")
      lane.arguments[p] = np.where(masked, poison, x).astype(x.dtype)
    if not is_float:
      continue
    number = case.floating.index(p)
    t = tangents[number]
    lane = add("garbage", f"NaN in tangent {number}")
    lane.tangents[number] = np.where(masked, np.nan, t).astype(t.dtype)
    lane = add("direction", f"along what is masked of argument {p}")
    lane.tangents = [0 * t for t in tangents]
    lane.tangents[number] = np.where(masked, t, 0).astype(t.dtype)
    if first is not None:
      lane = add("honesty", f"NaN included in argument {p}")
      lane.arguments[p] = x.copy()
      lane.arguments[p][first] = np.nan
      lane.included = first
  return lanes


@functools.lru_cache(maxsize=16)  # Those of one loss, for all tests of it.
def lanes(case: Case, dtype: str, kind: str) -> tuple[Lane, ...]:
  """All lanes of a loss with masks of a kind, run."""
  found, wheres = [], []
  for name, where in KINDS[kind](case.shape).items():
    whole = np.broadcast_to(where, case.shape)
    more = of_mask(case, dtype, name, whole)
    more += accuracy(case, dtype, name, whole)
    found += more
    wheres += [where] * len(more)
  run(case, case.loss, found, wheres)
  return tuple(found)


def selected(case, dtype, kind, role) -> list[Lane]:
  """The lanes that are for one thing."""
  found = [lane for lane in lanes(case, dtype, kind) if lane.role == role]
  assert found
  return found


def accuracy(case: Case, dtype: str, mask: str, where: np.ndarray):
  """Lanes with logits of all sizes, some of which predict their labels."""
  if mask not in ACCURATE[case.compacts]:
    return []
  found = []
  for scale in SCALES:
    for sample in range(SAMPLES):
      arguments = data(case, dtype, scale=scale, seed=sample)
      if sample % 2:
        arguments = confident(case, arguments, where)
      for p in case.positions(table.class_index):
        # The masks of the accuracy include class 0.
        own = of_label(where, arguments[p])[:, 0]
        arguments[p] = np.where(own, arguments[p], 0)
      tangents = directions(case, arguments)
      what = f"scale {scale}, sample {sample}"
      found.append(Lane("accuracy", what, mask, where, arguments, tangents))
  return found


def confident(case: Case, arguments, where):
  """Targets that are what is predicted, as after training."""
  x, *others = arguments
  best = np.argmax(np.where(where, x, x.min()), -1)
  certain = x > 0 if case.elementwise else np.eye(x.shape[-1])[best]
  targets = {
    table.logits: x + x / 128,  # Near, but not the same.
    table.class_index: best,
    table.binary: x > 0,
    table.signs: np.where(x > 0, 1, -1),
    table.soft_labels: certain,
  }
  (target, *_) = case.data[1:] or (None,)
  if target in targets:
    others[0] = targets[target].astype(others[0].dtype)
  return [x, *others]


def compacted(case: Case, lane: Lane) -> Lane:
  """A lane without what is masked: as much of each slice, or whole ones."""
  kept = lane.where
  slices = kept.any(-1)

  def left(x, of_examples=False):
    if of_examples:
      return x[slices]
    shape = (*kept.shape[:-2], -1, int(kept[slices][0].sum()))
    return x[kept].reshape(shape)

  arguments = [
    left(x, p in case.per_example) for p, x in enumerate(lane.arguments)
  ]
  for p in case.positions(table.class_index):
    position = np.cumsum(kept[slices], -1, dtype="int32") - 1
    arguments[p] = of_label(position, arguments[p])[:, 0]
  whole = np.ones(arguments[0].shape, bool)
  tangents = [left(x) for x in lane.tangents]
  return Lane(lane.role, lane.what, lane.mask, whole, arguments, tangents)


def without_mask(case: Case, dtype: str, kind: str) -> list[Lane]:
  """The lanes of the accuracy with Optax's loss, of what is included."""
  found = [
    compacted(case, lane) for lane in selected(case, dtype, kind, "accuracy")
  ]
  run(case, case.original, found, None)
  return found


def expected(case: Case, lane: Lane) -> dict:
  """What the formula gives for a lane."""
  shape = np.shape(lane.outputs["value"])
  return reference(
    case, lane.arguments, lane.where, weights(shape), lane.tangents
  )
