from typing import Any

from optax.microbatching import *

def __getattr__(name: str) -> Any: ...
