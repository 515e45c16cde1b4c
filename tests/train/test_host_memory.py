import subprocess
import sys

import pytest

from cmamba_jax.train import host_memory

FAULTS = """
import resource
import numpy as np
from cmamba_jax.train.host_memory import keep_freed_memory

def faults(times=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(2**26, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
told = keep_freed_memory()
faults(1)
print(told, before, faults())
"""


def test_memory_is_used_again(monkeypatch):
    for name in host_memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # Blocks beyond 32 MiB, glibc's largest threshold of its own; without huge pages every page of 4 KiB counts.
    monkeypatch.setenv("NUMPY_MADVISE_HUGEPAGE", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    told, before, after = done.stdout.split()
    assert told == "True"
    assert int(after) < int(before) / 10


@pytest.mark.parametrize("name", host_memory._VARIABLES)
def test_the_users_own_settings_stay(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not host_memory.keep_freed_memory()


def test_only_cpus(monkeypatch):
    monkeypatch.setattr(host_memory, "default_platform", lambda: "gpu")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    assert not host_memory.keep_freed_memory()


def test_another_c_library(monkeypatch):
    for name in host_memory._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed_memory()
