"""Guesses the arguments of a loss from the names of its parameters.

No two sizes of a guess are the same, so that an array that is used along a
wrong axis fits nothing.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_masking.losses._table import Maker, Shape, class_index, soft_labels
from optax_masking.testing import MaskCase
from optax_masking.testing._call import name_of

MASK_NAMES = ("where", "mask")

# Parts of names. An argument with one of the first is the class of each
# example, one with the second a number for each example, if it can be.
_CLASS_NAMES = ("label", "index", "indices", "class", "ids", "action", "token")
_EXAMPLE_NAMES = ("weight", "advantage", "value", "reward", "return")
_SCORE_NAMES = ("logit", "score", "prob")
_IMAGE_NAMES = ("image", "img", "pixel")
# Whole names of what no array can stand for.
_BATCH_NAMES = ("batch", "data", "inputs", "examples")
_MODEL_NAMES = ("params", "model", "state", "variables", "apply_fn")

_MOST = 250  # Guesses of a loss: it runs once with each.


class TargetError(ValueError):
  """A target can't be audited, for a reason that its user can fix."""


class _Layout(NamedTuple):
  """Shapes of the data and of the mask."""

  data: Shape
  mask: Shape


_IMAGES = _Layout((3, 5, 7, 2), (3, 5, 7))
_SEQUENCES = _Layout((3, 5, 7), (3, 5))
_EXAMPLES = _Layout((5, 7), (5,))
_ELEMENTS = tuple(
  _Layout(shape, shape) for shape in ((5, 7), (3, 5, 7), (7,), (3, 5, 7, 2))
)
_WITH_CLASSES = (_SEQUENCES, _EXAMPLES, _IMAGES, *_ELEMENTS[1::-1])
_WITHOUT_CLASSES = (
  _ELEMENTS[0],
  _SEQUENCES,
  _EXAMPLES,
  *_ELEMENTS[1:3],
  _IMAGES,
  _ELEMENTS[3],
)


def _of_examples(rng: np.random.Generator, shape: Shape) -> np.ndarray:
  """A number for each example."""
  return soft_labels(rng, shape[:-1])


class Guess(NamedTuple):
  """Arguments of a loss, with its mask."""

  args: tuple[np.ndarray, ...]
  keywords: dict[str, Any]
  where: np.ndarray

  def call(
    self, function: Callable[..., Any], mask_name: str, dtype: Any = None
  ) -> Any:
    """The result of a loss, which must be a floating array.

    Raises:
      TypeError: If it is something else.
      Exception: Any that the loss raises.
    """

    def given(x: np.ndarray) -> Any:
      floating = x.dtype.kind == "f"
      return jnp.asarray(x, dtype if floating else None)

    keywords = {k: given(x) for k, x in self.keywords.items()}
    keywords[mask_name] = jnp.asarray(self.where)
    result = function(*map(given, self.args), **keywords)
    if isinstance(result, float):
      return np.asarray(result)
    if not jnp.issubdtype(getattr(result, "dtype", bool), jnp.floating):
      hint = ""
      if isinstance(result, tuple | dict):
        hint = "; a MaskCase has options for that, has_aux=True or output="
      raise TypeError(
        f"it returns {type(result).__name__}, not a floating array{hint}"
      )
    return result

  def rolled(self, axis: int) -> "Guess":
    """The same examples in another order along an axis of the mask."""

    def roll(x: np.ndarray) -> np.ndarray:
      same = x.shape[: self.where.ndim] == self.where.shape
      return np.roll(x, 1, axis) if same else x

    keywords = {k: roll(x) for k, x in self.keywords.items()}
    return Guess(tuple(map(roll, self.args)), keywords, roll(self.where))

  def case(
    self, function: Callable[..., Any], mask_name: str, **options: Any
  ) -> MaskCase:
    return MaskCase(
      function,
      *self.args,
      where=self.where,
      where_name=mask_name,
      **self.keywords,
      **options,
    )


def random_mask(shape: Shape) -> np.ndarray:
  where = np.random.default_rng(5).uniform(size=shape) < 0.6
  where.flat[0], where.flat[-1] = True, False
  return where


def guess_arguments(
  target: str, function: Callable[..., Any]
) -> tuple[Guess, str]:
  """The first guess that a loss runs with, and the name of its mask.

  A guess is better if the loss makes no difference between the examples: one
  that reads an array along a wrong axis often runs, but does.

  Raises:
    TargetError: If there is none.
  """
  try:
    parameters = inspect.signature(function).parameters
  except (TypeError, ValueError) as error:
    raise TargetError(f"{target} has no signature: {error}") from error
  mask_name = next((m for m in MASK_NAMES if m in parameters), None)
  if mask_name is None:
    raise TargetError(_why_no_mask(target, function, list(parameters)))
  required = [
    p
    for p in parameters.values()
    if p.default is p.empty
    and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    and p.name != mask_name
  ]
  runs, first_error = None, ""
  for guess in itertools.islice(_guesses(required), _MOST):
    try:
      result = guess.call(function, mask_name)
      if _ignores_order(guess, result, function, mask_name):
        return guess, mask_name
      runs = runs or guess
    except Exception as error:  # A user's loss may raise anything.
      first_error = first_error or (
        f" With {_shapes(guess, required, mask_name)}:"
        f" {type(error).__name__}: {error}"
      )
  if runs is None:
    raise TargetError(
      f"No arguments could be guessed for {target}: with arrays of one to four"
      " axes and a mask of them it does not run. Name a MaskCase instead,"
      f" {_example(function, list(parameters), mask_name)}.{first_error}"
    )
  return runs, mask_name


def why_not_in(
  dtype: str, guess: Guess, function: Callable[..., Any], mask_name: str
) -> str | None:
  """Why a loss does not run in a dtype; None if it does."""
  try:
    result = guess.call(function, mask_name, dtype)
  except Exception as error:  # A user's loss may raise anything.
    return f"{type(error).__name__}: {error}"
  finite = bool(jnp.all(jnp.isfinite(result)))
  return None if finite else "its result is not finite"


def _ignores_order(
  guess: Guess, result: Any, function: Callable[..., Any], mask_name: str
) -> bool:
  for axis, size in enumerate(guess.where.shape):
    expected = np.asarray(result, "float32")
    if expected.shape[axis : axis + 1] == (size,):
      expected = np.roll(expected, 1, axis)
    got = np.asarray(guess.rolled(axis).call(function, mask_name), "float32")
    if not np.allclose(got, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
      return False
  return True


def _guesses(required: Sequence[inspect.Parameter]) -> Iterator[Guess]:
  """Those that fit the names best come first."""
  names = [p.name.lower() for p in required]
  images = any(_has(name, _IMAGE_NAMES) for name in names)
  makers = [_makers(name, names) for name in names]
  for chosen in itertools.product(*makers):
    if not any(make is soft_labels for make in chosen):
      continue
    per_example = any(make is not soft_labels for make in chosen)
    layouts = _WITH_CLASSES if per_example else _WITHOUT_CLASSES
    for layout in (_IMAGES, *layouts) if images else layouts:
      rng = np.random.default_rng(0)
      args, keywords = [], {}
      for make, parameter in zip(chosen, required, strict=True):
        array = _in_32_bits(make(rng, layout.data))
        if parameter.kind is parameter.KEYWORD_ONLY:
          keywords[parameter.name] = array
        else:
          args.append(array)
      yield Guess(tuple(args), keywords, random_mask(layout.mask))


def _makers(name: str, names: Sequence[str]) -> tuple[Maker, ...]:
  """What an argument may be, the most likely first."""
  scores = any(_has(other, _SCORE_NAMES) for other in names)
  if _has(name, _CLASS_NAMES) or (scores and _has(name, ("target",))):
    return class_index, soft_labels
  if _has(name, _EXAMPLE_NAMES):
    return soft_labels, _of_examples
  if _has(name, _SCORE_NAMES):
    return (soft_labels,)
  return soft_labels, class_index


def _has(name: str, parts: Iterable[str]) -> bool:
  return any(part in name for part in parts)


def _in_32_bits(x: np.ndarray) -> np.ndarray:
  return x.astype("int32" if x.dtype.kind == "i" else "float32")


# Errors.


def _why_no_mask(
  target: str, function: Callable[..., Any], names: Sequence[str]
) -> str:
  if any(name in (*_BATCH_NAMES, *_MODEL_NAMES) for name in names):
    return (
      f"{target} takes {' and '.join(names)}, which can't be guessed. Name a"
      f" MaskCase instead, {_example(function, names, None)}, with the name of"
      " the mask in the batch."
    )
  return (
    f"{target} has no argument `where` or `mask`. If its mask has another"
    " name, write a MaskCase: MaskCase(loss, ..., where=..., where_name='...')."
  )


def _example(
  function: Callable[..., Any], names: Sequence[str], mask_name: str | None
) -> str:
  """A MaskCase to copy."""
  where = "mask"
  if mask_name is None:
    batches = [name for name in names if name in _BATCH_NAMES]
    where = f"\"{(batches or names)[-1]}['mask']\""
  args = [name for name in names if name != mask_name]
  parts = [name_of(function), *args, f"where={where}"]
  if mask_name not in (None, "where"):
    parts.append(f"where_name={mask_name!r}")
  return f"MaskCase({', '.join(parts)})"


def _shapes(
  guess: Guess, required: Sequence[inspect.Parameter], mask_name: str
) -> str:
  positional = [p.name for p in required if p.kind is not p.KEYWORD_ONLY]
  arrays = {
    **dict(zip(positional, guess.args, strict=True)),
    **guess.keywords,
    mask_name: guess.where,
  }
  return ", ".join(f"{k} {x.dtype}{list(x.shape)}" for k, x in arrays.items())
