"""Notes on what is no fault of a mask, and on what a check leaves alone."""

from collections.abc import Iterator

import numpy as np

from optax_masking.testing._events import Event, Note
from optax_masking.testing._poisons import inputs
from optax_masking.testing._problem import SHARED_NAMES
from optax_masking.testing._run import Run, first_index, number


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
  problem = run.problem
  masked = {a.root for a in problem.arguments if a.maskable}
  names = [
    a.name if a.root in masked else a.root
    for a in problem.arguments
    if not a.maskable
    and a.value.size > 1
    and a.root not in SHARED_NAMES
    and not problem.options.axes_of(a.name)[0]
  ]
  names = list(dict.fromkeys(names))
  if names:
    listed = ", ".join(f"`{name}`" for name in names[:3])
    if len(names) > 3:
      listed += f" and {len(names) - 3} others"
    yield Note(
      f"The mask masks nothing of {listed}, which all examples seem to share."
      " If that is right, say so: axes={"
      + ", ".join(f"{name!r}: None" for name in names[:3])
      + "}."
    )


def unpoisoned_inputs(run: Run) -> Iterator[Event]:
  """Notes the inputs of a model, which are not poisoned."""
  for i in sorted(run.remember(inputs)):
    a = run.problem.arguments[i]
    yield Note(
      f"`{a.name}` indexes a table that all examples share, as tokens do, so"
      " that the check never replaces its masked entries. To have them"
      f" replaced, name its axes: axes={{{a.name!r}: {a.axes}}}."
    )


def underivable_masks(run: Run) -> Iterator[Event]:
  """Notes masks that the loss derives of no data that the check can make."""
  count = len(run.possible_masks)
  if len(run.masks) < count:
    yield Note(
      f"The check found data for {len(run.masks)} of {count} masks, since the"
      " loss derives its mask. Of others it says nothing."
    )
