"""What is installed, and whether it suits: for notebooks, where another JAX may be there already."""

import importlib.metadata
import platform
import sys

from cmamba_jax.errors import UserError


def check_versions() -> None:
    """Checks the installed packages against what this package requires.

    Raises:
        UserError: one is absent, too old, or was imported before a newer one was installed; says the exact cure.
    """
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("cmamba-jax") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found == "nothing" or not requirement.specifier.contains(found, prereleases=True):
            raise UserError(
                f"{requirement.name}: {found} is installed, {requirement.specifier} is needed; run "
                f'`pip install -U "{requirement.name}{requirement.specifier}"` and restart the session'
            )
    for name in ("jax", "flax", "numpy"):
        imported = getattr(sys.modules.get(name), "__version__", None)
        if imported not in (None, importlib.metadata.version(name)):
            raise UserError(
                f"{name} {imported} was imported before {importlib.metadata.version(name)} was installed; restart the "
                "session (on Colab: Runtime, Restart session) and run the cells again"
            )


def describe_environment() -> str:
    """Versions, devices, and the scan that `implementation=None` takes here, one a line."""
    import jax

    from pallas_kernels import choose_implementation
    from pallas_kernels.coupled_scan.cases import Case, make_inputs
    from pallas_kernels.coupled_scan.types import Problem

    shapes = jax.eval_shape(lambda: Problem(**make_inputs(Case(M=3, B=2, L=64, D=256, N=16))))
    choice = choose_implementation(shapes)
    packages = ("cmamba-jax", "jax", "flax", "optax")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    devices = [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
    return "\n".join([
        f"Python {platform.python_version()}, " + ", ".join(versions),
        "devices: " + ", ".join(devices),
        f"scan: {choice.name} ({choice.reason})",
    ])  # fmt: skip
