"""The Triton kernels. All arithmetic is float32; tiles are [M, N, D block], axes of size 1 where nothing varies.

P2M and P2N are M and N filled up to powers of two, BD the channels of a block. KIND: 0 independent, 1 shared, 2 full.
Arrays that a problem lacks come as a single element that is never read (SKIP, GATE, FLAGS say so). `flags` are
[B, L, M + 2]: M of presence, whether no modality is present, whether the state is kept (no reset).
"""

import triton
import triton.language as tl


@triton.jit
def _softplus(v):
    # The hardware's logarithm is exact to 2**-22 near 1 in absolute terms only: log(1 + e) = 2 atanh(e / (2 + e)).
    e = tl.exp(-tl.abs(v))
    s = e / (2.0 + e)
    q = s * s
    series = (((((1 / 11) * q + 1 / 9) * q + 1 / 7) * q + 1 / 5) * q + 1 / 3) * q + 1.0
    return tl.maximum(v, 0.0) + 2.0 * s * series


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _sum(values, axis: tl.constexpr):
    return tl.sum(values, axis=axis, keep_dims=True)


@triton.jit
def _mix(s, weights, KIND: tl.constexpr):
    """What each modality reads of the entering states [S, N, D]; the gain of `shared` is part of the decay."""
    if KIND == 2:
        return tl.sum(weights * s[None, :, :, :], axis=1)
    else:
        return s


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _indices(M: tl.constexpr, D: tl.constexpr, N: tl.constexpr, P2M: tl.constexpr, P2N: tl.constexpr, BD: tl.constexpr):
    m = tl.arange(0, P2M)[:, None, None]
    n = tl.arange(0, P2N)[None, :, None]
    d = tl.program_id(1) * BD + tl.arange(0, BD)[None, None, :]
    return m, n, d, m < M, n < N, d < D


@triton.jit
def _presence(flags, b, t, m, m_ok, L: tl.constexpr, M: tl.constexpr, FLAGS: tl.constexpr):
    """Which modalities are present, [M, 1, 1]; whether none is; whether the state is kept."""
    if FLAGS:
        row = flags + (b * L + t) * (M + 2)
        present = (tl.load(row + m, mask=m_ok, other=0.0) > 0) & m_ok
        return present, tl.load(row + M) > 0, tl.load(row + M + 1) > 0
    else:
        return m_ok, False, True


@triton.jit
def _weights(parameter, M: tl.constexpr, P2M: tl.constexpr, KIND: tl.constexpr):
    """W [M, M, 1, 1] of `full`."""
    if KIND == 2:
        i = tl.arange(0, P2M)[:, None, None, None]
        j = tl.arange(0, P2M)[None, :, None, None]
        return _load(parameter, i * M + j, (i < M) & (j < M))
    else:
        return 0.0


@triton.jit
def _log_gain(parameter, m, n, mn_ok, N: tl.constexpr, KIND: tl.constexpr):
    """Log g [M, N, 1] of `shared`."""
    if KIND == 1:
        return _load(parameter, m * N + n, mn_ok)
    else:
        return 0.0


@triton.jit
def _step(x, dt, B, s, A, weights, log_gain, real, KIND: tl.constexpr):
    """Decay a (with the gain), what is read of the entering states, and h."""
    a = tl.where(real, tl.exp(dt * A + log_gain), 0.0)
    mixed = _mix(s, weights, KIND)
    return a, mixed, a * mixed + (dt * x) * B


@triton.jit
def _collect(h, s, idle, KIND: tl.constexpr, FLAGS: tl.constexpr):
    after = _sum(h, 0) if KIND == 1 else h
    return tl.where(idle, s, after) if FLAGS else after


@triton.jit
def _step_size(raw, bias, present, SOFTPLUS: tl.constexpr):
    v = raw + bias
    return tl.where(present, _softplus(v) if SOFTPLUS else v, 0.0)


@triton.jit
def forward(
    x_p, dt_p, A_p, B_p, C_p, parameter_p, D_p, z_p, bias_p, flags_p, state_p,
    y_p, final_p, saved_p,
    M: tl.constexpr, B: tl.constexpr, L: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    P2M: tl.constexpr, P2N: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, KIND: tl.constexpr,
    SHARED_READOUT: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    FLAGS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Writes y, the final state, and (SAVE) the state entering each segment, [segments, S, B, N, D]."""
    b = tl.program_id(0).to(tl.int64)
    m, n, d, m_ok, n_ok, d_ok = _indices(M, D, N, P2M, P2N, BD)
    mn_ok, md_ok, real = m_ok & n_ok, m_ok & d_ok, m_ok & n_ok & d_ok
    A = _load(A_p, (m * D + d) * N + n, real)
    bias = _load(bias_p, m * D + d, md_ok)
    skip = _load(D_p, m * D + d, md_ok) if SKIP else 0.0
    weights = _weights(parameter_p, M, P2M, KIND)
    log_gain = _log_gain(parameter_p, m, n, mn_ok, N, KIND)
    S: tl.constexpr = 1 if KIND == 1 else M
    chain = m * 0 if KIND == 1 else m
    if KIND == 1:
        chain = tl.arange(0, 1)[:, None, None]
    s_ok = (chain < S) & n_ok & d_ok
    s = _load(state_p, ((chain * B + b) * D + d) * N + n, s_ok)

    for t in range(L):
        if SAVE:
            if t % SEGMENT == 0:
                tl.store(saved_p + ((((t // SEGMENT) * S + chain) * B + b) * N + n) * D + d, s, mask=s_ok)
        present, idle, kept = _presence(flags_p, b, t, m, m_ok, L, M, FLAGS)
        row = (m * B + b) * L + t
        x = _load(x_p, row * D + d, present & d_ok)
        dt = _step_size(_load(dt_p, row * D + d, present & d_ok), bias, present & d_ok, SOFTPLUS)
        Bt = _load(B_p, row * N + n, present & n_ok)
        Ct = _load(C_p, row * N + n, present & n_ok)
        if FLAGS:
            s = tl.where(kept, s, 0.0)
        a, mixed, h = _step(x, dt, Bt, s, A, weights, log_gain, real, KIND)
        read = _sum(h, 0) if SHARED_READOUT else h
        y = _sum(Ct * read, 1)
        if SKIP:
            y += skip * x
        if GATE:
            z = _load(z_p, row * D + d, present & d_ok)
            y *= z * _sigmoid(z)
        y = tl.where(present, y, 0.0)
        tl.store(y_p + row * D + d, y.to(y_p.dtype.element_ty), mask=md_ok)
        s = _collect(h, s, idle, KIND, FLAGS)
    tl.store(final_p + ((chain * B + b) * D + d) * N + n, s, mask=s_ok)


@triton.jit
def backward(
    x_p, dt_p, A_p, B_p, C_p, parameter_p, D_p, z_p, bias_p, flags_p, saved_p, dy_p, dfinal_p,
    dx_p, ddt_p, dz_p, dB_p, dC_p, dA_p, dparameter_p, dD_p, dbias_p, dstate_p, entering_p,
    M: tl.constexpr, B: tl.constexpr, L: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    P2M: tl.constexpr, P2N: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, KIND: tl.constexpr,
    SHARED_READOUT: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Writes every gradient; those that are sums over programs as [blocks of channels, ...] or [B, ...]."""
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    m, n, d, m_ok, n_ok, d_ok = _indices(M, D, N, P2M, P2N, BD)
    mn_ok, md_ok, real = m_ok & n_ok, m_ok & d_ok, m_ok & n_ok & d_ok
    A = _load(A_p, (m * D + d) * N + n, real)
    bias = _load(bias_p, m * D + d, md_ok)
    skip = _load(D_p, m * D + d, md_ok) if SKIP else 0.0
    weights = _weights(parameter_p, M, P2M, KIND)
    log_gain = _log_gain(parameter_p, m, n, mn_ok, N, KIND)
    S: tl.constexpr = 1 if KIND == 1 else M
    chain = m
    if KIND == 1:
        chain = tl.arange(0, 1)[:, None, None]
    s_ok = (chain < S) & n_ok & d_ok
    later = _load(dfinal_p, ((chain * B + b) * D + d) * N + n, s_ok)  # adjoint of the state leaving the step

    dA = tl.zeros([P2M, P2N, BD], tl.float32)
    dD = tl.zeros([P2M, 1, BD], tl.float32)
    dbias = tl.zeros([P2M, 1, BD], tl.float32)
    if KIND == 1:
        dparameter = tl.zeros([P2M, P2N, BD], tl.float32)
    if KIND == 2:
        dparameter = tl.zeros([P2M, P2M, P2N, BD], tl.float32)

    segments: tl.constexpr = (L + SEGMENT - 1) // SEGMENT
    for k in range(segments):
        segment = segments - 1 - k
        start = segment * SEGMENT
        steps = tl.minimum(SEGMENT, L - start)
        s = _load(saved_p, (((segment * S + chain) * B + b) * N + n) * D + d, s_ok)
        for i in range(steps):
            t = start + i
            present, idle, kept = _presence(flags_p, b, t, m, m_ok, L, M, FLAGS)
            if FLAGS:
                s = tl.where(kept, s, 0.0)
            tl.store(entering_p + (((i * S + chain) * B + b) * N + n) * D + d, s, mask=s_ok)
            row = (m * B + b) * L + t
            x = _load(x_p, row * D + d, present & d_ok)
            dt = _step_size(_load(dt_p, row * D + d, present & d_ok), bias, present & d_ok, SOFTPLUS)
            Bt = _load(B_p, row * N + n, present & n_ok)
            a, mixed, h = _step(x, dt, Bt, s, A, weights, log_gain, real, KIND)
            s = _collect(h, s, idle, KIND, FLAGS)
        tl.debug_barrier()

        for i in range(steps):
            step = steps - 1 - i
            t = start + step
            present, idle, kept = _presence(flags_p, b, t, m, m_ok, L, M, FLAGS)
            s = _load(entering_p, (((step * S + chain) * B + b) * N + n) * D + d, s_ok)
            row = (m * B + b) * L + t
            here = present & d_ok
            x = _load(x_p, row * D + d, here)
            raw = _load(dt_p, row * D + d, here) + bias
            dt = _step_size(raw, 0.0, here, SOFTPLUS)
            Bt = _load(B_p, row * N + n, present & n_ok)
            Ct = _load(C_p, row * N + n, present & n_ok)
            dy = _load(dy_p, row * D + d, here)
            a, mixed, h = _step(x, dt, Bt, s, A, weights, log_gain, real, KIND)
            read = _sum(h, 0) if SHARED_READOUT else h

            # y = (SUM_n C read + D x) SiLU(z)
            dlinear = dy
            if GATE:
                z = _load(z_p, row * D + d, here)
                sigmoid = _sigmoid(z)
                linear = _sum(Ct * read, 1)
                if SKIP:
                    linear += skip * x
                dz = dy * linear * sigmoid * (1.0 + z * (1.0 - sigmoid))
                tl.store(dz_p + row * D + d, dz.to(dz_p.dtype.element_ty), mask=md_ok)
                dlinear = dy * z * sigmoid
            dx = tl.zeros([P2M, 1, BD], tl.float32)
            if SKIP:
                dD += dlinear * x
                dx += dlinear * skip
            partial = ((block * M + m) * B + b) * L + t
            tl.store(dC_p + partial * N + n, _sum(dlinear * read, 2), mask=mn_ok)
            dh = dlinear * Ct
            if SHARED_READOUT:
                dh = _sum(dh, 0) + tl.zeros([P2M, P2N, BD], tl.float32)

            # h = a mix(s) + dt x B; where no modality is present the state passes through.
            dh += tl.where(idle, 0.0, later) if FLAGS else later
            dmixed = dh * a
            dexponent = dmixed * mixed
            dA += dexponent * dt
            if KIND == 1:
                dparameter += dexponent
                earlier = _sum(dmixed, 0)
            elif KIND == 2:
                dparameter += dmixed[:, None, :, :] * s[None, :, :, :]
                earlier = tl.sum(weights * dmixed[:, None, :, :], axis=0)
            else:
                earlier = dmixed
            if FLAGS:
                later = tl.where(kept, tl.where(idle, later, earlier), 0.0)
            else:
                later = earlier
            along_B = _sum(dh * Bt, 1)
            tl.store(dB_p + partial * N + n, _sum(dh * (dt * x), 2), mask=mn_ok)
            dx += along_B * dt
            ddt = _sum(dexponent * A, 1) + along_B * x
            if SOFTPLUS:
                ddt *= _sigmoid(raw)
            ddt = tl.where(here, ddt, 0.0)
            dx = tl.where(here, dx, 0.0)
            dbias += ddt
            tl.store(dx_p + row * D + d, dx.to(dx_p.dtype.element_ty), mask=md_ok)
            tl.store(ddt_p + row * D + d, ddt.to(ddt_p.dtype.element_ty), mask=md_ok)
        tl.debug_barrier()

    tl.store(dA_p + ((b * M + m) * D + d) * N + n, dA, mask=real)
    tl.store(dD_p + (b * M + m) * D + d, dD, mask=md_ok)
    tl.store(dbias_p + (b * M + m) * D + d, dbias, mask=md_ok)
    tl.store(dstate_p + ((chain * B + b) * D + d) * N + n, later, mask=s_ok)
    cell = block * B + b
    if KIND == 1:
        tl.store(dparameter_p + (cell * M + m) * N + n, _sum(dparameter, 2), mask=mn_ok)
    if KIND == 2:
        i = tl.arange(0, P2M)[:, None, None]
        j = tl.arange(0, P2M)[None, :, None]
        total = _sum(tl.sum(dparameter, axis=3), 2)
        tl.store(dparameter_p + (cell * M + i) * M + j, total, mask=(i < M) & (j < M))
