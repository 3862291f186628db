"""The pytest plugin: `--mask-audit` and the fixture `assert_mask_safe`."""

import xml.etree.ElementTree

import pytest

pytest_plugins = ["pytester"]

LOSSES = """
  import jax.numpy as jnp

  def wrong(predictions, targets, where):
    return jnp.where(where, targets * jnp.log(predictions), 0)

  def right(predictions, targets, where):
    return jnp.where(where, predictions - targets, 0) ** 2
"""
TESTS = """
  import numpy as np
  from losses import right, wrong

  X = np.linspace(0.2, 0.8, 6, dtype="float32").reshape(2, 3)

  def test_right(assert_mask_safe):
    assert assert_mask_safe(right, X, X / 2, where=X > 0.5).cases > 100

  def test_wrong(assert_mask_safe):
    assert_mask_safe(wrong, X, X / 2, where=X > 0.5)
"""


@pytest.fixture
def run(pytester):
  pytester.makepyfile(losses=LOSSES)
  pytester.makeini("[pytest]\nfilterwarnings = error\n")

  def run_pytest(*arguments):
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)

  return run_pytest


@pytest.mark.slow
def test_fixture(run, pytester):
  pytester.makepyfile(TESTS)
  result = run("-rP")
  result.assert_outcomes(passed=1, failed=1)
  result.stdout.fnmatch_lines(
    [
      "*AssertionError: wrong breaks 1 clause of the mask contract*",
      "*`div` at losses.py:4 in wrong*",
      "right keeps the mask contract (*",
    ]
  )
  result.stdout.no_fnmatch_line("*pytest_optax_masking.py:*")


@pytest.mark.slow
def test_audit_adds_a_test_for_each_clause(run, pytester):
  target = "--mask-audit=losses:wrong"
  result = run(target, "--mask-audit-quick", "--junitxml=report.xml")
  result.assert_outcomes(passed=7, failed=1, skipped=2)
  result.stdout.fnmatch_lines(
    [
      "zero_gradient: Derivatives with respect to masked elements are 0.",
      "FAILED mask-audit[[]losses:wrong]::wrong[[]zero_gradient]*",
    ]
  )
  cases = list(
    xml.etree.ElementTree.parse(pytester.path / "report.xml").iter("testcase")
  )
  assert len(cases) == 10
  (failed,) = (case for case in cases if case.find("failure") is not None)
  assert failed.get("name") == "wrong[zero_gradient]"


@pytest.mark.slow
def test_options_of_pytest_choose_from_the_tests(run):
  target = ("--mask-audit=losses:wrong", "--mask-audit-quick")
  result = run(*target, "-k", "zero_gradient or empty")
  result.assert_outcomes(passed=1, failed=1, deselected=8)
  result = run(*target, "-x")
  result.assert_outcomes(passed=2, failed=1)
  result = run(*target, "--collect-only", "-q")
  result.stdout.fnmatch_lines(["mask-audit[[]losses:wrong]::wrong[[]empty]"])


@pytest.mark.slow
def test_clauses_that_do_not_apply_are_skipped(run):
  target = ("--mask-audit=losses:wrong", "--mask-audit-quick")
  result = run(*target, "-rs", "-k", "masked_label")
  result.assert_outcomes(skipped=1, deselected=9)
  result.stdout.fnmatch_lines(
    ["SKIPPED * wrong, masked_label: does not apply: no integer argument*"]
  )


@pytest.mark.slow
def test_strict_cases_fail_if_a_clause_can_not_be_tried(run, pytester):
  pytester.makepyfile(
    cases="""
    import numpy as np
    from losses import right
    from optax_masking.testing import MaskCase

    X = np.ones((2, 3), "float32")
    case = MaskCase(right, X, X, where=X > 0, masks=("all",), strict=True)
    """
  )
  result = run("--mask-audit=cases:case", "--mask-audit-quick", "-k", "empty")
  result.assert_outcomes(failed=1, deselected=9)
  result.stdout.fnmatch_lines(["*right, empty could not be tried: *"])


@pytest.mark.slow
def test_several_targets(run):
  result = run(
    "--mask-audit=losses:right",
    "--mask-audit=losses:wrong",
    "--mask-audit-quick",
    "-k",
    "accepts",
  )
  result.assert_outcomes(passed=2, deselected=18)


def test_unknown_target(run):
  result = run("--mask-audit=losses:missing")
  assert result.ret == pytest.ExitCode.USAGE_ERROR
  result.stderr.fnmatch_lines(["*losses:missing can't be imported*"])


def test_jax_is_not_imported_before_it_is_used(run, pytester):
  pytester.makepyfile(
    """
    import sys

    def test_modules():
      assert "pytest_optax_masking" in sys.modules
      for name in ("jax", "optax", "optax_masking", "chex", "absl"):
        assert name not in sys.modules, name
    """
  )
  run().assert_outcomes(passed=1)


def test_names_under_pytest(run, pytester):
  """`dir` does not list names that pytest adds to rewritten modules."""
  # As pytest does by itself unless the installation is an editable one.
  pytester.makeconftest(
    "import pytest; pytest.register_assert_rewrite('optax_masking')"
  )
  pytester.makepyfile(
    """
    import optax_masking

    def test_names():
      added = [n for n in vars(optax_masking) if not n.isidentifier()]
      assert "@pytest_ar" in added
      assert not {*added} & {*dir(optax_masking)}
    """
  )
  run().assert_outcomes(passed=1)
