"""What is measured: losses and their data, masks, shapes and transforms."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_masking._audit import ROWS

LOSSES = tuple(ROWS)
INTEGER_LABELS = "softmax_cross_entropy_with_integer_labels"
# Each with its class axis.
SHAPES = (
  ((4096, 512), -1),
  ((512, 32000), -1),
  ((64, 128, 1000), -1),
  ((8, 19, 128, 128), 1),
)
DTYPES = ("float32", "bfloat16")
MASKS = ("none", "row", "full")
DENSITIES = (0.0, 0.5, 1.0)
_MOST_PAIRED = 256  # Embeddings of `ntxent`, which compares each with each.
_FRAMES = 128
_SYMBOLS = 16


def _forward(loss):
  return loss


def _value_and_grad(loss):
  return jax.value_and_grad(
    lambda *arguments: jnp.sum(loss(*arguments), dtype=jnp.float32)
  )


def _jvp(loss):
  def derivative(tangent, first, *rest):
    return jax.jvp(lambda x: loss(x, *rest), (first,), (tangent,))

  return derivative


TRANSFORMS: dict[str, Callable[..., Any]] = {
  "forward": _forward,
  "value_and_grad": _value_and_grad,
  "jvp": _jvp,
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A loss with its data.

  `shape` and `axis` are those of the first argument. An elementwise loss does
  not reduce its axis, but a mask of rows has size 1 along it all the same.
  """

  name: str
  shape: tuple[int, ...]
  axis: int
  arguments: tuple[jax.Array, ...]

  def of(self, package: ModuleType) -> Callable[..., jax.Array]:
    """The loss of a package, as a function of arrays and maybe `where`."""
    loss = getattr(package.losses, self.name)
    if self.name.startswith("ctc"):
      return _first(loss)
    loss = ROWS[self.name].adapt(loss)
    if _has_axis(self.name):
      loss = functools.partial(loss, axis=self.axis)
    return loss

  @property
  def takes_where(self) -> bool:
    """Whether Optax's loss has a mask of its own."""
    return "where" in _parameters(self.name)

  def mask(self, kind: str, density: float) -> jax.Array | None:
    """A mask of a kind that includes some of the data, the same each time."""
    if kind == "none":
      return None
    shape = list(self.shape)
    if kind == "row":
      shape[self.axis] = 1
    return jnp.asarray(np.random.default_rng(1).random(shape) < density)


def make_case(name: str, dtype: str, shape: tuple[int, ...], axis: int) -> Case:
  """Makes the seeded data of a loss.

  Args:
    name: Name of the loss.
    dtype: Of its floating arguments.
    shape: Shape of the logits, or of what the loss has instead of them.
    axis: Axis of the classes, features or items.

  Returns:
    The case, in the shape nearest to this one that Optax's loss can take.
  """
  rng = np.random.default_rng(0)
  row = ROWS[name]
  if not (row.elementwise or _has_axis(name)):
    shape, axis = _with_classes_last(name, shape, axis), -1
  classes_last = (*np.delete(shape, axis).tolist(), shape[axis])
  arrays = [make(rng, classes_last) for make in row.data]
  if name.startswith("ctc"):
    sequences, classes = shape[0], shape[-1]
    symbols = rng.integers(1, classes, (sequences, _SYMBOLS))
    arrays += [np.zeros(shape[:2]), symbols, np.zeros(symbols.shape)]
  arguments = (
    np.moveaxis(x, -1, axis) if x.ndim == len(shape) else x for x in arrays
  )
  return Case(
    name,
    shape,
    axis,
    tuple(
      jnp.asarray(x, "int32" if x.dtype.kind == "i" else dtype)
      for x in arguments
    ),
  )


def _with_classes_last(name, shape, axis):
  """The nearest shape for a loss that has no `axis`.

  The `multiclass_` losses take one axis of examples. CTC takes sequences of
  frames, `ntxent` few enough rows to compare each with each, and the Dice
  losses of classes images of pixels.
  """
  *batch, classes = (*np.delete(shape, axis).tolist(), shape[axis])
  rows = math.prod(batch)
  if name.startswith("ctc"):
    frames = math.gcd(rows, _FRAMES)
    return rows // frames, frames, classes
  if name == "ntxent":
    return min(rows, _MOST_PAIRED), classes
  if "dice" in name and name != "binary_dice_loss" and len(batch) == 1:
    images = math.gcd(rows, 8)
    return images, rows // images, classes
  if name.startswith("multiclass_") and "dice" not in name:
    return rows, classes
  return *batch, classes


def _first(loss):
  def of_sequences(*arguments, **keywords):
    result = loss(*arguments, **keywords)
    return result[0] if isinstance(result, tuple) else result

  return of_sequences


def _parameters(name):
  return inspect.signature(getattr(optax.losses, name)).parameters


def _has_axis(name):
  # That of the Dice loss is one of pixels.
  return "axis" in _parameters(name) and name != "dice_loss"
