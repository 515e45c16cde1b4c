"""Descriptions of accelerators that are not there, for compiling ahead of time."""

import importlib.util
from typing import Any

H100 = """\
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
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""An H100 as XLA:GPU reads it (its GpuTargetConfigProto, in text)."""

GPU_MISSING = "no XLA:GPU compiler is installed: pip install 'jax[cuda13]' (no GPU is needed)"


def gpu_available() -> bool:
    """Whether the CUDA plugin of JAX, which holds XLA's compiler for GPUs, is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12))


def devices(platform: str, topology: str) -> list[Any]:
    """Devices to compile for.

    Args:
        platform: "cuda" (H100s) or "tpu"; for a TPU the process needs `tpu_compile.environment`.
        topology: "1x1x4" is four GPUs of one host; "v5e:2x2" four chips.
    """
    from jax.experimental import topologies

    if platform == "cuda":
        return topologies.get_topology_desc(platform="cuda", topology=topology, target_config=H100).devices
    return topologies.get_topology_desc(topology, platform).devices
