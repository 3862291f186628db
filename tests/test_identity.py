"""Clause 5: without a mask Optax's program, with one of True its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, assert_allclose, each_case
from lanes import KINDS, selected, without_mask


@each_case(dtypes=DTYPES[:1])
def test_program(case, dtype):
  """The same jaxpr, to the letter, along every axis that Optax has."""
  for axis in (-1, 0, (0, 1)) if case.has_axis else (None,):
    keywords = {"axis": axis} if case.has_axis else {}
    data_axis = axis if case.has_axis else -1
    arguments = case.arguments(dtype, axis=data_axis)
    theirs = functools.partial(case.original, **keywords)
    for explicit in ({}, {"where": None}):
      ours = functools.partial(case.loss, **keywords, **explicit)
      assert str(jax.make_jaxpr(ours)(*arguments)) == str(
        jax.make_jaxpr(theirs)(*arguments)
      )


@pytest.mark.parametrize("kind", KINDS)
@each_case(dtypes=DTYPES[:1], quick=False)
def test_everything_included(case, dtype, kind):
  """A mask that masks nothing gives Optax's numbers, to rounding."""
  first, *_ = without_mask(case, dtype)
  for lane in selected(case, dtype, kind, "clean"):
    if lane.where.all():
      for name, roundings in (("value", 16), ("vjp", 16), ("hessian", 64)):
        for got, expected in zip(
          jax.tree.leaves(lane.outputs[name]),
          jax.tree.leaves(first.outputs[name]),
          strict=True,
        ):
          expected = expected.astype("float64")
          largest = max(np.abs(expected).max(), np.finfo("float32").tiny)
          assert_allclose(
            got.astype("float64") / largest,
            expected / largest,
            rtol=0,
            atol=roundings * float(jnp.finfo(dtype).eps),
          )


@each_case(dtypes=DTYPES[:1])
def test_scalar(case, dtype):
  arguments = case.arguments(dtype)
  expected = case.original(*arguments)
  got = case.loss(*arguments, where=True)
  assert got.dtype == expected.dtype
  assert_allclose(got, expected, rtol=16 * float(jnp.finfo(dtype).eps))
