"""The coupled selective SSM: convolution, selection and coupled scan, in one direction of time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cmamba_jax.config import ModelConfig
from cmamba_jax.models import functional, partition
from pallas_kernels import Coupling, Full, Independent, Shared

# Step sizes at the start: log-uniform between these bounds, as in Mamba.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
# Share of the other modalities in a row of W at the start.
FULL_EPSILON = 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SSMState:
    """What a coupled SSM carries from one step to the next.

    Attributes:
        window: the last K - 1 inputs of the convolution, [M, B, K-1, D].
        scan: state of the coupled scan, float32 [B, D, N] (shared) or [M, B, D, N].
    """

    window: Float[Array, "M B W D"]
    scan: Float[Array, "... D N"]


class CoupledSSM(nnx.Module):
    """u -> SiLU(conv(u)) -> dt, B, C -> coupled scan -> gate (the inner lines of Algorithm 1), for all M modalities.

    Args:
        config: sizes, coupling, readout and scan implementation.
        n_modalities: M.
        reverse: process time backwards.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, *, reverse: bool = False, rngs: nnx.Rngs):
        m, d, n = n_modalities, config.expand * config.d_model, config.d_state
        rank = config.dt_rank or math.ceil(config.d_model / 8)
        self.coupling_name = config.coupling
        self.unnormalized = config.unnormalized
        self.readout = config.readout
        self.scan = config.scan
        self.reverse = reverse
        self.rank = rank
        self.conv_kernel = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, config.d_conv, d), config.d_conv))
        self.conv_bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, d), config.d_conv))
        self.select = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, d, rank + 2 * n), d))
        self.dt_up = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, rank, d), rank))
        log_dt = jax.random.uniform(rngs.params(), (m, d), jnp.float32, math.log(DT_MIN), math.log(DT_MAX))
        dt = jnp.maximum(jnp.exp(log_dt), DT_FLOOR)
        self.dt_bias = nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))  # softplus(dt_bias) = dt
        self.A_log = nnx.Param(jnp.broadcast_to(jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32)), (m, d, n)).copy())
        self.D = nnx.Param(jnp.ones((m, d), jnp.float32))
        if config.coupling == "shared" and not config.unnormalized:
            self.gain = nnx.Param(jnp.zeros((m, n), jnp.float32))  # g = softmax over m: 1/M at the start
        if config.coupling == "full":
            own, other = 1 - FULL_EPSILON, FULL_EPSILON / max(m - 1, 1)
            weights = jnp.where(jnp.eye(m, dtype=bool), own if m > 1 else 1.0, other)
            self.mix = nnx.Param(weights if config.unnormalized else jnp.log(weights))

    def coupling(self) -> Coupling:
        """The coupling that the scan gets (Eq. 5, 6, 9), normalised so that the states stay bounded.

        Shared: g = softmax over the modalities, for each state. Full: W = softmax over each row. With `unnormalized`,
        g = 1 and W is used as it is.
        """
        if self.coupling_name == "shared":
            if self.unnormalized:
                return Shared(jnp.zeros((self.A_log.shape[0], self.A_log.shape[-1]), jnp.float32))
            return Shared(jax.nn.log_softmax(self.gain[...], axis=0))
        if self.coupling_name == "full":
            return Full(self.mix[...] if self.unnormalized else jax.nn.softmax(self.mix[...], axis=1))
        return Independent()

    def init_state(self, batch_size: int, dtype: jnp.dtype) -> SSMState:
        """The state before the first step: zeros."""
        m, taps, d = self.conv_kernel.shape
        n = self.A_log.shape[-1]
        lead = () if self.coupling_name == "shared" else (m,)
        return SSMState(
            window=jnp.zeros((m, batch_size, taps - 1, d), dtype),
            scan=jnp.zeros((*lead, batch_size, d, n), jnp.float32),
        )

    def __call__(
        self,
        u: Float[Array, "M B L D"],
        z: Float[Array, "M B L D"],
        *,
        mask: Bool[Array, "M B L"] | None,
        reset: Bool[Array, "B L"] | None,
        state: SSMState,
    ) -> tuple[Float[Array, "M B L D"], SSMState]:
        """Runs the convolution, the selection and the scan.

        Args:
            u: channels, in the compute dtype.
            z: gate before SiLU.
            mask: False where a modality is missing; acts before the convolution and in the scan.
            reset: True where a new sequence starts.
            state: of the steps before (reverse: after) these.

        Returns:
            y * SiLU(z), in u's dtype, and the state that continues the sequence.
        """
        if self.reverse and reset is not None:
            # Backwards, a sequence starts at its last step, which is the one before the next one's first.
            reset = jnp.pad(reset[:, 1:], ((0, 0), (0, 1)))
        x, window = functional.causal_conv_silu(
            u,
            mask,
            self.conv_kernel[...],
            self.conv_bias[...],
            state.window,
            reset,
            reverse=self.reverse,
            implementation=None if self.scan in (None, "mosaic_gpu") else "xla",
        )
        dt, B, C = jnp.split(
            functional.linear(x, self.select[...], x.dtype), [self.rank, self.rank + self.A_log.shape[-1]], axis=-1
        )
        out = partition.scan(
            x=x,
            dt=functional.linear(dt, self.dt_up[...], x.dtype),
            A=-jnp.exp(self.A_log[...]),
            B=B,
            C=C,
            coupling=self.coupling(),
            D=self.D[...],
            z=z,
            dt_bias=self.dt_bias[...],
            mask=mask,
            reset=reset,
            initial_state=state.scan,
            reverse=self.reverse,
            readout=self.readout,
            implementation=self.scan,
        )
        return out.y, SSMState(window=window, scan=out.final_state)
