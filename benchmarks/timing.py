"""Measurements of time, which vary from run to run."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def time_call(function: Callable[..., Any], *arguments: Any) -> float:
  """Times one call until its results are computed."""
  start = time.perf_counter()
  jax.block_until_ready(function(*arguments))
  return time.perf_counter() - start


def time_interleaved(
  calls: Sequence[Call], rounds: int = 30, budget: float = 6.0
) -> list[tuple[float, float]]:
  """Times calls that take turns, so that a slow moment slows all of them.

  The order differs from round to round, since a call is slower after another
  call that has filled the caches.

  Args:
    calls: Functions and their arguments.
    rounds: How often each is called, after a call that is not timed.
    budget: Seconds after which no round is started, after the first five.

  Returns:
    For each call the median of its seconds and the median, over the rounds, of
    its ratio to the first call.
  """
  for function, arguments in calls:
    time_call(function, *arguments)
  times: list[list[float]] = []
  order = list(range(len(calls)))
  shuffle = random.Random(0).shuffle
  start = time.perf_counter()
  while len(times) < rounds and (
    len(times) < 5 or time.perf_counter() - start < budget
  ):
    times.append([0.0] * len(calls))
    shuffle(order)
    for i in order:
      function, arguments = calls[i]
      times[-1][i] = time_call(function, *arguments)
  return [
    (
      statistics.median(column),
      statistics.median(t / r[0] for t, r in zip(column, times, strict=True)),
    )
    for column in zip(*times, strict=True)
  ]


def copy_speed(size: int = 2**28) -> float:
  """Returns the bytes a second, read and written, of a copy on the device."""
  x = jnp.zeros(size, jnp.float32)
  copy = jax.jit(lambda x: x + 1).lower(x).compile()
  ((median, _),) = time_interleaved([(copy, (x,))])
  return 2 * x.nbytes / median
