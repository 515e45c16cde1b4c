"""From one device to many: the same training step, partitioned over a mesh (jit) or copied to replicas (pmap).

A mesh has four axes. ``data`` and ``fsdp`` cut the batch, ``fsdp`` also cuts parameters and optimizer state, ``tensor``
cuts the channels D and ``sequence`` the time steps L. Whatever is chosen computes what one device computes: losses are
means over the whole batch, and dropout draws the same numbers for the same sample.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cmamba_jax.batch import Batch
from cmamba_jax.config import ExperimentConfig, ParallelConfig
from cmamba_jax.errors import UserError
from cmamba_jax.models import partition
from cmamba_jax.train.compilation import jit
from cmamba_jax.train.state import Params, StepMetrics, Strategy, TrainState
from pallas_kernels.coupled_scan.sharded import Axes

AXES = ("data", "fsdp", "tensor", "sequence")
CHANNELS = {
    "conv_kernel": 2,
    "conv_bias": 1,
    "select": 1,
    "dt_up": 2,
    "dt_bias": 1,
    "A_log": 1,
    "D": 1,
    "out_proj": 1,
}
"""Parameters with an axis of channels D, and which one it is."""
SMALLEST = 1024
"""Elements from which on `fsdp` cuts a parameter: less is not worth a gathering."""


def make_strategy(config: ExperimentConfig) -> Strategy:
    """The strategy that `config.parallel` asks for; plain `jax.jit` where that is one device.

    Raises:
        UserError: there are not that many devices, or sizes do not divide.
    """
    sizes = resolve_sizes(config.parallel, jax.device_count())
    devices = math.prod(sizes.values())
    if devices == 1 and jax.process_count() == 1:
        return Strategy()
    check_sizes(config, sizes)
    if config.parallel.strategy == "pmap":
        return Replicas(sizes["data"])
    return MeshStrategy(make_mesh(sizes))


def resolve_sizes(config: ParallelConfig, available: int) -> dict[str, int]:
    """Devices of each axis of the mesh.

    Args:
        config: what is asked for; ``data`` 0 takes what the other axes leave.
        available: devices that there are.

    Raises:
        UserError: there are fewer.
    """
    sizes = {name: getattr(config, name) for name in AXES}
    others = math.prod(size for name, size in sizes.items() if name != "data")
    if sizes["data"] == 0:
        sizes["data"] = max(1, available // others)
    needed = others * sizes["data"]
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
    if needed > available:
        raise UserError(
            f"parallel: {shown} need {needed} devices, but there are {available}; lower them"
            + ("" if available > 1 else " (a CPU can play several: XLA_FLAGS=--xla_force_host_platform_device_count=8)")
        )
    if config.strategy == "pmap" and others > 1:
        raise UserError(f"parallel.strategy pmap makes replicas: it takes data alone, got {shown}; use strategy jit")
    if jax.process_count() > 1 and needed != available:
        raise UserError(
            f"parallel: {shown} use {needed} of {available} devices; several processes have to use them all"
        )
    return sizes


def check_sizes(config: ExperimentConfig, sizes: dict[str, int]) -> None:
    """Makes sure that the sizes of the model and the batches divide.

    Raises:
        UserError: one does not; names it and the cure.
    """
    rows, model, pipeline = sizes["data"] * sizes["fsdp"], config.model, config.pipeline
    for name, value, devices, cure in (
        ("pipeline.batch_size", pipeline.batch_size, rows, "change it, parallel.data or parallel.fsdp"),
        ("pipeline.eval_batch_size", pipeline.eval_batch_size, rows, "change it, parallel.data or parallel.fsdp"),
        ("model.expand * model.d_model", model.expand * model.d_model, sizes["tensor"], "change parallel.tensor"),
    ):
        if value % devices:
            raise UserError(f"{name} is {value}, expected a multiple of the {devices} devices it is cut over; {cure}")


def length_multiple(config: ExperimentConfig) -> int:
    """What the length of batches has to be a multiple of, so that every device gets as many whole frames."""
    return config.parallel.sequence * (config.model.frame if config.parallel.sequence > 1 else 1)


def describe(config: ExperimentConfig) -> str:
    """How a run is spread, for the report; empty for one device."""
    sizes = resolve_sizes(config.parallel, jax.device_count())
    spread = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return f", {config.parallel.strategy} over {', '.join(spread)}" if spread else ""


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh over the first devices, neighbours along the last axes."""
    shape = tuple(sizes[name] for name in AXES)
    count = math.prod(shape)
    if count == jax.device_count():
        return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES)


class MeshStrategy(Strategy):
    """One program, partitioned by XLA over a mesh; the scan and the convolutions by `models.partition`.

    Args:
        mesh: devices with the axes data, fsdp, tensor and sequence.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

        def used(name: str) -> str | None:
            return name if mesh.shape[name] > 1 else None

        axes = Axes(("data", "fsdp"), used("tensor"), used("sequence"))
        self.partition = partition.Partition(mesh, axes)

    def gather(self, params: Params) -> Params:
        """Parameters cut over ``fsdp`` are brought together; their gradients are cut again."""

        def one(path: tuple, leaf: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, self._named(self.spec(path, leaf.shape, fsdp=False)))

        return jax.tree_util.tree_map_with_path(one, params)

    def compile_step(
        self, step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """`jax.jit` of the step for states that `place` has placed."""

        @functools.partial(jit, donate_argnums=0)
        def compiled(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            with partition.use(self.partition):
                new, metrics = step(state, batch)
            shardings = self.shardings(new)
            new = jax.tree.map(jax.lax.with_sharding_constraint, new, shardings)
            return new, jax.tree.map(lambda v: jax.lax.with_sharding_constraint(v, self._named()), metrics)

        return compiled

    def compile_predict(self, predict: Callable[[Params, Batch], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
        """Logits come back whole on every device."""

        @functools.partial(jit, out_shardings=self._named())
        def compiled(params: Params, batch: Batch) -> jax.Array:
            with partition.use(self.partition):
                return predict(params, batch)

        return lambda params, batch: compiled(params, self.place_batch(batch))

    def place(self, state: TrainState) -> TrainState:
        """Cuts a state as `shardings` says."""
        return jax.tree.map(_spread, state, self.shardings(state))

    def place_batch(self, batch: Batch) -> Batch:
        """Spreads a batch that every process holds whole."""
        return jax.tree.map(_spread, batch, self.batch_shardings(batch))

    def rows(self, batch_size: int) -> slice:
        """The samples of a batch that this process's devices hold."""
        sharding = self._named(self.partition.axes.spec("B"))
        held = [
            index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size,)).values()
        ]
        return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))

    def feed(self, batches: Any, batch_size: int) -> Any:
        """Batches on the devices."""
        rows = self.rows(batch_size)

        def place(batch: Batch) -> Batch:
            def one(part: np.ndarray, sharding: NamedSharding) -> jax.Array:
                def read(index: tuple[slice, ...]) -> np.ndarray:
                    start, stop, _ = index[0].indices(batch_size)
                    return part[(slice(start - rows.start, stop - rows.start), *index[1:])]

                return jax.make_array_from_callback((batch_size, *part.shape[1:]), sharding, read)

            return jax.tree.map(one, batch, self.batch_shardings(batch))

        return Feed(batches, place)

    def batch_shardings(self, batch: Batch) -> Batch:
        """Samples over ``data`` and ``fsdp``, steps over ``sequence``."""
        axes = self.partition.axes
        steps = next(iter(batch.inputs.values())).shape[1]

        def one(leaf: Any) -> NamedSharding:
            # Labels per sequence have no axis of time, even where there are as many outputs as steps.
            timed = leaf.ndim >= 2 and leaf.shape[1] == steps
            return self._named(axes.spec("BL" if timed else "B"))

        shardings = jax.tree.map(one, batch)
        if batch.labels is not None and batch.label_mask is None:
            shardings = dataclasses.replace(shardings, labels=self._named(axes.spec("B")))
        return shardings

    def shardings(self, state: TrainState) -> TrainState:
        """Where every array of a state lies; statistics of the optimizer lie with their parameters."""
        leaves = jax.tree_util.tree_leaves_with_path(state.params)
        params = {path: leaf.shape for path, leaf in leaves}

        def one(path: tuple, leaf: Any) -> NamedSharding:
            for start in range(len(path)):
                if params.get(path[start:]) == leaf.shape:
                    return self._named(self.spec(path[start:], leaf.shape))
            return self._named()

        return jax.tree_util.tree_map_with_path(one, state)

    def spec(self, path: tuple, shape: tuple[int, ...], *, fsdp: bool = True) -> PartitionSpec:
        """How a parameter is cut: channels over ``tensor``, then the longest axis that divides over ``fsdp``."""
        places: list[str | None] = [None] * len(shape)
        channel = CHANNELS.get(str(getattr(path[-1], "key", "")))
        if channel is not None and self.mesh.shape["tensor"] > 1 and len(shape) > channel:
            places[channel] = "tensor"
        ways = self.mesh.shape["fsdp"]
        if fsdp and ways > 1 and math.prod(shape) >= SMALLEST:
            free = [i for i, size in enumerate(shape) if places[i] is None and size % ways == 0]
            if free:
                places[max(free, key=lambda i: shape[i])] = "fsdp"
        return PartitionSpec(*places)

    def _named(self, spec: PartitionSpec | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, spec or PartitionSpec())


class Replicas(Strategy):
    """A whole copy of everything on each device; gradients are summed (`jax.pmap`).

    States have a leading axis of devices; `portable` takes it away.

    Args:
        replicas: number of devices over all processes.
    """

    axis = "replicas"

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.devices = jax.devices()[:replicas]
        self.local = [device for device in self.devices if device.process_index == jax.process_index()]

    def total(self, tree: Any) -> Any:
        """Sums over the replicas."""
        return jax.lax.psum(tree, self.axis)

    def compile_step(
        self, step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    ) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """`jax.pmap` of the step."""

        def replica(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
            with partition.use(partition.Partition(replicas=self.axis)):
                return step(state, batch)

        devices = None if jax.process_count() > 1 else self.devices
        return jax.pmap(replica, axis_name=self.axis, out_axes=(0, None), donate_argnums=0, devices=devices)

    def place(self, state: TrainState) -> TrainState:
        """Copies a state to every device."""
        sharding = NamedSharding(Mesh(np.array(self.local), (self.axis,)), PartitionSpec(self.axis))

        def copies(leaf: jax.Array) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(copies(jax.random.key_data(leaf)))
            own = leaf.addressable_data(0)
            parts = [jax.device_put(own[None], device) for device in self.local]
            return jax.make_array_from_single_device_arrays((len(parts), *leaf.shape), sharding, parts)

        return jax.tree.map(copies, state)

    def portable(self, tree: Any) -> Any:
        """The copies as one replicated array."""
        sharding = NamedSharding(Mesh(np.array(self.devices), (self.axis,)), PartitionSpec())

        def one(leaf: jax.Array) -> jax.Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.wrap_key_data(one(jax.random.key_data(leaf)))
            shards = [shard.data.reshape(leaf.shape[1:]) for shard in leaf.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape[1:], sharding, shards)

        return jax.tree.map(one, tree)

    def rows(self, batch_size: int) -> slice:
        """The samples of a batch that this process's devices hold."""
        places = [self.devices.index(device) for device in self.local]
        each = batch_size // self.replicas
        return slice(min(places) * each, (max(places) + 1) * each)

    def feed(self, batches: Any, batch_size: int) -> Any:
        """Batches with a leading axis of this process's devices."""
        del batch_size
        n = len(self.local)
        return Feed(batches, lambda batch: jax.tree.map(lambda v: v.reshape(n, -1, *v.shape[1:]), batch))


class Feed:
    """An iterator of batches that places each; its state is that of the iterator it takes them from.

    Args:
        batches: a grain iterator.
        place: puts a batch onto devices.
    """

    def __init__(self, batches: Any, place: Callable[[Batch], Batch]):
        self._batches, self._place = batches, place

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._place(next(self._batches))

    def get_state(self) -> Any:
        """See `loop.Batches`."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes to where `get_state` was called."""
        self._batches.set_state(state)


def _spread(value: Any, sharding: NamedSharding) -> jax.Array:
    """A global array from one that every process holds whole."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_spread(jax.random.key_data(value), sharding))
    if jax.process_count() == 1:
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
