from typing import Any

from optax.experimental import *

def __getattr__(name: str) -> Any: ...
