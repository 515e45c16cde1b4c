"""Why a model says what it says of one sequence: contributions of the modalities over time."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from matplotlib.figure import Figure

from cmamba_jax.batch import Batch
from cmamba_jax.errors import UserError
from cmamba_jax.train import figures
from cmamba_jax.train.inference import Run
from cmamba_jax.train.state import Params, split_model
from pallas_kernels.coupled_scan.trace import Trace, recording, trace


@dataclasses.dataclass(frozen=True)
class Course:
    """What one scan of the model does over time; see `pallas_kernels.coupled_scan.trace.Trace`.

    Attributes:
        layer: index of the layer.
        direction: "forward" or "backward" in time.
        energy: mean square of the states of each modality, float32 [M, T].
        flow: what modality m (first axis) reads that stems from modality j (second axis), float32 [M, M, T]. Off the
            diagonal it went through the coupling of the states; ``released`` couples between the layers instead.
    """

    layer: int
    direction: str
    energy: np.ndarray
    flow: np.ndarray


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One sequence of L samples, that is T = ceil(L / frame) steps of the model.

    Attributes:
        modalities: names, in the order of axis M.
        target: name of the output that is explained.
        logit: its value.
        baseline: its value for inputs that are zero after normalisation, the mean of the training data.
        attribution: integrated gradients, float32 [M, L]: how much each sample contributes to logit - baseline, to
            which they add up.
        courses: the scans, layer by layer.
        label: the prediction, see `Prediction.labels`.
    """

    modalities: tuple[str, ...]
    target: str
    logit: float
    baseline: float
    attribution: np.ndarray
    courses: tuple[Course, ...]
    label: tuple

    def shares(self) -> dict[str, float]:
        """Share of each modality in the absolute attribution; they add up to 1."""
        totals = np.abs(self.attribution).sum(axis=1)
        return dict(zip(self.modalities, (totals / max(totals.sum(), 1e-30)).tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = dataclasses.asdict(self) | {"shares": self.shares(), "attribution": self.attribution.tolist()}
        values["courses"] = [
            dataclasses.asdict(c) | {"energy": c.energy.tolist(), "flow": c.flow.tolist()} for c in self.courses
        ]
        return values

    def draw(self, theme: figures.Theme = figures.LIGHT) -> Figure:
        """Attribution, state energy and coupling flow over time, as colours."""
        names = self.modalities
        panels = {f"contribution to \u201c{self.target}\u201d (integrated gradients)": (names, self.attribution)}
        several = len({c.direction for c in self.courses}) > 1
        for c in self.courses:
            where = f"layer {c.layer + 1}" + (f", {c.direction}" if several else "")
            panels[f"state energy, {where}"] = (names, c.energy)
            pairs = [(to, by) for to in range(len(names)) for by in range(len(names)) if to != by]
            if c.flow.size and any(c.flow[pair].any() for pair in pairs):
                labels = [f"{names[by]} \u2192 {names[to]}" for to, by in pairs]
                panels[f"coupling flow, {where}"] = (labels, np.stack([c.flow[pair] for pair in pairs]))
        length, steps = self.attribution.shape[1], self.courses[0].energy.shape[1]
        unit = "step" if length == steps else f"sample (above) or frame of {-(-length // steps)} samples"
        return figures.over_time(panels, theme, time_label=unit)

    def _repr_png_(self) -> bytes:
        """The picture, where a notebook shows the explanation."""
        return figures.to_png(self.draw(), dpi=90)


def explain(
    run: Run,
    inputs: Mapping[str, npt.ArrayLike],
    masks: Mapping[str, npt.ArrayLike] | None = None,
    *,
    target: str | int | None = None,
    step: int = -1,
    points: int = 256,
) -> Explanation:
    """Explains one output for one sequence.

    Args:
        run: the trained model.
        inputs: modality -> raw [L, F].
        masks: modality -> bool [L], False where it is missing.
        target: name or index of the output; None: that of the largest logit.
        step: for predictions per step, which one.
        points: of the path from zero to the inputs at which gradients are taken (Sundararajan et al. 2017,
            arXiv 1703.01365).

    Raises:
        UserError: there is no such output or step.
        DataError: the inputs do not fit the model.
    """
    batch = run.batch(inputs, masks)
    names = run.info.label_names or tuple(f"output_{k}" for k in range(run.info.task.n_outputs))
    graphdef, params = split_model(run.model)
    logits, traces = _follow(graphdef, params, batch)
    logits = np.asarray(logits[0], np.float32)
    if run.info.task.per == "step":
        if not -len(logits) <= step < len(logits):
            raise UserError(f"step {step}: the sequence has {len(logits)} steps")
        logits = logits[step]
    k = int(logits.argmax()) if target is None else _index(target, names)
    parts, baseline = _integrated_gradients(graphdef, params, batch, k, step, points)
    scans = [(i, direction) for i, block in enumerate(run.model.blocks) for direction in block.ssms()]
    courses = []
    for (layer, direction), found in zip(scans, traces, strict=True):
        energy, flow = np.asarray(found.energy[:, 0]), np.asarray(found.flow[:, :, 0])
        if direction == "backward":
            energy, flow = np.flip(energy, -1), np.flip(flow, -1)
        courses.append(Course(layer, direction, energy, flow))
    return Explanation(
        run.model.modalities,
        names[k],
        float(logits[k]),
        float(baseline),
        np.stack([np.asarray(parts[m][0]) for m in run.model.modalities]),
        tuple(courses),
        run.interpret(logits)[1],
    )


def _index(target: str | int, names: tuple[str, ...]) -> int:
    if target in names:
        return names.index(str(target))
    if isinstance(target, int) and 0 <= target < len(names):
        return target
    raise UserError(f"target {target!r}: expected one of {', '.join(names)}, or 0 to {len(names) - 1}")


@functools.partial(jax.jit, static_argnums=0)
def _follow(graphdef: nnx.GraphDef, params: Params, batch: Batch) -> tuple[jax.Array, list[Trace]]:
    """Logits and the traces of all scans, in the order in which they ran."""
    with recording() as problems:
        logits = nnx.merge(graphdef, params)(batch).logits
    return logits, [trace(problem) for problem in problems]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _integrated_gradients(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, k: jax.Array, step: jax.Array, points: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Attribution of output k to every sample [1, L] of each modality, and the output at zero."""

    def output(inputs: dict[str, jax.Array]) -> jax.Array:
        logits = nnx.merge(graphdef, params)(Batch(inputs=inputs, mask=batch.mask)).logits
        return logits[0, step, k] if logits.ndim == 3 else logits[0, k]

    def scaled(weight: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(lambda x: weight * x, batch.inputs)

    # Midpoints of equal parts; many, since the norms can make the output steep anywhere on the path.
    weights = (jnp.arange(points, dtype=jnp.float32) + 0.5) / points
    grads = jax.lax.map(lambda weight: jax.grad(output)(scaled(weight)), weights, batch_size=16)
    parts = jax.tree.map(lambda x, g: (x * g.mean(0)).sum(-1), batch.inputs, grads)
    return parts, output(scaled(jnp.float32(0)))
