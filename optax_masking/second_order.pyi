from typing import Any

from optax.second_order import *

def __getattr__(name: str) -> Any: ...
