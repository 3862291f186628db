"""Clause 6: NaN and infinity in an included element come out."""

from collections.abc import Iterator, Sequence

import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._events import Event, Tried
from optax_masking.testing._masks import evenly_spaced
from optax_masking.testing._poisons import Poisoning
from optax_masking.testing._run import (
  Run,
  Values,
  at_index,
  number,
  weights_of,
)


def honesty(run: Run) -> Iterator[Event]:
  """Puts NaN and infinities into included elements."""
  gradients = {
    q.wrt: i for i, q in enumerate(run.quantities) if q.part == "vjp"
  }
  for mask in ("as given", "all included"):
    if mask not in run.masks:
      continue
    for i in run.problem.floats:
      if i not in gradients or i in run.problem.call.sources:
        continue
      # What has no slope may be a threshold, or not be used at all.
      counts = run.clean[mask][gradients[i]] != 0
      kept = ~run.problem.masked(run.masks[mask], i) & counts
      elements = [tuple(map(int, e)) for e in np.argwhere(kept)]
      few = [elements[k] for k in evenly_spaced(len(elements), 4)]
      if not few:
        continue
      if run.unmasked is not None and mask == "all included":
        yield from _as_without_mask(run, mask, i, few)
      else:
        yield from _nan_comes_out(run, mask, i, few)


def _as_without_mask(
  run: Run, mask: str, argument: int, elements: list[tuple[int, ...]]
) -> Iterator[Event]:
  """NaN and infinities come out where they do without a mask."""
  yield Tried("honesty")
  cases = [
    (e, _poisoning(run, mask, argument, poison))
    for e in elements
    for poison in (np.nan, np.inf, -np.inf)
  ]
  data = [poisoning.data(run, e) for e, poisoning in cases]
  results = _losses(run, mask, data)
  plain = run.plain([(values, weights_of(run)) for values in data])[None]
  kinds = (np.isnan, np.isposinf, np.isneginf)
  for (element, poisoning), got, expected in zip(
    cases, results, plain, strict=True
  ):
    if any(not np.array_equal(kind(got), kind(expected)) for kind in kinds):
      text = (
        f"the loss is {first_not_finite(got)}; without a mask it is"
        f" {first_not_finite(expected)}."
      )
      expected = first_not_finite(expected)
      yield _dishonest(run, (element, poisoning), text, got, expected)


def _nan_comes_out(
  run: Run, mask: str, argument: int, elements: list[tuple[int, ...]]
) -> Iterator[Event]:
  """NaN comes out of a loss that asks whether its data are NaN.

  A comparison that is False for NaN is no attempt to hide it.
  """
  yield Tried("honesty")
  if run.jaxpr is not None and argument not in run.remember(_looked_at):
    return
  poisoning = _poisoning(run, mask, argument, np.nan)
  data = [poisoning.data(run, e) for e in elements]
  plain = None
  if run.unmasked is not None:
    plain = run.plain([(values, weights_of(run)) for values in data])[None]
  results = _losses(run, mask, data)
  for k, (element, got) in enumerate(zip(elements, results, strict=True)):
    dropped_without_mask = plain is not None and not np.isnan(plain[k]).any()
    if not np.isnan(got).any() and not dropped_without_mask:
      text = "no entry of the loss is NaN."
      yield _dishonest(run, (element, poisoning), text, got, "nan")


def _looked_at(run: Run) -> set[int]:
  """The arguments of which the program asks whether they are NaN."""
  return _trace.flow(run.jaxpr).looked_at_for_nan


def _poisoning(run: Run, mask: str, argument: int, poison: float) -> Poisoning:
  dtype = run.problem.values[argument].dtype
  return Poisoning(mask, argument, str(poison), dtype.type(poison))


def _losses(run: Run, mask: str, data: Sequence[Values]) -> np.ndarray:
  where = run.masks[mask]
  return run.evaluate([(values, run.tangents, where) for values in data])[0]


def _dishonest(
  run: Run,
  case: tuple[tuple[int, ...], Poisoning],
  text: str,
  got: np.ndarray,
  expected: str,
) -> Event:
  element, poisoning = case
  name = run.problem.arguments[poisoning.argument].name
  facts = {
    "message": (
      f"When `{name}` holds {poisoning.name}{at_index(element)}, which is"
      f" included, {text}"
    ),
    "element": element,
    "poison": poisoning.name,
    **run.facts(poisoning.mask, 0, 0),
    "got": first_not_finite(got),
    "expected": expected,
  }
  return run.broken(
    "honesty", run.quantities[0], lambda: facts, poisoning.argument
  )


def first_not_finite(x: np.ndarray) -> str:
  """The first number that is not finite, or else the first."""
  flat = np.ravel(np.asarray(x, "float64"))
  broken = flat[~np.isfinite(flat)]
  return number((broken if broken.size else flat)[0]) if flat.size else "empty"
