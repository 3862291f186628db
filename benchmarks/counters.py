"""Costs of a compiled program, the same in every run.

A program is a list of kernels, which read arrays from memory and write arrays
to it. `traffic` adds up what they touch. XLA's `cost_analysis` would count that
a gather reads all of its operand, and that a scatter in place writes all of it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Loss = Callable[..., jax.Array]

_COMPUTATION = re.compile(
  r"^((?:ENTRY )?%[\w.-]+) \(.*?\) -> .*? \{\n(.*?)^\}", re.M | re.S
)
# Name, shapes, operation, operands and attributes of an instruction. The shapes
# have no space, unless they are a tuple.
_INSTRUCTION = re.compile(
  r"^ *(?:ROOT )?(%[\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", re.M
)
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_NAME = re.compile(r"%[\w.-]+")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|branch_computations|true_computation"
  r"|false_computation)=\{?((?:%[\w.-]+(?:, )?)+)"
)
_TRIPS = re.compile(r'known_trip_count"?:\{"n":"(\d+)"')
_NO_KERNEL = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("after-all", "partition-id", "replica-id"),
)
_PARTS = ("gather", "dynamic-slice", "slice")
_UPDATES = ("scatter", "dynamic-update-slice")
_SUMS = ("reduce", "reduce-window", "dot", "convolution")
# An asynchronous collective has a start and an end: only the start counts.
_COLLECTIVE = re.compile(
  r"(?:all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter"
  r"|collective-permute|collective-broadcast)(?:-start)?"
)


@dataclasses.dataclass(eq=False)
class _Instruction:
  operation: str
  size: int  # Of all arrays of the result, in elements.
  n_bytes: int
  operands: list["_Instruction"]
  attributes: str
  wanted: int = 0  # The elements that other instructions read.

  def bytes_of(self, elements: int) -> int:
    return min(elements, self.size) * self.n_bytes // max(self.size, 1)


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
    `bytes` and `kernels` of `traffic`; `flops`, as the compiler estimates them;
    `temporaries`, the bytes that the program allocates besides arguments and
    results; and the numbers of `transpose`, `scatter`, `gather` and
    `collective` operations, also inside of fusions.
  """
  cost = program.cost_analysis() or {}
  text = program.as_text() or ""
  ops = operations(text)
  collectives = (n for op, n in ops.items() if _COLLECTIVE.fullmatch(op))
  n_bytes, kernels = traffic(text)
  return {
    "bytes": n_bytes,
    "kernels": kernels,
    "flops": cost.get("flops", 0.0),
    "temporaries": program.memory_analysis().temp_size_in_bytes,
    **{op: ops[op] for op in ("transpose", "scatter", "gather")},
    "collective": sum(collectives),
  }


def traffic(text: str) -> tuple[int, int]:
  """The bytes that a program reads and writes, and the kernels that it starts.

  A loop counts as often as it is known to run, or once, and of a conditional
  the branch that moves most. There are no caches: a kernel reads its operands
  from memory, even if the one before has written them.

  Args:
    text: The text of a compiled program.
  """
  computations = dict(_COMPUTATION.findall(text))
  (entry,) = (c for name, c in computations.items() if name[0] == "E")

  def total(body: str) -> tuple[int, int]:
    n_bytes = kernels = 0
    for instruction in _instructions(body):
      if re.search("-done$", instruction.operation):
        continue
      called = [
        computations[name]
        for names in _CALLED.findall(instruction.attributes)
        for name in _NAME.findall(names)
      ]
      if instruction.operation in ("call", "while", "conditional"):
        trips = int((*_TRIPS.findall(instruction.attributes), 1)[0])
        most = max(map(total, called))
        n_bytes += trips * most[0]
        kernels += trips * most[1]
      elif instruction.operation == "fusion":
        n_bytes += _moved(_instructions(called[0]))
        kernels += 1
      elif instruction.operation not in _NO_KERNEL:
        operands = [
          dataclasses.replace(x, operation="parameter", operands=[])
          for x in instruction.operands
        ]
        alone = dataclasses.replace(instruction, operands=operands)
        n_bytes += _moved([*operands, alone])
        kernels += 1
    return n_bytes, kernels

  return total(entry)


def _instructions(body: str) -> list[_Instruction]:
  """The instructions of a computation. The last one is its result."""
  found: dict[str, _Instruction] = {}
  for name, shapes, operation, operands, rest in _INSTRUCTION.findall(body):
    sizes, n_bytes = [], 0
    for kind, bits, shape in _ARRAY.findall(shapes):
      sizes.append(math.prod(int(n) for n in shape.split(",") if n))
      n_bytes += sizes[-1] * (8 if kind == "pred" else int(bits or 0)) // 8
    known = [found[n] for n in _NAME.findall(operands) if n in found]
    found[name] = _Instruction(operation, sum(sizes), n_bytes, known, rest)
  return [*found.values()]


def _moved(kernel: Sequence[_Instruction]) -> int:
  """The bytes that a kernel reads of its parameters, and writes.

  From the result back to the parameters: of each array as many elements are
  read as those that read it need, and each only once.
  """
  *_, root = kernel
  moved = 0
  for result in root.operands if root.operation == "tuple" else [root]:
    result.wanted = result.size
    written = result
    while written.operation in ("bitcast", "convert") and written.operands:
      (written,) = written.operands
    if written.operation in _UPDATES:  # In place.
      moved += result.bytes_of(_update(written).size)
    else:
      moved += result.n_bytes
  for instruction in reversed(kernel):
    wanted = min(instruction.wanted, instruction.size)
    if instruction.operation == "parameter":
      moved += instruction.bytes_of(wanted)
    elif instruction.operation != "tuple":
      for position, operand in enumerate(instruction.operands):
        operand.wanted += _needed(instruction, wanted, position)
  return moved


def _needed(instruction: _Instruction, wanted: int, position: int) -> int:
  """How many elements of an operand give so many elements of a result."""
  operation, operand = instruction.operation, instruction.operands[position]
  if operation in _SUMS:
    return math.ceil(operand.size * wanted / max(instruction.size, 1))
  if operation in _PARTS:
    return operand.size if position else wanted  # All of the indices.
  if operation in _UPDATES and position == 0:
    # In place. A scatter reads what it adds to.
    return _update(instruction).size if operation == "scatter" else 0
  return operand.size if operation in _UPDATES else min(wanted, operand.size)


def _update(instruction: _Instruction) -> _Instruction:
  """What a scatter or an update of a slice puts into its first operand."""
  return instruction.operands[-1 if instruction.operation == "scatter" else 1]


def operations(text: str) -> collections.Counter[str]:
  """Counts the operations in the text of a compiled program, by their name."""
  found = _INSTRUCTION.findall(text)
  return collections.Counter(operation for _, _, operation, *_ in found)


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
