"""The options of a check."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optax_masking.testing._report import CLAUSES

DERIVATIVES = ("value", "vjp", "jvp", "hessian")
TRANSFORMS = ("eager", "jit", "vmap")
MASKS = ("given", "none", "all", "elements", "rows", "columns", "padded")

# The axis of the mask that each axis of an array is; None for an axis that the
# mask does not have.
Axes = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of `assert_mask_safe`, which describes them."""

  where_name: str = "where"
  numeric_where: bool = False
  inverted_where: bool = False
  axes: Mapping[str, Axes | None] | None = None
  output: Any = None
  has_aux: bool = False
  reference: Callable[..., Any] | None = None
  skip: Sequence[str] = ()
  strict: bool = False
  dtypes: Sequence[Any] | None = None
  derivatives: Sequence[str] = DERIVATIVES
  transforms: Sequence[str] = TRANSFORMS
  masks: Sequence[str] = MASKS
  samples: int = 16

  def __post_init__(self):
    for field, known in (
      ("skip", tuple(c for c in CLAUSES if c != "accepts")),
      ("derivatives", DERIVATIVES),
      ("transforms", TRANSFORMS),
      ("masks", MASKS),
    ):
      _check_names(field, getattr(self, field), known)
    for field in ("transforms", "masks"):
      if not getattr(self, field):
        raise ValueError(f"`{field}` is empty.")
    if isinstance(self.dtypes, str):
      raise TypeError(
        f"`dtypes` must be a sequence, but is {self.dtypes!r}. Write"
        f" dtypes=({self.dtypes!r},)."
      )
    for dtype in self.dtypes or ():
      try:
        jnp.dtype(dtype)
      except TypeError as error:
        raise TypeError(f"`dtypes` has {dtype!r}: {error}.") from None
      if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(
          f"`dtypes` has {jnp.dtype(dtype).name}; it may have floating dtypes."
          " They are those of the floating arguments; the others stay as given."
        )
    if not isinstance(self.samples, int):
      raise TypeError(f"`samples` must be an integer, but is {self.samples!r}.")
    if self.samples < 1:
      raise ValueError(f"`samples` must be 1 or more, but is {self.samples}.")
    if not isinstance(self.axes, Mapping | None):
      raise TypeError(
        f"`axes` must be a dict from names of arrays, but is {self.axes!r}."
      )
    if not callable(self.reference) and self.reference is not None:
      raise TypeError(
        f"`reference` must be a function, but is {self.reference!r}."
      )

  def axes_of(self, name: str) -> tuple[bool, Axes | None]:
    """Whether `axes` has an argument or what contains it, and its axes."""
    axes = self.axes or {}
    given = [part for part in axes if is_part_of(name, part)]
    if not given:
      return False, None
    return True, axes[max(given, key=len)]


def narrowed(options: Mapping[str, Any], to: Mapping[str, Any]) -> dict:
  """Options with their sequences cut down to those of others.

  A case that leaves out a derivative keeps it left out in a quick audit.
  """
  merged = {**to, **options}
  for name in ("derivatives", "transforms", "masks"):
    if name in options and name in to:
      both = tuple(x for x in options[name] if x in to[name])
      merged[name] = both or options[name]
  if "samples" in options and "samples" in to:
    merged["samples"] = min(options["samples"], to["samples"])
  return merged


def is_part_of(name: str, whole: str) -> bool:
  """Whether an array's name is another one, or an entry of it."""
  return name == whole or (
    name.startswith(whole) and name[len(whole)] in ".[" and whole != ""
  )


def _check_names(field: str, given: Any, known: Sequence[str]) -> None:
  if isinstance(given, str):
    raise TypeError(
      f"`{field}` must be a sequence of strings, but is {given!r}. Write"
      f" {field}=({given!r},)."
    )
  for each in given:
    if each not in known:
      close = difflib.get_close_matches(str(each), known, 1)
      raise ValueError(
        f"`{field}` has {each!r}; it may have {', '.join(known)}."
        + (f" Did you mean {close[0]!r}?" if close else "")
      )
