from typing import Any

from optax.tree_utils import *

def __getattr__(name: str) -> Any: ...
