"""A new loss is a wrapper, a row, a formula and a line of the changelog.

A 33rd loss is written so into a copy of this package, and of Optax. There it is
exported, tested, audited, listed, benchmarked and staged.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import optax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("optax_masking", "tests", "benchmarks", "examples", "docs")
FILES = ("pytest_optax_masking.py", "pyproject.toml", "README.md")

OPTAX = '''

def absolute_error(
    predictions: jax.typing.ArrayLike,
    targets: jax.typing.ArrayLike,
) -> jax.Array:
  """Absolute error.

  Args:
    predictions: a vector of arbitrary shape.
    targets: a vector of the same shape.

  Returns:
    Elementwise absolute errors.
  """
  return jnp.abs(predictions - targets)
'''
WRAPPER = '''

# An error of 0 is 0.
@compiled()
@masked_inputs(predictions=0.0, targets=0.0)
def absolute_error(
  predictions: jax.typing.ArrayLike,
  targets: jax.typing.ArrayLike,
  *,
  axis: Axis = (),
  where: Where = None,
) -> jax.Array:
  """Computes the size of the difference of predictions and targets.

  Args:
    predictions: Values of any shape and a floating dtype.
    targets: Values that broadcast with the predictions.
    axis: Axis or axes to sum over, as in :func:`optax_masking.masked_inputs`;
      none by default.
    where: Elements to include, as in :func:`optax_masking.masked_inputs`. A
      masked element is 0 in the output, and does not enter a sum.

  Returns:
    The losses, with the broadcast shape less ``axis``, in Optax's dtype.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_masking as optax
    >>> predictions = jnp.array([1.0, jnp.nan])
    >>> print(optax.absolute_error(
    ...     predictions, jnp.zeros(2), where=~jnp.isnan(predictions)))
    [1. 0.]
  """
  return original.absolute_error(predictions, targets)
'''
ROW = """\
  Row(
    "absolute_error",
    (logits, logits),
    _ELEMENTS,
    ("FINGERPRINT",),
    elementwise=True,
  ),
)

ROWS ="""
# Those with quick tests of every loss.
PROPERTIES = [
  "invariance",
  "zero_gradient",
  "compaction",
  "empty",
  "identity",
  "honesty",
]
FORMULA = '  "absolute_error": lambda x, y: _abs(x - y),\n}'


def put_in(path, old, new):
  text = path.read_text()
  assert old in text, old
  path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs Python in the copies, and returns what it prints."""
  root = tmp_path_factory.mktemp("copy")
  ignored = shutil.ignore_patterns("__pycache__", "_build", "_generated")
  for name in COPIED:
    shutil.copytree(ROOT / name, root / name, ignore=ignored)
  for name in (*FILES, "CHANGELOG.md", "CONTRIBUTING.md"):
    shutil.copy(ROOT / name, root)
  shutil.copytree(pathlib.Path(optax.__file__).parent, root / "optax")
  shutil.copytree(ROOT / ".github", root / ".github")

  def run(*arguments):
    result = subprocess.run(
      [sys.executable, *arguments],
      cwd=root,
      env=os.environ | {"PYTHONPATH": str(root)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout

  regression = root / "optax" / "losses" / "_regression.py"
  regression.write_text(regression.read_text() + OPTAX)
  exported = "from optax.losses._regression import absolute_error\n"
  for init in (root / "optax" / "losses", root / "optax"):
    init = init / "__init__.py"
    init.write_text(init.read_text() + exported)
  top = root / "optax" / "__init__.py"
  put_in(top, "__all__ = (", '__all__ = ("absolute_error",')

  # The four places.
  wrappers = root / "optax_masking" / "losses" / "_regression.py"
  wrappers.write_text(wrappers.read_text() + WRAPPER)
  table = root / "optax_masking" / "losses" / "_table.py"
  put_in(table, ")\n\nROWS =", ROW)
  put_in(root / "tests" / "formulas.py", "\n}\n", f"\n{FORMULA}\n")
  changelog = root / "CHANGELOG.md"
  changelog.write_text(changelog.read_text() + "- `absolute_error`\n")

  fingerprint = run(
    "-c",
    "from optax_masking.upstream._edits import fingerprint\n"
    "text = open('optax/losses/_regression.py').read()\n"
    "print(fingerprint(text, 'absolute_error', ()))",
  )
  put_in(table, "FINGERPRINT", fingerprint.strip())
  return run


def command(*arguments):
  return "-c", f"from optax_masking._command import main; main({arguments})"


@pytest.mark.slow
def test_command(run):
  assert "| `absolute_error` | `()` |" in run(*command("losses"))
  options = ("--quick", "--loss", "absolute_error", "optax_masking")
  assert ", 0 findings," in run(*command("audit", *options))
  staged = run(*command("stage", ".", "--dry-run", "--loss", "absolute_error"))
  assert "+    predictions = jnp.where(where, predictions, 0)" in staged


@pytest.mark.slow
def test_benchmark(run):
  options = ("--no-time", "--loss", "absolute_error", "--shape", "64x32")
  assert "absolute_error" in run("-m", "benchmarks", *options)


@pytest.mark.slow
def test_tests(run):
  """Each property is tested, and what is said of all losses is still so."""
  options = ("-v", "-p", "no:cacheprovider", "-m", "not slow")
  of_loss = run("-m", "pytest", *options, "tests", "-k", "absolute_error")
  for test in PROPERTIES:
    assert f"tests/test_{test}.py::" in of_loss, test
  run("-m", "pytest", *options, "tests/test_docs.py", "tests/test_swap.py")
