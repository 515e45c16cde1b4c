"""Coupled Mamba in JAX: fusing modalities with coupled state-space chains."""

__version__ = "0.1.0.dev0"
