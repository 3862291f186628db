"""Clause 4: a slice with nothing included is exactly 0, as its derivatives."""

import jax
import numpy as np
from cases import assert_equal, each_case
from lanes import selected


@each_case(kinds=True)
def test_nothing_included(case, dtype, kind):
  empty = 0
  for lane in selected(case, dtype, kind, "clean"):
    outputs = lane.outputs
    if not lane.where.any():
      empty += 1
      for x in (outputs["value"], outputs["jvp"]):
        assert_equal(x, 0, lane.mask)
      for gradient in (*outputs["vjp"], *outputs["hessian"]):
        assert_equal(gradient, 0, lane.mask)
    elif case.slices:
      nothing = ~lane.where.any(-1)
      empty += nothing.sum()
      assert_equal(outputs["value"][nothing], 0, lane.mask)
  assert empty


@each_case(dtypes=("float32",))
def test_scalar(case, dtype):
  arguments = case.arguments(dtype)
  got = case.loss(*arguments, where=False)
  assert_equal(got, np.zeros(jax.eval_shape(case.original, *arguments).shape))
