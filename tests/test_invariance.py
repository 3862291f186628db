"""Clause 1: what a masked element holds changes no bit of any derivative."""

import chex
import jax
from cases import bits, each_case
from lanes import selected


@each_case(kinds=True)
def test_garbage(case, dtype, kind):
  """NaN, infinities and extremes in data and tangents, labels of no class."""
  for lane in selected(case, dtype, kind, "clean"):
    chex.assert_tree_all_finite(lane.outputs)
  for lane in selected(case, dtype, kind, "garbage"):
    chex.assert_trees_all_equal(
      jax.tree.map(bits, lane.outputs),
      jax.tree.map(bits, lane.clean.outputs),
      custom_message=f"{lane.mask}, {lane.what}",
    )
