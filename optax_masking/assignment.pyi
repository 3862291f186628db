from typing import Any

from optax.assignment import *

def __getattr__(name: str) -> Any: ...
