import jax
import jax.numpy as jnp

from cmamba_jax.train import compilation


def test_sums_are_not_left_to_the_slow_library():
    values = jnp.ones((10, 3, 1, 64, 64))
    compiled = compilation.jit(lambda v: (v * v).sum(0)).lower(values).compile()
    assert "ynn_fusion" not in compiled.as_text()
    assert compiled(values).shape == (3, 1, 64, 64)


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compilation, "_WITHOUT_YNNPACK", {"xla_cpu_no_such_option": "1"})
    monkeypatch.setattr(compilation, "_options", compilation._options.__wrapped__)
    assert compilation._options() is None
    assert compilation.jit(lambda v: v + 1)(1) == 2


def test_only_cpus_get_options(monkeypatch):
    seen = []
    monkeypatch.setattr(compilation, "default_platform", lambda: "tpu")
    monkeypatch.setattr(jax, "jit", lambda function, **options: seen.append(options))
    compilation.jit(len, donate_argnums=0)
    assert seen == [{"compiler_options": None, "donate_argnums": 0}]
