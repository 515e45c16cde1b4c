import dataclasses

import numpy as np
import pytest

from cmamba_jax.batch import Batch
from cmamba_jax.config import TaskConfig, TrainConfig
from cmamba_jax.train.evaluation import Evaluator
from cmamba_jax.train.objective import make_loss_sum
from cmamba_jax.train.state import make_predict_step, split_model


def join(batches):
    stack = {m: np.concatenate([b.inputs[m] for b in batches]) for m in batches[0].inputs}
    return Batch(inputs=stack, labels=np.concatenate([b.labels for b in batches]))


def test_scores_do_not_depend_on_batches_or_filler(tiny_model, tiny_task, batch):
    graphdef, params = split_model(tiny_model())
    evaluate = Evaluator(make_predict_step(graphdef), make_loss_sum(tiny_task, TrainConfig()), tiny_task)
    parts = [batch(4, seed=i) for i in range(3)]
    filled = dataclasses.replace(parts[2], weight=np.array([1, 1, 0, 0], np.float32))
    first_rows = dataclasses.replace(
        parts[2], inputs={m: x[:2] for m, x in filled.inputs.items()}, labels=filled.labels[:2]
    )
    one = evaluate(params, [join([*parts[:2], first_rows])])
    many = evaluate(params, [*parts[:2], filled])
    assert one.metrics.keys() == {"loss", "accuracy", "weighted_f1", "macro_f1"}
    assert one.metrics == pytest.approx(many.metrics, rel=1e-6)
    np.testing.assert_allclose(one.logits, many.logits, rtol=1e-5)
    np.testing.assert_array_equal(one.labels, many.labels)
    assert one.logits.shape == (10, 3)


def test_steps_are_flattened_to_those_that_count():
    task = TaskConfig(kind="regression", n_outputs=1, per="step")
    values = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    batch = Batch(
        inputs={"a": values},
        labels=values + 1,
        weight=np.ones(2, np.float32),
        label_mask=np.array([[True, True, False], [False, True, True]]),
    )
    evaluate = Evaluator(lambda params, b: b.inputs["a"], make_loss_sum(task, TrainConfig()), task)
    result = evaluate({}, [batch])
    np.testing.assert_array_equal(result.logits[:, 0], [0, 1, 4, 5])
    np.testing.assert_array_equal(result.labels[:, 0], [1, 2, 5, 6])
    assert result.metrics["loss"] == result.metrics["mae"] == 1
