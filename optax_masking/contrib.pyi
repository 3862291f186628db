import optax.contrib as __getattr__
from optax.contrib import *
