"""`python -m optax_masking` is the command `optax-masking`."""

import sys

from optax_masking._command import main

sys.exit(main())
