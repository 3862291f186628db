"""Finds the losses of the targets of an audit."""

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import optax

import optax_masking
from optax_masking.losses._table import ROWS, Row
from optax_masking.testing import MaskCase
from optax_masking.testing._guess import (
  TargetError,
  guess_arguments,
  random_mask,
  why_not_in,
)
from optax_masking.testing._options import MASKS

TARGETS = {"optax": optax.losses, "optax_masking": optax_masking.losses}

WITHOUT_WHERE = "takes no `where`"

# The options for masks of examples: enough to see which axis a loss masks.
_EXAMPLE_MASK_OPTIONS: dict[str, Any] = {
  "skip": ("clean_arithmetic", "honesty", "identity"),
  "derivatives": ("value", "vjp"),
  "transforms": ("jit",),
  "masks": ("given", "rows"),
}
_HALF_PRECISION_OPTIONS: dict[str, Any] = {
  "transforms": ("jit",),
  "samples": 6,
}
# Shapes in which a mask of four examples also fits another axis.
_AMBIGUOUS_SHAPES = ((4, 4), (4, 4, 3))


@dataclasses.dataclass(frozen=True)
class Loss:
  """A loss of a target, with the cases to check it in.

  Attributes:
    target: The target.
    name: The name of the loss.
    cases: The cases of every audit.
    full_audit_cases: The cases that a quick audit leaves out.
    refusable_cases: Cases with masks that the loss may refuse. If the loss
      accepts such a mask, the case is checked.
    unchecked_reason: Why the loss can't be checked, None if it can.
    left_out: What a full audit leaves out of a loss whose arguments were
      guessed, and why.
  """

  target: str
  name: str
  cases: tuple[MaskCase, ...] = ()
  full_audit_cases: tuple[MaskCase, ...] = ()
  refusable_cases: tuple[MaskCase, ...] = ()
  unchecked_reason: str | None = None
  left_out: tuple[str, ...] = ()

  @property
  def definition(self) -> str | None:
    """Where the loss is defined, as the source of a finding."""
    if not self.cases:
      return None
    function = inspect.unwrap(self.cases[0].loss_fn)
    code = getattr(function, "__code__", None)
    if code is None:
      return None
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_name}"


def find_losses(target: str, names: Iterable[str] = ()) -> list[Loss]:
  """Finds the losses of a target.

  Args:
    target: `"optax"`, `"optax_masking"` or `"package.module:name"`, where the
      name is that of a loss, a `MaskCase`, a sequence of these, or a function
      without arguments that returns them.
    names: The names of some losses; by default all.

  Returns:
    The losses, in the order of their names.

  Raises:
    TargetError: If there is no such target or loss, or if the arguments of a
      loss can't be guessed.
  """
  if target in TARGETS:
    losses = [
      _loss_of_package(target, name)
      for name in _public_functions(TARGETS[target])
    ]
  else:
    losses = _losses_at_import_path(target)
  wanted = set(names)
  unknown = sorted(wanted - {loss.name for loss in losses})
  if unknown:
    known = [loss.name for loss in losses]
    raise TargetError(
      f"{target} has no loss {', '.join(unknown)}."
      f"{_did_you_mean(unknown[0], known)} It has {', '.join(known)}."
    )
  return [loss for loss in losses if not wanted or loss.name in wanted]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, list(known), 1)
  return f" Did you mean {close[0]}?" if close else ""


# Losses of Optax and of this package.


def _public_functions(module: Any) -> list[str]:
  return [
    name
    for name in sorted(vars(module))
    if not name.startswith("_") and inspect.isfunction(vars(module)[name])
  ]


def _loss_of_package(target: str, name: str) -> Loss:
  """A loss of Optax or of this package, with cases from its row."""
  function = getattr(TARGETS[target], name)
  row = ROWS.get(name)
  if row is None:  # The loss is newer than this audit.
    if not any(_accepts_keyword(function, m) for m in ("where", "mask")):
      return Loss(target, name, unchecked_reason=WITHOUT_WHERE)
    try:
      return _with_guessed_arguments(target, name, function)
    except TargetError as error:
      return Loss(target, name, unchecked_reason=str(error))
  # An adapter hides the parameters of the function that it adapts.
  loss = row.of(TARGETS[target])
  if not _accepts_keyword(loss if row.makes_loss else function, "where"):
    return Loss(target, name, unchecked_reason=WITHOUT_WHERE)
  return _with_cases_of_row(target, row, loss)


def _with_cases_of_row(target: str, row: Row, loss: Callable[..., Any]) -> Loss:
  def case(shape, where_shape, **options):
    args = map(np.asarray, row.arguments(shape=shape))
    where = random_mask(where_shape)
    return MaskCase(loss, *args, where=where, name=row.name, **options)

  axes = {} if row.result_axes is None else {"return": row.result_axes}
  skip = () if row.compacts else ("compaction",)
  reference = None if target == "optax" else row.of(optax.losses)
  options: dict[str, Any] = {
    "axes": axes,
    "reference": reference,
    "masks": tuple(kind for kind in MASKS if kind != "padded"),
  }
  half_options = {**options, **_HALF_PRECISION_OPTIONS}
  float32 = case(
    row.shape, row.shape, **options, skip=skip, dtypes=("float32",)
  )
  float16 = case(
    row.shape, row.shape, **half_options, skip=skip, dtypes=("float16",)
  )
  # Arithmetic that overflows in bfloat16 overflows in float32, too.
  skip = (*skip, "clean_arithmetic")
  bfloat16 = case(
    row.shape, row.shape, **half_options, skip=skip, dtypes=("bfloat16",)
  )
  full_audit_cases = [float16, bfloat16]
  refusable_cases = []
  if row.masks_examples:
    batch_shape = row.shape[:-1]
    options = {**_EXAMPLE_MASK_OPTIONS, "axes": axes}
    if not row.compacts:
      options["skip"] = (*options["skip"], "compaction")
    if row.elementwise:  # Such a loss has examples if it sums over an axis.
      options["axis"] = -1
    full_audit_cases.append(case(row.shape, batch_shape, **options))
    if len(batch_shape) == 1 and len(row.data) > 1:
      refusable_cases = [
        case(shape, (4,), **options) for shape in _AMBIGUOUS_SHAPES
      ]
  return Loss(
    target,
    row.name,
    (float32,),
    tuple(full_audit_cases),
    tuple(refusable_cases),
  )


def _accepts_keyword(function: Callable[..., Any], keyword: str) -> bool:
  parameters = inspect.signature(function).parameters
  return keyword in parameters or any(
    p.kind is p.VAR_KEYWORD for p in parameters.values()
  )


# Losses of anyone.


def _losses_at_import_path(target: str) -> list[Loss]:
  """The losses at `package.module:name`."""
  found = _import(target)
  if isinstance(found, MaskCase):
    found = [found]
  if isinstance(found, list | tuple):
    if not found or not all(isinstance(case, MaskCase) for case in found):
      types = ", ".join(sorted({type(x).__name__ for x in found})) or "nothing"
      raise TargetError(
        f"{target} is a {type(found).__name__} of {types}; it may be one of"
        " MaskCase."
      )
    named: dict[str, MaskCase] = {}
    for case in found:
      name, number = case.name, 1
      while name in named:
        number += 1
        name = f"{case.name}#{number}"
      named[name] = case
    return [Loss(target, name, (case,)) for name, case in named.items()]
  if not callable(found):
    raise TargetError(
      f"{target} is {type(found).__name__}, not a loss or a MaskCase."
    )
  _, _, attribute = target.partition(":")
  return [_with_guessed_arguments(target, attribute, found)]


def _import(target: str) -> Any:
  """The object at `package.module:name`. A function without parameters runs."""
  module_name, _, attribute = target.partition(":")
  if not module_name or not attribute:
    raise TargetError(
      f"{target!r} is no target.{_other_target(module_name)} A target is optax,"
      " optax_masking, or package.module:name of a loss."
    )
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  found: Any = None
  part = attribute
  try:
    found = importlib.import_module(module_name)
    for part in attribute.split("."):
      found = getattr(found, part)
    if inspect.isfunction(found) and not inspect.signature(found).parameters:
      found = found()
  except Exception as error:  # A user's module may raise anything.
    hint = ""
    if isinstance(error, AttributeError) and not hasattr(found, part):
      hint = f".{_did_you_mean(part, dir(found))}"
    raise TargetError(
      f"{target} can't be imported: {type(error).__name__}: {error}{hint}"
    ) from error
  return found


def _other_target(given: str) -> str:
  """The target that one without a colon may have been meant to be."""
  package, _, name = given.rpartition(".")
  if given.removesuffix(".losses") in TARGETS:
    meant = given.removesuffix(".losses")
  elif package.removesuffix(".losses") in TARGETS and name in ROWS:
    meant = f"{package.removesuffix('.losses')} --loss {name}"
  elif given in ROWS:
    meant = f"optax --loss {given}"
  elif package:
    meant = f"{package}:{name}"
  else:
    return _did_you_mean(given.lower().replace("-", "_"), TARGETS)
  return f" Did you mean {meant}?"


def _with_guessed_arguments(
  target: str, name: str, function: Callable[..., Any]
) -> Loss:
  """A loss with the first guess of arguments that it runs with."""
  described = f"{target}, {name}" if target in TARGETS else target
  guess, mask = guess_arguments(described, function)
  full_audit_cases, left_out = [], []
  for dtype, skip in (("float16", ()), ("bfloat16", ("clean_arithmetic",))):
    reason = why_not_in(dtype, guess, function, mask)
    if reason is None:
      options = {**_HALF_PRECISION_OPTIONS, "skip": skip, "dtypes": (dtype,)}
      full_audit_cases.append(guess.case(function, mask, name=name, **options))
    else:
      left_out.append(f"not in {dtype}: {reason}")
  case = guess.case(function, mask, name=name, dtypes=("float32",))
  return Loss(
    target, name, (case,), tuple(full_audit_cases), left_out=tuple(left_out)
  )
