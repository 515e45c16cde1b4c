import dataclasses
import importlib.util
import tracemalloc

import numpy as np
import pytest

from cmamba_jax import data
from cmamba_jax.bench import stream as bench
from cmamba_jax.config import PipelineConfig, WatchConfig
from cmamba_jax.data import Pipeline
from cmamba_jax.deploy import StreamingSession
from cmamba_jax.errors import UserError

TASKS = {
    "classification": {},
    "frames": {"frame": 3, "encoder": "conv"},
    "max pooling, full": {"pooling": "max", "coupling": "full"},
    "per step": {"per": "step"},
    "multilabel": {"kind": "multilabel", "coupling": "independent"},
    "regression": {"kind": "regression", "coupling": "released"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def run(make_run, request):
    return make_run(**request.param)


def at(inputs, time):
    return {name: values[:, time] for name, values in inputs.items()}


def answers(session, steps):
    return [a for a in (session.push(step) for step in steps) if a is not None] + session.finish()


def test_steps_give_what_the_whole_sequence_gives(run, make_inputs):
    """With missing samples, in some streams and in all, and a length that is no multiple of the frame."""
    n, length = 3, 7
    inputs = make_inputs(n, length)
    mask = {m: np.random.default_rng(2).uniform(size=(n, length)) < 0.7 for m in inputs}
    mask["text"][:, 3] = mask["audio"][:, 3] = False
    session = StreamingSession(run, streams=n)
    got = [session.push(at(inputs, t), mask=at(mask, t)) for t in range(length)]
    got = [a for a in got if a is not None] + session.finish()
    whole = run.predict(inputs, masks=mask)
    outputs = np.stack([p.outputs for p in whole])
    tolerance = 2e-2 if run.config.model.compute_dtype == "bfloat16" else 1e-5
    if run.info.task.per == "step":
        np.testing.assert_allclose(np.stack([a.outputs for a in got], 1), outputs, rtol=tolerance, atol=tolerance)
        assert [a.labels[1] for a in got] == list(whole[1].labels)
    else:
        np.testing.assert_allclose(got[-1].outputs, outputs, rtol=tolerance, atol=tolerance)
        assert got[-1].labels == tuple(label for p in whole for label in p.labels)
    assert [a.time for a in got] == [*range(run.config.model.frame - 1, length, run.config.model.frame)][
        : len(got)
    ] or (got[-1].time == length - 1)


def test_late_samples_that_are_waited_for_change_nothing(make_run, make_inputs):
    run, inputs = make_run(), make_inputs(1, 12)
    events = [(t, m) for t in range(12) for m in inputs]
    jitter = np.random.default_rng(3).uniform(0, 3, len(events))
    order = np.argsort([t + late for (t, _), late in zip(events, jitter, strict=True)], kind="stable")
    order = sorted(order, key=lambda i: events[i][0] > 0)  # The first sample sets the clock.
    session, got = StreamingSession(run, max_delay=4), []
    for i in order:
        time, name = events[i]
        got += session.feed(time, {name: inputs[name][0, time]})
    got += session.finish()
    expected = answers(StreamingSession(run), [at(inputs, t) for t in range(12)])
    assert [a.time for a in got] == list(range(12)) and session.late == {}
    np.testing.assert_array_equal([a.logits for a in got], [a.logits for a in expected])


def test_too_late_is_missing(make_run, make_inputs):
    run, inputs = make_run(), make_inputs(1, 3)
    session = StreamingSession(run)
    assert session.feed(0, {"text": inputs["text"][0, 0]}) == []
    (first,) = session.feed(1, {"text": inputs["text"][0, 1]})
    assert (first.time, first.missing) == (0, ("audio",))
    assert session.feed(0, {"audio": inputs["audio"][0, 0]}) == [] and session.late == {"audio": 1}
    (second,) = session.feed(1, {"audio": None})
    got = [first, second, *session.feed(2, {m: v[0, 2] for m, v in inputs.items()})]
    masks = {"text": [[True] * 3], "audio": [[False, False, True]]}
    expected = run.predict(inputs, masks=masks)[0].outputs
    np.testing.assert_allclose(got[-1].outputs[0], expected, rtol=1e-5)


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_saved_stream_goes_on_to_the_same_answers(make_run, make_inputs, tmp_path, stop):
    """Saved within a frame, with steps that wait, and after a late sample."""
    run, inputs = make_run(frame=3, compute_dtype="bfloat16"), make_inputs(1, 12)
    events = [(t + 2 * (m == "text") * (t % 2), t, m) for t in range(12) for m in inputs]
    events = [(t, m) for _, t, m in sorted(events)] + [(0, "text")]
    events.insert(8, (0, "audio"))

    def feed(session, events):
        return [a for t, m in events for a in session.feed(t, {m: inputs[m][0, t]})]

    whole = StreamingSession(run, max_delay=3)
    expected = feed(whole, events) + whole.finish()
    first, second = StreamingSession(run, max_delay=3), StreamingSession(run, max_delay=3)
    got = feed(first, events[: 2 * stop + 1])
    first.save(tmp_path / "state.npz")
    second.load(tmp_path / "state.npz")
    got += feed(second, events[2 * stop + 1 :]) + second.finish()
    assert [a.time for a in got] == [a.time for a in expected]
    np.testing.assert_array_equal([a.logits for a in got], [a.logits for a in expected])
    assert second.late == whole.late == {"audio": 1, "text": 1}


def test_a_state_that_does_not_fit(make_run, tmp_path):
    session = StreamingSession(make_run())
    session.save(path := tmp_path / "state.npz")
    with pytest.raises(UserError, match="belongs to another streams"):
        StreamingSession(make_run(), streams=2).load(path)
    with pytest.raises(UserError, match="belongs to another model"):
        StreamingSession(make_run(d_state=3)).load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="holds no state of a stream"):
        session.load(path)


def test_restart_starts_a_new_sequence(make_run, make_inputs):
    run, inputs = make_run(frame=3), make_inputs(1, 9)
    session = StreamingSession(run)
    steps = [at(inputs, t) for t in range(9)]
    answers(session, steps[:4])
    session.push(steps[8])
    session.restart()
    np.testing.assert_array_equal(
        [a.logits for a in answers(session, steps)], [a.logits for a in answers(StreamingSession(run), steps)]
    )


def test_memory_does_not_grow(make_run, make_inputs):
    session, inputs = StreamingSession(make_run(), max_delay=2), make_inputs(1, 1)
    steps = {m: v[0, 0] for m, v in inputs.items()}

    def go(start):
        for t in range(start, start + 300):
            session.feed(t, {"text": steps["text"]} if t % 3 else steps)

    go(0)
    size = session.nbytes
    tracemalloc.start()
    try:
        go(300)
        grown = []
        for start in (600, 900, 1200):  # Now and then something else in the process takes memory; a leak always does.
            before = tracemalloc.get_traced_memory()[0]
            go(start)
            grown.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert session.nbytes == size and min(grown) < 20_000


def test_mistakes_leave_the_session_as_it_was(make_run, make_inputs):
    run, inputs = make_run(), make_inputs(1, 2)
    session, steps = StreamingSession(run), [at(inputs, t) for t in range(2)]
    session.push(steps[0])
    for wrong, message in (
        ({"odor": [1.0]}, "unknown modality 'odor'; expected text, audio"),
        ({"text": [1.0]}, "modality 'text': expected 3 numbers"),
        ({"text": [1.0, 2.0, float("nan")]}, "expected finite numbers"),
        ({"text": ["a", 1, 2]}, "expected 3 numbers, got"),
        ({"audio": [1.0, 2.0], "text": [[1, 2, 3], [1, 2, 3]]}, "expected 3 numbers, got shape"),
    ):
        with pytest.raises(UserError, match=message):
            session.push(wrong)
    with pytest.raises(UserError, match="mask of 'text': expected bool"):
        session.push(steps[1], mask={"text": [1]})
    expected = answers(StreamingSession(run), steps)[-1]
    np.testing.assert_array_equal(session.push(steps[1]).logits, expected.logits)
    session.feed(5, {"text": None})
    with pytest.raises(UserError, match="still wait"):
        session.push(steps[0])
    with pytest.raises(UserError, match="expected at least 1 stream"):
        StreamingSession(run, streams=0)
    with pytest.raises(UserError, match="needs whole sequences"):
        StreamingSession(make_run(direction="bidirectional"))


@pytest.mark.skipif(importlib.util.find_spec("seglearn") is None, reason="needs the extra data")
def test_the_test_people_of_the_watch_data(tmp_path):
    """Every window of both people as a stream, against batches of the evaluation."""
    splits = data.load(WatchConfig(data_dir=str(tmp_path)))
    run = bench.untrained()
    pipeline = Pipeline(splits, PipelineConfig(), seed=0)
    run = dataclasses.replace(run, info=splits.info, normalizer=pipeline.normalizer)
    windows = [splits.test[i]["inputs"] for i in range(len(splits.test))]
    inputs = {m: np.stack([window[m] for window in windows]) for m in run.model.modalities}
    got = answers(StreamingSession(run, streams=len(windows)), [at(inputs, t) for t in range(100)])
    logits = run.evaluate("test", splits).logits
    assert len(logits) == len(windows) > 1000 and len(got) == 25
    np.testing.assert_allclose(got[-1].logits, logits, atol=1e-5)
    one = {name: values[7:8] for name, values in inputs.items()}
    alone = answers(StreamingSession(run), [at(one, t) for t in range(100)])
    np.testing.assert_allclose(alone[-1].logits[0], logits[7], atol=1e-5)
