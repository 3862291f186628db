"""Clauses that hold to the bit: zeros, and results despite poisons."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from optax_masking.testing._blame import blame
from optax_masking.testing._events import Event, Note, Tried
from optax_masking.testing._labels import lost_examples
from optax_masking.testing._masks import evenly_spaced
from optax_masking.testing._poisons import Poisoning, poisonings
from optax_masking.testing._program import Quantity
from optax_masking.testing._rounding import differ
from optax_masking.testing._run import (
  Results,
  Run,
  at_index,
  first_index,
  number,
)


@dataclasses.dataclass(frozen=True)
class _Result:
  """A quantity of the loss on clean data."""

  run: Run
  mask: str
  quantity: Quantity
  got: np.ndarray

  def zero(
    self,
    clause: str,
    region: np.ndarray,
    reason: str,
    argument: int | None = None,
  ) -> Iterator[Event]:
    """Reports a number other than 0 in a region, with the reason to be 0."""
    if not region.any():
      return
    yield Tried(clause)
    argument = self.quantity.wrt if argument is None else argument
    wrong = region & ~(self.got == 0)
    if wrong.any():
      index = first_index(wrong)
      yield self.run.broken(
        clause,
        self.quantity,
        lambda: self._describe(index, reason, argument),
        argument,
      )

  def _describe(
    self, index: tuple[int, ...], reason: str, argument: int | None
  ) -> dict[str, Any]:
    run, quantity, got = self.run, self.quantity, self.got[index]
    own = argument == quantity.wrt is not None
    values, where = run.values_of(self.mask), run.masks[self.mask]
    return {
      "message": (
        f"On clean data, {run.describe(quantity, index)}, {reason}, is"
        f" {number(got)}, not 0."
      ),
      "element": index if own else None,
      **run.facts(self.mask, got, 0),
      **blame(run, quantity, got, values, where),
    }


def zeros(run: Run) -> Iterator[Event]:
  """Clauses 2 and 4 on clean data: zeros where the contract has zeros."""
  for mask, where in run.masks.items():
    results = [
      _Result(run, mask, quantity, got)
      for quantity, got in zip(run.quantities, run.clean[mask], strict=True)
      if not quantity.repeats_value
    ]
    included = run.included_of_result(where)
    for result in results:
      if result.quantity.wrt is None:
        yield from _empty(result, ~included)
      else:
        yield from _zero_gradient(result, result.quantity.wrt)
    for labels, region_of in lost_examples(run, mask):
      name = run.problem.arguments[labels].name
      for result in results:
        region = region_of(result.quantity, result.got)
        if region is not None:
          wrt = result.quantity.wrt
          yield from result.zero(
            "masked_label",
            region,
            f"of an example whose own class, in `{name}`, is masked",
            labels if wrt is None else wrt,
          )


def _zero_gradient(result: _Result, argument: int) -> Iterator[Event]:
  run, where = result.run, result.run.masks[result.mask]
  masked = run.problem.masked(where, argument)
  if argument in run.problem.call.sources:
    # A mask in numbers has a gradient of its own.
    region = masked & ~np.isfinite(result.got)
    yield from result.zero("zero_gradient", region, "which is masked")
    return
  yield from result.zero("zero_gradient", masked, "which is masked")
  if not where.any() and run.problem.arguments[argument].maskable:
    yield from result.zero("empty", ~masked, "with nothing included")


def _empty(result: _Result, region: np.ndarray) -> Iterator[Event]:
  """Clause 4, but for a term of the parameters alone, such as a decay."""
  run, mask, got = result.run, result.mask, result.got
  clean = run.clean[mask]
  of_parameters = dict(_gradients(run, clean, maskable=False))
  names = [name for name, g in of_parameters.items() if g.any()]
  of_data = any(g.any() for _, g in _gradients(run, clean, maskable=True))
  finite = all(np.isfinite(x).all() for x in (got, *of_parameters.values()))
  if (
    not names
    or of_data
    or not finite
    or run.masks[mask].any()
    or run.remember(_is_of_zeros, mask)
  ):
    yield from result.zero("empty", region, "with nothing included")
    return
  yield Tried("empty")
  if result.quantity.part == "value" and got.any():
    yield Note(
      f"With nothing included the loss is {number(np.ravel(got)[0])}, not 0. It"
      f" depends on `{names[0]}`, which all examples share: that is right for a"
      " penalty of weights alone."
    )


def _gradients(
  run: Run, results: Results, maskable: bool
) -> Iterator[tuple[str, np.ndarray]]:
  """The gradients with respect to data or to what all examples share."""
  for quantity, got in zip(run.quantities, results, strict=True):
    if quantity.part == "vjp" and quantity.wrt is not None:
      a = run.problem.arguments[quantity.wrt]
      if a.maskable == maskable:
        yield a.name, got


def _is_of_zeros(run: Run, mask: str) -> bool:
  """Whether the loss under a mask is that of data of zeros, all of which count.

  So is the loss of a batch that is never empty. The gradient shows that the
  loss of zeros is more than a term of the parameters.
  """
  zeros_of = [
    np.zeros_like(x) if a.maskable else x
    for a, x in zip(run.problem.arguments, run.problem.values, strict=True)
  ]
  values = run.problem.call.arrays_for(zeros_of, run.everything)
  if values is None:
    return False
  results = run.evaluate_one(values, run.everything)
  got = run.clean[mask][0]
  return not differ(run, got, results[0], run.quantities[0]).any() and any(
    g.any() for _, g in _gradients(run, results, maskable=True)
  )


def directions(run: Run) -> Iterator[Event]:
  """Clause 2 in forward mode: masked elements have no tangent."""
  if not {"jvp", "hessian"} & {q.derivative for q in run.quantities}:
    return
  problem, lanes = run.problem, []
  for mask, where in run.masks.items():
    for argument in problem.floats:
      if argument in problem.call.sources:
        continue  # A mask in numbers has a gradient of its own.
      masked = problem.masked(where, argument)
      if masked.any():
        tangents = [
          np.where(masked, t, 0).astype(t.dtype) if f == argument else 0 * t
          for f, t in zip(problem.floats, run.tangents, strict=True)
        ]
        lanes.append((mask, argument, tangents))
  if not lanes:
    return
  results = run.evaluate(
    [(run.values_of(m), tangents, run.masks[m]) for m, _, tangents in lanes]
  )
  for i, (mask, argument, _) in enumerate(lanes):
    for quantity, stacked, usual in zip(
      run.quantities, results, run.clean[mask], strict=True
    ):
      if quantity.label == "the tangent" or quantity.derivative == "hessian":
        yield from _Result(run, mask, quantity, stacked[i]).zero(
          "zero_gradient",
          np.isfinite(usual),  # Others overflow without this direction, too.
          "in the direction of the masked elements of"
          f" `{problem.arguments[argument].name}` alone",
          argument,
        )


def poisoned(run: Run) -> Iterator[Event]:
  """Clauses 1 and 2: what masked elements hold changes nothing."""
  for mask, where in run.masks.items():
    tried = list(poisonings(run, mask))
    if not tried:
      continue
    results = run.evaluate([(p.data(run), run.tangents, where) for p in tried])
    for i, poisoning in enumerate(tried):
      got = [x[i] for x in results]
      yield from compare(run, poisoning, run.clean[mask], got)


def compare(
  run: Run,
  poisoning: Poisoning,
  clean: Results,
  got: Results,
  *,
  transform: str | None = None,
  positions: Sequence[int] | None = None,
) -> Iterator[Event]:
  """Compares results with and without a poison.

  Args:
    run: The run.
    poisoning: The poison.
    clean: The results without it.
    got: The results with it.
    transform: The transformation, if it is not that of the run.
    positions: The quantities that the results are, by default all.
  """
  where = run.masks[poisoning.mask]
  listed = run.quantities
  if positions is not None:
    listed = [listed[i] for i in positions]
  yield Tried("invariance")
  if any(quantity.wrt is not None for quantity in listed):
    yield Tried("zero_gradient")
  value_is_wrong = False
  for quantity, before, after in zip(listed, clean, got, strict=True):
    wrong = ~((after == before) | np.isnan(before))
    if not wrong.any() or (quantity.repeats_value and value_is_wrong):
      continue
    value_is_wrong |= quantity.part == "value"
    masked = np.zeros(wrong.shape, bool)
    if quantity.wrt is not None:
      masked = run.problem.masked(where, quantity.wrt)
    for clause, region in (
      ("invariance", wrong & ~masked),
      ("zero_gradient", wrong & masked & ~(after == 0)),
    ):
      if region.any():
        index = first_index(region)
        found = _Difference(
          run, poisoning, quantity, index, before[index], after[index]
        )
        yield run.broken(
          clause,
          quantity,
          functools.partial(found.describe, clause, transform),
          poisoning.argument,
          transform,
        )


@dataclasses.dataclass(frozen=True)
class _Difference:
  """A number that a poison changes."""

  run: Run
  poisoning: Poisoning
  quantity: Quantity
  index: tuple[int, ...]
  before: Any
  after: Any

  def describe(self, clause: str, transform: str | None) -> dict:
    run, poisoning = self.run, self.poisoning
    element = None if transform else self._element()
    name = run.problem.arguments[poisoning.argument].name
    holds = f"`{name}` holds {poisoning.name}" + (
      " where it is masked"
      if element is None
      else f"{at_index(element)}, which is masked"
    )
    changed = run.describe(self.quantity, self.index)
    expected = self.before
    if clause == "zero_gradient":
      expected = 0
      message = (
        f"When {holds}, {changed}, which is masked, is {number(self.after)},"
        " not 0."
      )
    else:
      message = (
        f"When {holds}, {changed} becomes {number(self.after)}; with clean data"
        f" it is {number(self.before)}."
      )
    if transform:
      how = "Without jit" if transform == "eager" else f"Under {transform}"
      message = f"{how}: {message}"
    return {
      "message": message,
      "element": element,
      "poison": poisoning.name,
      **run.facts(poisoning.mask, self.after, expected),
      **blame(
        run,
        self.quantity,
        self.after,
        poisoning.data(run, element),
        run.masks[poisoning.mask],
        against=run.values_of(poisoning.mask),
      ),
    }

  def _element(self) -> tuple[int, ...] | None:
    """A masked element that does the harm alone, if one does."""
    run, poisoning = self.run, self.poisoning
    where = run.masks[poisoning.mask]
    masked = np.argwhere(run.problem.masked(where, poisoning.argument))
    elements = [tuple(map(int, e)) for e in masked]
    if len(elements) == 1:
      return elements[0]
    tried = [elements[i] for i in evenly_spaced(len(elements), 64)]
    results = run.evaluate(
      [(poisoning.data(run, e), run.tangents, where) for e in tried]
    )
    got = results[run.quantities.index(self.quantity)]
    clean = run.clean[poisoning.mask][run.quantities.index(self.quantity)]
    at = clean[self.index]
    for element, after in zip(tried, got, strict=True):
      if not (after[self.index] == at or np.isnan(at)):
        return element
    return None
