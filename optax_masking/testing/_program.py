"""A loss with its derivatives, as one program."""

import functools
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

DERIVATIVE_OF = {part: d for d, parts in PARTS.items() for part in parts}


class Quantity(NamedTuple):
  """A description of one output of the program.

  Attributes:
    derivative: `"value"`, `"vjp"`, `"jvp"` or `"hessian"`.
    part: The part of `PARTS` that computes it.
    wrt: The position of the argument that a gradient or a Hessian is with
      respect to. None for a value or a tangent, which have the loss's shape.
    label: The quantity in words, such as `"the gradient"`.
  """

  derivative: str
  part: str
  wrt: int | None
  label: str

  @property
  def repeats_value(self) -> bool:
    """Whether it is the value of the loss, as a derivative returns it."""
    return self.label == "the value" and self.part != "value"


def quantities(parts: Sequence[str], floats: Sequence[int]) -> list[Quantity]:
  """Describes the outputs of `program`, in their order."""
  listed = []
  for derivative, parts_of_derivative in PARTS.items():
    for part in parts_of_derivative:
      if part not in parts:
        continue
      if derivative != "hessian":
        listed.append(Quantity(derivative, part, None, "the value"))
      if part == "jvp":
        listed.append(Quantity(derivative, part, None, "the tangent"))
      if part == "vjp":
        listed += [
          Quantity(derivative, part, f, "the gradient") for f in floats
        ]
      if derivative == "hessian":
        label = f"the Hessian ({part}) times a direction"
        listed += [Quantity(derivative, part, f, label) for f in floats]
  return listed


def cotangent(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Weights for the entries of a loss, no two the same; 1 for a single one."""
  size = int(np.prod(shape))
  return np.linspace(1, 2, size).reshape(shape).astype(dtype)


def program(
  call: Callable[..., Any], parts: Sequence[str], floats: Sequence[int]
) -> Callable[..., list[jax.Array]]:
  """Makes a function that computes a loss and its derivatives.

  Args:
    call: The loss, of a list of arrays and keywords.
    parts: The parts of `PARTS` to compute.
    floats: Positions of the floating arrays.

  Returns:
    A function `run(values, tangents, weights, **keywords)`. The weights are
    the cotangent of the loss, by default `cotangent` of its shape.
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
      return value, pull(jnp.asarray(w, value.dtype))[0]

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


# How many numbers a batch of data may have, and how many data.
_BATCH, _MOST_LANES = 2**21, 64


@functools.cache
def unoptimized() -> dict[str, Any] | None:
  """Options of XLA to compile programs that run once in half of the time."""
  if jax.default_backend() != "cpu":
    return None
  options = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
  }
  # Only some versions have the last one.
  for tried in ({**options, "xla_cpu_use_fusion_emitters": False}, options):
    try:
      jax.jit(lambda: 0.0, compiler_options=tried).lower().compile()
      return tried
    except Exception:  # Of an option that is unknown.
      continue
  return None


class Lanes:
  """A program that runs on many inputs of the same shapes, one by one.

  Compiled, it is one loop: no transformation of the program, and one call
  instead of many.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    compiled: bool,
    size: int,
    count: int = _MOST_LANES,
    optimized: bool = True,
  ):
    self._function = function
    self._count = max(1, min(count, _BATCH // max(1, size)))
    self._loop = None
    if compiled:
      options = None if optimized else unoptimized()
      self._loop = jax.jit(self._in_turn, compiler_options=options)

  def _in_turn(self, rows):
    if self._count == 1:
      return [
        x[None] for x in self._function(*jax.tree.map(lambda x: x[0], rows))
      ]
    return jax.lax.map(lambda row: self._function(*row), rows)

  def __call__(self, rows: Sequence[Any]) -> list[np.ndarray]:
    """Returns the outputs, each stacked along a first axis."""
    if self._loop is None:
      results = [jax.device_get(self._function(*row)) for row in rows]
      return [np.stack(column) for column in zip(*results, strict=True)]
    results = []
    for start in range(0, len(rows), self._count):
      part = list(rows[start : start + self._count])
      full = part + [part[-1]] * (self._count - len(part))  # For one program.
      stacked = jax.tree.map(lambda *xs: np.stack(xs), *full)
      outputs = jax.device_get(self._loop(stacked))
      results.append([x[: len(part)] for x in outputs])
    return [np.concatenate(column) for column in zip(*results, strict=True)]
