import contextlib
import dataclasses
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cmamba_jax.train import checkpoint
from cmamba_jax.train.checkpoint import CheckpointError, Checkpoints, Position, load_last, load_params
from cmamba_jax.train.state import init_state, split_model


@pytest.fixture
def make_state(tiny_model):
    def make(n_outputs: int = 3, fill: float | None = None, step: int = 0):
        params = split_model(tiny_model(n_outputs))[1]
        if fill is not None:
            params = jax.tree.map(lambda p: jnp.full_like(p, fill), params)
        state = init_state(params, optax.adam(1e-3), seed=7)
        return dataclasses.replace(state, step=jnp.int32(step))

    return make


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def test_what_is_saved_is_loaded(tmp_path, make_state):
    state = make_state(step=5)
    position = Position(step=5, epoch=2, best_epoch=1, best_value=0.1 + 0.2, data={"0": {"next_index": 12}})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", state, position)
        checkpoints.save("best", state, position)
    loaded, loaded_position = load_last(tmp_path, make_state(fill=0.0))
    assert loaded_position == position
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    assert equal((loaded.step, loaded.params, loaded.opt_state), (state.step, state.params, state.opt_state))
    assert jax.random.key_data(loaded.key).tolist() == jax.random.key_data(state.key).tolist()
    params, best = load_params(tmp_path, make_state(fill=0.0).params)
    assert equal(params, state.params) and best == position


def test_the_saved_state_may_be_donated_at_once(tmp_path, make_state):
    state = make_state(fill=1.0)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", state, Position(step=1))
        overwrite(state.params)
    assert equal(load_last(tmp_path, make_state())[0].params, make_state(fill=1.0).params)


def test_best_keeps_one_and_last_keeps_two(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save("last", make_state(fill=step), Position(step=step))
            checkpoints.save("best", make_state(fill=step), Position(step=step))
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == ["2", "3"]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["3"]


def test_a_resumed_run_replaces_a_best_of_the_run_before_it(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("best", make_state(fill=1.0), Position(step=8))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("best", make_state(fill=2.0), Position(step=6))
    params, position = load_params(tmp_path, make_state().params)
    assert position.step == 6 and equal(params, make_state(fill=2.0).params)


def test_leftovers_of_a_killed_write_are_no_checkpoint(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", make_state(fill=1.0), Position(step=1))
    leftover = tmp_path / "last" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "last" / "1" / "params", leftover / "params")
    assert load_last(tmp_path, make_state())[1].step == 1
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", make_state(fill=2.0), Position(step=2))
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == ["1", "2"]


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a bit flipped": lambda folder: flip_a_bit(largest(folder / "params")),
    "truncated": lambda folder: largest(folder / "training").write_bytes(b""),
    "parameters absent": lambda folder: shutil.rmtree(folder / "params"),
    "metadata absent": lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(),
    "checksums damaged": lambda folder: (folder / "files.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_one_message_with_the_cure(tmp_path, make_state, damage, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save("last", make_state(fill=step), Position(step=step))
    damage(tmp_path / "last" / "2")
    with pytest.raises(CheckpointError, match="is damaged or incomplete") as error:
        load_last(tmp_path, make_state())
    assert str(error.value).endswith(f"delete {tmp_path}/last/2 to resume from the one before it, step 1")
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(tmp_path / "last" / "2")
    assert load_last(tmp_path, make_state())[1].step == 1


def test_the_only_checkpoint_is_damaged(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", make_state(), Position(step=1))
    flip_a_bit(largest(tmp_path / "last" / "1"))
    with pytest.raises(CheckpointError, match=r"has changed since it was written\); delete .*/last and start .* again"):
        load_last(tmp_path, make_state())


def test_a_run_killed_before_the_checksums_still_resumes(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", make_state(), Position(step=1))
    (tmp_path / "last" / "1" / "files.json").unlink()
    assert load_last(tmp_path, make_state())[1].step == 1
    shutil.rmtree(tmp_path / "last" / "1" / "params")
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        load_last(tmp_path, make_state())


def test_another_model_is_named_as_such(tmp_path, make_state):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("best", make_state(3), Position(step=1))
    with pytest.raises(
        CheckpointError, match=r"another model: parameter layers.1.bias is \(3,\) in the checkpoint, \(4,\)"
    ):
        load_params(tmp_path, make_state(4).params)


def test_no_checkpoint(tmp_path, make_state):
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_params(tmp_path, make_state().params)


@contextlib.contextmanager
def files_of_at_most(n_bytes):
    """Writing more to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_message_and_leaves_the_checkpoint_before_it(tmp_path, make_state):
    def big(fill, step):
        state = make_state(fill=fill)
        return dataclasses.replace(state, params={"w": jnp.arange(2.0**16) + fill}), Position(step=step)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", *big(1.0, 1))
    with (
        pytest.raises(CheckpointError, match=r"last/2 cannot be written \(.*\); free space or .* --resume"),
        files_of_at_most(20_000),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save("last", *big(2.0, 2))
    state, position = load_last(tmp_path, big(0.0, 0)[0])
    assert position.step == 1 and equal(state.params, {"w": np.arange(2.0**16) + 1})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save("last", *big(3.0, 3))
    assert load_last(tmp_path, big(0.0, 0)[0])[1].step == 3


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "best").write_text("a file where a folder should be")
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\); free space or make the folder writable"):
        Checkpoints(tmp_path)


def test_remains_of_a_killed_deletion_are_removed(tmp_path, make_state):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save("last", make_state(fill=step), Position(step=step))
    (tmp_path / "last" / "1" / "_CHECKPOINT_METADATA").unlink()
    Checkpoints(tmp_path).close()
    assert sorted(p.name for p in (tmp_path / "last").iterdir()) == ["2", "3"]
