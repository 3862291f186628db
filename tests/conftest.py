"""More devices than one, and what is left out of the quick subset."""

import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", int(os.environ.get("DEVICES", "2")))
# Programs of two devices that wait for each other may wait for ever, if others
# have the threads that they need.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Half precision, what compiles or runs long, and what is particular to a loss.
SLOW = (
  "float16",
  "test_checkify",
  "test_compaction",
  "test_debug_nans",
  "test_everything_included",
  "test_honesty",
  "test_transforms.py",
  "test_losses.py",
  "test_ctc.py",
  "test_ranking.py",
  "test_segmentation.py",
  "test_self_supervised.py",
  "test_examples.py",
  "TangentsTest",
  "PrecisionTest",
  "test_of_losses",
  "MicrobatchesTest",
  "MappedAxisTest::test_derivatives",
  "test_guard",
  "test_audit.py",
  "test_pytest_plugin.py",
  "test_one_loss",
  "ctc_loss_with_forward_probs",  # The program of ctc_loss.
  "multiclass_generalized_dice_loss",  # That of dice_loss, with weights.
  "test_readme_file_of_tests",
  "test_typed_program",
)
QUICK = (
  "FindingTest",
  "HandWorked",
  "recompilation",
  "Deprecation",
  "test_one_loss_sigmoid_focal_loss",
)


def pytest_collection_modifyitems(items):
  for item in items:
    named = [any(part in item.nodeid for part in p) for p in (SLOW, QUICK)]
    if named == [True, False]:
      item.add_marker(pytest.mark.slow)
