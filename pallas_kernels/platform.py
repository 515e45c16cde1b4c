"""Where a computation is going to run."""

import jax


def default_platform() -> str:
    """Platform of the default device: "cpu", "gpu" or "tpu". Starts JAX's backends, so it is never called at import."""
    device = jax.config.jax_default_device
    platform = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def too_old_gpu(least: float, generation: str) -> str | None:
    """Why the default GPU cannot run kernels of a compute capability, or None if it can.

    Args:
        least: compute capability that they need, e.g. 9.0.
        generation: its name, e.g. "Hopper".
    """
    device = jax.config.jax_default_device
    device = device if hasattr(device, "compute_capability") else jax.devices("gpu")[0]
    capability = getattr(device, "compute_capability", "unknown")
    try:
        new_enough = float(capability) >= least
    except ValueError:
        new_enough = False
    if new_enough:
        return None
    return f"it needs a GPU of the generation {generation} (compute capability {least}) or newer, this has {capability}"
