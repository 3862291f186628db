from typing import Any

from optax.schedules import *

def __getattr__(name: str) -> Any: ...
