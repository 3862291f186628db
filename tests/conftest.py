"""More devices than one, and which tests are left out of the quick subset."""

import os
import pathlib
import re

import jax
import pytest

# To compile takes three quarters of the time. XLA's programs are kept for the
# next run, and for the processes that tests start.
PROGRAMS = {
  "jax_compilation_cache_dir": str(
    pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
  ),
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in PROGRAMS.items():
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
  """Keeps the tests of a loss in one process, where they share a program."""
  from xdist.scheduler import LoadScopeScheduling

  class ByLoss(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      return re.sub(r".*\[(\w+)-.*", r"\1", nodeid)

  return ByLoss(config, log)
