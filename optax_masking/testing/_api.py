"""The checks as functions."""

import contextlib
import dataclasses
import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_masking.testing._call import (
  Call,
  missing_arguments,
  name_of,
  parameters_of,
)
from optax_masking.testing._check import check, explanations
from optax_masking.testing._events import Log
from optax_masking.testing._options import (
  DERIVATIVES,
  MASKS,
  TRANSFORMS,
  Axes,
  Options,
  narrowed,
)
from optax_masking.testing._problem import described
from optax_masking.testing._report import Report


class MaskCase:
  """A loss, its arguments, and the options of its check.

  Args:
    loss_fn: The loss.
    *args: Its arguments.
    where: Its mask.
    name: The name in reports, by default that of the function.
    **options: The other arguments of `assert_mask_safe`.

  Examples:
    >>> import numpy as np
    >>> import optax_masking as optax
    >>> from optax_masking.testing import MaskCase
    >>> MaskCase(
    ...     optax.squared_error, np.ones(3), np.zeros(3),
    ...     where=np.array([True, True, False]))
    MaskCase('squared_error')
  """

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    *args: Any,
    where: Any,
    name: str | None = None,
    **options: Any,
  ):
    self.loss_fn = loss_fn
    self.args = args
    self.where = where
    self.name: str = name or name_of(loss_fn)
    self.options = options

  def __repr__(self) -> str:
    return f"MaskCase({self.name!r})"


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
    ...     squared_error, np.array([1.0, 2.0, 4.0]), np.array([3.0, 0.0, 5.0]),
    ...     where=np.array([True, False, True]))
    >>> report.ok
    False
    >>> report.clauses["compaction"], report.clauses["zero_gradient"]
    ('kept', 'broken')
  """
  names = [field.name for field in dataclasses.fields(Options)]
  chosen = Options(**{k: v for k, v in options.items() if k in names})
  keywords = {k: v for k, v in options.items() if k not in names}
  _check_keywords(loss_fn, keywords, names)
  _check_names(loss_fn, len(args), chosen)
  start = time.perf_counter()
  log, cases = Log(chosen), 0
  with (
    jax.debug_nans(False),
    jax.debug_infs(False),
    jax.disable_jit(False),
    np.errstate(all="ignore"),
  ):
    call = Call(loss_fn, args, keywords, where, chosen)
    for dtype in chosen.dtypes or (None,):
      with _float64_for(dtype):
        problem, count = check(call, dtype, log)
        cases += count
    with _float64_for(next((f.dtype for f in log.found.values()), None)):
      log.add(explanations(call, log))
  return log.report(
    call.name, cases, time.perf_counter() - start, described(problem)
  )


def _check_keywords(
  loss_fn: Callable[..., Any], keywords: Iterable[str], options: Iterable[str]
) -> None:
  """Refuses a keyword that neither the check nor the loss has."""
  parameters = parameters_of(loss_fn)
  if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters):
    return
  own = [p.name for p in parameters]
  for keyword in keywords:
    if keyword not in own:
      close = difflib.get_close_matches(keyword, [*options, *own], 1)
      raise TypeError(
        f"{name_of(loss_fn)} has no argument `{keyword}`, and the check has no"
        f" such option."
        + (f" Did you mean `{close[0]}`?" if close else "")
        + f" The options are {', '.join(options)}."
      )


def _check_names(
  loss_fn: Callable[..., Any], count: int, options: Options
) -> None:
  """Refuses an option that is an argument of the loss, too."""
  for name in missing_arguments(loss_fn, count):
    default = getattr(Options, name, None)
    if (
      name != options.where_name and getattr(options, name, None) is not default
    ):
      raise TypeError(
        f"`{name}` is an argument of {name_of(loss_fn)} and an option of the"
        f" check. For the argument, pass functools.partial(loss_fn, {name}=...)"
        " or all arguments by position."
      )


def assert_mask_safe(
  loss_fn: Callable[..., Any],
  *args: Any,
  where: Any,
  where_name: str = "where",
  numeric_where: bool = False,
  inverted_where: bool = False,
  axes: Mapping[str, Axes | None] | None = None,
  output: Any = None,
  has_aux: bool = False,
  reference: Callable[..., Any] | None = None,
  skip: Sequence[str] = (),
  strict: bool = False,
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
    loss_fn: The loss, or a training step's loss of parameters and a batch: a
      function that returns one floating array, of any shape.
    *args: Its arguments, with realistic numbers. Small arrays of some rows and
      columns are enough, and sizes that are all different show most. Arrays of
      JAX or NumPy, also inside of dicts, tuples, dataclasses and modules, are
      the data. The check passes on anything else as it is.
    where: The mask, True for included elements, in one of three forms. An array
      is passed to the loss as `where_name`. A string names the array among the
      arguments that is the mask, `"batch['mask']"`. A function makes the mask
      of arguments, `lambda batch: batch["labels"] != -100`, for a loss that
      does so itself; the check changes the labels, or the lengths, to have
      other masks.
    where_name: The name of the parameter that is the mask.
    numeric_where: Whether the loss takes a mask of zeros and ones, in the dtype
      of the given one.
    inverted_where: Whether the loss takes True, or one, for what is masked, as
      for paddings. The given mask is one of these, too.
    axes: For each array, by name, the axis of the mask that runs along each of
      its axes, and None where none does: `{"logits": (0, 1, None)}`. None
      instead of a tuple: the mask does not mask this array, or this whole
      argument, `{"params": None}`. `"return"` stands for the result. By default
      the axes of the mask are the first axes of an array, or else those of the
      same sizes, and arguments named `model`, `net`, `network`, `parameters`,
      `params`, `train_state` or `variables` are not masked.
    output: The loss in what `loss_fn` returns: a key, or a function.
    has_aux: Whether `loss_fn` returns a tuple of which the loss is the first.
    reference: The loss without a mask, of the same other arguments. With
      everything included `loss_fn` must equal it. If `loss_fn` takes None as
      its mask, too, both must be the same program. By default it is `loss_fn`
      itself, without its mask or with None, if it can be called so.
    skip: Names of clauses that the loss does not mean to keep, any of
      `"invariance"`, `"zero_gradient"`, `"compaction"`, `"empty"`,
      `"masked_label"` (an example whose own class is masked has loss 0),
      `"identity"`, `"honesty"`, `"clean_arithmetic"` and `"transforms"`.
    strict: Whether to fail, too, if a clause can't be tried, or if the loss or
      a gradient is not finite on the given data.
    dtypes: The dtypes to try for the floating arguments, such as
      `("float32", "bfloat16")`. By default the arguments keep their dtypes,
      but float64 becomes float32 unless JAX has it enabled.
    derivatives: Which of `"value"`, `"vjp"`, `"jvp"` and `"hessian"` to try.
    transforms: Which of `"eager"`, `"jit"` and `"vmap"` to try. Eagerly, values
      and gradients are computed for two of the masks.
    masks: Which masks to try: `"given"`, `"none"` and `"all"` (nothing and
      everything included), `"elements"` (one masked, one included), `"rows"`
      and `"columns"` (of the first and the last axis of `where`) and `"padded"`
      (the first elements of each row, as of sequences of several lengths, some
      of them empty or full).
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
    TypeError: If the mask is not boolean, if the loss does not return a
      floating array, or if a keyword is neither an option nor an argument of
      the loss.
    ValueError: If no array is floating, if the mask fits no array, if an
      included element is not finite, if there are more than a million numbers,
      or if an option has an unknown value.

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

    A training step, whose batch has the mask:

    >>> def loss_fn(params, batch):
    ...   mask = batch["mask"][..., None]
    ...   x = jnp.where(mask, batch["x"], 0)  # The gradient multiplies by it.
    ...   error = jnp.where(mask, x @ params["w"] - batch["y"], 0)
    ...   return jnp.sum(error**2) / jnp.maximum(jnp.sum(batch["mask"]), 1)
    >>> params = {"w": jnp.ones((3, 2))}
    >>> batch = {"x": jnp.ones((4, 5, 3)), "y": jnp.ones((4, 5, 2)),
    ...          "mask": jnp.arange(5) < jnp.array([[5], [2], [3], [1]])}
    >>> assert_mask_safe(loss_fn, params, batch, where="batch['mask']").ok
    True
  """
  __tracebackhide__ = True
  options = {field.name: None for field in dataclasses.fields(Options)}
  given = locals()
  report = check_mask_safe(
    loss_fn, *args, where=where, **{n: given[n] for n in options}, **kwargs
  )
  if not report.ok:
    raise AssertionError(str(report))
  return report


def check_case(case: MaskCase, **narrower: Any) -> Report:
  """Checks a case with its options, cut down to narrower ones."""
  options = narrowed(case.options, narrower)
  report = check_mask_safe(
    case.loss_fn, *case.args, where=case.where, **options
  )
  return dataclasses.replace(report, name=case.name)
