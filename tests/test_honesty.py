"""Clause 6: NaN and infinity in an included element come out as in Optax."""

import jax
import numpy as np
import pytest
from cases import assert_all_close, bits, each_case, masks
from formulas import value
from lanes import selected


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of NaN.
@each_case(kinds=True)
def test_nan(case, dtype, kind):
  """In the slice that it is in, and in no other."""
  for lane in selected(case, dtype, kind, "honesty"):
    message = f"{lane.mask}, {lane.what}"
    got, clean = lane.outputs, lane.clean.outputs
    nan = np.isnan(got["value"])
    if not case.slices:
      right = np.isnan(value(case, lane.arguments, lane.where))
      np.testing.assert_array_equal(nan, right, message)
      continue
    at = lane.included if nan.ndim > 1 else lane.included[0]
    assert nan[at] and nan.sum() == 1, message
    others = np.arange(len(nan)) != lane.included[0]
    for name in ("value", "jvp", "vjp", "hessian"):
      for x, y in zip(
        jax.tree.leaves(got[name]), jax.tree.leaves(clean[name]), strict=True
      ):
        np.testing.assert_array_equal(bits(x[others]), bits(y[others]), message)


@each_case(mechanisms=True)
def test_infinity(case, dtype):
  """What is made of it is Optax's, not that of a formula."""
  where = masks(case.shape)["nothing masked"]
  loss = jax.jit(case.loss)
  original = jax.jit(case.original)
  for position in case.floating:
    for poison in (np.inf, -np.inf):
      arguments = list(case.arguments(dtype))
      first = (0,) * arguments[position].ndim
      arguments[position] = arguments[position].at[first].set(poison)
      got = np.asarray(loss(*arguments, where=where), "float64")
      right = np.asarray(original(*arguments), "float64")
      for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(got), kind(right))
      finite = np.isfinite(right)
      if finite.any():
        assert_all_close(got[finite], right[finite], dtype)
