"""The partitioned train step, compiled by the real compilers for four GPUs and for TPU pods that are not there."""

import pathlib
import re
import subprocess
import sys

import pytest

from cmamba_jax.bench import topology, tpu_compile

SCRIPT = pathlib.Path(__file__).parent.parent / "pallas_kernels" / "compile_train_step.py"
LAYERS = 2


def compile_step(platform, name, layout, changes=""):
    process = subprocess.run(
        [sys.executable, SCRIPT, platform, name, layout, changes],
        env=tpu_compile.environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def assert_only_states_halos_and_gradients_travel(program):
    assert re.search(r"\ball-reduce(-start)?\(", program)
    assert not re.search(r"\b(all-gather|all-to-all)(-start)?\(", program)
    moved = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? collective-permute(?:-start)?\(", program)
    # Scan states [B, D, N] and the three steps [M, B, 3, D] that a convolution looks back.
    assert set(moved) == {"8,256,64", "3,8,3,256"}


@pytest.mark.skipif(not topology.gpu_available(), reason=topology.GPU_MISSING)
def test_two_gpus_share_out_the_memory_of_a_long_sequence():
    """One sequence; the longer it is and the more layers, the less else counts."""
    one, two = (
        int(compile_step("cuda", name, layout, f"samples=1,length={length},n_layers=1,scan=xla").split()[-1])
        for name, layout, length in (("1x1x1", "sequence=1", 32768), ("1x1x2", "sequence=2", 16384))
    )
    assert two < 0.6 * one


@pytest.mark.skipif(not tpu_compile.available(), reason=tpu_compile.MISSING)
@pytest.mark.parametrize(("name", "layout"), [("v5e:2x2", "data=2,sequence=2"), ("v5e:4x4", "data=4,sequence=4")])
def test_tpu_pods(name, layout):
    program = compile_step("tpu", name, layout)
    # Forwards the end state and the scan itself, backwards twice the derivative.
    assert program.count('custom_call_target="tpu_custom_call"') == 4 * LAYERS
    assert_only_states_halos_and_gradients_travel(program)


@pytest.mark.skipif(not topology.gpu_available(), reason=topology.GPU_MISSING)
def test_four_gpus():
    program = compile_step("cuda", "1x1x4", "data=2,sequence=2")
    # As on TPUs, or more of them where the kernels cut time in chunks.
    assert program.count('custom_call_target="mosaic_gpu') >= 4 * LAYERS
    assert_only_states_halos_and_gradients_travel(program)
