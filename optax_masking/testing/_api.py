"""The public functions that check a loss."""

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
from optax_masking.testing._checker import Checker, FindingLog
from optax_masking.testing._report import Report


def _dtype_and_shape(x: np.ndarray) -> str:
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
  """Checks a loss as `assert_mask_safe` does, and returns its report.

  Args:
    loss_fn: As in `assert_mask_safe`.
    *args: As in `assert_mask_safe`.
    where: As in `assert_mask_safe`.
    **options: The options of `assert_mask_safe`, and keywords of the loss.

  Returns:
    A `Report`. Its `ok` is True if the loss keeps the contract, its `findings`
    are the ways in which it does not, and `str(report)` is the message of
    `assert_mask_safe`.

  Raises:
    TypeError: As `assert_mask_safe`, for arguments that it refuses.
    ValueError: As `assert_mask_safe`, for arguments that it refuses.

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
  log = FindingLog(chosen.skip)
  with (
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
    np.errstate(all="ignore"),
  ):
    for dtype in chosen.dtypes or (None,):
      with _float64_for(dtype):
        problem = Problem(loss_fn, args, keywords, where, chosen, dtype)
        Checker(problem, log).run()
  data = [f"{a.name} {_dtype_and_shape(a.value)}" for a in problem.arguments]
  data.append(f"{chosen.where_name} {_dtype_and_shape(problem.where)}")
  return log.report(
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
  """Asserts that masked elements reach neither the value nor a gradient.

  The check calls the loss with many masks, made of the given mask, and puts
  many poisons into the masked elements of its arguments: NaN, infinities, the
  largest number, -1e30 (or the least number, if that is larger), a subnormal,
  0, and integers that are out of range. The value, gradients, tangents and
  Hessian of the loss have to keep the clauses of the mask contract, `CLAUSES`.

  Args:
    loss_fn: The loss: a function of arrays and a mask that returns one floating
      array, of any shape.
    *args: Its arguments, with realistic numbers. Small arrays of some rows and
      columns are enough; large arrays take long. Arrays of JAX or NumPy, also
      inside of dicts, lists and tuples, are the data. The check passes on
      anything else as it is.
    where: A mask that fits the data: boolean, True for included elements.
    where_name: The keyword of the mask.
    axes: For arguments whose shape is ambiguous, the axes of the data that
      their axes are, by name: `{"weights": (1,)}` for an array with one entry a
      class. An axis that the data lack is None; an array that no mask masks has
      None instead of a tuple. The names `"where"` and `"return"` stand for the
      mask and the result. By default an array of the data's rank has the axes
      of the data, and an array of lower rank has their first axes, one entry an
      example. An array that all examples share, such as a scalar or one entry a
      class, is not masked.
    reference: The same loss without a mask. With everything included the loss
      has to equal it; with the mask None the loss has to be the same program.
      By default the reference is the loss without its mask or with None, if the
      loss can be called so.
    skip: Names of clauses that the loss does not mean to keep, any of
      `"invariance"`, `"zero_gradient"`, `"compaction"`, `"empty"`,
      `"masked_label"` (an example whose own class is masked has loss 0),
      `"identity"`, `"honesty"`, `"clean_arithmetic"` and `"transforms"`.
    dtypes: The dtypes to try for the floating arguments, such as
      `("float32", "bfloat16")`. By default the arguments keep their dtypes,
      but float64 becomes float32 unless JAX has it enabled.
    derivatives: Which of `"value"`, `"vjp"`, `"jvp"` and `"hessian"` to try.
    transforms: Which of `"eager"`, `"jit"` and `"vmap"` to try.
    masks: Which masks to try: `"given"`, `"none"` and `"all"` (nothing and
      everything included), `"elements"` (one masked, one included), `"rows"`
      and `"columns"` (of the first and the last axis of `where`).
    samples: How many elements, rows and columns to try at most; fewer for
      arrays of many thousand numbers.
    **kwargs: Keyword arguments of the loss, with arrays as in `args`. For a
      keyword that is also an option use `functools.partial(loss_fn, ...)`.

  Returns:
    The `Report`, with the number of cases that were tried.

  Raises:
    AssertionError: If the loss breaks a clause. The message names the clause,
      the argument, element, mask, poison, derivative, transformation and dtype,
      the numbers, and the operation and the line of code in which the first NaN
      arose.
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
  """Checks a case. The given options replace those of the case."""
  report = check_mask_safe(
    case.loss_fn, *case.args, where=case.where, **{**case.options, **options}
  )
  return dataclasses.replace(report, name=case.name)
