"""Runs a program operation by operation, to find where a number arose."""

import contextlib
import linecache
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

# Primitives that only call a program of their own.
_CALLS = (
  "checkpoint",
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "jit",
  "pjit",
  "remat",
  "remat2",
)
# Primitives that only move numbers, and so make none.
_MOVES = (
  "broadcast_in_dim",
  "concatenate",
  "convert_element_type",
  "copy",
  "copy_p",
  "expand_dims",
  "gather",
  "pad",
  "reshape",
  "rev",
  "select_n",
  "slice",
  "squeeze",
  "transpose",
)
# Primitives each of whose numbers is made of those at the same place.
_ELEMENTWISE = (
  "add",
  "cos",
  "div",
  "exp",
  "exp2",
  "expm1",
  "integer_pow",
  "log",
  "log1p",
  "logistic",
  "mul",
  "pow",
  "rsqrt",
  "sin",
  "sqrt",
  "square",
  "sub",
  "tan",
)
_NOTHING = contextlib.nullcontext()
# Longer loops are one operation.
_LENGTH = 64
GUARD = os.path.dirname(__file__) + os.sep
LIBRARIES = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (jax, np))
_LOSSES = (
  os.path.dirname(optax.__file__) + os.sep,
  os.path.dirname(os.path.dirname(__file__)) + os.sep,
)


class Step(NamedTuple):
  """One operation that was run, with its inputs and outputs."""

  primitive: str
  inputs: list["Value"]
  outputs: list["Value"]
  traceback: Any


class Value:
  """An array of a run.

  `step` and `position` say which output of which step the array is. An argument
  has a position and no step, a constant has neither.
  """

  def __init__(
    self, array: Any, step: int | None = None, position: int | None = None
  ):
    self.array = array
    self.step = step
    self.position = position

  @property
  def is_constant(self) -> bool:
    """Whether the array is the same in each run."""
    return self.step is None and self.position is None


class Recorder:
  """Runs a closed jaxpr on flat arguments, and returns all steps.

  Compiled, one program returns the arrays of all steps. It can't have branches
  that depend on the data, whose steps run one by one.
  """

  def __init__(self, program: Any, compiled: bool, options: Any = None):
    self._program = program
    self._compiled = None
    if compiled:
      self._compiled = jax.jit(self._arrays, compiler_options=options)
    self._traced: tuple[list[Step], list[Value]] = [], []

  def _run(self, arguments: Sequence[Any]) -> tuple[list[Step], list[Value]]:
    steps: list[Step] = []
    inputs = [Value(x, None, i) for i, x in enumerate(arguments)]
    jaxpr, consts = self._program.jaxpr, self._program.consts
    return steps, _run(jaxpr, consts, inputs, steps, None)

  def _arrays(self, arguments: Sequence[Any]) -> list[list[Any]]:
    steps, outputs = self._traced = self._run(arguments)
    arrays = [[value.array for value in step.outputs] for step in steps]
    for values in (outputs, *(step.inputs + step.outputs for step in steps)):
      for value in values:
        if not value.is_constant:
          value.array = None  # JAX forbids to keep what it traces.
    return arrays

  def __call__(
    self, arguments: Sequence[Any]
  ) -> tuple[list[Step], list[Value]]:
    if self._compiled is None:
      return self._run(arguments)
    try:
      arrays = self._compiled(list(arguments))
    except jax.errors.TracerArrayConversionError:  # At a branch.
      self._compiled = None
      return self._run(arguments)

    def filled(value):
      x, step, position = value.array, value.step, value.position
      if step is not None:
        x = arrays[step][position]
      elif position is not None:
        x = arguments[position]
      return Value(x, step, position)

    steps, outputs = self._traced
    return [
      step._replace(
        inputs=list(map(filled, step.inputs)),
        outputs=list(map(filled, step.outputs)),
      )
      for step in steps
    ], list(map(filled, outputs))


def _run(
  jaxpr: Any,
  consts: Sequence[Any],
  inputs: Sequence[Value],
  steps: list[Step],
  outer: Any,
) -> list[Value]:
  known = dict(zip(jaxpr.constvars, map(Value, consts), strict=True))
  known.update(zip(jaxpr.invars, inputs, strict=True))

  def read(atom):
    return Value(atom.val) if isinstance(atom, core.Literal) else known[atom]

  for eqn in jaxpr.eqns:
    values = [read(atom) for atom in eqn.invars]
    traceback = outer or eqn.source_info.traceback
    inner = _inner(eqn, values)
    if eqn.primitive.name == "scan" and eqn.params["length"] <= _LENGTH:
      results = _scan(eqn.params, values, steps, outer, traceback)
    elif inner is not None:
      inner, values = inner
      closed = isinstance(inner, core.ClosedJaxpr)
      body = inner.jaxpr if closed else inner
      # JAX traces its own functions once: their lines may be of an older call.
      results = _run(
        body,
        inner.consts if closed else (),
        values,
        steps,
        traceback if outer or _is_of_a_library(body) else None,
      )
    else:
      bound = eqn.primitive.get_bind_params(eqn.params)
      # In older versions of JAX, with functions beside them.
      functions, parameters = bound if isinstance(bound, tuple) else ([], bound)
      # What has no inputs is no part of the data, and may choose a branch.
      constant = values == []
      arrays = [v.array for v in values]
      if eqn.primitive.name == "mul":  # XLA makes a select of 0 times infinity.
        arrays = list(map(_as_it_is, arrays))
      with jax.ensure_compile_time_eval() if constant else _NOTHING:
        arrays = eqn.primitive.bind(*functions, *arrays, **parameters)
      arrays = arrays if eqn.primitive.multiple_results else [arrays]
      results = [Value(x, len(steps), i) for i, x in enumerate(arrays)]
      steps.append(Step(eqn.primitive.name, values, results, traceback))
    known.update(zip(eqn.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _as_it_is(x: Any) -> Any:
  """Keeps XLA from computing with what an array is made of."""
  if isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.number):
    return jax.lax.optimization_barrier(x)
  return x


def _scan(
  parameters: Mapping[str, Any],
  values: list[Value],
  steps: list[Step],
  outer: Any,
  traceback: Any,
) -> list[Value]:
  """Runs a loop step by step, so that a fault inside of it has a step."""
  body, count = parameters["jaxpr"], parameters["num_consts"]
  carried = count + parameters["num_carry"]
  constants, carry = values[:count], values[count:carried]
  rows: list[list[Value]] = []
  order = range(parameters["length"])
  for i in reversed(order) if parameters["reverse"] else order:
    row = []
    for x in values[carried:]:
      row.append(Value(x.array[i], len(steps), 0))
      steps.append(Step("slice", [x], [row[-1]], traceback))
    results = _run(
      body.jaxpr, body.consts, [*constants, *carry, *row], steps, outer
    )
    carry = results[: len(carry)]
    rows.append(results[len(carry) :])
  if parameters["reverse"]:
    rows.reverse()
  stacked = []
  for column in zip(*rows, strict=True):
    array = jnp.stack([x.array for x in column])
    stacked.append(Value(array, len(steps), 0))
    steps.append(Step("concatenate", list(column), [stacked[-1]], traceback))
  return carry + stacked


def _inner(eqn: Any, values: list[Value]) -> tuple[Any, list[Value]] | None:
  """The program that an operation only calls, and the inputs of the call."""
  name, parameters = eqn.primitive.name, eqn.params
  if name == "cond":
    index = int(np.asarray(values[0].array))
    branches = parameters["branches"]
    return branches[min(max(index, 0), len(branches) - 1)], values[1:]
  if name in _CALLS:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
      if key in parameters:
        return parameters[key], values
  return None


def _is_of_a_library(jaxpr: Any) -> bool:
  info = getattr(jaxpr, "debug_info", None)
  written = str(getattr(info, "func_src_info", "") or "")
  return any(library in written for library in LIBRARIES)


def floating(value: Value) -> np.ndarray | None:
  """The numbers of a floating array, None for anything else."""
  dtype = getattr(value.array, "dtype", None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
    return None
  return np.asarray(value.array)


def has_nan(value: Value) -> bool:
  """Whether a floating array has a NaN."""
  x = floating(value)
  return x is not None and bool(np.isnan(x).any())


def nonfinite(value: Value) -> bool:
  """Whether a floating array has a NaN or an infinity."""
  x = floating(value)
  return x is not None and not np.isfinite(x).all()


def first(
  steps: Sequence[Step], output: Value, wrong: Callable[[Value], bool]
) -> Step | None:
  """The first step with a wrong output, of those that led to a wrong output."""
  seen: set[int] = set()
  todo = [output]
  while todo:
    value = todo.pop()
    if value.step is None or value.step in seen or not wrong(value):
      continue
    seen.add(value.step)
    todo += steps[value.step].inputs
  making = [i for i in seen if steps[i].primitive not in _MOVES]
  return steps[min(making or seen)] if seen else None


def origins(
  steps: Sequence[Step], values: Sequence[Value]
) -> tuple[set[int], set[int]]:
  """The steps, and the positions of the arguments, that led to some values."""
  seen: set[int] = set()
  arguments: set[int] = set()
  todo = list(values)
  while todo:
    value = todo.pop()
    if value.step is None:
      if value.position is not None:
        arguments.add(value.position)
    elif value.step not in seen:
      seen.add(value.step)
      todo += steps[value.step].inputs
  return seen, arguments


def source(step: Step) -> tuple[str | None, str | None]:
  """The line that made a step, in the code of the user, and its text."""
  frames = []
  for frame in getattr(step.traceback, "frames", ()):
    if frame.file_name.startswith(GUARD):
      break
    if not frame.file_name.startswith(LIBRARIES):
      frames.append(frame)
  if not frames:
    return None, None
  inner = frames[0]
  own = next((f for f in frames if _is_of_the_user(f.file_name)), inner)
  text = linecache.getline(own.file_name, own.line_num).strip() or None
  place = _place(own)
  if own is not inner:
    place += f", by way of {_place(inner)}"
  return place, text


def _is_of_the_user(file: str) -> bool:
  installed = f"{os.sep}site-packages{os.sep}" in file
  return not installed and not file.startswith(_LOSSES)


def _place(frame: Any) -> str:
  name = frame.file_name
  folder = os.getcwd() + os.sep
  name = name.removeprefix(folder)
  return f"{name}:{frame.line_num} in {frame.function_name}"


def making_nonfinite(
  steps: Sequence[Step], outputs: Sequence[Value]
) -> list[int]:
  """The steps on the way to some outputs that make a NaN or an infinity.

  An infinity that is a constant, such as the fill before a softmax, is moved
  and added to by other steps.
  """
  reached, _ = origins(steps, outputs)
  return [i for i in sorted(reached) if _makes_nonfinite(steps[i])]


def _makes_nonfinite(step: Step) -> bool:
  inputs = [x for x in map(floating, step.inputs) if x is not None]
  for output in step.outputs:
    x = floating(output)
    if x is None or np.isfinite(x).all():
      continue
    has_nan, is_infinite = np.isnan(x), np.isinf(x)
    for y in inputs:
      given_nan, given_infinite = np.isnan(y), ~np.isfinite(y)
      if y.shape != x.shape or step.primitive not in _ELEMENTWISE:
        given_nan, given_infinite = given_nan.any(), given_infinite.any()
      has_nan = has_nan & ~given_nan
      is_infinite = is_infinite & ~given_infinite
    if has_nan.any() or is_infinite.any():
      return True
  return False


def programs_in(eqn: Any) -> Iterator[Any]:
  """The programs that an operation runs."""
  for parameter in jax.tree.leaves(
    list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
  ):
    if hasattr(parameter, "eqns"):
      yield parameter


def length(program: Any) -> int:
  """How many steps a program has."""
  steps = 0
  for eqn in program.eqns:
    inner = max(map(length, programs_in(eqn)), default=1)
    count = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    steps += inner * (count if count <= _LENGTH else 1)
  return steps


def uses(program: Any, primitives: Collection[str]) -> bool:
  """Whether any of some primitives is in a program."""
  return any(
    eqn.primitive.name in primitives
    or any(uses(inner, primitives) for inner in programs_in(eqn))
    for eqn in program.eqns
  )


def draws_random_numbers(program: Any) -> bool:
  """Whether a program draws bits from a key."""
  bits = ("random_bits", "threefry2x32", "rng_bit_generator")
  return program is not None and uses(program, bits)


class Flow(NamedTuple):
  """What a program does with its arguments, by their positions.

  Attributes:
    indices: The arguments by which rows of some tables are looked up.
    looked_at_for_nan: Those of which it asks whether they are NaN, as
      nan_to_num does.
  """

  indices: set[int]
  looked_at_for_nan: set[int]


def flow(program: Any, tables: Collection[int] = ()) -> Flow:
  """Follows the arguments of a program.

  Args:
    program: A closed jaxpr.
    tables: Positions of the arguments that are tables.
  """
  jaxpr = program.jaxpr
  names = {v: i for i, v in enumerate(jaxpr.invars)}
  tables_of = {v: {i} if i in tables else set() for v, i in names.items()}
  origins_of = {v: {i} for v, i in names.items()}
  found = Flow(set(), set())
  _follow(jaxpr, tables_of, origins_of, found)
  return found


def _asks_for_nan(eqn: Any) -> bool:
  name = eqn.primitive.name
  same = name in ("eq", "ne") and eqn.invars[0] is eqn.invars[-1]
  return same or name == "is_finite"


def _follow(
  jaxpr: Any,
  tables_of: dict[Any, set[int]],
  origins_of: dict[Any, set[int]],
  found: Flow,
) -> list[tuple[set[int], set[int]]]:
  """Follows tables through moves, and the origins of all other arrays."""

  def read(known, atom):
    return set() if isinstance(atom, core.Literal) else known.get(atom, set())

  for eqn in jaxpr.eqns:
    tables = [read(tables_of, a) for a in eqn.invars]
    origins_ = [read(origins_of, a) for a in eqn.invars]
    if eqn.primitive.name == "gather" and tables[0]:
      found.indices.update(origins_[1])
    if _asks_for_nan(eqn):
      found.looked_at_for_nan.update(*origins_)
    results = None
    for inner in programs_in(eqn):
      body = getattr(inner, "jaxpr", inner)
      # A branch has no input for the number of its branch.
      skipped = len(eqn.invars) - len(body.invars)
      if skipped not in (0, 1):
        continue
      results = _follow(
        body,
        dict(zip(body.invars, tables[skipped:], strict=True)),
        dict(zip(body.invars, origins_[skipped:], strict=True)),
        found,
      )
    if results is None or len(results) != len(eqn.outvars):
      moved = eqn.primitive.name in _MOVES and eqn.primitive.name != "gather"
      outcome = (
        set().union(*tables) if moved else set(),
        set().union(*origins_),
      )
      results = [outcome] * len(eqn.outvars)
    for variable, (table, origin) in zip(eqn.outvars, results, strict=True):
      tables_of[variable], origins_of[variable] = table, origin
  return [(read(tables_of, v), read(origins_of, v)) for v in jaxpr.outvars]
