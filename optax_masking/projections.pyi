from typing import Any

from optax.projections import *

def __getattr__(name: str) -> Any: ...
