"""How the arrays of a model are spread over devices while it is traced.

A model knows nothing of devices. Whoever compiles it on a mesh says so around the trace, ``with use(Partition(...))``;
the few places where it matters ask here: the scan and the convolutions' look at earlier steps, which work on what each
device holds (inside `jax.shard_map`, so that XLA never gathers the inputs of a kernel), the residual stream, and
dropout. Everywhere else XLA partitions the program by itself. Without a partition all of this does nothing.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cmamba_jax.errors import UserError
from pallas_kernels import ScanOutput, coupled_scan
from pallas_kernels.coupled_scan.sequence_parallel import rank_of, shift
from pallas_kernels.coupled_scan.sharded import Axes, sharded_scan
from pallas_kernels.coupled_scan.varying import vary


@dataclasses.dataclass(frozen=True)
class Partition:
    """Where the axes B, D and L of arrays go.

    Attributes:
        mesh: the devices; None for replicas that each run the whole program (`jax.pmap`).
        axes: which axes of the mesh cut batch, channels and time.
        replicas: name of the mapped axis of `jax.pmap`, or None.
    """

    mesh: Mesh | None = None
    axes: Axes = Axes()  # noqa: RUF009 (frozen)
    replicas: str | None = None


_active: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("partition", default=None)


@contextlib.contextmanager
def use(partition: Partition | None) -> Iterator[None]:
    """Traces what is inside for this partition."""
    token = _active.set(partition)
    try:
        yield
    finally:
        _active.reset(token)


def _meshed() -> Partition | None:
    partition = _active.get()
    return partition if partition is not None and partition.mesh is not None else None


def spreads() -> bool:
    """Whether arrays are spread over a mesh of devices."""
    return _meshed() is not None


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Cuts an array whose axes are these letters, e.g. "MBLF", as the partition says; B, L and D are cut."""
    partition = _meshed()
    if partition is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, partition.axes.spec(axes)))


def cuts_channels() -> bool:
    """Whether channels D are cut over devices."""
    partition = _meshed()
    return partition is not None and partition.axes.channels is not None


def scan(**arguments: Any) -> ScanOutput:
    """`pallas_kernels.coupled_scan`, of each device's part of the arrays."""
    partition = _meshed()
    if partition is None:
        return coupled_scan(**arguments)
    return sharded_scan(partition.mesh, partition.axes, **arguments)


History = Callable[[jax.Array, jax.Array, jax.Array | None], tuple[list[jax.Array], jax.Array]]


def with_halo(
    history: History, x: jax.Array, window: jax.Array, reset: jax.Array | None, *, reverse: bool = False
) -> tuple[list[jax.Array], jax.Array]:
    """Calls ``history(x, window, reset)`` where time may be cut: the last steps of the device before are the window.

    Args:
        history: see `functional.history`; the window that it returns is that of the steps after x.
        x: [M, B, L, D] or [B, L, F].
        window: the W steps before x, [M, B, W, D] or [B, W, F].
        reset: bool [B, L], or None.
        reverse: "before" is later in time.

    Raises:
        UserError: a device holds fewer steps than the window.
    """
    partition = _meshed()
    if partition is None or partition.axes.time is None or window.shape[-2] == 0:
        return history(x, window, reset)
    mesh, axes, time = partition.mesh, partition.axes, partition.axes.time
    width, steps = window.shape[-2], x.shape[-2] // mesh.shape[time]
    if steps < width:
        raise UserError(
            f"a convolution looks {width} steps back, but {x.shape[-2]} steps over {mesh.shape[time]} devices leave "
            f"{steps} steps a device; lower parallel.sequence, or use longer sequences"
        )
    letters = "MBLD" if x.ndim == 4 else "BLF"

    def local(x: jax.Array, window: jax.Array, reset: jax.Array | None) -> tuple[list[jax.Array], jax.Array]:
        x, window, reset = vary((x, window, reset), [time])
        rank = rank_of(time, reverse)
        # Taps are linear in x and window, and the window reaches the first steps alone. As a sum the small part is no
        # reason for XLA to write out the long one, as it would a concatenation that it also keeps for the gradient.
        taps, after = history(x, jnp.zeros_like(window), reset)
        entering = jnp.where(rank == 0, window, shift(time, 1, reverse, after))
        first = slice(steps - width, None) if reverse else slice(None, width)
        heads, _ = history(jnp.zeros_like(x[..., first, :]), entering, None if reset is None else reset[:, first])
        rest = (steps - width, 0) if reverse else (0, steps - width)
        padding = [(0, 0)] * (x.ndim - 2) + [rest, (0, 0)]
        taps = [tap + jnp.pad(head, padding) for tap, head in zip(taps, heads, strict=True)]
        # The window after the whole sequence is that of the last device.
        return taps, jax.lax.psum(jnp.where(rank == mesh.shape[time] - 1, after, 0), time)

    taps_spec, window_spec = axes.spec(letters), axes.spec(letters.replace("L", "W"))
    in_specs = (taps_spec, window_spec, None if reset is None else axes.spec("BL"))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=([taps_spec] * (width + 1), window_spec))(
        x, window, reset
    )


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...], batch_axis: int) -> jax.Array:
    """`jax.random.bernoulli`; replicas draw for the samples of all of them and take their own.

    So every sample gets the same numbers as on one device, however the batch is spread.
    """
    partition = _active.get()
    if partition is None or partition.replicas is None:
        return jax.random.bernoulli(key, probability, shape)
    size = shape[batch_axis]
    everyone = list(shape)
    everyone[batch_axis] = size * jax.lax.axis_size(partition.replicas)
    drawn = jax.random.bernoulli(key, probability, tuple(everyone))
    return jax.lax.dynamic_slice_in_dim(drawn, jax.lax.axis_index(partition.replicas) * size, size, batch_axis)
