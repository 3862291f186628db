"""Two devices instead of one, for the tests of sharded losses."""

import jax

jax.config.update("jax_num_cpu_devices", 2)
