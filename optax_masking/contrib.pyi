from typing import Any

from optax.contrib import *

def __getattr__(name: str) -> Any: ...
