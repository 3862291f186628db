from typing import Any

from optax.tree import *

def __getattr__(name: str) -> Any: ...
