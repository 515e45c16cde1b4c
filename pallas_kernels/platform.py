"""Where a computation is going to run."""

import jax


def default_platform() -> str:
    """Platform of the default device: "cpu", "gpu" or "tpu". Starts JAX's backends, so it is never called at import."""
    device = jax.config.jax_default_device
    platform = getattr(device, "platform", device) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
