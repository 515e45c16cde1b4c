"""Shapes and inputs shared by the tests and the benchmarks.

Axes: M modality, B batch, L time, D channel, N state.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.coupled_scan.types import Coupling, Full, Independent, Readout, Shared


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem of `coupled_scan`: its shape, its dtype and which of the optional arguments it has."""

    M: int
    B: int
    L: int
    D: int
    N: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of x, dt, B, C and z; A, D, dt_bias, the coupling and the states are float32."""
    coupling: Literal["independent", "shared", "full"] = "shared"
    readout: Readout = "per_modality"
    dt_softplus: bool = True
    reverse: bool = False
    skip: bool = False
    """Whether D is given; so `gate` for z, and the others by their names."""
    gate: bool = False
    dt_bias: bool = False
    mask: bool = False
    reset: bool = False
    initial_state: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `coupled_scan` that are no arrays."""
        return {"readout": self.readout, "dt_softplus": self.dt_softplus, "reverse": self.reverse}

    def __str__(self) -> str:
        sizes = "-".join(f"{axis}{getattr(self, axis)}" for axis in "MBLDN")
        flags = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is True]
        readout = ["shared_readout"] if self.readout == "shared" else []
        return "-".join([sizes, self.dtype, self.coupling, *readout, *flags])


_MODEL = {"skip": True, "gate": True, "dt_bias": True}

BENCHMARKS: Mapping[str, Case] = {
    "cpu": Case(M=3, B=4, L=2048, D=256, N=16, **_MODEL),
    "S1": Case(M=3, B=1024, L=50, D=256, N=64, dtype="bfloat16", **_MODEL),
    "S2": Case(M=3, B=16, L=2048, D=1024, N=16, dtype="bfloat16", **_MODEL),
    "S3": Case(M=3, B=4, L=4096, D=1024, N=16, dtype="bfloat16", **_MODEL),
    "S4": Case(M=3, B=1, L=65536, D=1024, N=16, dtype="bfloat16", **_MODEL),
}
"""The benchmarked problems by name. S1 is the paper's training shape (MOSEI), S4 one long sequence."""


def covering_cases(seed: int = 0) -> list[Case]:
    """Small cases for a CPU that together hold every pair of values of any two properties, and one with everything.

    The full product has millions of members, and nearly every mistake shows with two properties at once.
    """
    switch = (False, True)
    values = {
        "L": (1, 2, 31, 50, 257),
        "N": (4, 8, 16, 32, 64, 128),
        "M": (1, 2, 3, 8),
        "coupling": ("independent", "shared", "full"),
        "B": (1, 3),
        "D": (2, 5),
        "dtype": ("float32", "bfloat16"),
        "readout": ("per_modality", "shared"),
    } | dict.fromkeys(("dt_softplus", "reverse", "skip", "gate", "dt_bias", "mask", "reset", "initial_state"), switch)
    everything = dict.fromkeys(("reverse", "skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
    return [Case(**row) for row in _cover_pairs(values, seed)] + [
        Case(M=3, B=2, L=50, D=3, N=4, coupling=coupling, **everything) for coupling in values["coupling"]
    ]


def make_inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Draws inputs with the statistics of a Mamba block at initialisation.

    A = -(1..N) with some spread, step sizes from 1e-3 to 1e-1 after the softplus, gains that sum to one over the
    modalities (shared), row-stochastic weights that favour the own modality (full). The mask drops single steps,
    a step of every modality, the whole of one modality, and pads the end of the last sample.

    Args:
        case: what to draw.
        seed: of the random numbers.

    Returns:
        The arrays (and the coupling) of `coupled_scan(**make_inputs(case), **case.options)`; arguments that
        the case lacks are left out.
    """
    rng = np.random.default_rng(seed)
    m, b, length, d, n = case.M, case.B, case.L, case.D, case.N

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def step_size(*shape: int) -> np.ndarray:
        return np.exp(np.log(1e-3) + np.log(1e2) * rng.random(shape, dtype=np.float32))

    def parameter(values: np.ndarray) -> Any:
        return jnp.asarray(values, jnp.float32)

    def activation(values: np.ndarray) -> Any:
        return jnp.asarray(values, jnp.dtype(case.dtype))

    def before_softplus(values: np.ndarray) -> np.ndarray:
        return np.log(np.expm1(values)) if case.dt_softplus else values

    if case.dt_bias:
        dt = 0.5 * normal(m, b, length, d) if case.dt_softplus else step_size(m, b, length, d)
    else:
        dt = before_softplus(step_size(m, b, length, d))
    inputs: dict[str, Any] = {
        "x": activation(normal(m, b, length, d)),
        "dt": activation(dt),
        "A": parameter(-np.arange(1, n + 1) * np.exp(0.1 * normal(m, d, n))),
        "B": activation(normal(m, b, length, n)),
        "C": activation(normal(m, b, length, n)),
        "coupling": _make_coupling(case, normal),
    }
    if case.skip:
        inputs["D"] = parameter(1 + 0.1 * normal(m, d))
    if case.gate:
        inputs["z"] = activation(normal(m, b, length, d))
    if case.dt_bias:
        inputs["dt_bias"] = parameter(before_softplus(step_size(m, d)))
    if case.mask:
        mask = rng.random((m, b, length)) < 0.8
        mask[:, :, length // 2] = False
        mask[0, 0] = False
        mask[:, -1, length - length // 4 :] = False
        mask[-1, :, 0] = True
        inputs["mask"] = jnp.asarray(mask)
    if case.reset:
        reset = rng.random((b, length)) < 0.1
        reset[0, length // 2] = True  # with a mask: where nothing is observed
        inputs["reset"] = jnp.asarray(reset)
    if case.initial_state:
        inputs["initial_state"] = parameter(normal(*([b, d, n] if case.coupling == "shared" else [m, b, d, n])))
    return inputs


def _make_coupling(case: Case, normal: Any) -> Coupling:
    """A learned-looking coupling that keeps the states bounded."""

    def log_softmax(values: np.ndarray, axis: int) -> np.ndarray:
        return values - np.log(np.exp(values).sum(axis, keepdims=True))

    if case.coupling == "shared":
        return Shared(log_gain=jnp.asarray(log_softmax(normal(case.M, case.N), axis=0)))
    if case.coupling == "full":
        scores = 2 * np.eye(case.M, dtype=np.float32) + normal(case.M, case.M)
        return Full(weights=jnp.asarray(np.exp(log_softmax(scores, axis=1))))
    return Independent()


def _cover_pairs(values: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Rows with one value a key, such that any two values of two keys meet in a row (greedy, best of 20 a row)."""
    rng = np.random.default_rng(seed)

    def pairs(row: Mapping[str, Any]) -> set[Any]:
        settings = ((key, row[key]) for key in values if key in row)
        return set(itertools.combinations(settings, 2))

    missing = {
        ((first, v), (second, w)): None  # a dict keeps the order, so that a seed always gives the same rows
        for first, second in itertools.combinations(values, 2)
        for v in values[first]
        for w in values[second]
    }

    def gain(row: Mapping[str, Any]) -> int:
        return sum(pair in missing for pair in pairs(row))

    def candidate() -> dict[str, Any]:
        row = dict(list(missing)[rng.integers(len(missing))])
        for key in rng.permutation([key for key in values if key not in row]):
            choices = [row | {str(key): values[key][i]} for i in rng.permutation(len(values[key]))]
            row = max(choices, key=gain)
        return row

    rows = []
    while missing:
        rows.append(max((candidate() for _ in range(20)), key=gain))
        for pair in pairs(rows[-1]):
            missing.pop(pair, None)
    return rows
