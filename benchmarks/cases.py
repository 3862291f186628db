"""The losses to measure, with data, masks, shapes and transforms."""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.losses._table import ROWS

LOSSES = tuple(sorted(ROWS))
INTEGER_LABELS = "softmax_cross_entropy_with_integer_labels"
# Shapes, each with its class axis.
SHAPES = (
  ((4096, 512), -1),
  ((512, 32000), -1),
  ((64, 128, 1000), -1),
  ((8, 19, 128, 128), 1),
)
DTYPES = ("float32", "bfloat16")
MASKS = ("none", "row", "full")
DENSITIES = (0.0, 0.5, 1.0)


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

  `shape` and `axis` are those of the first argument. A mask of rows has size 1
  along this axis, even if the loss is elementwise.
  """

  name: str
  shape: tuple[int, ...]
  axis: int
  arguments: tuple[jax.Array, ...]

  def of(self, package: ModuleType) -> Callable[..., jax.Array]:
    """The loss of a package, as a function of arrays and maybe `where`."""
    row = ROWS[self.name]
    loss = row.of(package.losses)
    return (
      functools.partial(loss, axis=self.axis)
      if row.has_axis_of_slices
      else loss
    )

  @property
  def takes_where(self) -> bool:
    """Whether Optax's loss has a mask of its own."""
    return ROWS[self.name].takes("where")

  def mask(self, kind: str, density: float) -> jax.Array | None:
    """A seeded mask of a kind, None for the kind `"none"`."""
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
    dtype: Dtype of its floating arguments.
    shape: Shape of its first argument, such as the logits.
    axis: Axis of the classes, features or items.

  Returns:
    The case. If Optax's loss can't take the shape, the case has a similar one.
  """
  row = ROWS[name]
  if not (row.elementwise or row.has_axis_of_slices):
    classes_last = (*np.delete(shape, axis).tolist(), shape[axis])
    shape, axis = row.fit(classes_last), -1
  return Case(name, shape, axis, row.arguments(dtype, shape, axis))
