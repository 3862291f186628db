"""A pytest plugin that puts the masked losses in the place of Optax's.

Loaded with `-p masked_optax`, before Optax's own test files are.
"""

import optax_masking

optax_masking.patch(permanent=True)
