"""The examples run. Each ends with an error if one of its checks fails."""

import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(name, *arguments, status=0, **environment):
  result = subprocess.run(
    [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert result.returncode == status, result.stderr
  return result.stdout + result.stderr


@pytest.mark.slow
def test_padded_text():
  """In few steps the loss falls, and the gradients are as expected."""
  output = run("padded_text.py", "--steps", "20")
  assert "where=mask" in output
  assert "NaN in" in output


@pytest.mark.slow
def test_missing_targets():
  output = run("missing_targets.py")
  assert "59 of them were not measured" in output
  assert "NaN in 10 of 10 entries" in output


@pytest.mark.nightly  # Its ways are those of `test_linear_cross_entropy.py`.
def test_linear_cross_entropy():
  """The losses of both ways are the same, or it ends with an error."""
  output = run("linear_cross_entropy.py", "--steps", "20", "--sentences", "32")
  unfused, fused = re.search(r"16,000 +(\S+) MB +(\S+) MB", output).groups()
  assert float(fused.replace(",", "")) < float(unfused.replace(",", "")) / 2


@pytest.mark.nightly  # Its ways are those of `test_reductions.py`.
def test_microbatches():
  output = run("microbatches.py")
  assert "in 8 microbatches, of 0, " in output
  wrong = re.search(r"mean of means, wrong +(\S+)", output)
  assert float(wrong[1]) > 0.05


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("matplotlib") is None, reason="An extra draws."
)
def test_pictures(tmp_path):
  output = run("pictures.py", "--output", tmp_path)
  assert re.search(r"^ +1 +nan +0\.\d+$", output, re.MULTILINE)
  drawn = {path.name for path in tmp_path.iterdir()}
  static = EXAMPLES.parent / "docs" / "_static"
  assert drawn == {path.name for path in static.glob("*.svg")}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="JAX is too old.")
class TestMultiHost:
  def test_equals_one_process(self):
    """The losses are equal, even when the second host has no sentence left."""
    output = run("multi_host.py")
    rows = re.findall(r"^ +\d+ +\d+ +(\d+) .* (\S+)%$", output, re.MULTILINE)
    assert len(rows) == 8
    assert rows[-1] == ("0", "50")

  @pytest.mark.nightly
  def test_host_that_dies(self):
    output = run("multi_host.py", "--die-at", "2", status=1)
    assert "error: host 1 was killed by SIGKILL" in output

  def test_host_that_fails(self):
    """The output has the traceback of the host."""
    output = run("multi_host.py", status=1, JAX_PLATFORMS="nothing")
    assert "Traceback" in output
    assert "ended with exit status 1, and all were stopped" in output

  def test_parent_that_dies(self, tmp_path):
    """A host that waits for another ends as soon as its parent has."""
    with socket.socket() as taken:  # Nobody is there to answer.
      taken.bind(("127.0.0.1", 0))
      port = str(taken.getsockname()[1])
      internal = ("--host", "1", "--port", port, "--folder", tmp_path)
      process = subprocess.Popen(
        [sys.executable, EXAMPLES / "multi_host.py", *internal],
        stdin=subprocess.PIPE,
      )
      try:
        with pytest.raises(subprocess.TimeoutExpired):
          process.wait(10)
        process.stdin.close()
        assert process.wait(60) == 3
      finally:
        process.kill()
        process.wait()
