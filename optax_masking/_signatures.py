"""What a decorator has to know of the signature of a loss."""

import functools
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def check_fills(
  loss: Callable[..., Any],
  fills: Mapping[str, Any],
  formula: Callable[..., Any] | None,
) -> None:
  """Refuses fills of what the loss has not, and what can't be a fill."""
  if not (formula is None or callable(formula)):
    raise TypeError(f"`formula` must be a function, not {formula!r}.")
  parameters = inspect.signature(loss).parameters
  one_value = [
    name
    for name, parameter in parameters.items()
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    and name not in ("axis", "where")
  ]
  if not fills or not fills.keys() <= set(one_value):
    raise TypeError(
      f"There are fills for {list(fills)}; the parameters are {one_value}."
      " Name a fill for each that is an array."
    )
  for name, fill in fills.items():
    if fill is None or getattr(fill, "fill", 0) is None:
      if formula is None:
        raise TypeError(f"`{name}` has no fill, and the loss no `formula`.")
      continue
    if not (callable(fill) or isinstance(fill, numbers.Real)):
      raise TypeError(f"The fill of `{name}` is no number, but {fill!r}.")


def accepting_axis_and_where(loss: Callable[..., T]) -> Callable[..., T]:
  """Adds the keywords ``axis=()`` and ``where=None`` that a loss lacks."""
  signature = inspect.signature(loss)
  keyword = inspect.Parameter.KEYWORD_ONLY
  added = [
    inspect.Parameter(name, keyword, default=default)
    for name, default in (("axis", ()), ("where", None))
    if name not in signature.parameters
  ]
  if not added:
    return loss

  @functools.wraps(loss)
  def accepting(*args, **kwargs):
    for parameter in added:
      kwargs.pop(parameter.name, None)
    return loss(*args, **kwargs)

  parameters = sorted(
    [*signature.parameters.values(), *added], key=lambda p: p.kind
  )
  accepting.__signature__ = signature.replace(  # type: ignore[attr-defined]
    parameters=parameters
  )
  return accepting


def argument_reader(
  name: str, signature: inspect.Signature
) -> Callable[..., Any]:
  """Looks one argument up, without the microseconds of binding a whole call."""
  parameter = signature.parameters[name]
  default = parameter.default
  position = sys.maxsize
  if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
    position = list(signature.parameters).index(name)

  def read(args, kwargs):
    if len(args) > position:
      return args[position]
    return kwargs.get(name, default)

  return read
