import jax
import jax.numpy as jnp

from cmamba_jax.train.profile import Profiler


def test_a_few_steps_are_traced_after_the_first_ones(tmp_path):
    profiler = Profiler(tmp_path / "profile", steps=2)
    step = jax.jit(lambda x: x + 1)
    for number in range(1, 6):
        with profiler.step(number):
            step(jnp.ones(2)).block_until_ready()
    assert not (tmp_path / "profile").exists()
    for number in range(6, 9):
        with profiler.step(number):
            step(jnp.ones(2)).block_until_ready()
    profiler.close()
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    content = traces[0].read_bytes()
    assert b"step_num" in content and b"train" in content


def test_no_steps_no_trace(tmp_path):
    profiler = Profiler(tmp_path / "profile", steps=0)
    for number in range(10):
        with profiler.step(number):
            pass
    profiler.close()
    assert not (tmp_path / "profile").exists()
