"""The losses as cases of the tests, with masks, poisons and comparisons.

What there is to know of a loss is in `optax_masking/losses/_table.py`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax as upstream
import pytest

import optax_masking as optax
from optax_masking.losses import _table as table

# float64 exists only where JAX is told so before it starts.
DTYPES = (
  ("float64",)
  if jax.config.jax_enable_x64
  else ("float32", "bfloat16", "float16")
)
SHAPE = (4, 5)
# For programs that are to be compiled as users do, whatever `conftest.py` says.
AS_USERS_DO = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}
if jax.__version_info__ < (0, 11):
  AS_USERS_DO["xla_cpu_use_fusion_emitters"] = True


@dataclasses.dataclass(frozen=True)
class Case(table.Row):
  """A row of the table, with the loss of this package and Optax's."""

  @functools.cached_property
  def loss(self) -> Callable[..., jax.Array]:
    return self.of(optax.losses)

  @functools.cached_property
  def original(self) -> Callable[..., jax.Array]:
    return self.of(upstream.losses)

  def with_floats(self, arguments: Sequence, floats: Sequence) -> list:
    """The arguments, with others in the place of the floating ones."""
    given = dict(enumerate(arguments))
    return list(
      (given | dict(zip(self.floating, floats, strict=True))).values()
    )

  def garbled(self, arguments: Sequence, where: np.ndarray) -> list[jax.Array]:
    """The arguments, with NaN or no class in what is masked.

    They may be batches of data, with a batch of masks.
    """
    where = np.broadcast_to(where, arguments[0].shape)
    return [
      jnp.where(
        self.masked(p, where), np.nan if p in self.floating else -100, x
      )
      for p, x in enumerate(arguments)
    ]

  def masked(self, position: int, where: np.ndarray) -> np.ndarray:
    """What a mask of the data's shape masks of an argument."""
    return ~where.any(-1) if position in self.per_example else ~where


MASKED = sorted(table.ROWS)
# A deprecated name is no loss of its own.
CASES = tuple(
  Case(**vars(row)) for row in table.ROWS.values() if row.alias_of is None
)
NAMED = [(case.name, case) for case in CASES]
BY_NAME = dict(NAMED)
# Those with one number for each slice, or for each of its elements.
SLICED = [case for case in CASES if case.slices and not case.keeps_shape]
MECHANISMS = [case.name for case in CASES if case.mechanism]


def turn(mechanism: str, dtypes: Sequence[str]) -> str:
  """The dtype in which a mechanism is tested by day: each in turn."""
  turns = ("float32", "bfloat16", "float16", "float64")
  dtype = turns[MECHANISMS.index(mechanism) % len(turns)]
  # What is tested in one dtype is tested of all mechanisms.
  elsewhere = dtype == "float64" and len(dtypes) > 1
  return dtype if dtype in dtypes or elsewhere else "float32"


def each_case(
  cases: Iterable[Case] = CASES,
  *,
  dtypes: Iterable[str] = DTYPES,
  kinds: bool = False,
  mechanisms: bool = False,
  quick: bool | None = None,
) -> pytest.MarkDecorator:
  """Runs a test for losses and dtypes.

  Args:
    cases: Which losses.
    dtypes: Which dtypes. In the quick subset are the first of them, and masks
      of elements.
    kinds: Whether to run it for the lanes of each kind of mask, too.
    mechanisms: Whether one loss of each mechanism will do, each in one of the
      dtypes, float64 included: the others are left to the night. Else it does
      in float64, and for masks of rows in half precision, in one of the two.
    quick: Whether any of it is in the quick subset; by default, if it is not
      about the mechanisms.
  """
  dtypes = tuple(dtypes)
  if quick is None:
    quick = not mechanisms

  def marks(case, number, kind):
    is_one = case.name in MECHANISMS
    if mechanisms:
      by_day = is_one and dtypes[number] == turn(case.name, dtypes)
    elif jax.config.jax_enable_x64:
      by_day = is_one
    elif number and kind == "rows":
      by_day = is_one and number == 1 + MECHANISMS.index(case.name) % 2
    else:  # A loss that is an output of another has a program like its own.
      by_day = not number or case.output_of is None
    if not by_day:
      return [pytest.mark.nightly]
    if not quick or number or kind == "rows":
      return [pytest.mark.slow]
    return []

  parameters = []
  for case, (number, dtype), kind in itertools.product(
    cases, enumerate(dtypes), KINDS if kinds else (None,)
  ):
    values = (case, dtype, kind) if kinds else (case, dtype)
    name = "-".join([case.name, *values[1:]])
    parameters.append(
      pytest.param(*values, id=name, marks=marks(case, number, kind))
    )
  names = ("case", "dtype", "kind") if kinds else ("case", "dtype")
  return pytest.mark.parametrize(names, parameters)


# NumPy by itself takes NaN for equal to NaN.
assert_allclose = functools.partial(np.testing.assert_allclose, equal_nan=False)


def assert_close(
  got,
  expected,
  dtype: str,
  message: str = "",
  roundings: float = 16.0,
  terms: float = 0.0,
) -> None:
  """Compares numbers of a dtype, up to some roundings of each.

  Those that are differences are as exact as the larger `terms` of them.
  """
  room = roundings * float(jnp.finfo(dtype).eps)
  assert_allclose(
    np.asarray(got, "float64"),
    np.asarray(expected, "float64"),
    rtol=room,
    atol=terms * room,
    err_msg=message,
  )


def assert_all_close(got, expected, dtype: str, roundings: float = 16.0):
  """Compares trees, each array relative to the largest number in it."""
  jax.tree.map(
    lambda a, b: assert_close(
      a, b, dtype, roundings=roundings, terms=largest(b)
    ),
    got,
    expected,
  )


def largest(x) -> float:
  """The size of the largest number of an array."""
  return float(jnp.max(jnp.abs(x)))


def assert_equal(got, expected, message: str = "") -> None:
  """Compares finite numbers, exactly."""
  assert np.all(np.isfinite(np.asarray(got, "float64"))), message
  np.testing.assert_array_equal(got, expected, err_msg=message)


def bits(x: np.ndarray) -> np.ndarray:
  """Numbers as they are stored: NaN and minus zero, too."""
  x = np.asarray(x)
  return x.view(f"u{x.dtype.itemsize}")


def masks(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
  """Masks of the data's shape, of every kind."""
  rng = np.random.default_rng(7)
  kinds = {
    "nothing masked": np.ones(shape, bool),
    "everything masked": np.zeros(shape, bool),
    "one element": np.ones(shape, bool),
    "all but one element": np.zeros(shape, bool),
    "whole rows": np.ones(shape, bool),
    "whole classes": np.ones(shape, bool),
    "one class": np.ones(shape, bool),
    "random": rng.uniform(size=shape) < 0.6,
    "random, sparse": rng.uniform(size=shape) < 0.2,
  }
  kinds["one element"].flat[1] = False
  kinds["all but one element"].flat[-1] = True
  kinds["whole rows"][::2] = False
  kinds["whole classes"][..., 1:3] = False
  kinds["one class"][..., 1] = False
  return kinds


def row_masks(shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
  """Masks of examples, with size 1 along the last axis."""
  shape = (*shape[:-1], 1)
  some = np.resize([True, False, False, True, True], shape)
  return {
    "no row masked": np.ones(shape, bool),
    "some rows masked": some,
    "all rows masked": np.zeros(shape, bool),
  }


def float_poisons(dtype: str) -> tuple[jax.Array, ...]:
  """What a masked element of a floating argument may hold."""
  info = jnp.finfo(dtype)
  values = (
    np.nan,
    np.inf,
    -np.inf,
    info.max,
    info.min,
    -1e30,
    info.smallest_subnormal,
    0.0,
  )
  return tuple(jnp.asarray(v).astype(dtype) for v in values)


# By the kind of the masks, which have one shape: one program is for them all.
KINDS = {"elements": masks, "rows": row_masks}
INDEX_POISONS = (-100, -1, SHAPE[-1], 2**31 - 1)
