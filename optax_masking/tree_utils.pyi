import optax.tree_utils as __getattr__
from optax.tree_utils import *
