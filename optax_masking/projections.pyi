import optax.projections as __getattr__
from optax.projections import *
