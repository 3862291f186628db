"""A loss with its derivatives, as one program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The Hessian times a direction, in both orders of the modes.
PARTS = {
  "value": ("value",),
  "vjp": ("vjp",),
  "jvp": ("jvp",),
  "hessian": ("forward over reverse", "reverse over reverse"),
}


class Quantity(NamedTuple):
  """What one output of the program is.

  `wrt` is the position of the argument that the derivative is with respect to.
  It is None for what has the shape of the loss. `again` tells that it is the
  value, as differentiation returns it.
  """

  derivative: str
  part: str
  wrt: int | None
  what: str

  @property
  def again(self) -> bool:
    return self.what == "the value" and self.part != "value"


def quantities(parts: Sequence[str], floats: Sequence[int]) -> list[Quantity]:
  """What the outputs of `program` are, in their order."""
  listed = []
  for derivative, its_parts in PARTS.items():
    for part in its_parts:
      if part not in parts:
        continue
      if part in ("value", "vjp"):
        listed.append(Quantity(derivative, part, None, "the value"))
      if part == "jvp":
        listed.append(Quantity(derivative, part, None, "the value"))
        listed.append(Quantity(derivative, part, None, "the tangent"))
      if part == "vjp":
        listed += [
          Quantity(derivative, part, f, "the gradient") for f in floats
        ]
      if derivative == "hessian":
        what = f"the Hessian ({part}) times a direction"
        listed += [Quantity(derivative, part, f, what) for f in floats]
  return listed


def cotangent(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """A weight for each entry of a loss, no two the same."""
  size = int(np.prod(shape))
  return np.linspace(0.5, 1.5, size).reshape(shape).astype(dtype)


def program(
  call: Callable[..., Any], parts: Sequence[str], floats: Sequence[int]
) -> Callable[..., list[jax.Array]]:
  """Makes a function of all that is to be computed of a loss.

  Args:
    call: The loss, of a list of arrays and keywords.
    parts: Which of the parts of `PARTS`.
    floats: Positions of the floating arrays.

  Returns:
    A function `run(values, tangents, weights, **keywords)`, where `weights`
    None stands for `cotangent`.
  """

  def run(values, tangents, weights=None, **keywords):
    values = list(map(jnp.asarray, values))

    def loss(floating):
      replaced = list(values)
      for position, x in zip(floats, floating, strict=True):
        replaced[position] = x
      return call(replaced, **keywords)

    def gradient(floating):
      value, pull = jax.vjp(loss, floating)
      w = cotangent(value.shape, value.dtype) if weights is None else weights
      return value, pull(jnp.asarray(w))[0]

    floating = [values[f] for f in floats]
    tangents = list(map(jnp.asarray, tangents))
    results = []
    if "value" in parts:
      results.append(loss(floating))
    if "vjp" in parts:
      value, gradients = gradient(floating)
      results += [value, *gradients]
    if "jvp" in parts:
      results += jax.jvp(loss, (floating,), (tangents,))
    if "forward over reverse" in parts:
      results += jax.jvp(
        lambda floating: gradient(floating)[1], (floating,), (tangents,)
      )[1]
    if "reverse over reverse" in parts:
      _, pull = jax.vjp(lambda floating: gradient(floating)[1], floating)
      results += pull(tangents)[0]
    return results

  return run
