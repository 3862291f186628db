"""Two devices instead of one, and what is left out of the quick subset."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)


def pytest_collection_modifyitems(items):
  """Half precision and the longest compilations are slow."""
  for item in items:
    slow = ("float16", "checkify", "test_derivatives")
    if any(part in item.name for part in slow):
      item.add_marker(pytest.mark.slow)
