import optax.perturbations as __getattr__
from optax.perturbations import *
