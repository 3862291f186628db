"""Accuracy: small numbers have as many digits as Optax's without a mask.

The errors are relative to each number: at a confident logit the right gradient
is 1e-9, and 0 is wrong. Of all errors the median and the 98% quantile are at
most 4 times those of Optax, or 4 roundings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import each_case
from formulas import UNCERTAINTY
from lanes import expected, selected, without_mask

QUANTILES = (0.5, 0.98)
# Where the errors of Optax jump, as at the second derivatives of the focal loss
# from 1e-7 to 1, a few numbers more on one side decide.
SLACK = 0.01


def relative_errors(case, lanes, dtype):
  """By what is computed: for each number that is not 0 and is in the range."""
  info = jnp.finfo(dtype)
  found = {}
  for lane in lanes:
    right = expected(case, lane)
    for name in ("value", "vjp", "hessian"):
      for g, r in zip(
        jax.tree.leaves(lane.outputs[name]),
        jax.tree.leaves(right[name]),
        strict=True,
      ):
        size = np.abs(r)
        counts = (size >= float(info.tiny)) & (size <= float(info.max))
        error = np.abs(g.astype("longdouble") - r)[counts] / size[counts]
        found.setdefault(name, []).append(error.astype("float64"))
  return {name: np.concatenate(errors) for name, errors in found.items()}


@each_case(kinds=True, quick=False)
def test_quantiles(case, dtype, kind):
  """Of the same elements, with a mask around them and without the others."""
  ours = relative_errors(case, selected(case, dtype, kind, "accuracy"), dtype)
  try:
    unmasked = without_mask(case, dtype, kind)
  except TypeError as e:
    assert "Custom JVP rule" in str(e)  # Of the projection, in half precision.
    pytest.skip("Optax has no second derivative of this dtype.")
  theirs = relative_errors(case, unmasked, dtype)
  few = 4 * float(jnp.finfo(dtype).eps)
  for name, errors in ours.items():
    if not len(errors):
      continue  # These derivatives are 0.
    finite, floors = (x[np.isfinite(x)] for x in (errors, theirs[name]))
    lost, by_optax = len(errors) - len(finite), len(theirs[name]) - len(floors)
    few_more = SLACK * len(errors)
    assert lost <= by_optax + few_more, f"{name}: {lost} are not finite"
    for q in QUANTILES if len(finite) else ():
      got, floor = np.quantile(finite, q), np.quantile(floors, q + SLACK)
      limit = max(4 * floor, few) + UNCERTAINTY * (name == "hessian")
      assert got <= limit, (
        f"{name}: the {q:.0%} quantile of the relative errors is {got:.2g}, and"
        f" {floor:.2g} of Optax without a mask"
      )
