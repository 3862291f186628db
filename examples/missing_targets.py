"""Fits a curve to weekly carbon dioxide data with weeks that were not measured.

A week without a measurement is NaN in the data, and stays NaN: the loss gets
the data as they are and `where=measured`.

The output has the falling loss, the gradient next to that of the data without
the missing weeks and to the NaN of `jnp.mean(loss, where=measured)`, and the
curve's growth and season, with its values in some missing weeks.

    python examples/missing_targets.py
"""

import argparse
import csv
import pathlib
import sys
from collections.abc import Sequence
from datetime import date, datetime
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import optax_masking as optax
from optax_masking import reductions

CSV = pathlib.Path(__file__).parent / "data" / "mauna_loa_co2.csv"
TREND = 4  # The first coefficients are of a cubic trend, the others of seasons.


def read_weeks() -> tuple[list[date], jax.Array]:
  """Returns the weeks and their CO2 in ppm, NaN where it was not measured."""
  with CSV.open(encoding="utf-8") as file:
    rows = list(csv.DictReader(line for line in file if line[0] != "#"))
  weeks = [datetime.strptime(row["date"], "%Y%m%d").date() for row in rows]
  return weeks, jnp.array([float(row["co2"] or "nan") for row in rows])


def features(days: Sequence[date]) -> jax.Array:
  """A cubic trend and three harmonics of the year, one row a day."""
  years = np.array([d.year + d.timetuple().tm_yday / 365.25 for d in days])
  # Standardized to about -1 to 1, where Legendre polynomials are orthogonal.
  trend = np.polynomial.legendre.legvander((years - 1980) / 22, TREND - 1)
  angles = 2 * np.pi * np.outer(years, [1, 2, 3])
  return jnp.array(np.hstack([trend, np.sin(angles), np.cos(angles)]))


def predict(weights: jax.Array, x: jax.Array) -> jax.Array:
  # Some accelerators multiply float32 in fewer bits unless asked not to.
  return jnp.matmul(x, weights, precision="highest")


def masked_loss(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  measured = ~jnp.isnan(y)
  losses = optax.squared_error(predict(weights, x), y, where=measured)
  return reductions.masked_mean(losses, measured)


def mean_where_loss(
  weights: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
  """The usual code without a maskable loss: its gradient is NaN."""
  losses = optax.squared_error(predict(weights, x), y)
  return jnp.mean(losses, where=~jnp.isnan(y))


def plain_loss(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  return optax.squared_error(predict(weights, x), y).mean()


def compare_gradients(weights: jax.Array, x: jax.Array, y: jax.Array) -> bool:
  """Whether the missing weeks leave no trace in the gradient."""
  kept = ~jnp.isnan(y)
  loss, exact = jax.value_and_grad(plain_loss)(weights, x[kept], y[kept])
  largest = abs(exact).max()
  print("\nBefore the fit             loss   gradient")
  print(f"  missing dropped      {loss:8.1f}   largest entry {largest:.1f}")

  loss, grad = jax.value_and_grad(masked_loss)(weights, x, y)
  error = abs(grad - exact).max()
  print(f"  where=measured       {loss:8.1f}   differs by at most {error:.1e}")
  loss, nans = jax.value_and_grad(mean_where_loss)(weights, x, y)
  count = f"{jnp.isnan(nans).sum()} of {nans.size}"
  print(f"  mean(loss, where=)   {loss:8.1f}   NaN in {count} entries")
  # The sums may add their 2,225 float32 terms in different orders.
  return bool(error <= 1e-5 * largest)


def fit(weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
  optimizer = optax.lbfgs()
  state = optimizer.init(weights)
  loss_fn = partial(masked_loss, x=x, y=y)

  @jax.jit
  def step(
    weights: jax.Array, state: optax.OptState
  ) -> tuple[jax.Array, optax.OptState]:
    loss, grad = jax.value_and_grad(loss_fn)(weights)
    updates, state = optimizer.update(
      grad, state, weights, value=loss, grad=grad, value_fn=loss_fn
    )
    return optax.apply_updates(weights, updates), state

  print("\n  step   loss, squared ppm")
  for i in range(13):
    if i % 2 == 0:
      print(f"  {i:4} {loss_fn(weights):18.4f}")
    if i < 12:
      weights, state = step(weights, state)
  return weights


def describe(weights: jax.Array, weeks: list[date], y: jax.Array) -> None:
  x = features(weeks)
  curve = predict(weights, x)
  season = predict(weights[TREND:], x[-52:, TREND:])
  turns = features([date(year, 1, 1) for year in (1960, 1970, 1990, 2000)])
  growth = jnp.diff(predict(weights, turns)) / 10
  deviation = masked_loss(weights, x, y) ** 0.5
  print(f"\nResidual standard deviation    {deviation:.2f} ppm")
  print(f"Season, from low to high       {jnp.ptp(season):.2f} ppm")
  print(f"Growth a year in the sixties   {growth[0]:.2f} ppm")
  print(f"Growth a year in the nineties  {growth[2]:.2f} ppm")
  print("\nThe last missing weeks and their neighbours, in ppm:")
  print("  week         measured    curve")
  missing = np.flatnonzero(jnp.isnan(y))[-5:]
  for i in np.unique(missing[:, None] + [-1, 0, 1]):
    measured = "missing" if jnp.isnan(y[i]) else f"{y[i]:.1f}"
    print(f"  {weeks[i]}   {measured:>8}   {curve[i]:6.1f}")


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description="Fits a curve to CO2 data.")
  parser.parse_args(argv)
  weeks, y = read_weeks()
  x = features(weeks)
  print(f"{len(weeks):,} weeks, {weeks[0]} to {weeks[-1]}")
  print(f"{jnp.isnan(y).sum()} of them were not measured")

  start = jnp.zeros(x.shape[1])
  equal = compare_gradients(start, x, y)
  weights = fit(start, x, y)
  describe(weights, weeks, y)
  if not equal:
    sys.exit("error: the missing weeks changed the gradient.")
  if not masked_loss(weights, x, y) < 1:
    sys.exit("error: the curve is more than 1 ppm from the data.")


if __name__ == "__main__":
  main()
