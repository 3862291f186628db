"""Checks of the mask contract, for any loss."""

from optax_masking.testing._api import (
  MaskCase as MaskCase,
  assert_mask_safe as assert_mask_safe,
  check_mask_safe as check_mask_safe,
)
from optax_masking.testing._report import (
  CLAUSES as CLAUSES,
  Finding as Finding,
  Report as Report,
)
