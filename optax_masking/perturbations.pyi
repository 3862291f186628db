from typing import Any

from optax.perturbations import *

def __getattr__(name: str) -> Any: ...
