import json
import subprocess
import sys

import pytest

HEAVY = ("absl", "grain", "matplotlib", "orbax", "sklearn", "tensorboardX", "tensorflow_datasets", "tqdm", "tyro")

PROBE = """
import json, sys
import jax, cmamba_jax
modules = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps([jax._src.xla_bridge.backends_are_initialized(), modules]))
"""


@pytest.fixture(scope="module")
def fresh_import():
    """Whether a backend exists, and the top-level modules, after `import cmamba_jax` in a new process."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_initialises_no_backend(fresh_import):
    assert fresh_import[0] is False


@pytest.mark.parametrize("module", HEAVY)
def test_import_is_light(fresh_import, module):
    assert "cmamba_jax" in fresh_import[1]
    assert module not in fresh_import[1]


def test_every_public_name_exists():
    import cmamba_jax

    for name in cmamba_jax.__all__:
        assert getattr(cmamba_jax, name) is not None
    assert set(cmamba_jax.__all__) <= set(dir(cmamba_jax))


def test_unknown_name_is_an_attribute_error():
    import cmamba_jax

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cmamba_jax.nothing  # noqa: B018
