"""``python -m cmamba_jax`` is ``cmamba``."""

from cmamba_jax.cli import main

if __name__ == "__main__":
    main()
