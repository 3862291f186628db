"""The examples do what they print. Each ends with an error if a check fails."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(name, *arguments):
  return subprocess.run(
    [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
    capture_output=True,
    text=True,
    check=True,
  ).stdout


@pytest.mark.slow
def test_padded_text():
  """Few steps: the loss falls, and the gradients are what they should be."""
  output = run("padded_text.py", "--steps", "60")
  assert "where=mask" in output
  assert "NaN in" in output


def test_missing_targets():
  output = run("missing_targets.py")
  assert "59 of them were not measured" in output
  assert "NaN in 10 of 10 entries" in output
