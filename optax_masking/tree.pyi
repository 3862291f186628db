import optax.tree as __getattr__
from optax.tree import *
