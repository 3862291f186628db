from typing import Any

from optax.transforms import *

def __getattr__(name: str) -> Any: ...
