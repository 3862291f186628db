"""Clause 5: without a mask Optax's program, with one of True its numbers."""

import functools

import jax
import numpy as np
from cases import DTYPES, assert_close, each_case


@each_case(dtypes=DTYPES[:1])
def test_program(case, dtype):
  """The same jaxpr, to the letter, along every axis that Optax has."""
  for axis in (-1, 0, (0, 1)) if case.has_axis_of_slices else (-1,):
    keywords = {"axis": axis} if case.has_axis_of_slices else {}
    arguments = case.arguments(dtype, axis=axis)
    theirs = functools.partial(case.original, **keywords)
    for explicit in ({}, {"where": None}):
      ours = functools.partial(case.loss, **keywords, **explicit)
      assert str(jax.make_jaxpr(ours)(*arguments)) == str(
        jax.make_jaxpr(theirs)(*arguments)
      )


@each_case(dtypes=DTYPES[:1])
def test_everything_included(case, dtype):
  """A mask that masks nothing gives Optax's numbers, to rounding."""
  arguments = case.arguments(dtype)
  expected = jax.jit(case.original)(*arguments)
  for where in (True, np.ones(case.shape, bool)):
    got = case.loss(*arguments, where=where)
    assert got.dtype == expected.dtype
    assert_close(got, expected, dtype)
