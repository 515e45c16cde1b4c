"""Measurements: what `cmamba bench` runs."""
