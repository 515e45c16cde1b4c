"""Couplings, the problem that an implementation solves, and its result.

Axes: M modality, B batch, L time, D channel, N state.
"""

import dataclasses
from typing import Literal

import jax

Array = jax.Array
Readout = Literal["per_modality", "shared"]


class ScanInputError(ValueError):
    """An argument of the scan has the wrong shape, dtype or value."""


class UnsupportedError(ValueError):
    """The named implementation cannot solve this problem on this device."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Independent:
    """No coupling: h_t^m = a_t^m h_{t-1}^m + u_t^m ("Mamba fusion" of Table 11)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """One shared chain: h_t^m = a_t^m g^m SUM_i h_{t-1}^i + u_t^m (Eq. 6, and Eq. 9 with G as a probability).

    Attributes:
        log_gain: log g, [M, N]. The states stay bounded where SUM_m g^m <= 1 for every state n.
    """

    log_gain: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Full:
    """Every chain reads every other: h_t^m = a_t^m SUM_i W_{m,i} h_{t-1}^i + u_t^m (Eq. 5, A_{i,m} = a^m W_{m,i}).

    Attributes:
        weights: W, [M, M], row m weighs the states that modality m reads. The states stay bounded
            where every row sums to at most one in absolute value.
    """

    weights: Array


Coupling = Independent | Shared | Full


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """The checked arguments of one `coupled_scan`, as every implementation receives them.

    Implementations process time forwards; the API turns a reverse scan around beforehand.
    """

    x: Array  # [M, B, L, D]
    dt: Array  # [M, B, L, D]
    A: Array  # [M, D, N]
    B: Array  # [M, B, L, N]
    C: Array  # [M, B, L, N]
    coupling: Coupling
    D: Array | None = None  # [M, D]
    z: Array | None = None  # [M, B, L, D]
    dt_bias: Array | None = None  # [M, D]
    mask: Array | None = None  # [M, B, L], bool
    reset: Array | None = None  # [B, L], bool
    initial_state: Array | None = None  # [B, D, N] (shared) or [M, B, D, N], float32
    dt_softplus: bool = dataclasses.field(default=True, metadata={"static": True})
    readout: Readout = dataclasses.field(default="per_modality", metadata={"static": True})

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the carried state: [B, D, N] for Shared (the one chain H), else [M, B, D, N]."""
        m, b, _, d = self.x.shape
        n = self.A.shape[-1]
        return (b, d, n) if isinstance(self.coupling, Shared) else (m, b, d, n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanOutput:
    """Result of a scan.

    Attributes:
        y: [M, B, L, D] ([M, B, D] for one step), dtype of x.
        final_state: the state after the last processed step, float32: H = SUM_m h^m, [B, D, N], for
            Shared; [M, B, D, N] for Independent and Full. Feeding it as the initial state continues the scan.
    """

    y: Array
    final_state: Array
