"""Clause 6: NaN and infinity in an included element come out."""

from collections.abc import Iterator

import numpy as np

from optax_masking.testing import _trace
from optax_masking.testing._events import Event, Note, Tried
from optax_masking.testing._masks import evenly_spaced
from optax_masking.testing._poisons import Poisoning
from optax_masking.testing._problem import has_shared_name
from optax_masking.testing._run import (
  Run,
  at_index,
  first_index,
  number,
  weights_of,
)

_POISONS = (np.nan, np.inf, -np.inf)


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
      few = evenly_spaced(len(elements), 4)
      yield from _come_out(run, mask, i, [elements[k] for k in few])


def _come_out(
  run: Run, mask: str, argument: int, elements: list[tuple[int, ...]]
) -> Iterator[Event]:
  if not elements:
    return
  yield Tried("honesty")
  dtype = run.problem.values[argument].dtype
  cases = [
    (element, Poisoning(mask, argument, str(poison), dtype.type(poison)))
    for element in elements
    for poison in _POISONS
  ]
  data = [poisoning.data(run, element) for element, poisoning in cases]
  results = run.evaluate(
    [(values, run.tangents, run.masks[mask]) for values in data]
  )[0]
  plain = None
  if run.unmasked is not None and mask == "all included":
    plain = run.plain([(values, weights_of(run)) for values in data])[None]
  for k, ((element, poisoning), got) in enumerate(
    zip(cases, results, strict=True)
  ):
    expected = None if plain is None else plain[k]
    yield from _comes_out(run, poisoning, element, got, expected)


def _comes_out(
  run: Run,
  poisoning: Poisoning,
  element: tuple[int, ...],
  got: np.ndarray,
  plain: np.ndarray | None,
) -> Iterator[Event]:
  name = run.problem.arguments[poisoning.argument].name
  holds = f"`{name}` holds {poisoning.name}{at_index(element)}"
  if plain is not None:
    kinds = (np.isnan, np.isposinf, np.isneginf)
    wrong = any(not np.array_equal(kind(got), kind(plain)) for kind in kinds)
    expected = first_not_finite(plain)
    message = (
      f"When {holds}, which is included, the loss is {first_not_finite(got)};"
      f" without a mask it is {expected}."
    )
  elif np.isnan(poisoning.value) and run.unmasked is None:
    # A comparison that is False for NaN is no attempt to hide it.
    wrong = not np.isnan(got).any() and _trace.looks_for_nan(run.jaxpr)
    expected = "nan"
    message = f"When {holds}, which is included, no entry of the loss is NaN."
  else:
    return
  if not wrong:
    return
  facts = {
    "message": message,
    "element": element,
    "poison": poisoning.name,
    **run.facts(poisoning.mask, 0, 0),
    "got": first_not_finite(got),
    "expected": expected,
  }
  yield run.broken(
    "honesty", run.quantities[0], lambda: facts, poisoning.argument
  )


def given_numbers(run: Run) -> Iterator[Event]:
  """Notes numbers that are not finite on the data without any mask."""
  results = zip(run.quantities, run.usual, strict=True)
  for quantity, got in results:
    if quantity.derivative not in ("value", "vjp") or quantity.repeats_value:
      continue
    if not np.isfinite(got).all():
      index = first_index(~np.isfinite(got))
      yield Note(
        f"With everything included, {run.describe(quantity, index)} is"
        f" {number(got[index])}, on finite data. The mask is not at fault.",
        serious=True,
      )


def unmasked_axes(run: Run) -> Iterator[Event]:
  """Notes axes that may be the mask's, too, such as those of pairs."""
  sizes = {s for s in run.problem.where.shape if s > 1}
  for a in run.problem.arguments:
    others = [
      k
      for k, (s, axis) in enumerate(zip(a.value.shape, a.axes, strict=True))
      if axis is None and s in sizes
    ]
    if a.maskable and others:
      yield Note(
        f"The axis {others[0]} of `{a.name}` has the size of an axis of the"
        " mask, but the check does not mask it. If it should, as in an array of"
        " pairs, check a function that makes the pairs."
      )


def unmasked_arrays(run: Run) -> Iterator[Event]:
  """Notes arrays that no part of a mask masks, if nothing says so."""
  names = [
    a.name
    for a in run.problem.arguments
    if not a.maskable
    and a.value.size > 1
    and not has_shared_name(a.name)
    and not run.problem.options.axes_of(a.name)[0]
  ]
  if names:
    listed = ", ".join(f"`{name}`" for name in names[:3])
    if len(names) > 3:
      listed += f" and {len(names) - 3} others"
    yield Note(
      f"The mask masks nothing of {listed}, which all examples seem to share."
      f" If that is right, say so: axes={{{names[0]!r}: None}}."
    )


def unpoisoned_inputs(run: Run) -> Iterator[Event]:
  """Notes the inputs of a model, which are not poisoned."""
  for i in sorted(run.inputs):
    a = run.problem.arguments[i]
    yield Note(
      f"`{a.name}` indexes a table that all examples share, as tokens do, so"
      " that the check never replaces its masked entries. To have them"
      f" replaced, name its axes: axes={{{a.name!r}: {a.axes}}}."
    )


def first_not_finite(x: np.ndarray) -> str:
  """The first number that is not finite, or else the first."""
  flat = np.ravel(np.asarray(x, "float64"))
  broken = flat[~np.isfinite(flat)]
  return number((broken if broken.size else flat)[0]) if flat.size else "empty"
