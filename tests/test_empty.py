"""Clause 4: a slice with nothing included is exactly 0, as its derivatives."""

import jax
import numpy as np
from cases import DTYPES, assert_equal, each_case
from lanes import selected


@each_case(kinds=True)
def test_nothing_included(case, dtype, kind):
  for lane in selected(case, dtype, kind, "clean"):
    outputs = lane.outputs
    if not lane.where.any():
      for x in (outputs["value"], outputs["jvp"]):
        assert_equal(x, 0, lane.mask)
      for gradient in (*outputs["vjp"], *outputs["hessian"]):
        assert_equal(gradient, 0, lane.mask)
    elif case.slices:
      nothing = ~lane.where.any(-1)
      for x in (outputs["value"], outputs["jvp"]):
        assert_equal(x[nothing], 0, lane.mask)


@each_case(dtypes=DTYPES[:1])
def test_scalar(case, dtype):
  arguments = case.arguments(dtype)
  got = case.loss(*arguments, where=False)
  unmasked = jax.eval_shape(case.original, *arguments)
  assert got.dtype == unmasked.dtype
  assert_equal(got, np.zeros(unmasked.shape))
