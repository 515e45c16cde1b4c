"""The commands that use a trained model: words into calls, nothing else."""

import json
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from cmamba_jax.errors import UserError


def explain(words: list[str]) -> None:
    """Runs `cmamba explain` with the words after it."""

    def run(
        run_dir: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        input: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")],
        /,
        output: pathlib.Path = pathlib.Path("explanation.png"),
        target: str | None = None,
        checkpoint: Literal["best", "last"] = "best",
    ) -> None:
        """Draw what each modality contributes over time: integrated gradients, state energy, coupling flow.

        Args:
            run_dir: Folder of the run, such as runs/watch/001, or of an exported model.
            input: An .npz file, or SPLIT:NUMBER for a sample of the run's own data, such as test:0.
            output: Picture to write, .png; the numbers go beside it, .json.
            target: Output to explain; without it, the most probable one.
            checkpoint: Which parameters.
        """
        if output.suffix != ".png":
            raise UserError(f"{output}: expected a name that ends in .png")
        from cmamba_jax.deploy.pretrained import load_model
        from cmamba_jax.train import explain, figures

        run = load_model(run_dir, which=checkpoint)
        result = explain.explain(run, *run.sample(input), target=target)
        output.write_bytes(figures.to_png(result.draw()))
        output.with_suffix(".json").write_text(json.dumps(result.to_dict()) + "\n", encoding="utf-8")
        shares = "  ".join(f"{name} {100 * share:.0f}%" for name, share in result.shares().items())
        print(f"{result.target}: logit {result.logit:.4f}; contributions: {shares}")
        print(f"written to {output} and {output.with_suffix('.json')}")

    tyro.cli(run, args=words, prog="cmamba explain")


def export(words: list[str]) -> None:
    """Runs `cmamba export` with the words after it."""

    def run(
        run_dir: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        folder: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
        /,
        format: Literal["pretrained", "stablehlo"] = "pretrained",
        dtype: Literal["float32", "bfloat16"] | None = None,
        length: int | None = None,
        checkpoint: Literal["best", "last"] = "best",
    ) -> None:
        """Write a trained model for others; needs `pip install "cmamba-jax[hub]"`.

        Args:
            run_dir: Folder of the run, such as runs/watch/001.
            folder: Folder to write.
            format: "pretrained": model.safetensors, config.json and a model card, which the other commands read;
                "stablehlo": a function of the inputs that runs on CPU, CUDA and TPU with JAX alone.
            dtype: Of the stored parameters ("pretrained").
            length: Length of the sequences ("stablehlo").
            checkpoint: Which parameters.
        """
        from cmamba_jax.deploy import artefact, pretrained

        if (format == "stablehlo") != (length is not None) or (format == "stablehlo" and dtype is not None):
            raise UserError("--length belongs to --format stablehlo, which needs it; --dtype to --format pretrained")
        run = pretrained.load_model(run_dir, which=checkpoint)
        if length is not None:
            artefact.save(run, folder, length=length)
        else:
            pretrained.save(run, folder, dtype=dtype)
            from cmamba_jax.deploy.hub import PretrainedModel

            PretrainedModel(run).generate_model_card().save(folder / "README.md")
        print(f"written to {folder}")

    tyro.cli(run, args=words, prog="cmamba export")


def convert(words: list[str]) -> None:
    """Runs `cmamba convert` with the words after it."""

    def run(
        checkpoint: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
        folder: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
        /,
    ) -> None:
        """Convert a state dict of the published Coupled Mamba into a folder like those of `cmamba export`.

        Args:
            checkpoint: State dict, .safetensors, or .pt where PyTorch is installed.
            folder: Folder to write.
        """
        from cmamba_jax.deploy import pretrained, published

        print(f"written to {pretrained.save(published.convert(published.read(checkpoint)), folder)}")

    tyro.cli(run, args=words, prog="cmamba convert")


def stream(words: list[str]) -> None:
    """Runs `cmamba stream` with the words after it."""

    def run(
        run_dir: Annotated[pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
        /,
        port: int | None = None,
        max_delay: int = 0,
        state: pathlib.Path | None = None,
        checkpoint: Literal["best", "last"] = "best",
    ) -> None:
        """Answer live samples step by step, with constant memory.

        One JSON object a line: {"accelerometer": [0.1, 9.8, 0.3], "gyroscope": [0, 0, 1]} is the next step; what is
        not named is missing. With "time": 17, the number of the step, samples may come in several lines and late.
        {"restart": true} starts a new sequence, {"finish": true} ends one.

        Args:
            run_dir: Folder of the run, such as runs/watch/001, or of an exported model.
            port: Listen on this port of 127.0.0.1 (0: a free one) instead of reading stdin; a stream a connection.
            max_delay: Steps that a sample may come late, with "time".
            state: File to go on from where it exists, and to write at the end of stdin (also after Ctrl-C).
            checkpoint: Which parameters.
        """
        from cmamba_jax.deploy import jsonlines
        from cmamba_jax.deploy.pretrained import load_model
        from cmamba_jax.deploy.streaming import StreamingSession

        if state is not None and port is not None:
            raise UserError("--state belongs to one stream on stdin; leave --port or --state out")
        run = load_model(run_dir, which=checkpoint)
        session = StreamingSession(run, max_delay=max_delay)
        jsonlines.check_names(session)
        if port is not None:
            with jsonlines.Server(port, lambda: StreamingSession(run, max_delay=max_delay)) as server:
                print(f"listening on 127.0.0.1:{server.server_address[1]}", file=sys.stderr, flush=True)
                server.serve_forever()
        if state is not None and state.exists():
            session.load(state)
        try:
            for line in jsonlines.reply(session, jsonlines.read_lines(sys.stdin.buffer), finish=state is None):
                print(line, end="", flush=True)
        finally:
            if state is not None:
                session.save(state)

    tyro.cli(run, args=words, prog="cmamba stream")
