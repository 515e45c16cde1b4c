"""The coupled Mamba block (Algorithm 1) and the layer coupling of the published code."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from cmamba_jax.config import ModelConfig
from cmamba_jax.models import functional, partition
from cmamba_jax.models.ssm import CoupledSSM, SSMState


class CoupledMambaBlock(nnx.Module):
    """x + Linear(CoupledSSM(Linear_u(x'), Linear_z(x'))) with x' = LayerNorm(x), for all M modalities (Algorithm 1).

    Args:
        config: sizes, coupling, direction and compute dtype.
        n_modalities: M.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, *, rngs: nnx.Rngs):
        m, f, d = n_modalities, config.d_model, config.expand * config.d_model
        self.dtype = jnp.dtype(config.compute_dtype)
        self.dropout = config.dropout
        self.norm_scale = nnx.Param(jnp.ones((m, f), jnp.float32))
        self.norm_bias = nnx.Param(jnp.zeros((m, f), jnp.float32))
        self.in_proj = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, f, 2 * d), f))
        self.forward_ssm = CoupledSSM(config, m, rngs=rngs)
        if config.direction == "bidirectional":
            self.backward_ssm = CoupledSSM(config, m, reverse=True, rngs=rngs)
        # Scaled by 1/sqrt(layers), so that the residual stream does not grow with depth (GPT-2, Mamba).
        scale = 1 / math.sqrt(config.n_layers)
        self.out_proj = nnx.Param(scale * functional.uniform_fan_in(rngs.params(), (m, d, f), d))
        if config.block_norm == "both":
            self.post_scale = nnx.Param(jnp.ones((m, f), jnp.float32))
            self.post_bias = nnx.Param(jnp.zeros((m, f), jnp.float32))

    def ssms(self) -> dict[str, CoupledSSM]:
        """The SSMs of the block by direction of time."""
        ssms = {"forward": self.forward_ssm}
        return ssms | {"backward": self.backward_ssm} if hasattr(self, "backward_ssm") else ssms

    def __call__(
        self,
        x: Float[Array, "M B L F"],
        *,
        mask: Bool[Array, "M B L"] | None,
        reset: Bool[Array, "B L"] | None,
        state: dict[str, SSMState],
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "M B L F"], dict[str, SSMState]]:
        """Applies the block to the residual stream x (float32).

        Args:
            x: residual stream; zero where masked.
            mask: False where a modality is missing.
            reset: True where a new sequence starts.
            state: of the steps before, by direction (see `ssms`).
            key: for dropout, see `draw`; None: no dropout.

        Returns:
            The residual stream after the block and the states that continue the sequence.
        """
        normed = functional.layer_norm(x, self.norm_scale[...], self.norm_bias[...])
        if partition.cuts_channels():
            # Halves of the weights rather than of their product: cut, the halves of one product lie on other devices.
            u, z = (functional.linear(normed, half, self.dtype) for half in jnp.split(self.in_proj[...], 2, axis=-1))
        else:
            u, z = jnp.split(functional.linear(normed, self.in_proj[...], self.dtype), 2, axis=-1)
        u, z = partition.constrain(u, "MBLD"), partition.constrain(z, "MBLD")
        total, states = 0, {}
        for direction, ssm in self.ssms().items():
            y, states[direction] = ssm(u, z, mask=mask, reset=reset, state=state[direction])
            total = total + y
        out = functional.linear(total, self.out_proj[...], self.dtype).astype(jnp.float32)
        if hasattr(self, "post_scale"):
            out = functional.keep(functional.layer_norm(out, self.post_scale[...], self.post_bias[...]), mask)
        return partition.constrain(x + dropout(out, self.dropout, key, batch_axis=1), "MBLF"), states


class LayerCoupling(nnx.Module):
    """e^m <- out^m + Linear(concat of the other modalities' outputs): the coupling of the published code.

    Args:
        config: sizes and compute dtype.
        n_modalities: M, at least 2.
        rngs: source of the initial parameters.
    """

    def __init__(self, config: ModelConfig, n_modalities: int, *, rngs: nnx.Rngs):
        m, f = n_modalities, config.d_model
        fan_in = (m - 1) * f
        self.dtype = jnp.dtype(config.compute_dtype)
        self.kernel = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, m - 1, f, f), fan_in))
        self.bias = nnx.Param(functional.uniform_fan_in(rngs.params(), (m, f), fan_in))

    def __call__(self, x: Float[Array, "M B L F"], *, mask: Bool[Array, "M B L"] | None) -> Float[Array, "M B L F"]:
        """Adds to each modality a linear map of all others; masked steps stay zero."""
        others = x[others_of(x.shape[0])].astype(self.dtype)
        mixed = jnp.einsum("mobli,moij->mblj", others, self.kernel[...].astype(self.dtype))
        return functional.keep(x + mixed.astype(jnp.float32) + self.bias[...][:, None, None], mask)

    def norms(self) -> np.ndarray:
        """Frobenius norm of the matrix from each modality (column) to each other (row), [M, M]; zero diagonal."""
        kernel = np.asarray(self.kernel[...])
        others = others_of(kernel.shape[0])
        norms = np.zeros((kernel.shape[0],) * 2, np.float32)
        np.put_along_axis(norms, others, np.linalg.norm(kernel, axis=(2, 3)), axis=1)
        return norms


def others_of(n_modalities: int) -> np.ndarray:
    """Indices of the other modalities for each modality, int [M, M-1]."""
    return np.array([[i for i in range(n_modalities) if i != m] for m in range(n_modalities)])


def draw(rate: float, rngs: nnx.Rngs | None) -> PRNGKeyArray | None:
    """The key of the next dropout; None where there is none."""
    return None if rngs is None or rate == 0 else rngs.dropout()


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None, *, batch_axis: int) -> Float[Array, "..."]:
    """Inverted dropout; the identity without a `key`."""
    if key is None:
        return x
    return jnp.where(partition.bernoulli(key, 1 - rate, x.shape, batch_axis), x / (1 - rate), 0)
