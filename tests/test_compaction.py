"""Clause 3: the loss of the data without the masked elements.

That is the definition in NumPy, of what is left, with its derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np
from cases import each_case
from formulas import UNCERTAINTY
from lanes import expected, selected, weights


def assert_near(got, right, size, dtype, message, roundings=16):
  """Compares relative to the size of what a number is made up of."""
  assert got.shape == right.shape
  error = np.abs(got.astype("longdouble") - right)
  limit = roundings * float(jnp.finfo(dtype).eps) * (np.abs(right) + size)
  wrong = ~(error <= limit)  # As it is for NaN.
  assert not wrong.any(), f"{message}: {got[wrong]} and not {right[wrong]}"


class Sizes:
  """How large the terms are that the numbers of a lane are made up of."""

  def __init__(self, case, lane, right):
    self.case, self.right = case, right
    self.floats = [
      lane.arguments[p].astype("longdouble") for p in case.floating
    ]
    self.tangents = [t.astype("longdouble") for t in lane.tangents]
    self.largest = max(np.abs(x).max() for x in self.floats)
    self.smallest = min(np.abs(x).min() for x in self.floats)
    self.single = lane.where.sum(-1, keepdims=True) == 1

  def of_slices(self, function, x):
    """A number for each slice, or for all of them if they are not apart."""
    axis = -1 if self.case.slices else None
    size = function(np.abs(x), axis, keepdims=True)
    # A slice of one element may have a derivative of 0, as a difference.
    return np.where(size < 1e-15, self.largest, size)

  def moved(self, factors):
    """Of the loss: the products of its derivatives and of what moves it."""
    value = np.shape(self.right["value"])
    terms = sum(
      np.abs(x * g) for x, g in zip(factors, self.right["vjp"], strict=True)
    )
    terms = terms / weights(value).min()
    if self.case.elementwise or self.case.keeps_shape:
      return np.where(terms == 0, self.largest, terms)
    return np.resize(self.of_slices(np.sum, terms), value)

  def value(self):
    return self.moved(self.floats)

  def jvp(self):
    return self.moved(self.tangents)

  def vjp(self):
    return self.of_slices(np.max, np.max(np.abs(self.right["vjp"]), 0))

  def hessian(self):
    """A second derivative is a difference of terms as large as the first.

    Of a slice of one element it may be one of reciprocals.
    """
    terms = np.stack([*self.right["vjp"], *self.right["hessian"]])
    size = self.of_slices(np.max, np.max(np.abs(terms), 0))
    return np.where(self.single, size + 1 / self.smallest, size)


@each_case(kinds=True)
def test_formula(case, dtype, kind):
  for lane in selected(case, dtype, kind, "clean"):
    right = expected(case, lane)
    unmasked = jax.eval_shape(case.original, *lane.arguments)
    assert lane.outputs["value"].dtype == unmasked.dtype
    sizes = Sizes(case, lane, right)
    for name, got in lane.outputs.items():
      size = getattr(sizes, name)()
      for g, r in zip(
        jax.tree.leaves(got), jax.tree.leaves(right[name]), strict=True
      ):
        roundings = 16
        if name == "hessian":  # In bfloat16 64 would be half of the number.
          eps = float(jnp.finfo(dtype).eps)
          roundings = min(64, 0.1 / eps) + UNCERTAINTY / eps
        assert_near(g, r, size, dtype, f"{lane.mask}: {name}", roundings)
