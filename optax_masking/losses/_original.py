"""Optax's own losses, as they were when this package was imported.

The wrappers call these, so that a program which puts the wrappers in their
place inside Optax does not make them call themselves.
"""

import types

import optax.losses

original: types.SimpleNamespace = types.SimpleNamespace(**vars(optax.losses))
