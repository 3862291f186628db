"""Clause 2: derivatives with respect to masked elements are exactly 0."""

from cases import assert_equal, each_case
from lanes import selected


@each_case(kinds=True)
def test_of_masked_elements(case, dtype, kind):
  """In reverse mode, and of the gradients."""
  for lane in selected(case, dtype, kind, "clean"):
    for name in ("vjp", "hessian"):
      for gradient in lane.outputs[name]:
        assert_equal(gradient[~lane.where], 0, f"{lane.mask}: {name}")


@each_case(kinds=True)
def test_along_masked_elements(case, dtype, kind):
  """In forward mode, and of the gradients of what is included."""
  for lane in selected(case, dtype, kind, "direction"):
    message = f"{lane.mask}, {lane.what}"
    assert_equal(lane.outputs["jvp"], 0, message)
    for change in lane.outputs["hessian"]:
      assert_equal(change, 0, message)
