"""The ground truth of the coupled scan's tests: a numpy loop over time, in float64, with its backward derived by hand.

Axes: M modality, B batch, L time, D channel, N state. One step of the recurrence (arXiv 2405.18014, Eq. 5 and 6) is

    p = mix(s)               the state s that enters the step, as each modality sees it
    h = exp(dt A) p + dt x B
    s' = collect(h)          the state that is carried on
    y = (SUM_n C h + D x) SiLU(z)

with mix and collect set by the coupling: the identity (independent), g SUM_i h^i (shared, which carries the sum),
SUM_i W[m, i] h^i (full). Nothing here is written for speed, and nothing is imported from the package under test.
The forward accepts complex inputs, so that complex-step differentiation can check the backward to rounding error.
"""

import numpy as np


def coupled_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    kind,
    parameter=None,
    D=None,
    z=None,
    dt_bias=None,
    mask=None,
    reset=None,
    initial_state=None,
    dt_softplus=True,
    reverse=False,
    readout="per_modality",
):
    """Runs the scan.

    Args:
        x, dt, z: [M, B, L, D].
        A: [M, D, N]. B, C: [M, B, L, N]. D, dt_bias: [M, D].
        kind: "independent", "shared" or "full".
        parameter: log_gain [M, N] (shared), weights [M, M] (full) or None (independent).
        mask: bool [M, B, L]; reset: bool [B, L].
        initial_state: [B, D, N] (shared) or [M, B, D, N].

    Returns:
        y [M, B, L, D], final_state, and vjp(y_bar, final_bar) -> dict of the gradients of every input that was given.
    """
    m, b, length, d = x.shape
    n = A.shape[-1]
    keep = np.ones((m, b, length), bool) if mask is None else np.asarray(mask)
    reset = np.zeros((b, length), bool) if reset is None else np.asarray(reset)
    awake = keep.any(axis=0)  # [B, L]: at least one modality is present
    x, dt, B, C = (_where(keep, v) for v in (x, dt, B, C))
    gate = np.ones(x.shape) if z is None else _silu(_where(keep, z))
    skip = np.zeros((m, d)) if D is None else D
    dt_raw = dt if dt_bias is None else dt + dt_bias[:, None, None, :]
    dt_eff = _where(keep, np.log1p(np.exp(dt_raw)) if dt_softplus else dt_raw)

    state_shape = (b, d, n) if kind == "shared" else (m, b, d, n)
    dtype = np.result_type(
        np.float64, x, dt_raw, A, B, C, skip, gate, *(v for v in (parameter, initial_state) if v is not None)
    )
    state = np.zeros(state_shape, dtype) if initial_state is None else initial_state.astype(dtype)
    y = np.zeros(x.shape, dtype)
    linear = np.zeros(x.shape, dtype)  # y before the gate
    entering, hidden = [None] * length, [None] * length
    order = range(length - 1, -1, -1) if reverse else range(length)

    for t in order:
        s = np.where(reset[:, t, None, None], 0, state)
        a = np.exp(dt_eff[:, :, t, :, None] * A[:, None])
        u = (dt_eff * x)[:, :, t, :, None] * B[:, :, t, None, :]
        h = a * _mix(kind, parameter, s, m) + u
        read = h if readout == "per_modality" else np.broadcast_to(h.sum(0), h.shape)
        linear[:, :, t] = np.einsum("mbn,mbdn->mbd", C[:, :, t], read) + skip[:, None] * x[:, :, t]
        y[:, :, t] = np.where(keep[:, :, t, None], linear[:, :, t] * gate[:, :, t], 0)
        state = np.where(awake[:, t, None, None], _collect(kind, h), s)
        entering[t], hidden[t] = s, h

    def vjp(y_bar, final_bar):
        bar = {"x": np.zeros(x.shape), "dt": np.zeros(x.shape), "A": np.zeros(A.shape)}
        bar |= {"B": np.zeros(B.shape), "C": np.zeros(C.shape), "D": np.zeros((m, d)), "z": np.zeros(x.shape)}
        bar["parameter"] = None if parameter is None else np.zeros(parameter.shape)
        y_bar = _where(keep, y_bar)
        state_bar = np.array(final_bar, np.float64)

        for t in reversed(order):
            s, h, x_t, dt_t = entering[t], hidden[t], x[:, :, t], dt_eff[:, :, t]
            a = np.exp(dt_t[..., None] * A[:, None])
            up = awake[:, t, None, None]

            # Output: y = (C read + D x) gate.
            linear_bar = y_bar[:, :, t] * gate[:, :, t]
            if z is not None:
                bar["z"][:, :, t] = y_bar[:, :, t] * linear[:, :, t] * _silu_slope(_where(keep, z)[:, :, t])
            bar["D"] += (linear_bar * x_t).sum(1)
            bar["x"][:, :, t] = linear_bar * skip[:, None]
            read = h if readout == "per_modality" else np.broadcast_to(h.sum(0), h.shape)
            bar["C"][:, :, t] = np.einsum("mbd,mbdn->mbn", linear_bar, read)
            read_bar = np.einsum("mbd,mbn->mbdn", linear_bar, C[:, :, t])
            h_bar = read_bar if readout == "per_modality" else np.broadcast_to(read_bar.sum(0), read_bar.shape)

            # Recurrence: h = a mix(s) + u; a sample with no modality present hands its state through.
            h_bar = h_bar + np.where(up, state_bar, 0)  # for shared, collect = SUM_m: every h^m gets the same
            a_bar = h_bar * _mix(kind, parameter, s, m) * a  # adjoint of dt A
            bar["A"] += np.einsum("mbdn,mbd->mdn", a_bar, dt_t)
            dt_bar = np.einsum("mbdn,mdn->mbd", a_bar, A) + np.einsum("mbdn,mbn->mbd", h_bar, B[:, :, t]) * x_t
            bar["dt"][:, :, t] = np.where(keep[:, :, t, None], dt_bar, 0)
            bar["x"][:, :, t] += np.einsum("mbdn,mbn->mbd", h_bar, B[:, :, t]) * dt_t
            bar["B"][:, :, t] = np.einsum("mbdn,mbd->mbn", h_bar, dt_t * x_t)
            parameter_bar, s_bar = _mix_vjp(kind, parameter, s, np.where(up, h_bar * a, 0))
            if parameter is not None:
                bar["parameter"] += parameter_bar
            s_bar = np.where(up, s_bar, state_bar)
            state_bar = np.where(reset[:, t, None, None], 0, s_bar)

        if dt_softplus:
            bar["dt"] *= 1 / (1 + np.exp(-dt_raw))
        bar["dt_bias"] = bar["dt"].sum((1, 2))
        bar["initial_state"] = state_bar
        given = {"D": D, "z": z, "dt_bias": dt_bias, "parameter": parameter, "initial_state": initial_state}
        return {name: value for name, value in bar.items() if given.get(name, value) is not None}

    return y, state, vjp


def _where(keep, value):
    return np.where(keep[..., None], value, 0)


def _silu(v):
    return v / (1 + np.exp(-v))


def _silu_slope(v):
    sigmoid = 1 / (1 + np.exp(-v))
    return sigmoid * (1 + v * (1 - sigmoid))


def _mix(kind, parameter, s, m):
    """The entering state as each modality sees it, [M, B, D, N]."""
    if kind == "shared":
        return np.exp(parameter)[:, None, None, :] * s
    if kind == "full":
        return np.einsum("mi,ibdn->mbdn", parameter, s)
    return s


def _mix_vjp(kind, parameter, s, p_bar):
    """Gradients of _mix for its parameter and its state."""
    if kind == "shared":
        gain = np.exp(parameter)
        return gain * np.einsum("mbdn,bdn->mn", p_bar, s), np.einsum("mn,mbdn->bdn", gain, p_bar)
    if kind == "full":
        return np.einsum("mbdn,ibdn->mi", p_bar, s), np.einsum("mi,mbdn->ibdn", parameter, p_bar)
    return None, p_bar


def _collect(kind, h):
    return h.sum(0) if kind == "shared" else h
