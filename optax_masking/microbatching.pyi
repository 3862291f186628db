import optax.microbatching as __getattr__
from optax.microbatching import *
