import optax.experimental as __getattr__
from optax.experimental import *
