"""Several processes that train together, one or more a machine, on JAX's distributed runtime."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from cmamba_jax.config import ParallelConfig
from cmamba_jax.errors import UserError

_SIZES = {"Slurm": "SLURM_STEP_NUM_TASKS", "Open MPI": "OMPI_COMM_WORLD_SIZE"}
"""Variables that hold the number of processes."""


def detected() -> str | None:
    """The cluster that started this process as one of several, or None."""
    for name, variable in _SIZES.items():
        if int(os.environ.get(variable) or 1) > 1:
            return name
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ:
        return "TPU pod"
    return None


def initialize(config: ParallelConfig) -> None:
    """Joins the other processes, where there are any; to be called before JAX looks at its devices.

    With a `coordinator`, processes meet there; otherwise JAX finds the others from what the cluster says.

    Raises:
        UserError: the configuration is incomplete, the others cannot be found, or JAX is running already.
    """
    own = {name: getattr(config, name) for name in ("coordinator", "num_processes", "process_id")}
    given = [name for name, value in own.items() if value is not None]
    if config.multi_host == "off" or jax.distributed.is_initialized():
        return
    if given and len(given) < len(own):
        missing = ", ".join(f"parallel.{name}" for name in own if name not in given)
        raise UserError(f"parallel.{given[0]} is set, but {missing} not: set all three, or none in a cluster")
    if not given and config.multi_host == "auto" and detected() is None:
        return
    # Not every version has this default; it is for processes without GPUs and TPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run cannot meet ({reason}); set parallel.coordinator (HOST:PORT of process 0), "
            "num_processes and process_id, or parallel.multi_host off for one process alone"
        ) from error


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says what to do where training with several processes fails because one of them is gone.

    Raises:
        UserError: a collective failed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise UserError(
            f"the processes of this run lost each other ({str(error).splitlines()[0][:200]}); most likely one has "
            "died: see its own messages, then start all of them again with --resume"
        ) from error


def is_lead() -> bool:
    """Whether this process writes files and messages: one of all does."""
    return jax.process_index() == 0


def from_lead(make: Callable[[], str]) -> str:
    """What `make` returns in the lead process, in all; a UserError there is raised in all."""
    if jax.process_count() == 1:
        return make()
    from jax.experimental import multihost_utils

    message = np.zeros(4096, np.uint8)
    if is_lead():
        try:
            text = "+" + make()
        except UserError as error:
            text = "-" + str(error)
        encoded = np.frombuffer(text.encode()[: len(message)], np.uint8)
        message[: len(encoded)] = encoded
    text = bytes(multihost_utils.broadcast_one_to_all(message)).rstrip(b"\0").decode(errors="replace")
    if text[0] == "-":
        raise UserError(text[1:])
    return text[1:]


def to_host(tree: Any) -> Any:
    """Arrays whole on this process, where devices of other processes hold parts of them."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def wait_for_all(name: str) -> None:
    """Returns when every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
