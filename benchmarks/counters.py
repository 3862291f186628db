"""Costs of a program as the compiler counts them, the same in every run."""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Loss = Callable[..., jax.Array]

# The shape of an instruction has no space, unless it is a tuple.
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE
)
# Name, dtype, shape, operation and operands of an instruction with an array.
_ARRAY = re.compile(
  r"^\s*(?:ROOT )?%([\w.-]+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)",
  re.MULTILINE,
)
# An asynchronous collective has a start and an end: only the start counts.
_COLLECTIVE = re.compile(
  r"(?:all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
  r"|collective-permute|collective-broadcast)(?:-start)?"
)


def counters(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
  """Compiles a function and returns `counters_of` the program.

  Args:
    function: The function. Arrays that it closes over become constants.
    *arguments: Arrays, `jax.ShapeDtypeStruct` or pytrees of them.
  """
  return counters_of(jax.jit(function).lower(*arguments).compile())


def counters_of(program: jax.stages.Compiled) -> dict[str, float]:
  """Returns the counters of a compiled program.

  Args:
    program: The program.

  Returns:
    `bytes` and `flops`, as the compiler estimates them, but with the bytes that
    a gather or a scatter touches; `temporaries`, the bytes that the program
    allocates besides arguments and results; and the numbers of `transpose`,
    `scatter`, `gather` and `collective` operations, also inside of fusions.
  """
  cost = program.cost_analysis() or {}
  text = program.as_text() or ""
  ops = operations(text)
  collectives = (n for op, n in ops.items() if _COLLECTIVE.fullmatch(op))
  return {
    "bytes": cost.get("bytes accessed", 0.0) - _untouched_bytes(text),
    "flops": cost.get("flops", 0.0),
    "temporaries": program.memory_analysis().temp_size_in_bytes,
    **{op: ops[op] for op in ("transpose", "scatter", "gather")},
    "collective": sum(collectives),
  }


def _untouched_bytes(text: str) -> int:
  """Bytes that the compiler counts, but gathers and scatters don't touch.

  The compiler counts that a gather reads all of its operand, and that a
  scatter in place reads and writes all of it.
  """
  total = 0
  for computation in text.split("\n}"):
    found = {x[0]: x for x in _ARRAY.findall(computation)}

    def size(name, found=found):
      _, dtype, sizes, *_ = found[name]
      bits = int(re.sub(r"\D", "", dtype) or 8)
      return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8

    operands = {n: re.findall(r"%([\w.-]+)", x[4]) for n, x in found.items()}
    for name, (_, _, _, operation, _) in found.items():
      if operation not in ("gather", "scatter"):
        continue
      whole, *_, last = operands[name]
      readers = [n for n in operands if whole in operands[n]]
      if operation == "scatter":
        total += 2 * (size(whole) - size(last))
      elif len(readers) == 1:
        while found[whole][3] == "convert":  # It is fused into the gather.
          (whole,) = operands[whole]
        total += size(whole) - size(name)
  return total


def operations(text: str) -> collections.Counter[str]:
  """Counts the operations in the text of a compiled program, by their name."""
  return collections.Counter(_INSTRUCTION.findall(text))


def residual_bytes(loss: Loss, *arguments: Any) -> int:
  """Returns the bytes of the residuals that a backward pass needs.

  Args:
    loss: A function of arrays.
    *arguments: Its arguments. The gradient is with respect to the first one.
  """

  def pullback(first, *rest):
    return jax.vjp(lambda x: loss(x, *rest), first)[1]

  leaves = jax.tree.leaves(jax.eval_shape(pullback, *arguments))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def scanned_temporaries(
  loss: Loss, arguments: Sequence[Any], steps: int = 16
) -> int:
  """Returns the temporaries of a gradient through a loop over the examples.

  In a loop the residuals of a loss become temporaries, since the compiler can't
  fuse the forward pass with the backward pass.

  Args:
    loss: A function of arrays, whose result is summed.
    arguments: Its arguments, split along their first axes. The gradient is with
      respect to the first one.
    steps: Number of steps. If it does not divide the first axes, its largest
      divisor that does.
  """
  sizes = {x.shape[0] for x in jax.tree.leaves(arguments)}
  steps = math.gcd(steps, *sizes)

  def split(x):
    shape = (steps, x.shape[0] // steps, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype)

  def step(total, xs):
    return total + jnp.sum(loss(*xs), dtype=jnp.float32), None

  def scanned(*xs):
    return jax.lax.scan(step, jnp.float32(0), xs)[0]

  xs = jax.tree.map(split, tuple(arguments))
  program = jax.jit(jax.grad(scanned)).lower(*xs).compile()
  return program.memory_analysis().temp_size_in_bytes
