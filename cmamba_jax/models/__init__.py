"""Flax NNX modules: they hold parameters and call pure functions."""

from cmamba_jax.models.coupled_mamba import CoupledMamba, CouplingTable, ModelOutput, ModelState

__all__ = ["CoupledMamba", "CouplingTable", "ModelOutput", "ModelState"]
