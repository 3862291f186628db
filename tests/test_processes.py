"""Tests that need a process of their own."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent
IN_FLOAT64 = (
  "test_invariance.py",
  "test_zero_gradient.py",
  "test_compaction.py",
  "test_empty.py",
  "test_identity.py",
  "test_honesty.py",
  "test_clean_arithmetic.py",
  "test_transforms.py",
  "test_accuracy.py",
)


def run_pytest(*arguments, **environment):
  """Runs tests elsewhere; a failure shows their output."""
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-q",
      "-p",
      "no:cacheprovider",
      *arguments,
    ],
    cwd=TESTS,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert result.returncode == 0, result.stdout


by_day_and_night = pytest.mark.parametrize(
  "marked",
  [
    pytest.param("not nightly", marks=pytest.mark.slow),
    pytest.param("nightly", marks=pytest.mark.nightly),
  ],
)


@by_day_and_night
def test_float64(marked):
  """The contract in float64, which JAX has only where it starts with it."""
  at_night = marked == "nightly"
  files = [*IN_FLOAT64, *["test_losses.py"] * at_night]
  run_pytest(*files, "-m", "" if at_night else marked, JAX_ENABLE_X64="1")


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="JAX is too old.")
@by_day_and_night
def test_eight_devices(marked):
  run_pytest("eight_devices.py", "-m", marked, DEVICES="8")


@pytest.mark.parametrize(
  "module",
  [
    pytest.param("optax.losses._smoothing_test", marks=pytest.mark.slow),
    pytest.param("optax.losses", marks=pytest.mark.nightly),
  ],
)
def test_optax_with_masked_losses(module):
  """Optax's own tests of its losses, with the masked ones in their place.

  And the one of its other tests that uses a loss, where its data are installed.
  """
  masked = ("-p", "masked_optax", "-W", "ignore", "--pyargs")
  run_pytest(*masked, module)
  if module == "optax.losses" and importlib.util.find_spec("sklearn"):
    run_pytest(*masked, "optax._src.alias_test", "-k", "multiclass_logreg")


@pytest.mark.slow
def test_typed_program():
  """What the type checker accepts also runs."""
  subprocess.run([sys.executable, TESTS / "typed_program.py"], check=True)
