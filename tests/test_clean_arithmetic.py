"""Clause 7: no NaN or infinity is computed because of a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, each_case, masks, row_masks
from jax.experimental import checkify
from lanes import derivatives, directions


# bfloat16 has the range of float32, and so the same extremes.
@each_case(dtypes=[d for d in DTYPES if d != "bfloat16"], mechanisms=True)
def test_debug_nans_and_infs(case, dtype):
  """Operation by operation, with garbage in what is masked."""
  clean = case.arguments(dtype)

  def total(floats, arguments, where):
    given = case.with_floats(arguments, floats)
    # Scaled, as a loss in half precision is, and as a weighted one may be.
    return jnp.sum(128 * case.loss(*given, where=where))

  for where in (masks(case.shape) | row_masks(case.shape)).values():
    arguments = case.garbled(clean, where)
    floats = [arguments[p] for p in case.floating]
    with jax.debug_nans(True), jax.debug_infs(True):
      jax.value_and_grad(total)(floats, arguments, where)
  # They are on, and look.
  with jax.debug_nans(True), pytest.raises(FloatingPointError):
    case.original(*arguments)


@each_case(dtypes=DTYPES[:1], mechanisms=True)
def test_checkify(case, dtype):
  """Inside of compiled code too, and in second derivatives."""
  arguments = [np.asarray(x)[None] for x in case.arguments(dtype)]
  tangents = [t[None] for t in directions(case, [x[0] for x in arguments])]
  checked = jax.jit(
    checkify.checkify(
      lambda *given: derivatives(case, case.loss, *given),
      checkify.nan_checks,
    )
  )
  for where in masks(case.shape).values():
    error, _ = checked(arguments, where[None], tangents)
    error.throw()
