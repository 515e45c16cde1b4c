"""Scan kernels for state-space models: pure functions of arrays that know nothing of models or data."""

from pallas_kernels.coupled_scan import (
    Choice,
    Coupling,
    Full,
    Implementation,
    Independent,
    ScanInputError,
    ScanOutput,
    Shared,
    UnsupportedError,
    choose_implementation,
    coupled_scan,
    coupled_scan_step,
    implementations,
)

__all__ = [
    "Choice",
    "Coupling",
    "Full",
    "Implementation",
    "Independent",
    "ScanInputError",
    "ScanOutput",
    "Shared",
    "UnsupportedError",
    "choose_implementation",
    "coupled_scan",
    "coupled_scan_step",
    "implementations",
]
