"""Compiles the scan for an H100 that is not there: `python compile_gpu.py < jobs.json`, one JSON record a job.

A process of its own, since JAX's GPU plugin is otherwise kept away from the tests.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.experimental import topologies

from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels.coupled_scan import mosaic_gpu
from pallas_kernels.coupled_scan.cases import Case
from pallas_kernels.coupled_scan.types import Problem

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_case(case, device):
    sharding = jax.sharding.SingleDeviceSharding(device)
    inputs = abstract_inputs(case)
    inputs = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), inputs)
    switches = {name: inputs.pop(name) for name in ("mask", "reset") if name in inputs}
    options = {name: value for name, value in case.options.items() if name != "reverse"}

    def scan(floats, switches):
        return mosaic_gpu.scan(Problem(**floats, **switches, **options))

    def forward_backward(floats, switches, bars):
        out, vjp = jax.vjp(lambda floats: scan(floats, switches), floats)
        return out, vjp(bars)[0]

    bars = jax.eval_shape(scan, inputs, switches)
    bars = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), bars)
    lowered = jax.jit(forward_backward).trace(inputs, switches, bars).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    return {
        "input_bytes": sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(inputs)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "kernels": compiled.as_text().count('custom_call_target="mosaic_gpu'),
    }


def main():
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H100)
    with jax.default_device(topology.devices[0]):
        for job in json.load(sys.stdin):
            try:
                record = {"error": None} | compile_case(Case(**job), topology.devices[0])
            except Exception as error:  # whatever the compiler raises is the result
                record = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
