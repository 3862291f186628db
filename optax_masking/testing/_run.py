"""One run of the checks: a loss on the data of one dtype, and its results."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._events import Broken
from optax_masking.testing._masks import make_masks
from optax_masking.testing._options import Axes
from optax_masking.testing._problem import LARGE, Problem
from optax_masking.testing._program import (
  Lanes,
  Quantity,
  cotangent,
  program,
  quantities,
  unoptimized,
)
from optax_masking.testing._report import Finding

Values = Sequence[np.ndarray]
Results = list[np.ndarray]
ByArgument = dict[int | None, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
  """A loss, its programs, and its results on clean data.

  Attributes:
    problem: The loss and the data.
    result: The shape and the dtype of the loss.
    unmasked: The loss without a mask, as a function of the data; None if it
      can't be called so.
    parts: The parts of the program that can be computed.
    compiled: Whether the programs are compiled.
  """

  problem: Problem
  result: jax.ShapeDtypeStruct
  unmasked: Callable[[Values], Any] | None
  parts: tuple[str, ...]
  compiled: bool
  tally: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )

  @functools.cached_property
  def epsilon(self) -> float:
    """The largest rounding error of the floating arguments."""
    dtypes = (self.problem.values[f].dtype for f in self.problem.floats)
    return max(float(jnp.finfo(d).eps) for d in dtypes)

  @functools.cached_property
  def result_axes(self) -> Axes | None:
    return self.problem.axes_of_result(self.result.shape)

  @functools.cached_property
  def quantities(self) -> list[Quantity]:
    return quantities(self.parts, self.problem.floats)

  @functools.cached_property
  def tangents(self) -> list[np.ndarray]:
    """A direction for each floating argument."""
    rng = np.random.default_rng(0)
    shapes = [self.problem.values[f] for f in self.problem.floats]
    return [
      (rng.choice((-1, 1), x.shape) * rng.uniform(0.5, 1.5, x.shape)).astype(
        x.dtype
      )
      for x in shapes
    ]

  @functools.cached_property
  def everything(self) -> np.ndarray:
    return self.problem.call.everything

  @functools.cached_property
  def possible_masks(self) -> dict[str, np.ndarray]:
    """The masks to try, by name, without what is never included."""
    found: dict[str, np.ndarray] = {}
    for name, where in make_masks(self.problem).items():
      where = where & self.everything
      if not any(np.array_equal(where, other) for other in found.values()):
        found[name] = where
    return found

  @functools.cached_property
  def masks(self) -> dict[str, np.ndarray]:
    """Those of them for which there are data."""
    return {
      name: where
      for name, where in self.possible_masks.items()
      if self.remember(_values_for, name) is not None
    }

  @functools.cached_property
  def all_included(self) -> list[np.ndarray] | None:
    """Data with everything included, if there are such."""
    return self.problem.values_for(self.everything)

  @functools.cached_property
  def lanes(self) -> Lanes:
    """All quantities, for many data and masks."""
    run = self.problem.program(self.parts, self.compiled)

    def lane(values, tangents, where):
      return run(values, tangents, where=where)

    large = self.problem.size > LARGE // 8  # Which takes longer to run.
    return Lanes(lane, self.compiled, self.problem.size, optimized=large)

  def evaluate(
    self, rows: Sequence[tuple[Values, Values, np.ndarray]]
  ) -> Results:
    """All quantities, stacked, for data, tangents and masks."""
    derivatives = len({q.derivative for q in self.quantities})
    self.tally["cases"] += len(rows) * derivatives
    mask = self.problem.call.host_mask
    return self.lanes([(x, t, mask(where)) for x, t, where in rows])

  def evaluate_one(
    self, values: Values, where: np.ndarray, tangents: Values | None = None
  ) -> Results:
    """All quantities for some data, by default with the usual tangents."""
    tangents = self.tangents if tangents is None else tangents
    return [x[0] for x in self.evaluate([(values, tangents, where)])]

  @functools.cached_property
  def clean(self) -> dict[str, Results]:
    """The results on clean data, by mask."""
    rows = [
      (self.values_of(name), self.tangents, where)
      for name, where in self.masks.items()
    ]
    results = self.evaluate(rows)
    return {name: [x[i] for x in results] for i, name in enumerate(self.masks)}

  @functools.cached_property
  def usual(self) -> Results:
    """The results with everything included, or else with the first mask."""
    if self.all_included is None:
      return next(iter(self.clean.values()))
    return self.evaluate_one(self.all_included, self.everything)

  def values_of(self, mask: str) -> list[np.ndarray]:
    """The clean data with which the loss has a mask."""
    values = self.remember(_values_for, mask)
    assert values is not None
    return values

  # The value and the gradients alone, without a mask or of data of other sizes.

  def plain(self, rows: Sequence[tuple[Values, Any]]) -> ByArgument:
    """The value, at None, and the gradients of the loss without a mask.

    Args:
      rows: Data, and the cotangents of the loss.
    """
    self.tally["cases"] += len(rows)
    return self._by_argument(self._plain(rows))

  def with_mask(
    self, rows: Sequence[tuple[Values, Any, np.ndarray]]
  ) -> ByArgument:
    """The value, at None, and the gradients of the loss with masks.

    Args:
      rows: Data, the cotangents of the loss, and masks.
    """
    self.tally["cases"] += len(rows)
    mask = self.problem.call.host_mask
    rows = [(x, weights, mask(where)) for x, weights, where in rows]
    return self._by_argument(self._with_mask(rows))

  def _by_argument(self, results: list[np.ndarray]) -> ByArgument:
    value, *rest = results
    return {
      None: value,
      **dict(zip(self.problem.floats, rest[1:], strict=False)),
    }

  @functools.cached_property
  def _plain(self) -> Lanes:
    assert self.unmasked is not None
    run = program(self.unmasked, self.parts_of_gradient, self.problem.floats)
    return self._few_lanes(lambda values, weights: run(values, (), weights))

  @functools.cached_property
  def _with_mask(self) -> Lanes:
    run = program(
      self.problem.call, self.parts_of_gradient, self.problem.floats
    )
    return self._few_lanes(
      lambda values, weights, where: run(values, (), weights, where=where)
    )

  def _few_lanes(self, lane: Callable[..., Any]) -> Lanes:
    return Lanes(
      lane, self.compiled, self.problem.size, count=1, optimized=False
    )

  @property
  def parts_of_gradient(self) -> list[str]:
    """The parts for the value and the gradient."""
    return [part for part in ("value", "vjp") if part in self.parts]

  def remember(self, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function of this run, computed once."""
    key = (function, *args)
    if key not in self._memory:
      self._memory[key] = function(self, *args)
    return self._memory[key]

  @functools.cached_property
  def _memory(self) -> dict[Any, Any]:
    return {}

  # The program, operation by operation.

  @functools.cached_property
  def jaxpr(self) -> Any:
    """The program as JAX traces it; None if it can't be traced."""
    try:
      return self._traced(self.parts)
    except Exception:  # Whatever the loss raises.
      return None

  def _traced(self, parts: Sequence[str]) -> Any:
    run = self.problem.program(tuple(parts), self.compiled)
    values = self.problem.values_for(self.problem.where)
    return jax.make_jaxpr(
      lambda values, tangents, where: run(values, tangents, where=where)
    )(values, self.tangents, self.problem.call.host_mask(self.problem.where))

  def steps(
    self, values: Values, where: np.ndarray
  ) -> tuple[list[_trace.Step], list[_trace.Value]]:
    """All operations of the program on some data, and its outputs."""
    if self.problem.size > LARGE:
      raise ValueError("the data are too large to keep all of its arrays")
    if self.jaxpr is None:
      raise ValueError("the loss can't be traced")
    self.tally["cases"] += 1
    mask = self.problem.call.host_mask(where)
    arrays = list(map(jnp.asarray, [*values, *self.tangents, mask]))
    try:
      return self._recorders[-1](arrays)
    except Exception:
      if len(self._recorders) > 1:
        raise
      # A derivative by hand may have no derivative: the first ones alone.
      jaxpr = self._traced(self.parts_of_gradient)
      self._recorders.append(self._recorder(jaxpr))
      return self._recorders[-1](arrays)

  @functools.cached_property
  def _recorders(self) -> list[_trace.Recorder]:
    jaxpr = self.jaxpr
    if self.is_long:
      jaxpr = self._traced(self.parts_of_gradient)
    return [self._recorder(jaxpr)]

  @functools.cached_property
  def is_long(self) -> bool:
    """Whether XLA would take minutes to compile all steps as results."""
    return self.jaxpr is not None and _trace.length(self.jaxpr) > 3000

  def _recorder(self, jaxpr: Any) -> _trace.Recorder:
    return _trace.Recorder(jaxpr, self.compiled, unoptimized())

  # Words.

  def describe(self, quantity: Quantity, index: Sequence[int] = ()) -> str:
    """A quantity at an index, in words."""
    text = quantity.label
    if quantity.wrt is not None:
      name = self.problem.arguments[quantity.wrt].name
      text += f" with respect to `{name}`"
    return text + at_index(index)

  def broken(
    self,
    clause: str,
    quantity: Quantity,
    describe: Callable[[], dict[str, Any]],
    argument: int | None = None,
    transform: str | None = None,
  ) -> Broken:
    """A case in which a quantity breaks a clause."""
    names = [a.name for a in self.problem.arguments]
    finding = Finding(
      clause,
      "",
      argument=None if argument is None else names[argument],
      derivative=quantity.derivative,
      wrt=None if quantity.wrt is None else names[quantity.wrt],
      transform=transform or ("jit" if self.compiled else "eager"),
      dtype=self.problem.dtype,
    )
    return Broken(finding, describe)

  def facts(
    self,
    mask: str,
    got: Any,
    expected: Any,
    where: np.ndarray | None = None,
  ) -> dict[str, Any]:
    """The facts about a mask, by default one of `masks`, and two numbers."""
    where = self.masks[mask] if where is None else where
    return {
      "mask": mask,
      "where": listed(where),
      "got": number(got),
      "expected": number(expected),
    }

  def included_of_result(self, where: np.ndarray) -> np.ndarray:
    """The entries of the loss of which anything is included."""
    if self.result_axes is None:
      return np.broadcast_to(where.any(), self.result.shape)
    return self.problem.included(where, self.result.shape, self.result_axes)


def _values_for(run: Run, mask: str) -> list[np.ndarray] | None:
  return run.problem.values_for(run.possible_masks[mask])


def number(x: Any) -> str:
  return f"{float(x) + 0.0:.6g}"  # No minus before 0.


def listed(where: np.ndarray) -> Any:
  """A mask as nested lists; None if it is large."""
  return where.tolist() if where.size <= 256 else None


def at_index(index: Sequence[int]) -> str:
  return f" at {list(map(int, index))}" if len(index) else ""


def first_index(wrong: np.ndarray) -> tuple[int, ...]:
  """The index of the first True."""
  return tuple(map(int, np.argwhere(wrong)[0]))


def error_line(error: BaseException) -> str:
  """The first line of an error, with its type."""
  lines = str(error).strip().splitlines() or [""]
  text = lines[0] if len(lines[0]) < 300 else lines[0][:300] + "..."
  return f"{type(error).__name__}: {text}"


def weights_of(run: Run) -> np.ndarray:
  """The cotangent of the loss."""
  return cotangent(run.result.shape, run.result.dtype)
