import optax.assignment as __getattr__
from optax.assignment import *
