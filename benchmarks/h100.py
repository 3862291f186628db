"""Compiles for an H100 without one, with the packages of the extra `h100`."""

import functools
import os
from typing import Any

import jax
from jax.experimental import topologies

# What XLA has to know of the device, in the text format of its message
# `GpuTargetConfigProto`.
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def prepare() -> None:
  """Lets JAX load its plugin for CUDA without a GPU; before all else."""
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"


@functools.cache
def _device() -> Any:
  try:
    topology = topologies.get_topology_desc(
      platform="cuda", target_config=_TARGET, topology="1x1x1"
    )
  except (ImportError, RuntimeError, ValueError) as error:
    raise SystemExit(
      "To compile for an H100: pip install -e '.[h100]', which has the plugin"
      f" of JAX {jax.__version__} for CUDA.\n{error}"
    ) from error
  return topology.devices[0]


def compiled(function: Any, inputs: Any, for_h100: bool) -> jax.stages.Compiled:
  """Compiles a jitted function for inputs of these shapes, here or for it."""
  if not for_h100:
    return function.lower(*inputs).compile()
  sharding = jax.sharding.SingleDeviceSharding(_device())
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs
  )
  return function.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
