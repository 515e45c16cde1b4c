"""Compiles the scan for a TPU that is not there: `python -m cmamba_jax.bench.tpu_compile < jobs.json`.

libtpu reads its settings when JAX is first imported, so this runs in a process of its own, see `compile_all`.
Standard input is a JSON list of jobs, standard output one JSON record a line, in the same order.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, Literal

from cmamba_jax.errors import UserError
from pallas_kernels import Full, Independent, Shared
from pallas_kernels.coupled_scan.cases import Case

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""The smallest topology of each chip that libtpu can describe; one of its devices is compiled for."""

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MISSING = "libtpu is not installed, so nothing can be compiled for TPUs: pip install 'jax[tpu]'"


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to compile.

    Attributes:
        chip: key of `TOPOLOGIES`.
        case: fields of a `pallas_kernels.coupled_scan.cases.Case`.
        kind: forward; forward_backward, the VJP with every cotangent; loop and xla, the baselines of `tpu-static`.
        width: channels a block of the loop baseline.
    """

    chip: str
    case: dict[str, Any]
    kind: Literal["forward", "forward_backward", "loop", "xla"] = "forward_backward"
    width: int = 128


def available() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def environment(dump: pathlib.Path | None = None) -> dict[str, str]:
    """Environment of a process in which libtpu starts without a TPU.

    Args:
        dump: folder for the compiler's schedules, or None.
    """
    variables = os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if dump is not None:
        variables["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return variables


def compile_all(jobs: list[Job], dump: pathlib.Path | None = None) -> list[dict[str, Any]]:
    """Compiles jobs in a new process.

    Args:
        jobs: what to compile.
        dump: folder for the compiler's schedules, or None.

    Returns:
        For each job "error": None or the compiler's message, and where it compiled: "seconds", "input_bytes",
        "argument_bytes", "output_bytes", "temp_bytes" (temporaries in HBM) and "text", the compiled program.

    Raises:
        UserError: libtpu is not installed, or the process fails.
    """
    if not available():
        raise UserError(MISSING)
    process = subprocess.run(
        [sys.executable, "-m", "cmamba_jax.bench.tpu_compile"],
        input=json.dumps([dataclasses.asdict(job) for job in jobs]),
        env=environment(dump),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise UserError(f"the TPU compiler's process failed:\n{process.stderr[-2000:]}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def _main() -> None:
    for job in json.load(sys.stdin):
        print(json.dumps(_compile(Job(**job))), flush=True)


def _compile(job: Job) -> dict[str, Any]:
    import time

    import jax
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout

    device = topologies.get_topology_desc(TOPOLOGIES[job.chip], "tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def row_major(shape: tuple[int, ...]) -> Format:
        # The layout that kernels read. In a model XLA gives it to their inputs; arguments of a program would get
        # the layout that pads least, and a copy.
        return Format(Layout(tuple(range(len(shape)))), sharding)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=row_major(v.shape)), tree)

    record = {"chip": job.chip, "kind": job.kind, "case": job.case, "error": None}
    start = time.perf_counter()
    with jax.default_device(device):
        try:
            function, arguments = _function(job, Case(**job.case))
            formats = jax.tree.map(lambda v: row_major(v.shape), jax.eval_shape(function, *arguments))
            compiled = jax.jit(function, out_shardings=formats).lower(*place(arguments)).compile()
        except Exception as error:  # whatever the compiler raises is the result
            return record | {"error": f"{type(error).__name__}: {error}"}
    memory = compiled.memory_analysis()
    return record | {
        "seconds": time.perf_counter() - start,
        "input_bytes": sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(arguments[0])),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "text": compiled.as_text(),
    }


def _function(job: Job, case: Case) -> tuple[Any, tuple]:
    """The function of a job and its abstract arguments; the inputs of the scan come first."""
    import jax

    from cmamba_jax.bench import tpu_baselines
    from pallas_kernels import coupled_scan

    inputs = abstract_inputs(case)
    switches = {name: inputs.pop(name) for name in ("mask", "reset") if name in inputs}

    def scan(inputs: dict[str, Any], switches: dict[str, Any]) -> Any:
        return coupled_scan(**inputs, **switches, **case.options, implementation="mosaic_tpu")

    def forward_backward(inputs: dict[str, Any], switches: dict[str, Any], bar: Any) -> Any:
        out, vjp = jax.vjp(lambda inputs: scan(inputs, switches), inputs)
        return out, vjp(bar)[0]

    if job.kind == "forward":
        return scan, (inputs, switches)
    if job.kind == "loop":
        return lambda inputs: tpu_baselines.loop(inputs, job.width), (inputs,)
    if job.kind == "xla":
        return lambda inputs: tpu_baselines.associative(inputs), (inputs,)
    return forward_backward, (inputs, switches, jax.eval_shape(scan, inputs, switches))


def abstract_inputs(case: Case) -> dict[str, Any]:
    """Shapes and dtypes of `cases.make_inputs(case)`, without drawing gigabytes of numbers."""
    import jax
    import jax.numpy as jnp

    def of(dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(getattr(case, axis) for axis in axes), dtype)

    f32, activation = jnp.float32, jnp.dtype(case.dtype)
    inputs = {name: of(activation, *"MBLD") for name in ("x", "dt")} | {"A": of(f32, *"MDN")}
    inputs |= {name: of(activation, *"MBLN") for name in ("B", "C")}
    couplings = {"shared": lambda: Shared(of(f32, *"MN")), "full": lambda: Full(of(f32, *"MM"))}
    inputs["coupling"] = couplings.get(case.coupling, Independent)()
    optional = {
        "D": (case.skip, of(f32, *"MD")),
        "z": (case.gate, of(activation, *"MBLD")),
        "dt_bias": (case.dt_bias, of(f32, *"MD")),
        "mask": (case.mask, of(jnp.bool_, *"MBL")),
        "reset": (case.reset, of(jnp.bool_, *"BL")),
        "initial_state": (case.initial_state, of(f32, *("BDN" if case.coupling == "shared" else "MBDN"))),
    }
    return inputs | {name: value for name, (given, value) in optional.items() if given}


if __name__ == "__main__":
    _main()
