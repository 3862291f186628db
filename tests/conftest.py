"""Settings of JAX for all tests, and in which process pytest runs them."""

import os
import pathlib
import re

import jax
import pytest

# To compile takes three quarters of the time. XLA's programs are kept for the
# next run, and for the processes that tests start.
CACHE = {
  "jax_compilation_cache_dir": str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
  ),
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}
# Most programs run once, and to optimize them takes XLA half of the time.
# `XLA_FLAGS= python -m pytest` compiles all of them as users do.
FLAGS = [
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # Later versions have no such flag.
  FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
for name, value in CACHE.items():
  given = os.environ.setdefault(name.upper(), str(value))
  jax.config.update(name, type(value)(given))
jax.config.update("jax_num_cpu_devices", int(os.environ.get("DEVICES", "2")))
# Programs of two devices that wait for each other may wait for ever, if others
# have the threads that they need.
jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_collection_modifyitems(items):
  """What is left to the night is not quick, either."""
  for item in items:
    if item.get_closest_marker("nightly"):
      item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Keeps the tests of a loss in one process, where they share a program.

  And those of the copy with a new loss. The groups of xdist itself are not kept
  with pytest 9.
  """
  from xdist.scheduler import LoadScopeScheduling

  class ByLoss(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      of_loss = re.search(r"\[(\w+)-|(test_new_loss)", nodeid)
      return of_loss[0] if of_loss else nodeid

  return ByLoss(config, log)
