"""The quick start from an installed wheel: run in an empty folder, it needs nothing of the checkout."""

import contextlib
import io
import json
import pathlib

CONFIG = """
from cmamba_jax import ExperimentConfig, ModelConfig, PipelineConfig, SyntheticConfig, TrainConfig


def config() -> ExperimentConfig:
    return ExperimentConfig(
        name="quick",
        data=SyntheticConfig(n_train=64, n_valid=16, n_test=16, length=8, n_classes=2),
        model=ModelConfig(d_model=4, d_state=2, n_layers=1, scan="reference"),
        pipeline=PipelineConfig(batch_size=16),
        train=TrainConfig(epochs=1),
    )
"""


def cmamba(*words):
    from cmamba_jax.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(list(words))
    return out.getvalue()


def main():
    import cmamba_jax

    place = pathlib.Path(cmamba_jax.__file__).parent
    assert place != pathlib.Path(__file__).resolve().parent.parent / "cmamba_jax", "this is the checkout"
    pathlib.Path("quick.py").write_text(CONFIG, encoding="utf-8")
    out = cmamba("train", "quick.py")
    report = pathlib.Path(out.strip().rsplit("report: ", 1)[1])
    assert "<html" in report.read_text(encoding="utf-8") and json.loads((report.parent / "metrics.json").read_text())
    assert cmamba("eval", "runs/quick/001").startswith("test: loss ")
    print(f"quick start from {place}: ok")


if __name__ == "__main__":
    main()
