import jax
import numpy as np
import optax
import pytest

from cmamba_jax.config import EvaluationConfig, TaskConfig, TrainConfig
from cmamba_jax.errors import UserError
from cmamba_jax.train import loop
from cmamba_jax.train.checkpoint import Checkpoints, Position, load_last, load_params
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.state import init_state, make_train_step, split_model
from cmamba_jax.train.writers import MetricWriter, Progress, read_history

STEPS = 5


@pytest.fixture
def run(tmp_path, tiny_model, tiny_task, array_iterator):
    """Trains the tiny model in a folder; `valid` gives the validation metrics of each epoch."""

    def run(folder="run", *, valid=lambda epoch: {"loss": 1.0}, poison=None, resume=False, **config):
        folder, config = tmp_path / folder, TrainConfig(**{"log_every": 2, **config})
        transformation = optax.adam(0.01)
        graphdef, params = split_model(tiny_model(dropout=0.2))
        state, position, batches = init_state(params, transformation, seed=0), Position(), array_iterator()
        if resume:
            state, position = load_last(folder / "checkpoints", state)
            batches.set_state(position.data)
        epochs = iter(range(position.epoch + 1, 1000))
        train_step = make_train_step(graphdef, transformation, make_loss_sum(tiny_task, config))

        def poisoned(state, batch):
            if poison and int(state.step) + 1 == poison:
                batch.inputs["a"][:] = np.nan
            return train_step(state, batch)

        writer = MetricWriter(folder, start_step=position.step)
        try:
            with Checkpoints(folder / "checkpoints") as checkpoints:
                return folder, *loop.train(
                    state,
                    position,
                    config=config,
                    train_step=poisoned,
                    validate=lambda params: valid(next(epochs)),
                    batches=batches,
                    steps_per_epoch=STEPS,
                    batch_size=4,
                    learning_rate=lambda step: 0.01,
                    checkpoints=checkpoints,
                    writer=writer,
                    progress=Progress(config.epochs * STEPS, position.step, enabled=False),
                )
        finally:
            writer.close()

    return run


def falling(epoch):
    return {"loss": 1 / epoch}


def test_records_are_the_means_of_every_few_steps_and_one_validation_an_epoch(run):
    folder, _, position = run(epochs=2, valid=falling)
    records = read_history(folder)
    assert [(r["step"], r["epoch"], r["split"]) for r in records] == [
        (2, 1, "train"), (4, 1, "train"), (5, 1, "train"), (5, 1, "valid"),
        (6, 2, "train"), (8, 2, "train"), (10, 2, "train"), (10, 2, "valid"),
    ]  # fmt: skip
    assert set(records[0]) == {"step", "epoch", "split", "loss", "grad_norm", "learning_rate"}
    each = read_history(run("each", epochs=1, valid=falling, log_every=1)[0])
    np.testing.assert_allclose(records[0]["loss"], np.mean([r["loss"] for r in each[:2]]), rtol=1e-6)
    assert position.step == 10 and position.epoch == 2


def test_training_lowers_the_loss(run):
    losses = [r["loss"] for r in read_history(run(epochs=40, checkpoint_every=40)[0]) if r["split"] == "train"]
    assert np.mean(losses[-9:]) < 0.8 * np.mean(losses[:9])


@pytest.mark.parametrize(("metric", "values", "best"), [
    ("loss", [3, 1, 2, 1], 2),
    ("accuracy", [0.1, 0.5, 0.4, 0.5], 2),
    ("accuracy", [float("nan"), 0.1, float("nan"), 0.05], 2),
])  # fmt: skip
def test_the_best_checkpoint_follows_the_monitored_metric(run, metric, values, best):
    folder, state, position = run(
        epochs=4, monitor=metric, valid=lambda epoch: {"loss": 1.0, metric: values[epoch - 1]}
    )
    _, saved = load_params(folder / "checkpoints", state.params)
    assert position.best_epoch == saved.epoch == best
    assert position.best_value == values[best - 1]


def test_early_stopping_waits_for_patience_epochs(run):
    folder, state, position = run(epochs=50, patience=3, valid=lambda epoch: {"loss": abs(epoch - 4) + 1})
    assert position.best_epoch == 4 and position.epoch == 7
    assert load_last(folder / "checkpoints", state)[1] == position
    assert len(read_history(folder)) == 7 * 4


def test_more_patience_continues_a_stopped_run(run):
    run(epochs=50, patience=2)
    _, _, position = run(epochs=50, patience=4, resume=True)
    assert position.epoch == 5
    assert run(epochs=50, patience=4, resume=True)[2] == position


def test_resumed_equals_uninterrupted_bit_for_bit(run):
    whole, state, position = run("whole", epochs=4, valid=falling)
    run("parts", epochs=1, valid=falling)
    run("parts", epochs=3, valid=falling, resume=True)
    parts, resumed, resumed_position = run("parts", epochs=4, valid=falling, resume=True)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (resumed.params, resumed.opt_state))
    assert resumed_position == position
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()


def test_the_last_checkpoint_is_saved_every_so_many_epochs_and_at_the_end(run):
    folder, _, _ = run(epochs=5, checkpoint_every=3)
    assert sorted(int(p.name) for p in (folder / "checkpoints/last").iterdir()) == [3 * STEPS, 5 * STEPS]


@pytest.mark.parametrize("step", [1, 4, 10])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_parameters(run, step, tmp_path):
    with pytest.raises(loop.NonFiniteError) as error:
        run(epochs=3, poison=step)
    message = str(error.value)
    assert f"stopped at step {step} (epoch {(step - 1) // STEPS + 1}): the loss is nan" in message
    assert "gradients not finite: layers.0.kernel, " in message
    assert "parameters not finite: none" in message and "optimizer.learning_rate" in message
    assert all(r["step"] < step for r in read_history(tmp_path / "run"))


def test_a_validation_loss_that_is_not_finite_stops(run):
    with pytest.raises(loop.NonFiniteError, match=r"validation loss is inf after epoch 2 \(step 10\)"):
        run(epochs=3, valid=lambda epoch: {"loss": 1.0 if epoch < 2 else float("inf")})


def test_monitor_has_to_be_a_metric_of_the_task():
    loop.check_monitor("mae", TaskConfig(), EvaluationConfig())
    loop.check_monitor("auc", TaskConfig(kind="classification", n_outputs=2), EvaluationConfig())
    with pytest.raises(UserError, match="unknown metric 'auc'; expected one of loss, accuracy, weighted_f1, macro_f1"):
        loop.check_monitor("auc", TaskConfig(kind="classification", n_outputs=3), EvaluationConfig())
