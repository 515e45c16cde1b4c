"""The resolved configuration of each file in configs/ is kept in tests/golden, so that a changed default shows.

After a wanted change: pytest tests/test_config.py --update-golden
"""

import dataclasses
import json
import pathlib

import pytest

from cmamba_jax import config
from cmamba_jax.cli import load_config
from cmamba_jax.config_json import to_dict
from cmamba_jax.train.sweep import apply

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_equals_its_golden_file(path, request):
    golden = GOLDEN / f"{path.stem}.json"
    text = json.dumps(to_dict(load_config(path)), indent=2) + "\n"
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert golden.exists(), f"{golden.name} is missing: run pytest tests/test_config.py --update-golden"
    assert text == golden.read_text(encoding="utf-8"), "if the change is wanted, run again with --update-golden"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ablations").glob("*.py")), ids=lambda path: path.stem)
def test_rows_of_a_sweep_fit_their_base(path):
    sweep = load_config(path, kinds=(config.SweepConfig,))
    assert len({row.label for row in sweep.rows}) == len(sweep.rows) > 0
    for row in sweep.rows:
        apply(sweep.base, row.changes)
    assert sweep.name not in {load_config(base).name for base in CONFIGS}


def test_every_golden_file_has_its_config():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {path.stem for path in CONFIGS}


CLASSES = [value for value in vars(config).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_configs_are_frozen_and_hashable(cls):
    instance = cls(**{"name": "x"} if cls is config.ExperimentConfig else {})
    hash(instance)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, dataclasses.fields(cls)[0].name, None)


def test_defaults_are_the_papers():
    model, optimizer, train = config.ModelConfig(), config.OptimizerConfig(), config.TrainConfig()
    assert (model.d_model, model.expand, model.d_conv, model.d_state, model.n_layers) == (128, 2, 4, 64, 3)
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adam", 5e-4, 5e-4)
    assert train.epochs == 150
