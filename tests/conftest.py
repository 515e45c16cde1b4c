"""CPU by default, shapes and types checked at run time, and our own warnings are errors."""

import importlib.abc
import importlib.machinery
import os
import sys
import warnings

import jaxtyping
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Hundreds of tiny programs are compiled and hardly run: leaving out LLVM's optimisations halves the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Threads of XLA's pool, however few cores there are: warpgroups of an interpreted kernel wait for each other in them.
os.environ.setdefault("NPROC", "8")
# Eight simulated devices, for the tests of meshes; what names no device uses the first.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

# Before the packages are imported for the first time.
jaxtyping.install_import_hook(["cmamba_jax", "pallas_kernels"], "typecheck.check")


class _TritonKernels(importlib.abc.MetaPathFinder):
    """Finds them before the hook does: Triton compiles a function's source, which a wrapper hides from it."""

    def find_spec(self, fullname, path, target=None):
        if fullname == "pallas_kernels.coupled_scan.triton_gpu.kernels":
            return importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return None


sys.meta_path.insert(0, _TritonKernels())


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/golden")


@pytest.fixture(autouse=True)
def _own_warnings_are_errors():
    # pytest restores the filters after each test.
    warnings.filterwarnings("error", module=r"(cmamba_jax|pallas_kernels)\b")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """Each has some 80 memory mappings; more than 65,530, Linux's limit, and LLVM crashes near the end of the suite."""
    import jax

    yield
    jax.clear_caches()
