"""The checks as functions."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._case import (
  DERIVATIVES,
  MASKS,
  TRANSFORMS,
  Axes,
  MaskCase,
  Options,
  Problem,
  name_of,
)
from optax_masking.testing._checker import Checker, Findings
from optax_masking.testing._report import Report


def _described(x: np.ndarray) -> str:
  return f"{x.dtype}{list(x.shape)}"


@contextlib.contextmanager
def _float64_for(dtype: Any) -> Iterator[None]:
  if dtype is None or jnp.dtype(dtype) != jnp.float64:
    yield
    return
  if hasattr(jax, "enable_x64"):
    switch = jax.enable_x64(True)
  else:  # In older versions of JAX.
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    switch = enable_x64()
  with switch:
    yield


def check_mask_safe(
  loss_fn: Callable[..., Any], *args: Any, where: Any, **options: Any
) -> Report:
  """Checks a loss as `assert_mask_safe` does, and returns what it found.

  Args:
    loss_fn: As in `assert_mask_safe`.
    *args: As in `assert_mask_safe`.
    where: As in `assert_mask_safe`.
    **options: What else `assert_mask_safe` takes: its options, and keywords of
      the loss.

  Returns:
    A `Report`. Its `ok` tells whether the loss keeps the contract, its
    `findings` how it does not, and its text is what `assert_mask_safe` raises.

  Raises:
    TypeError: As `assert_mask_safe`, if it is called in a wrong way.
    ValueError: The same.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_masking.testing import check_mask_safe
    >>> def squared_error(predictions, targets, where):
    ...   return jnp.square(predictions - targets) * where
    >>> report = check_mask_safe(
    ...     squared_error, np.array([1.0, 2.0]), np.array([3.0, 0.0]),
    ...     where=np.array([True, False]))
    >>> report.ok
    False
    >>> report.clauses["compaction"], report.clauses["zero_gradient"]
    ('kept', 'broken')
  """
  names = {field.name for field in dataclasses.fields(Options)}
  chosen = Options(**{k: v for k, v in options.items() if k in names})
  keywords = {k: v for k, v in options.items() if k not in names}
  start = time.perf_counter()
  findings = Findings(chosen.skip)
  with (
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
    np.errstate(all="ignore"),
  ):
    for dtype in chosen.dtypes or (None,):
      with _float64_for(dtype):
        problem = Problem(loss_fn, args, keywords, where, chosen, dtype)
        Checker(problem, findings).run()
  data = [f"{a.name} {_described(a.value)}" for a in problem.arguments]
  data.append(f"{chosen.where_name} {_described(problem.where)}")
  return findings.report(
    name_of(loss_fn), time.perf_counter() - start, ", ".join(data)
  )


def assert_mask_safe(
  loss_fn: Callable[..., Any],
  *args: Any,
  where: Any,
  where_name: str = "where",
  axes: Mapping[str, Axes | None] | None = None,
  reference: Callable[..., Any] | None = None,
  skip: Sequence[str] = (),
  dtypes: Sequence[Any] | None = None,
  derivatives: Sequence[str] = DERIVATIVES,
  transforms: Sequence[str] = TRANSFORMS,
  masks: Sequence[str] = MASKS,
  samples: int = 16,
  **kwargs: Any,
) -> Report:
  """Asserts that what a loss masks reaches neither its value nor a gradient.

  The loss is called with many masks, made of the given one, while the masked
  elements of its arguments hold many poisons: NaN, infinities, the largest
  number, -1e30 (or the least, if that is larger), a subnormal, 0, and for
  integers some that are out of range. Its value, gradients, tangents and
  Hessian have to keep the clauses of the mask contract, `CLAUSES`.

  Args:
    loss_fn: The loss: a function of arrays and a mask that returns one floating
      array, of any shape.
    *args: What to call it with, with numbers that it is made for: small arrays
      do, of some rows and columns; large ones take long. Arrays of JAX or
      NumPy, also inside of dicts, lists and tuples, are the data. Anything else
      is passed on.
    where: A mask that fits the data: boolean, True for what is included.
    where_name: The keyword of the mask.
    axes: Which axes of the data the axes of an argument are, by its name, where
      the shapes do not tell: `{"weights": (1,)}` for an array with an entry a
      class, None for one that no mask masks. An axis that the data lack is
      None. Also for `"where"` and for what the loss returns, `"return"`. By
      default an array of the data's rank has the axes of the data, and one of
      lower rank has their first ones, an entry an example. One that all
      examples share, such as a scalar or an entry a class, is not masked.
    reference: The same loss without a mask, which the loss has to equal where
      nothing is masked, and to be, as a program, without a mask. By default
      the loss itself, called without its mask or with None, if it can be.
    skip: Names of clauses that the loss does not mean to keep, any of
      `"invariance"`, `"zero_gradient"`, `"compaction"`, `"empty"`,
      `"masked_label"` (an example whose own class is masked has loss 0),
      `"identity"`, `"honesty"`, `"clean_arithmetic"` and `"transforms"`.
    dtypes: The dtypes to try for the floating arguments, such as
      `("float32", "bfloat16")`. By default they stay as JAX takes them, so
      float64 becomes float32 where that is not enabled.
    derivatives: Which of `"value"`, `"vjp"`, `"jvp"` and `"hessian"` to try.
    transforms: Which of `"eager"`, `"jit"` and `"vmap"` to try.
    masks: Which masks to try: `"given"`, `"none"` and `"all"` (nothing and
      everything included), `"elements"` (one masked, one included), `"rows"`
      and `"columns"` (of the first and the last axis of `where`).
    samples: How many elements, rows and columns to try at most; fewer of arrays
      of many thousand numbers.
    **kwargs: What else to call the loss with, arrays as in `args`. What has the
      name of an option goes by `functools.partial(loss_fn, ...)`.

  Returns:
    The `Report`, with the number of cases that were tried.

  Raises:
    AssertionError: If the loss breaks a clause. The message tells which, with
      which argument, element, mask, poison, derivative, transformation and
      dtype, the numbers, and the operation and the line of the code in which
      the first NaN arose.
    TypeError: If `where` is not boolean, or the loss does not return a floating
      array.
    ValueError: If no array is floating, if `where` does not fit the data, if an
      included element is not finite, if there are more than a million numbers,
      or if an option is unknown.

  Examples:
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from optax_masking.testing import assert_mask_safe
    >>> def mean_squared_error(predictions, targets, where):
    ...   error = jnp.where(where, predictions - targets, 0)
    ...   return jnp.sum(jnp.square(error)) / jnp.maximum(jnp.sum(where), 1)
    >>> report = assert_mask_safe(
    ...     mean_squared_error, np.array([1.0, 2.0]), np.array([3.0, 0.0]),
    ...     where=np.array([True, False]))
    >>> report.ok
    True
  """
  __tracebackhide__ = True
  report = check_mask_safe(
    loss_fn,
    *args,
    where=where,
    where_name=where_name,
    axes=axes,
    reference=reference,
    skip=skip,
    dtypes=dtypes,
    derivatives=derivatives,
    transforms=transforms,
    masks=masks,
    samples=samples,
    **kwargs,
  )
  if not report.ok:
    raise AssertionError(str(report))
  return report


def check_case(case: MaskCase, **options: Any) -> Report:
  """Checks a case, with some options replaced."""
  report = check_mask_safe(
    case.loss_fn, *case.args, where=case.where, **{**case.options, **options}
  )
  return dataclasses.replace(report, name=case.name)
