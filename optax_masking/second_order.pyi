import optax.second_order as __getattr__
from optax.second_order import *
