"""The scan over meshes of simulated devices equals the scan on one, gradients included."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_coupled_scan import assert_close

from pallas_kernels import ScanInputError, ScanOutput, coupled_scan
from pallas_kernels.coupled_scan import sharded
from pallas_kernels.coupled_scan.cases import Case, make_inputs
from pallas_kernels.coupled_scan.sharded import Axes, sharded_scan

ALL = dict.fromkeys(("skip", "gate", "dt_bias", "mask", "reset", "initial_state"), True)
PLAIN = Case(M=2, B=4, L=40, D=4, N=4, skip=True, gate=True, dt_bias=True)
FULL = Case(M=3, B=4, L=40, D=4, N=4, **ALL)
LETTERS = {"x": "MBLD", "dt": "MBLD", "B": "MBLN", "C": "MBLN", "z": "MBLD", "mask": "MBL", "reset": "BL"}


def mesh_of(**sizes):
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))


def axes_of(sizes):
    return Axes(
        batch=tuple(name for name in ("data", "fsdp") if name in sizes),
        channels="tensor" if "tensor" in sizes else None,
        time="sequence" if "sequence" in sizes else None,
    )


def value_and_gradients(scan, case, inputs):
    """y, the final state, and the gradients under random cotangents."""
    rng = np.random.default_rng(1)
    switches = {name: inputs[name] for name in ("mask", "reset") if name in inputs}
    floats = {name: value for name, value in inputs.items() if name not in switches}

    @jax.jit
    def run(floats, switches, bar):
        out, vjp = jax.vjp(lambda floats: scan(**floats, **switches, **case.options), floats)
        return out, vjp(bar)[0]

    shapes = jax.eval_shape(lambda: coupled_scan(**inputs, **case.options))
    bar = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), v.dtype), shapes)
    return run(floats, switches, bar)


def assert_same(case, sizes, implementation="xla"):
    inputs = make_inputs(case)
    expected = value_and_gradients(functools.partial(coupled_scan, implementation=implementation), case, inputs)
    spread = functools.partial(sharded_scan, mesh_of(**sizes), axes_of(sizes), implementation=implementation)
    actual = value_and_gradients(spread, case, inputs)
    leaves = zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True)
    for (path, value), got in leaves:
        assert_close(got, value, 1e-5, jax.tree_util.keystr(path))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_time_over_eight_devices(coupling, reverse):
    assert_same(dataclasses.replace(FULL, coupling=coupling, reverse=reverse), {"sequence": 8})


@pytest.mark.parametrize("case", [PLAIN, dataclasses.replace(FULL, coupling="full")], ids=str)
def test_a_number_of_devices_that_is_no_power_of_two(case):
    assert_same(case, {"sequence": 5}, "reference")


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2}, {"tensor": 4}], ids=str)
def test_batch_and_channels(sizes):
    assert_same(FULL, sizes)


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_all_axes_at_once(coupling):
    assert_same(dataclasses.replace(FULL, coupling=coupling), {"data": 2, "tensor": 2, "sequence": 2})


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_implementations_that_do_not_know_varying_axes(coupling, monkeypatch):
    """As the GPU kernels: without its checks `jax.shard_map` sums the gradients of what is shared in another way."""
    known = {name: dataclasses.replace(i, knows_varying=False) for name, i in sharded.implementations().items()}
    monkeypatch.setattr(sharded, "implementations", lambda: known)
    assert_same(dataclasses.replace(FULL, coupling=coupling), {"data": 2, "tensor": 2, "sequence": 2})


def test_a_reset_or_a_long_gap_on_one_device_is_exact():
    """Nothing of the state before a reset passes; a device whose steps are all masked passes it untouched."""
    case = dataclasses.replace(FULL, M=2)
    inputs = make_inputs(case)
    inputs["mask"] = jnp.ones((2, 4, 40), bool).at[:, :, 10:30].set(False)
    inputs["reset"] = jnp.zeros((4, 40), bool).at[0, 7].set(True)
    run = jax.jit(functools.partial(sharded_scan, mesh_of(sequence=8), Axes(time="sequence")))
    spoiled = dict(inputs, initial_state=inputs["initial_state"].at[0].add(1e6))
    np.testing.assert_array_equal(run(**spoiled).final_state[0], run(**inputs).final_state[0])
    early = {k: v[:, :, :10] if k in ("x", "dt", "B", "C", "z", "mask") else v for k, v in inputs.items()}
    early["reset"] = inputs["reset"][:, :10]
    late = {k: v[:, :, 30:] if k in ("x", "dt", "B", "C", "z", "mask") else v for k, v in inputs.items()}
    late |= {"reset": inputs["reset"][:, 30:], "initial_state": coupled_scan(**early).final_state}
    assert_close(run(**inputs).final_state, coupled_scan(**late).final_state, 2e-6)


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_a_plain_jit_sums_over_devices_once_and_not_at_each_step(coupling):
    case = dataclasses.replace(FULL, B=8, coupling=coupling)
    inputs, mesh = make_inputs(case), mesh_of(data=8)
    letters = LETTERS | {"initial_state": "BDN" if coupling == "shared" else "MBDN"}
    specs = {name: axes_of({"data": 8}).spec(letters.get(name, "")) for name in inputs}
    spread = jax.device_put(inputs, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
    switches = {name: spread.pop(name) for name in ("mask", "reset")}
    run = jax.jit(
        jax.grad(lambda floats, switches: jnp.square(coupled_scan(**floats, **switches, **case.options).y).sum())
    )
    # Of the two loops, over chunks and over the steps of a chunk, the inner one does without.
    inner = re.compile("while/body/.*while/body/")
    lines = run.lower(spread, switches).compile().as_text().splitlines()
    assert any(map(inner.search, lines))
    sums = [line for line in lines if " all-reduce(" in line]
    assert sums and not any(map(inner.search, sums))


def collectives(text):
    """Names and result bytes of the collectives of a compiled program."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = rf"= \(?(\w+)\[([\d,]*)\][^=]*? ({kinds})(?:-start)?\("
    return [
        (name, int(np.prod([int(n) for n in sizes.split(",") if n])) * (4 if dtype.endswith("32") else 2))
        for dtype, sizes, name in re.findall(pattern, text)
    ]


@pytest.mark.parametrize("coupling", ["independent", "shared", "full"])
def test_communication_does_not_grow_with_the_length(coupling):
    def volumes(length):
        case = dataclasses.replace(FULL, L=length, coupling=coupling)
        mesh, axes = mesh_of(sequence=8), Axes(time="sequence")
        arrays = {
            name: jax.tree.map(
                lambda v, name=name: jax.ShapeDtypeStruct(
                    v.shape, v.dtype, sharding=NamedSharding(mesh, axes.spec(LETTERS[name]) if name in LETTERS else
                                                             PartitionSpec())
                ),
                value,
            )
            for name, value in make_inputs(case).items()
        }  # fmt: skip
        switches = {name: arrays.pop(name) for name in ("mask", "reset")}

        def loss(floats, switches):
            out = sharded_scan(mesh, axes, **floats, **switches, implementation="xla")
            return jnp.sum(out.y**2) + jnp.sum(out.final_state)

        return collectives(jax.jit(jax.grad(loss)).lower(arrays, switches).compile().as_text())

    short, long = volumes(40), volumes(160)
    assert sorted(short) == sorted(long)
    assert {name for name, _ in short} == {"collective-permute", "all-reduce"}


def test_lengths_that_do_not_divide_are_refused():
    inputs = make_inputs(PLAIN)
    with pytest.raises(ScanInputError, match="axis L is 40, expected a multiple of 3 devices"):
        sharded_scan(mesh_of(sequence=3), Axes(time="sequence"), **inputs)


def test_result_is_a_scan_output_cut_like_its_inputs():
    out = jax.jit(functools.partial(sharded_scan, mesh_of(data=2, sequence=4), Axes(("data",), None, "sequence")))(
        **make_inputs(PLAIN)
    )
    assert isinstance(out, ScanOutput)
    assert out.y.sharding.spec[1:3] == ("data", "sequence")
