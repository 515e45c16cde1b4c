"""The Hugging Face Hub: `PretrainedModel` with save_pretrained, from_pretrained and push_to_hub, and its model card."""

import os
import pathlib
from importlib import resources
from typing import Any

import jax
from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, snapshot_download

import cmamba_jax
from cmamba_jax.deploy import pretrained
from cmamba_jax.train.inference import Prediction, Run

PAPER = "https://arxiv.org/abs/2405.18014"


class PretrainedModel(ModelHubMixin, library_name="cmamba-jax", tags=["coupled-mamba", "multimodal", "jax"]):
    """A trained model for sharing; what it holds is a `Run`.

    Args:
        run: the trained model.

    Attributes:
        run: the trained model, with `predict`, `evaluate` and everything else.
    """

    run: Run

    def __init__(self, run: Run):
        self.run = run

    def predict(self, *args: Any, **kwargs: Any) -> list[Prediction]:
        """`Run.predict`."""
        return self.run.predict(*args, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card, filled from the run: modalities, task, size, metrics."""
        run, config = self.run, pretrained.to_config(self.run)
        metrics = {split: dict(values) for split, values in (config["metrics"] or {}).items()}
        data = run.config.data
        data_name = "given in memory" if data is None else type(data).__name__.removesuffix("Config")
        card_data: Any = self._hub_mixin_info.model_card_data.to_dict()
        card_data["model_name"] = run.config.name
        card_data["eval_results"] = [
            EvalResult(
                task_type=f"multimodal-{run.info.task.kind}",
                dataset_type=data_name.lower().replace(" ", "-"),
                dataset_name=data_name,
                dataset_split=split,
                metric_type=name,
                metric_value=value,
            )
            for split, values in metrics.items()
            for name, value in values.items()
            if value is not None
        ] or None
        if card_data["eval_results"] is None:
            del card_data["model_name"]
        return ModelCard.from_template(
            ModelCardData(**card_data),
            template_str=resources.files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"),
            name=run.config.name,
            paper=PAPER,
            version=cmamba_jax.__version__,
            modalities=dict(run.info.features),
            task=run.info.task,
            labels=run.info.label_names,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(run.params)),
            model=run.config.model,
            repo_id=kwargs.get("repo_id") or "OWNER/" + run.config.name,
            metrics=metrics,
            names=list(dict.fromkeys(name for values in metrics.values() for name in values)),
            epoch=run.epoch,
            data=data_name,
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads the model, see `ModelHubMixin.push_to_hub`; the card's example names the repository."""
        kwargs["model_card_kwargs"] = {"repo_id": repo_id} | (kwargs.get("model_card_kwargs") or {})
        return super().push_to_hub(repo_id, **kwargs)

    def _save_pretrained(self, save_directory: pathlib.Path) -> None:
        pretrained.save(self.run, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "PretrainedModel":
        if not os.path.isdir(model_id):
            known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {name: kwargs[name] for name in known if name in kwargs}
            files = [pretrained.CONFIG, pretrained.WEIGHTS]
            model_id = snapshot_download(model_id, allow_patterns=files, **options)
        return cls(pretrained.load(model_id))
