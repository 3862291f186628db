"""Clause 8: the same results eagerly, under `jit` and under `vmap`."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from optax_masking.testing._events import Broken, Event
from optax_masking.testing._exact import compare
from optax_masking.testing._masks import evenly_spaced
from optax_masking.testing._poisons import Poisoning, poisonings
from optax_masking.testing._problem import Problem
from optax_masking.testing._program import cotangent, program, unoptimized
from optax_masking.testing._report import Finding
from optax_masking.testing._rounding import Pairs, agree, nearby_for
from optax_masking.testing._run import (
  Results,
  Run,
  error_line,
  first_index,
  listed,
  number,
)


def repetitions(run: Run) -> Iterator[Event]:
  """Differentiation returns the value that the loss has by itself."""
  for mask, clean in run.clean.items():

    def pairs(_: bool, clean: Results = clean) -> Pairs:
      return [
        (quantity, got, clean[0])
        for quantity, got in zip(run.quantities, clean, strict=True)
        if quantity.repeats_value
      ]

    events = agree(
      run,
      "transforms",
      mask,
      pairs,
      "Under differentiation, {what} is {got}; by itself it is {expected}.",
    )
    # That it is the same is no sign of any transformation.
    yield from (event for event in events if isinstance(event, Broken))


def vmapped(run: Run) -> Iterator[Event]:
  """The clauses again, for a batch of masks and poisons at once."""
  tried = [p for mask in run.masks for p in poisonings(run, mask)]
  most = max(2, 2**20 // (run.problem.size + run.problem.where.size))
  few = evenly_spaced(len(tried), min(48, most))
  tried = [tried[i] for i in few]
  masks = [
    list(run.masks)[i] for i in evenly_spaced(len(run.masks), min(16, most))
  ]
  batch = _Batch(run, [*masks, *(p.mask for p in tried)])
  try:
    clean = batch()
  except Exception as error:
    text = error_line(error)
    facts = {
      "message": f"The loss does not run under vmap: {text}",
      "got": text,
    }
    finding = Finding(
      "transforms", "", transform="vmap", dtype=run.problem.dtype
    )
    yield Broken(finding, lambda: facts)
    return
  for lane, mask in enumerate(masks):
    yield from _agrees_with_jit(run, batch, clean, lane, mask)
  got = batch([run.values_of(m) for m in masks] + [p.data(run) for p in tried])
  for lane, poisoning in enumerate(tried, len(masks)):
    before, after = [x[lane] for x in clean], [x[lane] for x in got]
    yield from _also_of_transforms(
      compare(run, poisoning, before, after, transform="vmap"), "vmap"
    )


class _Batch:
  """The derivatives of a batched loss, as a training step takes them."""

  def __init__(self, run: Run, masks: Sequence[str]):
    self.run, self.masks = run, masks
    size = len(masks)
    call = run.problem.call
    self.wheres = np.stack([call.host_mask(run.masks[m]) for m in masks])

    def together(values, where):
      return jax.vmap(call)(values, where)

    batched = program(together, run.parts, run.problem.floats)

    def stack(x):
      return np.broadcast_to(x, (size, *x.shape))

    tangents = [stack(t) for t in run.tangents]
    weights = stack(cotangent(run.result.shape, run.result.dtype))
    self._program = jax.jit(
      lambda values, where: batched(values, tangents, weights, where=where),
      compiler_options=unoptimized(),
    )

  def __call__(self, rows: Sequence[Any] | None = None) -> list[np.ndarray]:
    """The results for some data, by default the clean ones."""
    if rows is None:
      rows = [self.run.values_of(m) for m in self.masks]
    self.run.tally["cases"] += len(rows)
    stacked = [np.stack(column) for column in zip(*rows, strict=True)]
    return jax.device_get(self._program(stacked, self.wheres))


def _agrees_with_jit(
  run: Run, batch: _Batch, clean: list[np.ndarray], lane: int, mask: str
) -> Iterator[Event]:
  where = run.masks[mask]

  def pairs(nearby: bool) -> Pairs:
    together, single = clean, run.clean[mask]
    if nearby:
      data = nearby_for(run, where)
      together = batch([data] * len(batch.masks))
      single = run.evaluate_one(data, where)
    return [
      (quantity, a[lane], b)
      for quantity, a, b in zip(run.quantities, together, single, strict=True)
    ]

  yield from agree(
    run,
    "transforms",
    mask,
    pairs,
    "Under vmap, {what} is {got}; under jit it is {expected}.",
    transform="vmap",
  )


def _also_of_transforms(
  events: Iterator[Event], transform: str
) -> Iterator[Event]:
  """A poison that gets through in one transformation breaks clause 8, too."""
  for event in events:
    if isinstance(event, Broken):
      finding = dataclasses.replace(event.finding, clause="transforms")
      also = Broken(finding, event.describe)
      event = dataclasses.replace(event, if_new=also)
    yield event


def in_python(run: Run) -> Iterator[Event]:
  """The loss called as it is, which may do other things than when traced."""
  for mask in ("as given", "nothing included"):
    if mask not in run.masks:
      continue
    try:
      python = _Python(run, mask)
      yield from python.zero_gradients()
      yield from python.agrees_with_jit()
      for poisoning in poisonings(run, mask):
        yield from _also_of_transforms(python.poisoned(poisoning), "eager")
    except Exception as error:
      yield refusal(run.problem, error, mask, run.masks[mask])


class _Python:
  """The loss and its gradients, computed operation by operation."""

  def __init__(self, run: Run, mask: str):
    self.run, self.mask = run, mask
    self.where = run.masks[mask]
    self.given = run.problem.call.host_mask(self.where)
    parts = run.parts_of_gradient
    self.positions = [
      i for i, q in enumerate(run.quantities) if q.part in parts
    ]
    self._derivatives = program(run.problem.call, parts, run.problem.floats)
    values = run.values_of(mask)
    self.value, self.results = self.value_of(values), self.results_of(values)

  def value_of(self, values: Any) -> list[np.ndarray]:
    self.run.tally["cases"] += 1
    return [np.asarray(self.run.problem.call(values, self.given))]

  def results_of(self, values: Any) -> list[np.ndarray]:
    self.run.tally["cases"] += 1
    return jax.device_get(
      self._derivatives(
        values,
        self.run.tangents,
        where=self.given,
      )
    )

  def agrees_with_jit(self) -> Iterator[Event]:
    run = self.run

    def pairs(nearby: bool) -> Pairs:
      got, expected = self.results, run.clean[self.mask]
      if nearby:
        data = nearby_for(run, self.where)
        got = self.results_of(data)
        expected = run.evaluate_one(data, self.where)
      return [
        (run.quantities[i], x, expected[i])
        for i, x in zip(self.positions, got, strict=True)
      ]

    yield from agree(
      run,
      "transforms",
      self.mask,
      pairs,
      "Without jit, {what} is {got}; under jit it is {expected}.",
      transform="eager",
    )

  def zero_gradients(self) -> Iterator[Event]:
    run = self.run
    for i, got in zip(self.positions, self.results, strict=True):
      quantity = run.quantities[i]
      if quantity.wrt is None or quantity.wrt in run.problem.call.sources:
        continue
      wrong = run.problem.masked(self.where, quantity.wrt) & ~(got == 0)
      if wrong.any():
        index = first_index(wrong)
        facts = {
          "message": (
            f"Without jit, on clean data, {run.describe(quantity, index)},"
            f" which is masked, is {number(got[index])}, not 0."
          ),
          "element": index,
          **run.facts(self.mask, got[index], 0),
        }
        yield run.broken(
          "zero_gradient",
          quantity,
          functools.partial(dict, facts),
          quantity.wrt,
          "eager",
        )

  def poisoned(self, poisoning: Poisoning) -> Iterator[Event]:
    run, values = self.run, poisoning.data(self.run)
    yield from compare(
      run,
      poisoning,
      self.value,
      self.value_of(values),
      transform="eager",
      positions=[0],
    )
    if poisoning.name == "nan":
      yield from compare(
        run,
        poisoning,
        self.results,
        self.results_of(values),
        transform="eager",
        positions=self.positions,
      )


def refusal(
  problem: Problem,
  error: BaseException,
  mask: str = "as given",
  where: np.ndarray | None = None,
) -> Broken:
  """The finding that a loss does not run with a mask."""
  call = problem.call
  where = call.where if where is None else where
  name = call.options.where_name
  message = (
    f"With a mask of shape {where.shape}, {mask}, the loss raises"
    f" {error_line(error)}"
  )
  if f"unexpected keyword argument '{name}'" in str(error):
    message = (
      f"The loss has no argument `{name}`. If its mask has another name, pass"
      " that as `where_name`; if it is an entry of an argument, pass its name,"
      " as in where=\"batch['mask']\"."
    )
  facts = {
    "message": message,
    "mask": mask,
    "where": listed(where),
    "got": error_line(error),
  }
  finding = Finding("accepts", "", transform="eager", dtype=problem.dtype)
  return Broken(finding, lambda: facts)
