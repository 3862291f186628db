"""The data of a loss, and which of them a mask masks."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._call import Call
from optax_masking.testing._options import Axes, Options, is_part_of
from optax_masking.testing._program import program

# How many numbers the data may have, and how many large data have.
MOST = 2**20
LARGE = 2**17

# Arguments that all examples share, whatever their shapes are.
SHARED_NAMES = (
  "model",
  "net",
  "network",
  "parameters",
  "params",
  "train_state",
  "variables",
)


@dataclasses.dataclass(frozen=True)
class Argument:
  """An array that a loss is called with.

  Attributes:
    name: Its name, such as `batch['labels']`.
    value: The array, finite, also where it is masked.
    axes: The axis of the mask that each of its axes is.
    maskable: Whether the mask masks any of it. All examples share the others.
  """

  name: str
  value: np.ndarray
  axes: Axes
  maskable: bool

  @property
  def root(self) -> str:
    """The argument of the loss that it is an entry of."""
    return re.split(r"[.[]", self.name)[0]

  @property
  def floating(self) -> bool:
    return jnp.issubdtype(self.value.dtype, jnp.floating)

  @property
  def integer(self) -> bool:
    return jnp.issubdtype(self.value.dtype, jnp.integer)

  @property
  def is_label(self) -> bool:
    """Whether its name says that it is one, whose padding is often -100."""
    words = ("label", "target", "class")
    return self.integer and any(w in self.name.lower() for w in words)


@dataclasses.dataclass(frozen=True)
class Problem:
  """A loss with the data of one dtype."""

  call: Call
  arguments: tuple[Argument, ...]

  @property
  def options(self) -> Options:
    return self.call.options

  @property
  def where(self) -> np.ndarray:
    return self.call.where

  @functools.cached_property
  def floats(self) -> tuple[int, ...]:
    """Positions of the arguments that have derivatives."""
    return tuple(i for i, a in enumerate(self.arguments) if a.floating)

  @functools.cached_property
  def dtype(self) -> str:
    """The name of the dtype of the first floating argument."""
    return self.arguments[self.floats[0]].value.dtype.name

  @functools.cached_property
  def values(self) -> list[np.ndarray]:
    return [a.value for a in self.arguments]

  @functools.cached_property
  def size(self) -> int:
    return sum(a.value.size for a in self.arguments)

  def program(self, parts: tuple[str, ...], compiled: bool) -> Any:
    """The loss and its derivatives as a function, which JAX traces once."""
    known = self._programs
    if (parts, compiled) not in known:
      run = program(self.call, parts, self.floats)
      known[parts, compiled] = jax.jit(run) if compiled else run
    return known[parts, compiled]

  @functools.cached_property
  def _programs(self) -> dict[Any, Any]:
    return {}

  def included(
    self, where: np.ndarray, shape: Sequence[int], axes: Axes
  ) -> np.ndarray:
    """What a mask includes of an array.

    An element is included if any element of the mask that it broadcasts against
    is True.
    """
    own = [a for a in axes if a is not None]
    others = tuple(a for a in range(where.ndim) if a not in own)
    kept = np.transpose(where.any(others), np.argsort(np.argsort(own)))
    new = tuple(k for k, a in enumerate(axes) if a is None)
    kept = np.expand_dims(kept, new)
    # An axis of size 1 meets all of the mask's.
    met = tuple(k for k, s in enumerate(shape) if s == 1 != kept.shape[k])
    return np.broadcast_to(kept.any(met, keepdims=True), shape)

  def masked(self, where: np.ndarray, argument: int) -> np.ndarray:
    """What a mask masks of an argument."""
    a = self.arguments[argument]
    if not a.maskable:
      return np.zeros(a.value.shape, bool)
    return ~self.included(where, a.value.shape, a.axes)

  def values_for(self, where: np.ndarray) -> list[np.ndarray] | None:
    """The data with which the loss has this mask, None if there are none."""
    return self.call.arrays_for(self.values, where)

  def axes_of_result(self, shape: tuple[int, ...]) -> Axes | None:
    """The axis of the mask that each axis of a result is; None if unknown."""
    named, axes = self.options.axes_of("return")
    if named:
      return axes and _checked_axes("return", axes, shape, self.call)
    axes, _ = align(shape, self.where.shape)
    return axes


def make_problem(call: Call, dtype: Any) -> Problem:
  """Converts the data of a call, and finds out what a mask masks of them."""
  names = call.names
  if not names:
    raise ValueError(
      f"{call.name} was given no array to mask. Pass arrays of JAX or NumPy,"
      " not lists or numbers."
    )
  values = [_convert(x, dtype) for x in call.arrays]
  for name, x in zip(names, values, strict=True):
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise ValueError(
        f"`{name}` is {x.dtype}, and the check has no derivatives of complex"
        " numbers. Pass the real and the imaginary part as two arrays."
      )
  if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in values):
    kinds = ", ".join(
      f"{n} {x.dtype}" for n, x in zip(names, values, strict=True)
    )
    raise ValueError(
      f"{call.name} was given no array of floating numbers, and so has no"
      f" gradient to check: {kinds}."
    )
  _check_axes_option(call)
  size = sum(x.size for x in values)
  if size > MOST:
    raise ValueError(
      f"The arrays have {size:,} numbers, and all derivatives are computed many"
      f" times: pass {MOST:,} at most. Some rows and some columns of them show"
      " the same faults."
    )
  if not call.where.size:
    raise ValueError(
      f"`{call.mask_name}` has shape {call.where.shape}, without any element to"
      " check."
    )
  arguments = [
    Argument(n, x, *_axes_of(n, x.shape, call))
    for n, x in zip(names, values, strict=True)
  ]
  _check_that_any_fits(arguments, call)
  return _finite(Problem(call, tuple(arguments)))


def described(problem: Problem) -> str:
  """The dtypes and shapes of the data, of many parameters their number."""
  groups: dict[str, list[Argument]] = {}
  for a in problem.arguments:
    groups.setdefault(a.name if a.maskable else a.root, []).append(a)
  texts = []
  for name, group in groups.items():
    if len(group) > 3:
      texts.append(f"{name}, {len(group)} arrays (not masked)")
    else:
      texts += [
        f"{a.name} {a.value.dtype}{list(a.value.shape)}"
        + ("" if a.maskable else " (not masked)")
        for a in group
      ]
  call = problem.call
  texts.append(f"{call.mask_name} {call.mask_dtype}{list(call.where.shape)}")
  return ", ".join(texts)


def align(shape: Sequence[int], mask: Sequence[int]) -> tuple[Axes, bool]:
  """Finds the axis of the mask that each axis of an array is.

  Args:
    shape: The shape of the array.
    mask: The shape of the mask.

  Returns:
    The axes, and whether the mask masks the array: an entry of an array that
    lacks the first axes of the mask is shared by all examples.
  """
  none = (None,) * len(shape)
  if not (shape and mask):
    return none, not mask
  rank = min(len(shape), len(mask))
  first = tuple(range(rank)) + (None,) * (len(shape) - rank)

  def fits(axes, exactly):
    pairs = [
      (s, mask[a]) for s, a in zip(shape, axes, strict=True) if a is not None
    ]
    equal = all(s == m or (not exactly and 1 in (s, m)) for s, m in pairs)
    return equal and (not exactly or any(m > 1 for _, m in pairs))

  if fits(first, True):
    return first, True
  if len(shape) >= len(mask):
    # The axes of the mask among those of the array, in order if possible.
    places, count = range(len(shape)), len(mask)
    for positions in itertools.chain(
      itertools.combinations(places, count),
      itertools.permutations(places, count),
    ):
      axes: list[int | None] = list(none)
      for a, position in enumerate(positions):
        axes[position] = a
      if fits(axes, True):
        return tuple(axes), True
  else:
    last = tuple(range(len(mask) - rank, len(mask)))
    if fits(last, True):
      return last, False
  if shape[0] == mask[0] > 1 and not fits(first, False):
    # Examples with another axis than the mask's, such as that of classes.
    same = itertools.takewhile(
      lambda s: s[0] == s[1], zip(shape, mask, strict=False)
    )
    count = len(list(same))
    return (*range(count), *none[count:]), True
  if fits(first, False):
    pairs = list(zip(shape, mask, strict=False))
    # An array of size 1 wherever the mask has more is shared by all examples.
    met = any(s == m > 1 for s, m in pairs) or all(s == m for s, m in pairs)
    if met or len(shape) <= len(mask):
      return first, met and not shape[0] == 1 != mask[0]
  return none, False


def _axes_of(
  name: str, shape: tuple[int, ...], call: Call
) -> tuple[Axes, bool]:
  named, axes = call.options.axes_of(name)
  if not named and re.split(r"[.[]", name)[0] not in SHARED_NAMES:
    return align(shape, call.where.shape)
  if axes is None:
    return (None,) * len(shape), False
  return _checked_axes(name, axes, shape, call), True


def _checked_axes(
  name: str, axes: Any, shape: tuple[int, ...], call: Call
) -> Axes:
  """Checks the axes that an option names for an array."""
  if not isinstance(axes, tuple | list):
    raise TypeError(
      f"`axes[{name!r}]` must be a tuple with an entry for each axis, or None,"
      f" but is {axes!r}."
    )
  rank = call.where.ndim
  axes = tuple(a if a is None else _axis(name, a, rank) for a in axes)
  used = [a for a in axes if a is not None]
  if len(set(used)) != len(used):
    raise ValueError(
      f"`axes` has an axis of the mask twice for `{name}`. An array of pairs of"
      " examples can't be checked: make it of the examples in a function of"
      " these."
    )
  if len(axes) != len(shape):
    raise ValueError(
      f"`axes[{name!r}]` has {len(axes)} entries, but the array has shape"
      f" {shape}: write one for each axis, and None for an axis that the mask"
      " does not have."
    )
  for s, a in zip(shape, axes, strict=True):
    if (
      a is not None
      and 1 not in (s, call.where.shape[a])
      and (s != call.where.shape[a])
    ):
      raise ValueError(
        f"`axes` makes an axis of size {s} of `{name}` the axis {a} of"
        f" `{call.mask_name}`, which has size {call.where.shape[a]}."
      )
  return axes


def _axis(name: str, axis: int, rank: int) -> int:
  if not -rank <= axis < rank:
    raise ValueError(
      f"`axes` has {axis} for `{name}`, but the mask has {rank} axes."
    )
  return axis % rank


def _check_axes_option(call: Call) -> None:
  for given in call.options.axes or {}:
    known = [*call.all_names, *call.parameters, "return"]
    if not any(is_part_of(name, given) for name in known):
      raise ValueError(
        f"`axes` names {given!r}, but the arrays of {call.name} are"
        f" {', '.join(call.names)}, and 'return' is its result."
      )


def _check_that_any_fits(arguments: Sequence[Argument], call: Call) -> None:
  if any(a.maskable for a in arguments) or call.where.ndim == 0:
    return
  shapes = ", ".join(f"{a.name} {a.value.shape}" for a in arguments)
  example = max(arguments, key=lambda a: a.value.ndim)
  axes = (0, *[None] * (example.value.ndim - 1))
  raise ValueError(
    f"`{call.mask_name}` has shape {call.where.shape}, which fits none of the"
    f" arrays: {shapes}. It must have the first axes of the data that it masks,"
    " or broadcast to them. If it has other ones, say which axis of the mask"
    f" each axis of an array is, axes={{{example.name!r}: {axes}}}."
  )


def _convert(x: Any, dtype: Any) -> np.ndarray:
  x = np.asarray(x)
  if jnp.issubdtype(x.dtype, jnp.floating) and dtype is not None:
    with np.errstate(over="ignore"):
      x = x.astype(dtype)
  # As JAX takes it, so without float64 unless it is on.
  return x.astype(jnp.asarray(x[:0] if x.ndim else x).dtype)


def _finite(problem: Problem) -> Problem:
  """Puts included numbers where padding is not finite or out of range."""
  arguments = list(problem.arguments)
  for i, a in enumerate(arguments):
    masked = problem.masked(problem.where, i)
    kept = a.value[~masked]
    if a.floating:
      # Among what all examples share, an infinity may be a constant.
      if np.isnan(kept).any() or (a.maskable and np.isinf(kept).any()):
        raise ValueError(
          f"`{a.name}` has a NaN or an infinity that is included, as"
          f" {a.value.dtype}. Pass data that are finite where the mask is True."
        )
      broken = masked & ~np.isfinite(a.value)
    elif i in problem.call.sources or a.value.dtype == bool or not kept.size:
      continue
    else:
      broken = masked & ((a.value < kept.min()) | (a.value > kept.max()))
    if i in problem.call.sources or not broken.any():
      continue
    arguments[i] = replace_elements(a, broken, kept)
  return dataclasses.replace(problem, arguments=tuple(arguments))


def replace_elements(
  argument: Argument, broken: np.ndarray, kept: np.ndarray
) -> Argument:
  """An argument with some elements replaced by others."""
  if not kept.size:
    kept = np.array([0.5 if argument.floating else 0], argument.value.dtype)
  value = np.array(argument.value)
  value[broken] = np.resize(kept, int(broken.sum()))
  return dataclasses.replace(argument, value=value)


def replace_masked(problem: Problem) -> Problem:
  """Puts included numbers in the place of all masked ones."""
  arguments = list(problem.arguments)
  for i in problem.floats:
    masked = problem.masked(problem.where, i)
    if masked.any() and i not in problem.call.sources:
      a = arguments[i]
      arguments[i] = replace_elements(a, masked, a.value[~masked])
  return dataclasses.replace(problem, arguments=tuple(arguments))
