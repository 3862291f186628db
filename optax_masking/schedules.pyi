import optax.schedules as __getattr__
from optax.schedules import *
