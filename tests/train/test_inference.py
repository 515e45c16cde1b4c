import csv
import io
import json

import numpy as np
import pytest
from scipy import special

from cmamba_jax.config import TaskConfig
from cmamba_jax.data import DataError, DataInfo, load
from cmamba_jax.errors import UserError
from cmamba_jax.train.inference import Prediction, format_predictions, load_run


@pytest.fixture(scope="module")
def run(tiny_run):
    return load_run(tiny_run.run_dir)


@pytest.fixture(scope="module")
def samples(run):
    return list(load(run.config.data).test)


def arrays(samples):
    return {m: [s["inputs"][m] for s in samples] for m in samples[0]["inputs"]}


def write(folder, samples, **extra):
    folder.mkdir()
    for i, sample in enumerate(samples):
        np.savez(folder / f"{i:03d}.npz", label=sample["label"], **sample["inputs"], **extra)


def test_evaluate_gives_the_metrics_of_the_run(run, tiny_run):
    for split in ("valid", "test"):
        assert run.evaluate(split).metrics == pytest.approx(tiny_run.metrics[split], rel=1e-6)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        run.evaluate("dev")


def test_predictions_are_those_of_the_evaluation(run, samples):
    logits = run.evaluate("test").logits
    predictions = run.predict(arrays(samples))
    np.testing.assert_allclose([p.outputs for p in predictions], special.softmax(logits, -1), rtol=1e-4)
    assert [p.labels for p in predictions] == [(run.info.label_names[k],) for k in logits.argmax(-1)]


def test_files_and_arrays_give_the_same(run, samples, tmp_path):
    write(tmp_path / "new", samples[:3])
    from_files, from_memory = run.predict(tmp_path / "new"), run.predict(arrays(samples[:3]))
    assert [p.id for p in from_files] == ["000.npz", "001.npz", "002.npz"]
    for a, b in zip(from_files, from_memory, strict=True):
        np.testing.assert_array_equal(a.outputs, b.outputs)
    single = run.predict(str(tmp_path / "new" / "001.npz"))
    np.testing.assert_allclose(single[0].outputs, from_files[1].outputs, rtol=1e-4)


def test_longer_sequences_than_those_of_the_training_and_masks(run, samples):
    longer = {m: [np.concatenate([x, 9 + x])] for m, (x,) in arrays(samples[:1]).items()}
    masks = {m: [np.arange(len(x)) < len(x) // 2] for m, (x,) in longer.items()}
    predicted = run.predict(longer, masks=masks)[0].outputs
    np.testing.assert_allclose(predicted, run.predict(arrays(samples[:1]))[0].outputs, rtol=1e-4)


def test_inputs_that_do_not_fit(run, samples, tmp_path):
    good = arrays(samples[:2])
    with pytest.raises(DataError, match=r"modality 'cue' has shape \[.*, 2\]"):
        run.predict(good | {"cue": [np.ones((len(x), 2)) for x in good["cue"]]})
    with pytest.raises(DataError, match="unknown modality 'odor'"):
        run.predict(good | {"odor": good["cue"]})
    with pytest.raises(DataError, match="modality 'symbols' is absent"):
        run.predict({"cue": good["cue"]})
    with pytest.raises(DataError, match="different numbers of sequences"):
        run.predict(good | {"cue": good["cue"][:1]})
    with pytest.raises(DataError, match="nan at step"):
        run.predict(good | {"cue": [x * np.nan for x in good["cue"]]})
    with pytest.raises(DataError, match="no sequences"):
        run.predict({"cue": [], "symbols": []})
    with pytest.raises(UserError, match=r"expected an .npz file or a folder"):
        run.predict(tmp_path)
    with pytest.raises(UserError, match=r"expected an .npz file or a folder"):
        run.predict(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_text("no zip")
    with pytest.raises(UserError, match=r"bad.npz cannot be read"):
        run.predict(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="expected the folder of a run"):
        load_run(tmp_path)


def info(kind, per="sequence", names=("x", "y")):
    return DataInfo({"a": 1}, TaskConfig(kind=kind, n_outputs=2, per=per), names)


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_csv():
    p = Prediction("s", np.array([0.25, 0.75], np.float32), ("y",))
    assert rows(format_predictions([p], info("classification"), "csv")) == [
        ["id", "label", "x", "y"],
        ["s", "y", "0.25", "0.75"],
    ]
    p = Prediction("s", np.array([[0.75, 1.0], [0.25, 0.0]], np.float32), (("x", "y"), ()))
    assert rows(format_predictions([p], info("multilabel", "step"), "csv")) == [
        ["id", "step", "label", "x", "y"],
        ["s", "0", "x|y", "0.75", "1"],
        ["s", "1", "", "0.25", "0"],
    ]
    p = Prediction("s", np.array([1.5, -2.0], np.float32), ())
    assert rows(format_predictions([p], info("regression", names=()), "csv")) == [
        ["id", "output_0", "output_1"],
        ["s", "1.5", "-2"],
    ]


def test_jsonl():
    p = Prediction("s", np.array([0.25, 0.75], np.float32), ("y",))
    text = format_predictions([p, p], info("classification"), "jsonl")
    expected = {"id": "s", "names": ["x", "y"], "outputs": [0.25, 0.75], "label": "y"}
    assert [json.loads(line) for line in text.splitlines()] == [expected] * 2
