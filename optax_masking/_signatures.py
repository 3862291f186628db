"""What a decorator has to know of the signature of a loss."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


def accepting_axis_and_where(loss: Callable[..., R]) -> Callable[..., R]:
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


def reader(name: str, signature: inspect.Signature) -> Callable[..., Any]:
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
