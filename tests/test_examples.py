"""The examples do what they print. Each ends with an error if a check fails."""

import pathlib
import re
import subprocess
import sys

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(name, *arguments, status=0):
  result = subprocess.run(
    [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
    capture_output=True,
    text=True,
  )
  assert result.returncode == status, result.stderr
  return result.stdout + result.stderr


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


@pytest.mark.slow
def test_microbatches():
  output = run("microbatches.py")
  assert "microbatches of 3 sentences, with 0, " in output
  wrong = re.search(r"mean of means +(\S+)", output)
  assert float(wrong[1]) > 0.05


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX is too old.")
class TestMultiHost:
  def test_equals_one_process(self):
    """Also from where the second host has nothing left, and half is off."""
    output = run("multi_host.py")
    rows = re.findall(r"^ +\d+ +\d+ +(\d+) .* (\S+)%$", output, re.MULTILINE)
    assert len(rows) == 8
    assert rows[-1] == ("0", "50")

  def test_host_that_dies(self):
    output = run("multi_host.py", "--die-at", "2", status=1)
    assert "error: host 1 was killed by SIGKILL" in output

  def test_parent_that_dies(self, tmp_path):
    """A host that waits for another ends as soon as its parent has."""
    internal = ("--host", "0", "--port", "1024", "--folder", tmp_path)
    with subprocess.Popen(
      [sys.executable, EXAMPLES / "multi_host.py", *internal],
      stdin=subprocess.PIPE,
    ) as process:
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)
      process.stdin.close()
      assert process.wait(30) == 1
