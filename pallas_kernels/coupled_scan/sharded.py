"""The coupled scan of arrays that are spread over a mesh of devices."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.coupled_scan.api import choose_implementation, coupled_scan, implementations
from pallas_kernels.coupled_scan.sequence_parallel import sequence_parallel_scan
from pallas_kernels.coupled_scan.types import Array, Problem, ScanInputError, ScanOutput, Shared
from pallas_kernels.coupled_scan.varying import vary


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of the mesh the axes of the arrays are cut along.

    Attributes:
        batch: for B.
        channels: for D, or None.
        time: for L, or None.
    """

    batch: tuple[str, ...] = ()
    channels: str | None = None
    time: str | None = None

    def spec(self, axes: str) -> PartitionSpec:
        """Partition of an array whose axes are these letters, e.g. "MBLD"."""
        places = {"B": self.batch or None, "D": self.channels, "L": self.time}
        return PartitionSpec(*(places.get(letter) for letter in axes))


def sharded_scan(mesh: Mesh, axes: Axes, **arguments: Any) -> ScanOutput:
    """`coupled_scan` inside `jax.shard_map`, so that every device runs the kernels on what it holds of the arrays.

    Batches and channels do not meet in a scan: nothing is exchanged for them but the gradients of what they share.
    Time is exchanged as `sequence_parallel_scan` says.

    Args:
        mesh: the devices.
        axes: how the arrays are cut.
        **arguments: those of `coupled_scan`; global arrays.

    Returns:
        y and the final state, cut like x and the initial state.

    Raises:
        ScanInputError: an axis is no multiple of the number of devices that it is cut over, or an argument is wrong.
        UnsupportedError: the named implementation cannot solve the local problem.
    """
    shape = arguments["x"].shape
    for letter, size in zip("MBLD", shape, strict=True):
        names = axes.spec(letter)[0] or ()
        devices = 1
        for name in (names,) if isinstance(names, str) else names:
            devices *= mesh.shape[name]
        if size % devices:
            raise ScanInputError(f"x {list(shape)}: axis {letter} is {size}, expected a multiple of {devices} devices")
    state = "BDN" if isinstance(arguments["coupling"], Shared) else "MBDN"
    letters = {"x": "MBLD", "dt": "MBLD", "A": "MDN", "B": "MBLN", "C": "MBLN", "D": "MD", "z": "MBLD"}
    letters |= {"dt_bias": "MD", "mask": "MBL", "reset": "BL", "initial_state": state}
    arrays = {k: v for k, v in arguments.items() if k in letters and v is not None} | {
        "coupling": arguments["coupling"]
    }
    options = {k: v for k, v in arguments.items() if k not in letters and k != "coupling"}
    specs = {k: axes.spec(letters[k]) if k in letters else PartitionSpec() for k in arrays}

    def part(name: str, value: Array) -> jax.ShapeDtypeStruct:
        """What one device holds of an array."""
        cuts = axes.spec(letters[name])
        over = ((cut,) if isinstance(cut, str) else cut or () for cut in cuts)
        counts = (math.prod(mesh.shape[axis] for axis in cut) for cut in over)
        shape = tuple(size // count for size, count in zip(value.shape, counts, strict=True))
        return jax.ShapeDtypeStruct(shape, value.dtype)

    def local(arrays: dict[str, Any]) -> ScanOutput:
        # The union of what the arrays vary over, also where one device holds an axis of the mesh alone.
        arrays = vary(arrays, [*axes.batch, *([axes.channels] if axes.channels else [])])
        if axes.time is None:
            return coupled_scan(**arrays, **options)
        return sequence_parallel_scan(**arrays, **options, axis_name=axes.time)

    parts = {k: part(k, v) if k in letters else v for k, v in arrays.items()}
    problem = Problem(**parts, **{k: options[k] for k in ("dt_softplus", "readout") if k in options})
    name = options.get("implementation") or choose_implementation(problem).name
    # An unknown name raises its error inside.
    checks = implementations()[name].knows_varying if name in implementations() else True
    out_specs = ScanOutput(y=axes.spec("MBLD"), final_state=axes.spec(state))
    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=checks)(arrays)
