"""A pytest plugin that puts the masked losses in the place of Optax's.

Loaded with `-p masked_optax`, before Optax's own test files are.
"""

import sys

from cases import MASKED

import optax_masking as optax

modules = [m for n, m in sys.modules.items() if n.split(".")[0] == "optax"]
for name in MASKED:
  holders = [module for module in modules if hasattr(module, name)]
  assert len(holders) >= 2, name  # `optax.losses` and the module it is from.
  for module in holders:
    setattr(module, name, getattr(optax.losses, name))
