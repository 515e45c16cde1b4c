"""The published networks in float64 numpy, step by step, from the names and shapes of their PyTorch state dicts."""

import numpy as np


def mamba_block(rng, prefix, f, expand=2, n=4, k=3, r=2):
    """Random tensors of one block, as PyTorch stores them."""
    d = expand * f
    shapes = {
        "mixer.in_proj.weight": (2 * d, f),
        "mixer.conv1d.weight": (d, 1, k),
        "mixer.conv1d.bias": (d,),
        "mixer.x_proj.weight": (r + 2 * n, d),
        "mixer.dt_proj.weight": (d, r),
        "mixer.dt_proj.bias": (d,),
        "mixer.A_log": (d, n),
        "mixer.D": (d,),
        "mixer.out_proj.weight": (f, d),
        "norm.weight": (f,),
        "norm.bias": (f,),
    }
    return {f"{prefix}.{name}": draw(rng, shape) for name, shape in shapes.items()}


def draw(rng, shape):
    return rng.normal(scale=0.6, size=shape).astype(np.float32)


def coupled_mamba(rng, *, f=8, n_layers=3, dims=None, generation=2):
    """A random state dict of the published Coupled Mamba; generation 1 shares the blocks among the modalities."""
    dims = dims or {"audio": 5, "vision": 3, "text": 6}
    tensors = {}
    for i in range(n_layers):
        for prefix in [f"layers.{i}"] if generation == 1 else [f"mamba_branches.{b}.{i}" for b in range(3)]:
            tensors |= mamba_block(rng, prefix, f)
    for m, width in dims.items():
        encoder = f"{m}_{'linear' if generation == 1 else 'projection'}.fc"
        for j, shape in ((0, (256, width)), (1, (256,)), (3, (f, 256)), (4, (f,))):
            tensors |= {f"{encoder}.{j}.weight": draw(rng, shape), f"{encoder}.{j}.bias": draw(rng, shape[:1])}
        tensors |= {f"resnet_{m}.dense.weight": draw(rng, (f, 2 * f)), f"resnet_{m}.dense.bias": draw(rng, (f,))}
        tensors |= {f"resnet_{m}.out_proj.weight": draw(rng, (f, 9)), f"resnet_{m}.out_proj.bias": draw(rng, (f,))}
    head = "regression" if generation == 1 else "regression_head"
    tensors |= {f"{head}.dense.weight": draw(rng, (4, f)), f"{head}.dense.bias": draw(rng, (4,))}
    tensors |= {f"{head}.out_proj.weight": draw(rng, (1, 4)), f"{head}.out_proj.bias": draw(rng, (1,))}
    tensors |= {"norm_f.weight": draw(rng, (f,)), "norm_f.bias": draw(rng, (f,))}
    for name in ("audio", "visual", "text"):
        tensors[f"weight_{name}"] = draw(rng, (1,))
        if generation == 1:
            tensors[f"weight_{name}_inner"] = rng.uniform(0.5, 2, 1).astype(np.float32)
    return tensors


def silu(x):
    return x / (1 + np.exp(-x))


def layer_norm(x, t, prefix):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed * t[f"{prefix}.weight"] + t[f"{prefix}.bias"]


def linear(x, t, prefix):
    return x @ t[f"{prefix}.weight"].T + t.get(f"{prefix}.bias", 0)


def mixer(x, t, prefix):
    """x [B, L, F] through LayerNorm and Mamba's mixer."""
    x = layer_norm(x, t, f"{prefix}.norm")
    u, z = np.split(linear(x, t, f"{prefix}.mixer.in_proj"), 2, axis=-1)
    kernel = t[f"{prefix}.mixer.conv1d.weight"][:, 0]
    padded = np.pad(u, ((0, 0), (kernel.shape[1] - 1, 0), (0, 0)))
    conv = sum(padded[:, j : j + u.shape[1]] * kernel[:, j] for j in range(kernel.shape[1]))
    u = silu(conv + t[f"{prefix}.mixer.conv1d.bias"])
    a_log = t[f"{prefix}.mixer.A_log"]
    n, r = a_log.shape[1], t[f"{prefix}.mixer.dt_proj.weight"].shape[1]
    dt, b, c = np.split(linear(u, t, f"{prefix}.mixer.x_proj"), [r, r + n], axis=-1)
    dt = np.logaddexp(0, linear(dt, t, f"{prefix}.mixer.dt_proj"))
    h, y = np.zeros((len(x), *a_log.shape)), np.empty_like(u)
    for i in range(x.shape[1]):
        h = np.exp(-dt[:, i, :, None] * np.exp(a_log)) * h + (dt[:, i] * u[:, i])[..., None] * b[:, i, None]
        y[:, i] = (h * c[:, i, None]).sum(-1)
    y = (y + u * t[f"{prefix}.mixer.D"]) * silu(z)
    return linear(y, t, f"{prefix}.mixer.out_proj")


def run_coupled_mamba(tensors, inputs, generation):
    """Predictions [B, 1] for modality -> [B, L, F]."""
    t = {name: values.astype(np.float64) for name, values in tensors.items()}
    names, streams = ("audio", "vision", "text"), []
    for m in names:
        fc = f"{m}_{'linear' if generation == 1 else 'projection'}.fc"
        hidden = np.maximum(layer_norm(linear(inputs[m].astype(np.float64), t, f"{fc}.0"), t, f"{fc}.1"), 0)
        streams.append(layer_norm(linear(hidden, t, f"{fc}.3"), t, f"{fc}.4"))
    n_layers = sum(name.endswith("A_log") for name in t) // (1 if generation == 1 else 3)
    for i in range(n_layers):
        prefixes = [f"layers.{i}"] * 3 if generation == 1 else [f"mamba_branches.{b}.{i}" for b in range(3)]
        outs = [e + layer_norm(mixer(e, t, p), t, "norm_f") for e, p in zip(streams, prefixes, strict=True)]
        if i < n_layers - 1:
            others = [np.concatenate([outs[j] for j in range(3) if j != m], -1) for m in range(3)]
            streams = [o + linear(x, t, f"resnet_{m}.dense") for o, x, m in zip(outs, others, names, strict=True)]
    pooled = [o.max(1) for o in outs]
    if generation == 1:
        weights = np.array([t[f"weight_{m}_inner"][0] for m in ("audio", "visual", "text")])
    else:
        weights = np.exp([t[f"weight_{m}"][0] for m in ("audio", "visual", "text")])
    fused = sum(w * p for w, p in zip(weights / weights.sum(), pooled, strict=True))
    head = "regression" if generation == 1 else "regression_head"
    return linear(np.maximum(linear(fused, t, f"{head}.dense"), 0), t, f"{head}.out_proj")


def mamba(rng, *, f=6, n_layers=2):
    """A random state dict of a Mamba language model with LayerNorm."""
    tensors = {"backbone.embedding.weight": draw(rng, (11, f)), "lm_head.weight": draw(rng, (11, f))}
    for i in range(n_layers):
        tensors |= mamba_block(rng, f"backbone.layers.{i}", f)
    return tensors | {"backbone.norm_f.weight": draw(rng, (f,)), "backbone.norm_f.bias": draw(rng, (f,))}


def run_mamba(tensors, x):
    """Features [B, L, F] of embeddings [B, L, F]: the backbone's output."""
    t = {name.removeprefix("backbone."): values.astype(np.float64) for name, values in tensors.items()}
    for i in range(sum(name.endswith("A_log") for name in t)):
        x = x + mixer(x, t, f"layers.{i}")
    return layer_norm(x, t, "norm_f")
