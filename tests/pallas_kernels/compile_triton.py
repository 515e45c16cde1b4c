"""Compiles the Triton kernels for GPUs that are not there: `python compile_triton.py < jobs.json`, one record a job.

A job is {"case": ..., "capability": 80}. A process of its own, since the tests' process interprets the kernels.
Forward and backward are lowered through jax-triton, inside one jitted function, for the platform cuda; then each
kernel is compiled to machine code by Triton with its own ptxas, which says how many registers it uses and how many
bytes it spills.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile

os.environ |= {"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "0"}

import jax
import jax_triton  # noqa: F401  (before 0.4 its import empties TRITON_CACHE_DIR)
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from cmamba_jax.bench.tpu_compile import abstract_inputs
from pallas_kernels.coupled_scan import triton_gpu
from pallas_kernels.coupled_scan.cases import Case
from pallas_kernels.coupled_scan.triton_gpu import vjp
from pallas_kernels.coupled_scan.types import Problem

NAMES = {"float32": "*fp32", "bfloat16": "*bf16"}


def compile_kernel(kernel, arrays, outputs, capability, warps, constants):
    """Registers, shared memory and spilled bytes of one kernel."""
    values = [*arrays, *outputs.values()]
    signature = {name: NAMES[v.dtype.name] for name, v in zip(kernel.arg_names, values, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(values))}
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(compiled.asm["ptx"].encode())
        file.flush()
        arch = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", file.name, "-o", os.devnull]
        process = subprocess.run(command, capture_output=True, text=True)
        report = process.stdout + process.stderr
        if process.returncode:
            raise RuntimeError(f"ptxas: {report}")
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
    }


def compile_case(case, capability):
    inputs = abstract_inputs(case)
    switches = {name: inputs.pop(name) for name in ("mask", "reset") if name in inputs}
    options = {name: value for name, value in case.options.items() if name != "reverse"}
    launches = []

    def call(kernel, arrays, outputs, *, grid, warps, constants):
        launches.append((kernel, arrays, dict(outputs), capability, warps, constants))
        launch = functools.partial(vjp.call_on_gpu, compute_capability=capability)
        return launch(kernel, arrays, outputs, grid=grid, warps=warps, constants=constants)

    def scan(floats, switches):
        return triton_gpu.scan(Problem(**floats, **switches, **options), call=call)

    def forward_backward(floats, switches, bars):
        out, vjp = jax.vjp(lambda floats: scan(floats, switches), floats)
        return out, vjp(bars)[0]

    bars = jax.eval_shape(scan, inputs, switches)
    launches.clear()
    lowered = jax.jit(forward_backward).trace(inputs, switches, bars).lower(lowering_platforms=("cuda",))
    kernels = {kernel.__name__: compile_kernel(kernel, *rest) for kernel, *rest in launches}
    return {"calls": len(re.findall("custom_call @triton_kernel_call", lowered.as_text())), "kernels": kernels}


def main():
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        run_jobs()


def run_jobs():
    for job in json.load(sys.stdin):
        try:
            record = {"error": None} | compile_case(Case(**job["case"]), job["capability"])
        except Exception as error:  # whatever the compiler raises is the result
            record = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
