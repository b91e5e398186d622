"""The law in plain torch: what every kernel of this project must compute.

Readable before fast: one loop over segments, no tricks, any floating dtype up to float64. The
upper half holds the pieces on dense tensors (spectrogram of explicit attention rows, EMA,
normalisation, recency, scorers); the lower half the ragged ops with the names, argument order
and mutation semantics of :mod:`namm_ext.ops`, on the values of :mod:`namm_ext.values`. Dead rows
are never read; in results they are zero.

Arithmetic runs in the dtype of the state or of the keys, at least float32. ``round_to`` (here
only, not in the kernels) repeats the roundings of the original's bfloat16 attention.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .values import Segments, Window

N_FFT = 32
HOP = 16
CARRY = N_FFT - HOP
NUM_BINS = N_FFT // 2 + 1
NUM_RECENCY = 8
NUM_FEATURES = NUM_RECENCY + NUM_BINS
HIDDEN = 32
RECENCY_MAX_FREQ = 50000.0
MIN_STD = 1e-7
LOG_CLAMP = 20.0

#: Name and shape of each block of the flat BAM vector, in order; weights are ``[in][out]``.
BAM_LAYOUT: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("W1", (NUM_FEATURES, 3 * HIDDEN)),
    ("b1", (3 * HIDDEN,)),
    ("W2", (HIDDEN, 2 * NUM_FEATURES)),
    ("b2", (2 * NUM_FEATURES,)),
    ("W3", (NUM_FEATURES, 1)),
    ("b3", (1,)),
)
NUM_BAM_PARAMS = sum(math.prod(shape) for _, shape in BAM_LAYOUT)


class Statistics(NamedTuple):
    """Mean, biased variance and number of samples, one value per frequency bin."""

    mean: Tensor
    var: Tensor
    num: Tensor


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


# Pieces on dense tensors ------------------------------------------------------------------------


def group_mean(attn: Tensor, num_groups: int, round_to: torch.dtype | None = None) -> Tensor:
    """Average the attention of the query heads that share a KV head (spec 1.2).

    Query head ``h * G + g`` belongs to KV head ``h``; the sum runs in float32 or above.

    Args:
        attn: ``[..., H * G, rows, K]`` probabilities.
        num_groups: G.
        round_to: dtype the mean is rounded to, as the original does with bfloat16 attention.

    Returns:
        ``[..., H, rows, K]`` in the compute dtype; with ``round_to``, its values are rounded.

    Example:
        >>> group_mean(torch.tensor([[[1.0]], [[0.0]]]), 2)
        tensor([[[0.5000]]])
    """
    mean = attn.to(_compute_dtype(attn)).unflatten(-3, (-1, num_groups)).mean(dim=-3)
    return _round(mean, round_to)


def _round(x: Tensor, round_to: torch.dtype | None) -> Tensor:
    return x if round_to is None else x.to(round_to).to(x.dtype)


def hann_window(dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Periodic Hann window ``w(m) = (1 - cos(2 pi m / 32)) / 2`` (spec 2).

    Example:
        >>> hann_window()[[0, 8, 16]]
        tensor([0.0000, 0.5000, 1.0000])
    """
    m = torch.arange(N_FFT, dtype=torch.float64, device=device)
    return (0.5 * (1.0 - torch.cos(2.0 * math.pi * m / N_FFT))).to(dtype)


def spectrogram_from_attention(attn: Tensor, tail: Tensor | None = None) -> Tensor:
    """Magnitudes of the windowed Fourier transform of the attention each key received (spec 2).

    ``Y_f(k) = |sum_m w(m) x(16 f + m) exp(-2 pi i k m / 32)|``, where ``x`` is the key's column
    with its last 16 values of the previous period in front. No centring, no scaling.

    Args:
        attn: ``[..., n_up, K]`` group-averaged probabilities, query rows oldest first.
        tail: ``[..., K, 16]`` previous period's last 16 values of each key, or None for zeros.

    Returns:
        ``[..., n_up / 16, K, 17]``, float32 or above.

    Raises:
        ValueError: if n_up is not a positive multiple of 16 or the tail has another shape.

    Example:
        >>> constant = torch.full((32, 1), 0.5)
        >>> mags = spectrogram_from_attention(constant, torch.full((1, 16), 0.5))
        >>> mags.shape, [round(v, 4) for v in mags[0, 0, :3].tolist()]
        (torch.Size([2, 1, 17]), [8.0, 4.0, 0.0])
    """
    n_up = attn.shape[-2]
    if n_up == 0 or n_up % HOP:
        raise ValueError(
            f"spectrogram_from_attention: attn must have a positive multiple of {HOP} rows, "
            f"got {n_up}"
        )
    series = attn.to(_compute_dtype(attn)).transpose(-1, -2)
    tail_shape = (*series.shape[:-1], CARRY)
    if tail is None:
        tail = series.new_zeros(tail_shape)
    if tail.shape != tail_shape:
        raise ValueError(
            f"spectrogram_from_attention: tail must be {list(tail_shape)}, got {list(tail.shape)}"
        )
    x = torch.cat([tail.to(series.dtype), series], dim=-1)
    frames = x.unfold(-1, N_FFT, HOP)  # [..., K, F, 32]
    window = hann_window(x.dtype, x.device)
    if frames.numel() == 0:  # an empty segment; MKL refuses to transform zero rows
        return x.new_zeros(*frames.shape[:-1], NUM_BINS).transpose(-2, -3)
    magnitudes = torch.fft.rfft(frames * window).abs()
    return magnitudes.transpose(-2, -3)


def fold_ema(magnitudes: Tensor, ema: Tensor, ema_coeff: float) -> Tensor:
    """Fold the frames of one period into the running average (spec 3).

    ``E = (1 - a) sum_f a^(F-1-f) Y_f + a^F E_old`` with ``a = ema_coeff ** 16``; powers are taken
    in double. No bias correction.

    Args:
        magnitudes: ``[..., F, K, 17]``.
        ema: ``[..., K, 17]``, zero for keys born in this period.
        ema_coeff: coefficient per token.

    Returns:
        ``[..., K, 17]`` in the compute dtype of both.

    Example:
        >>> fold_ema(torch.ones(1, 1, 1), torch.zeros(1, 1), 0.5 ** (1 / 16))
        tensor([[0.5000]])
    """
    dtype = _compute_dtype(magnitudes, ema)
    num_frames = magnitudes.shape[-3]
    alpha = ema_coeff**HOP
    powers = [alpha ** (num_frames - 1 - f) for f in range(num_frames)]
    weights = torch.tensor(powers, dtype=dtype, device=magnitudes.device)[:, None, None]
    folded = (1.0 - alpha) * (weights * magnitudes.to(dtype)).sum(dim=-3)
    return folded + alpha**num_frames * ema.to(dtype)


def log_features(ema: Tensor, log_eps: float) -> Tensor:
    """``log(ema + log_eps)``: the feature transform "log", ahead of the normalisation.

    Example:
        >>> log_features(torch.tensor([0.0, 1.0]), 1.0)
        tensor([0.0000, 0.6931])
    """
    return torch.log(ema + log_eps)


def normalise(
    ema: Tensor,
    mean: Tensor,
    var: Tensor,
    log_transform: bool = False,
    log_eps: float = 0.0,
) -> Tensor:
    """Standardise the spectral features: ``(x - mean) / max(sqrt(var), 1e-7)`` (spec 4).

    With ``log_transform`` x is ``log(ema + log_eps)`` and the result is clamped to +-20.

    Args:
        ema: ``[..., 17]``.
        mean: ``[17]``.
        var: ``[17]``, biased variance.
        log_transform: whether to take the logarithm first.
        log_eps: added below the logarithm.

    Returns:
        ``[..., 17]`` in the compute dtype of ``ema``.

    Example:
        >>> normalise(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([4.0]))
        tensor([1.])
    """
    dtype = _compute_dtype(ema)
    x = ema.to(dtype)
    std = var.to(dtype).sqrt().clamp(min=MIN_STD)
    if not log_transform:
        return (x - mean.to(dtype)) / std
    z = (log_features(x, log_eps) - mean.to(dtype)) / std
    return z.clamp(-LOG_CLAMP, LOG_CLAMP)


def batch_statistics(features: Tensor) -> Statistics:
    """Mean and biased variance over all leading dimensions (spec 4, "batch statistics").

    Args:
        features: ``[..., 17]``, every row a valid token of some head.

    Returns:
        ``Statistics`` of ``[17]``, ``[17]`` and a scalar int64 ``num``.

    Example:
        >>> batch_statistics(torch.tensor([[1.0], [3.0]]))
        Statistics(mean=tensor([2.]), var=tensor([1.]), num=tensor(2))
    """
    flat = features.reshape(-1, features.shape[-1])
    num = torch.tensor(flat.shape[0], dtype=torch.int64, device=flat.device)
    if flat.shape[0] == 0:
        zeros = flat.new_zeros(flat.shape[1])
        return Statistics(zeros, zeros.clone(), num)
    return Statistics(flat.mean(dim=0), flat.var(dim=0, correction=0), num)


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """Merge two sets of statistics (spec 4): exact for mean and biased variance.

    ``p = na / (na + nb)``, ``q = 1 - p``, ``mean = p ma + q mb``,
    ``var = p va + q vb + p q (mb - ma)^2``; the divisor is at least 1.

    Example:
        >>> one = batch_statistics(torch.tensor([[1.0]]))
        >>> three = batch_statistics(torch.tensor([[3.0]]))
        >>> merge_statistics(one, three)
        Statistics(mean=tensor([2.]), var=tensor([1.]), num=tensor(2))
    """
    num = a.num + b.num
    p = a.num.to(a.mean.dtype) / num.clamp(min=1).to(a.mean.dtype)
    q = 1.0 - p
    mean = p * a.mean + q * b.mean
    var = p * a.var + q * b.var + p * q * (b.mean - a.mean) ** 2
    return Statistics(mean, var, num)


def recency_embedding(ages: Tensor, offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sines and cosines of the age of a token (spec 5).

    ``f_j = 50000 ** (-j / 4)``; ``[sin(a f_0..3), cos(a f_0..3)]`` with ``a = age + offset``,
    taken in float64 and cast. No upper limit on the age (the original's table ends at 32768).

    Args:
        ages: ``[...]`` integers, newest position minus own position.
        offset: 0 in the published runs; the original calls it ``start_recency_from``.
        dtype: of the result.

    Returns:
        ``[..., 8]``.

    Example:
        >>> recency_embedding(torch.tensor([0]))
        tensor([[0., 0., 0., 0., 1., 1., 1., 1.]])
    """
    half = NUM_RECENCY // 2
    exponents = torch.arange(half, dtype=torch.float64, device=ages.device) / half
    angles = (ages.to(torch.float64) + offset)[..., None] * RECENCY_MAX_FREQ**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def split_params(
    params: Tensor, layout: tuple[tuple[str, tuple[int, ...]], ...] = BAM_LAYOUT
) -> dict[str, Tensor]:
    """Views of a flat vector (or bank ``[P, n]``) by name, in the published layout (spec 6.1).

    Raises:
        ValueError: if the last dimension is not the size of the layout.

    Example:
        >>> {name: tuple(t.shape) for name, t in split_params(torch.zeros(4172)).items()}
        {'W1': (25, 96), 'b1': (96,), 'W2': (32, 50), 'b2': (50,), 'W3': (25, 1), 'b3': (1,)}
    """
    sizes = [math.prod(shape) for _, shape in layout]
    if params.shape[-1] != sum(sizes):
        raise ValueError(f"params must have {sum(sizes)} numbers, got {params.shape[-1]}")
    parts = params.split(sizes, dim=-1)
    return {
        name: part.unflatten(-1, shape) for (name, shape), part in zip(layout, parts, strict=True)
    }


def bam(x: Tensor, params: Tensor, keymask: Tensor | None = None) -> Tensor:
    """Score tokens with the backward attention memory (spec 6.1).

    ``[q|k|v] = x W1 + b1``; token i attends to itself and to newer tokens (j >= i);
    ``[r|m] = o W2 + b2``; ``score = (x * (1 + m) + r) W3 + b3``.

    Args:
        x: ``[..., K, 25]`` features in cache order; leading dimensions are independent.
        params: ``[4172]``.
        keymask: ``[K]``, 0 for padding that nobody may attend to.

    Returns:
        ``[..., K]`` in the dtype of ``x``.

    Example:
        >>> bam(torch.ones(2, 25), torch.zeros(4172))
        tensor([0., 0.])
    """
    w = split_params(params.to(x.dtype))
    q, k, v = (x @ w["W1"] + w["b1"]).split(HIDDEN, dim=-1)
    num_keys = x.shape[-2]
    index = torch.arange(num_keys, device=x.device)
    visible = index[None, :] >= index[:, None]
    if keymask is not None:
        visible = visible & keymask.to(torch.bool)
    logits = q @ k.transpose(-1, -2) / math.sqrt(HIDDEN)
    # The original adds finfo(float32).min: a row without any visible key averages all keys.
    logits = logits + torch.where(visible, 0.0, torch.finfo(torch.float32).min).to(x.dtype)
    out = torch.softmax(logits, dim=-1) @ v
    residual, gain = (out @ w["W2"] + w["b2"]).split(NUM_FEATURES, dim=-1)
    return ((x * (1.0 + gain) + residual) @ w["W3"] + w["b3"]).squeeze(-1)


def mlp_layout(hidden: int, depth: int, bias: bool) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Blocks of the flat vector of an MLP scorer: per layer the weight ``[in][out]``, then bias.

    Example:
        >>> mlp_layout(25, 1, False)
        (('W1', (25, 1)),)
    """
    widths = [NUM_FEATURES, *([hidden] * (depth - 1)), 1]
    layout: list[tuple[str, tuple[int, ...]]] = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
        layout.append((f"W{i}", (fan_in, fan_out)))
        if bias:
            layout.append((f"b{i}", (fan_out,)))
    return tuple(layout)


def num_mlp_params(hidden: int, depth: int, bias: bool) -> int:
    """Size of the flat vector of an MLP scorer.

    Example:
        >>> num_mlp_params(25, 2, True)
        676
    """
    return sum(math.prod(shape) for _, shape in mlp_layout(hidden, depth, bias))


def mlp(
    x: Tensor,
    params: Tensor,
    hidden: int = 25,
    depth: int = 1,
    bias: bool = False,
    residual_first: bool = False,
) -> Tensor:
    """Score tokens one by one with a small ReLU network (spec 6.2).

    Depth 1 is a linear map. Kept from the original: layers 2 .. depth - 1 discard their linear
    map and compute ``h + relu(h)``, so their parameters are dead.

    Args:
        x: ``[..., 25]`` features.
        params: ``[num_mlp_params(hidden, depth, bias)]``.
        hidden: width of the hidden layers.
        depth: number of layers, at least 1.
        bias: whether each layer has a bias behind its weight.
        residual_first: add the input to the first hidden layer; needs ``hidden == 25``.

    Returns:
        ``[...]`` in the dtype of ``x``.

    Example:
        >>> mlp(torch.ones(25), torch.full((25,), 2.0))
        tensor(50.)
    """
    w = split_params(params.to(x.dtype), mlp_layout(hidden, depth, bias))

    def linear(i: int, h: Tensor) -> Tensor:
        out = h @ w[f"W{i}"]
        return out + w[f"b{i}"] if bias else out

    h = x
    if depth > 1:
        h = torch.relu(linear(1, x))
        if residual_first:
            h = x + h
        for _ in range(depth - 2):
            h = h + torch.relu(h)
    return linear(depth, h).squeeze(-1)


def rope_ntk_inv_freq(
    head_dim: int,
    base: float,
    factor: float,
    alpha: float = 1.0,
    *,
    round_to_bf16: bool = False,
) -> Tensor:
    """Inverse frequencies of the original's static NTK change of base (spec 8).

    ``base' = base * (alpha * factor - (alpha - 1)) ** (d / (d - 2))``, used from position 0 on
    whatever the length.

    Args:
        head_dim: d.
        base: ``rope_theta`` of the model.
        factor: of the rope_scaling entry; for the manual mode see :func:`rope_manual_inv_freq`.
        alpha: of the rope_scaling entry.
        round_to_bf16: the original's trainer casts this buffer to bfloat16 by accident, and its
            published memories were evolved that way.

    Returns:
        ``[head_dim / 2]`` float32.

    Example:
        >>> rope_ntk_inv_freq(4, 100.0, 1.0)
        tensor([1.0000, 0.1000])
    """
    base = base * (alpha * factor - (alpha - 1.0)) ** (head_dim / (head_dim - 2))
    # Powers in float32, as transformers takes them: an ulp is 4e-3 rad at position 32767.
    inv_freq = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return _round(inv_freq, torch.bfloat16 if round_to_bf16 else None)


def rope_manual_inv_freq(
    head_dim: int, base: float, factor: float, max_positions: int, seqlen: int
) -> Tensor:
    """Inverse frequencies of the original's "manual" dynamic mode, fixed before generation.

    The base grows by ``(factor * T / max_positions - (factor - 1)) ** (d / (d - 2))`` if the
    expected length T exceeds ``max_positions``; mode "max" is ``T = factor * max_positions``.

    Example:
        >>> rope_manual_inv_freq(4, 100.0, 2.0, max_positions=64, seqlen=64)
        tensor([1.0000, 0.1000])
    """
    if seqlen <= max_positions:
        return rope_ntk_inv_freq(head_dim, base, 1.0)
    return rope_ntk_inv_freq(head_dim, base, seqlen / max_positions, alpha=factor)


# Ragged ops ---------------------------------------------------------------------------------------


def append_(
    segments: Segments,
    k_new: Tensor,
    v_new: Tensor,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
) -> None:
    """Put new tokens behind the live rows of their segments, in place.

    Row b brings columns ``[first[b], first[b] + num_new[b])``; the i-th of them gets position
    ``pos_first[b] + i`` and a zero state.

    Args:
        segments: the store, written, all but ``cu_seqlens_k``.
        k_new: ``[B, H, L, D]``; v_new: ``[B, H, L, Dv]``.
        first, num_new, pos_first: ``[B]`` int32.

    Raises:
        ValueError: if a slot has no room for its new rows.
    """
    num_heads = k_new.shape[1]
    for s, live in enumerate(segments.slices()):
        b, h = divmod(s, num_heads)
        n, c = int(num_new[b]), int(first[b])
        room = int(segments.cu_seqlens_k[s + 1]) - live.stop
        if n > room:
            raise ValueError(f"append_: segment {s} must have room for {n} rows, got {room}")
        new, columns = slice(live.stop, live.stop + n), slice(c, c + n)
        segments.k[new] = k_new[b, h, columns]
        segments.v[new] = v_new[b, h, columns]
        segments.pos[new] = pos_first[b] + torch.arange(n, device=segments.pos.device)
        segments.state[new] = 0
        segments.seqused_k[s] += n


def record_(
    q_window: Tensor,
    lse_window: Tensor,
    q: Tensor,
    lse: Tensor,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
) -> None:
    """Put new queries and their log-sum-exps into the window of their layer, in place.

    The query at position p goes to window row ``16 + p % n_up``.

    Args:
        q_window: ``[B, H * G, 16 + n_up, D]``; lse_window: ``[B, H * G, 16 + n_up]``, written.
        q: ``[B, H * G, L, D]``; lse: ``[B, H * G, L]``.
        first, num_new, pos_first: ``[B]`` int32.

    Raises:
        ValueError: if the queries of a row go past the end of its period.
    """
    n_up = q_window.shape[2] - CARRY
    for b in range(q.shape[0]):
        n, c, begin = int(num_new[b]), int(first[b]), int(pos_first[b]) % n_up
        if begin + n > n_up:
            raise ValueError(
                f"record_: row {b} must have at most {n_up - begin} queries up to its next update, "
                f"got {n}"
            )
        rows, columns = slice(CARRY + begin, CARRY + begin + n), slice(c, c + n)
        q_window[b, :, rows] = q[b, :, columns]
        lse_window[b, :, rows] = lse[b, :, columns]


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """Logits bounded as in Gemma 2 (arXiv:2408.00118): ``softcap * tanh(logits / softcap)``.

    Args:
        logits: before any mask.
        softcap: positive, or 0 for no bound.
    """
    return logits if softcap == 0 else softcap * torch.tanh(logits / softcap)


def _logits(
    q: Tensor, k: Tensor, scale: float, softcap: float, round_to: torch.dtype | None
) -> Tensor:
    """``q k^T * scale`` over the last dimension, soft-capped, rounded after each step if asked."""
    dtype = _compute_dtype(q, k)
    product = _round(q.to(dtype) @ k.to(dtype).transpose(-1, -2), round_to)
    return _round(soft_cap(_round(product * scale, round_to), softcap), round_to)


def attend_(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    segments: Segments,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    round_to: torch.dtype | None = None,
) -> None:
    """Softmax attention of new queries over the ragged segments, causal by position, in place.

    Query column c of row b stands at ``pos_first[b] + c - first[b]`` and sees live rows with
    ``pos <=`` that. Columns outside ``[first, first + num_new)`` are left untouched. A query
    that sees nothing gets ``out = 0`` and ``lse = -inf``.

    Args:
        out: ``[B, L, H * G, Dv]``, written. lse: ``[B, H * G, L]`` natural log, written.
        q: ``[B, H * G, L, D]`` after RoPE. segments: the store, new keys included.
        first, num_new, pos_first: ``[B]`` int32.
        softmax_scale: usually ``D ** -0.5``.
        softcap: bound of the logits (:func:`soft_cap`), 0 for none.
        round_to: round logits and probabilities as the original does in that dtype.
    """
    batch_size, num_heads = q.shape[0], q.shape[1]
    num_kv_heads = segments.seqused_k.numel() // batch_size
    groups = num_heads // num_kv_heads
    for s, live in enumerate(segments.slices()):
        b, h = divmod(s, num_kv_heads)
        n, c = int(num_new[b]), int(first[b])
        heads, columns = slice(h * groups, (h + 1) * groups), slice(c, c + n)
        keys, pos = segments.k[live], segments.pos[live]
        logits = _logits(q[b, heads, columns], keys, softmax_scale, softcap, round_to)  # [G, n, K]
        query_pos = int(pos_first[b]) + torch.arange(n, device=pos.device)
        visible = pos[None, :] <= query_pos[:, None]
        logits = logits.masked_fill(~visible, -torch.inf)
        row_lse = torch.logsumexp(logits, dim=-1)
        probs = torch.where(visible, torch.exp(logits - row_lse[..., None]), 0.0)
        values = _round(probs, round_to) @ segments.v[live].to(probs.dtype)
        out[b, columns, heads] = values.transpose(0, 1).to(out.dtype)
        lse[b, heads, columns] = row_lse.to(lse.dtype)


def attend(
    q: Tensor,
    segments: Segments,
    first: Tensor,
    num_new: Tensor,
    pos_first: Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attend_` into new tensors: out zeros, lse -inf where nothing is written.

    Returns:
        ``out [B, L, H * G, Dv]`` in the dtype of ``q`` and ``lse [B, H * G, L]``, float32 or
        float64 as the compute dtype.
    """
    batch_size, num_heads, num_cols, _ = q.shape
    out = q.new_zeros(batch_size, num_cols, num_heads, segments.v.shape[-1])
    lse = q.new_full((batch_size, num_heads, num_cols), -torch.inf, dtype=_compute_dtype(q))
    attend_(
        out, lse, q, segments, first, num_new, pos_first,
        softmax_scale=softmax_scale, softcap=softcap, round_to=round_to,
    )  # fmt: skip
    return out, lse


def _window_attention(
    window: Window,
    segments: Segments,
    s: int,
    live: slice,
    num_kv_heads: int,
    softmax_scale: float,
    softcap: float,
    round_to: torch.dtype | None,
) -> Tensor:
    """Group mean of the recomputed probabilities of one segment, ``[W, K]``.

    ``P[i, t] = exp(cap(q_i . k_t * scale) - lse_i)`` if ``pos[t] <= pos_q + i`` else exactly 0.
    """
    b, h = divmod(s, num_kv_heads)
    groups = window.q.shape[1] // num_kv_heads
    heads = slice(h * groups, (h + 1) * groups)
    pos = segments.pos[live]
    logits = _logits(window.q[b, heads], segments.k[live], softmax_scale, softcap, round_to)
    row_pos = int(window.pos_q[b]) + torch.arange(window.q.shape[2], device=pos.device)
    visible = pos[None, :] <= row_pos[:, None]
    log_probs = logits - window.lse[b, heads, :, None].to(logits.dtype)
    probs = torch.where(visible, torch.exp(log_probs), 0.0)
    return group_mean(_round(probs, round_to), groups, round_to).squeeze(0)


def spectrogram(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    ema_coeff: float,
    softcap: float = 0.0,
    round_to: torch.dtype | None = None,
) -> Tensor:
    """New spectral state of every live token after a period (spec 2 and 3).

    The attention of the window's queries is recomputed from their log-sum-exps, so the 16 rows
    of left context need no storage per token.

    Args:
        window: of 16 + n_up rows. segments: the store, with 17 numbers of state per token; the
            state of rows that are not active is copied.
        softmax_scale, softcap: as in attention. ema_coeff: per token.
        round_to: round logits, probabilities and group mean as the original's attention dtype.

    Returns:
        ``[C, 17]`` in the dtype of ``state``.
    """
    state = segments.state
    num_kv_heads = segments.seqused_k.numel() // window.q.shape[0]
    new_state = torch.zeros_like(state)
    for s, live in enumerate(segments.slices()):
        if not window.active[s // num_kv_heads]:
            new_state[live] = state[live]
            continue
        attn = _window_attention(
            window, segments, s, live, num_kv_heads, softmax_scale, softcap, round_to
        )
        magnitudes = spectrogram_from_attention(attn[CARRY:], attn[:CARRY].T)
        new_state[live] = fold_ema(magnitudes, state[live], ema_coeff).to(state.dtype)
    return new_state


def attention_received(
    window: Window,
    segments: Segments,
    *,
    softmax_scale: float,
    first_row: int,
    softcap: float = 0.0,
) -> Tensor:
    """Attention each live token received: the group mean summed over rows ``first_row`` ....

    Args:
        window, segments, softmax_scale, softcap: as in :func:`spectrogram`, with any state.
        first_row: first window row that counts, in ``[0, 16 + n_up]``; 16 skips the left context.

    Returns:
        ``[C]``, float32 (float64 for float64 keys); zero for inactive rows.

    Raises:
        ValueError: if first_row lies outside the window.
    """
    num_rows = window.q.shape[2]
    if not 0 <= first_row <= num_rows:
        raise ValueError(
            f"attention_received: first_row must be in [0, {num_rows}], got {first_row}"
        )
    k = segments.k
    num_kv_heads = segments.seqused_k.numel() // window.q.shape[0]
    received = torch.zeros(segments.capacity, dtype=_compute_dtype(k), device=k.device)
    for s, live in enumerate(segments.slices()):
        if window.active[s // num_kv_heads]:
            attn = _window_attention(
                window, segments, s, live, num_kv_heads, softmax_scale, softcap, None
            )
            received[live] = attn[first_row:].sum(dim=0)
    return received


def token_features(
    state: Tensor, pos: Tensor, mean: Tensor, var: Tensor, log_transform: bool, log_eps: float
) -> Tensor:
    """Scorer input of one segment: recency first, then the normalised bins (spec 5).

    Args:
        state: ``[K, 17]``; pos: ``[K]``, increasing, so the last one is the newest.
        mean, var, log_transform, log_eps: as in :func:`normalise`.

    Returns:
        ``[K, 25]`` in the compute dtype of the state.
    """
    z = normalise(state, mean, var, log_transform, log_eps)
    return torch.cat([recency_embedding(pos[-1:] - pos, dtype=z.dtype), z], dim=-1)


def _check_param_index(op: str, params: Tensor, param_index: Tensor) -> None:
    bad = [i for i in param_index.tolist() if not 0 <= i < params.shape[0]]
    if bad:
        raise ValueError(f"{op}: param_index must be in [0, {params.shape[0]}), got {bad[0]}")


def bam_scores(
    segments: Segments,
    params: Tensor,
    param_index: Tensor,
    mean: Tensor,
    var: Tensor,
    active: Tensor,
    *,
    log_transform: bool,
    log_eps: float,
) -> Tensor:
    """One BAM score per live token (spec 4, 5, 6.1).

    Args:
        segments: the store, with 17 numbers of state per token.
        params: ``[P, 4172]`` bank; row b uses vector ``param_index[b]``. param_index: ``[B]``.
        mean, var: ``[17]``. active: ``[B]`` bool.
        log_transform, log_eps: as in :func:`normalise`.

    Returns:
        ``[C]`` in the compute dtype of ``state``; zero for inactive rows.

    Raises:
        ValueError: if param_index points outside the bank or params has another width.
    """
    _check_param_index("bam_scores", params, param_index)
    state, pos = segments.state, segments.pos
    num_kv_heads = segments.seqused_k.numel() // param_index.numel()
    scores = torch.zeros(segments.capacity, dtype=_compute_dtype(state), device=state.device)
    for s, live in enumerate(segments.slices()):
        b = s // num_kv_heads
        if active[b]:
            x = token_features(state[live], pos[live], mean, var, log_transform, log_eps)
            scores[live] = bam(x, params[param_index[b]])
    return scores


def mlp_scores(
    segments: Segments,
    params: Tensor,
    param_index: Tensor,
    mean: Tensor,
    var: Tensor,
    active: Tensor,
    *,
    log_transform: bool,
    log_eps: float,
    hidden: int,
    depth: int,
    bias: bool,
    residual_first: bool,
) -> Tensor:
    """One MLP score per live token (spec 4, 5, 6.2).

    Args:
        segments .. log_eps: as in :func:`bam_scores`.
        params: ``[P, num_mlp_params(hidden, depth, bias)]``.
        hidden, depth, bias, residual_first: as in :func:`mlp`.

    Returns:
        ``[C]`` in the compute dtype of ``state``; zero for inactive rows.

    Raises:
        ValueError: if param_index points outside the bank or params has another width.
    """
    _check_param_index("mlp_scores", params, param_index)
    state, pos = segments.state, segments.pos
    num_kv_heads = segments.seqused_k.numel() // param_index.numel()
    scores = torch.zeros(segments.capacity, dtype=_compute_dtype(state), device=state.device)
    for s, live in enumerate(segments.slices()):
        b = s // num_kv_heads
        if active[b]:
            x = token_features(state[live], pos[live], mean, var, log_transform, log_eps)
            scores[live] = mlp(x, params[param_index[b]], hidden, depth, bias, residual_first)
    return scores


def gate_inputs(
    k: Tensor, v: Tensor, *, rotary_dim: int, interleaved: bool = False, eps: float = 1e-6
) -> Tensor:
    """What the linear gate sees of a token: keys and values of all KV heads (spec 12.2).

    RoPE turns the first R = ``rotary_dim`` dimensions of a key in pairs: dimension i with i + R / 2
    (half-split), or 2 i with 2 i + 1 (interleaved). ``m_h`` is the length of each of the R / 2
    pairs, which no position changes, then the other D - R dimensions as they are. The inputs,
    each block for all heads in order::

        m_h | log(length of each pair + eps) | v_h | log(|v_h| + eps) | log(|k_h| + eps)

    Args:
        k: ``[..., H, D]`` keys after RoPE. v: ``[..., H, Dv]``.
        rotary_dim: R, even, in ``[0, D]``; 0 without RoPE.
        interleaved: whether neighbours are pairs (GPT-J) instead of halves (Llama).
        eps: added below the logarithms.

    Returns:
        ``[..., H * (D + Dv + 2)]`` in the compute dtype; R / 2 + (D - R) + R / 2 is D.

    Raises:
        ValueError: if rotary_dim is odd or outside of ``[0, D]``.

    Example:
        >>> k, v = torch.tensor([[3.0, 4.0, -2.0]]), torch.tensor([[2.0]])
        >>> gate_inputs(k, v, rotary_dim=2)[:2]
        tensor([ 5., -2.])
    """
    if rotary_dim % 2 or not 0 <= rotary_dim <= k.shape[-1]:
        raise ValueError(
            f"gate_inputs: rotary_dim must be even and in [0, {k.shape[-1]}], got {rotary_dim}"
        )
    dtype = _compute_dtype(k, v)
    k, v = k.to(dtype), v.to(dtype)
    turned, half = k[..., :rotary_dim], rotary_dim // 2
    if interleaved:
        pairs = torch.hypot(turned[..., 0::2], turned[..., 1::2])
    else:
        pairs = torch.hypot(turned[..., :half], turned[..., half:])
    blocks = (
        torch.cat([pairs, k[..., rotary_dim:]], dim=-1),
        torch.log(pairs + eps),
        v,
        torch.log(v.norm(dim=-1, keepdim=True) + eps),
        torch.log(k.norm(dim=-1, keepdim=True) + eps),
    )
    return torch.cat([block.flatten(-2) for block in blocks], dim=-1)


def gate_(
    segments: Segments,
    active: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    num_new: int,
    rotary_dim: int,
    interleaved: bool = False,
    eps: float = 1e-6,
) -> None:
    """Linear gate of the newest tokens into the last column of the state, in place (spec 12.2).

    ``g_h = weight[h] . x + bias[h]`` with x of :func:`gate_inputs`.

    Args:
        segments: the store; the last of at least one state column is written.
        active: ``[B]`` bool; the other batch rows stay as they are.
        weight: ``[H, H * (D + Dv + 2)]``. bias: ``[H]``.
        num_new: newest live rows of every segment to work on; the heads of a batch row hold the
            same tokens there.
        rotary_dim, interleaved, eps: as in :func:`gate_inputs`.

    Raises:
        ValueError: if an active batch row has a head with fewer live rows, or heads that differ in
            the positions of those rows. Nothing has been written then.
    """
    num_kv_heads = segments.seqused_k.numel() // active.numel()
    slices = segments.slices()
    all_rows = []
    for b in active.nonzero().flatten().tolist():
        heads = range(b * num_kv_heads, (b + 1) * num_kv_heads)
        for s in heads:
            if slices[s].stop - slices[s].start < num_new:
                raise ValueError(
                    f"gate_: segment {s} must have {num_new} live rows, "
                    f"got {slices[s].stop - slices[s].start}"
                )
        newest = torch.arange(-num_new, 0, device=segments.pos.device)
        rows = torch.stack([slices[s].stop + newest for s in heads])  # [H, num_new]
        if not bool((segments.pos[rows] == segments.pos[rows[0]]).all()):
            raise ValueError(
                f"gate_: the newest {num_new} rows of batch row {b} must have equal positions in "
                "all heads"
            )
        all_rows.append(rows)
    dtype = _compute_dtype(segments.k, segments.state)
    for rows in all_rows:
        k, v = segments.k[rows].transpose(0, 1), segments.v[rows].transpose(0, 1)
        x = gate_inputs(k, v, rotary_dim=rotary_dim, interleaved=interleaved, eps=eps).to(dtype)
        gate = x @ weight.to(dtype).T + bias.to(dtype)  # [num_new, H]
        segments.state[rows, -1] = gate.T.to(segments.state.dtype)


def _keep_order(forced: Tensor, newest: Tensor, scores: Tensor, pos: Tensor) -> Tensor:
    """Rows from first to last to stay; rows must come in ascending order of the head.

    Forced rows first (a segment's newest before the others), then score descending, then
    position descending, then head ascending.
    """
    order = torch.arange(scores.numel(), device=scores.device)
    # Stable sorts, least significant key first. Adding 0 makes -0 and +0 one value.
    for key in (pos, scores + 0.0, forced.to(torch.int8), newest.to(torch.int8)):
        order = order[torch.sort(key[order], descending=True, stable=True).indices]
    return order


def select(
    scores: Tensor,
    segments: Segments,
    active: Tensor,
    *,
    threshold: float,
    cache_size: int,
    budget: str,
    fill: bool,
    protect_newest: bool,
    sink_tokens: int,
    recent_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Decide which live rows stay (spec 7; ``SelectParams`` in params.h).

    Candidates are rows with ``score >= threshold`` and forced rows: each segment's newest
    (``protect_newest``), ``pos < sink_tokens``, ``newest - pos < recent_tokens``. A budget keeps
    the first of them in the order forced (newest before others), score descending, position
    descending, head ascending. ``fill`` is the released code's rule.

    Args:
        scores: ``[C]``; segments: the store, of which the keys do not matter here.
        active: ``[B]`` bool; inactive rows keep everything.
        threshold: ``-inf`` for none. -0 counts as 0.
        cache_size: -1 for none.
        budget: "per_head": at most cache_size per segment. "per_layer": at most
            ``cache_size * H`` per batch row, shared by its segments.
        fill: every segment of a row keeps R = the largest count among them, filled up in the
            same order; only with "per_head".
        protect_newest, sink_tokens, recent_tokens: forced rows.

    Returns:
        ``keep [C]`` uint8, 1 for rows that stay, and ``num_kept [S]`` int32. A segment with a
        NaN score has num_kept -1; then keep means nothing and the caller raises.

    Raises:
        ValueError: for an unknown budget, or ``fill`` with "per_layer".

    Example:
        >>> k = torch.zeros(3, 0)
        >>> store = Segments(k, k, torch.arange(3), k, torch.tensor([0, 3]), torch.tensor([3]))
        >>> keep, num_kept = select(
        ...     torch.tensor([1.0, -1.0, -2.0]), store, torch.tensor([True]),
        ...     threshold=0.0, cache_size=-1, budget="per_head", fill=False,
        ...     protect_newest=True, sink_tokens=0, recent_tokens=0)
        >>> keep.tolist(), num_kept.tolist()
        ([1, 0, 1], [2])
    """
    if budget not in ("per_head", "per_layer"):
        raise ValueError(f"select: budget must be 'per_head' or 'per_layer', got {budget!r}")
    if fill and budget == "per_layer":
        raise ValueError("select: fill must be False with budget 'per_layer', got True")
    pos = segments.pos
    num_segments = segments.seqused_k.numel()
    num_kv_heads = num_segments // active.numel()
    keep = torch.zeros(scores.shape[0], dtype=torch.uint8, device=scores.device)
    num_kept = torch.zeros(num_segments, dtype=torch.int32, device=scores.device)
    all_rows = list(enumerate(segments.slices()))
    for b, is_active in enumerate(active.tolist()):
        heads = all_rows[b * num_kv_heads : (b + 1) * num_kv_heads]
        if not is_active:
            for s, live in heads:
                keep[live] = 1
                num_kept[s] = live.stop - live.start
            continue
        poisoned = [s for s, live in heads if bool(scores[live].isnan().any())]
        heads = [(s, live) for s, live in heads if s not in poisoned]
        num_kept[poisoned] = -1

        orders, counts, newest_rows, forced_rows = [], [], [], []
        for _, live in heads:
            p = pos[live]
            newest = torch.zeros_like(p, dtype=torch.bool)
            newest[-1:] = protect_newest
            forced = newest | (p < sink_tokens) | (p[-1:] - p < recent_tokens)
            newest_rows.append(newest)
            forced_rows.append(forced)
            orders.append(_keep_order(forced, newest, scores[live], p))
            counts.append(int((forced | (scores[live] >= threshold)).sum()))

        if budget == "per_layer" and cache_size >= 0 and heads:
            rows = torch.cat([torch.arange(c.start, c.stop, device=pos.device) for _, c in heads])
            forced, newest = torch.cat(forced_rows), torch.cat(newest_rows)
            candidate = forced | (scores[rows] >= threshold)
            order = _keep_order(forced, newest, scores[rows], pos[rows])
            order = order[candidate[order]][: cache_size * num_kv_heads]
            keep[rows[order]] = 1
        else:
            if cache_size >= 0:
                counts = [min(n, cache_size) for n in counts]
            if fill:
                counts = [max(counts)] * len(counts)
            # Candidates lead the order, because forced rows and scores >= threshold sort first.
            for (_, live), order, n in zip(heads, orders, counts, strict=True):
                keep[live.start + order[:n]] = 1
        for s, live in heads:
            num_kept[s] = int(keep[live].sum())
    return keep, num_kept


def compact(
    segments: Segments,
    keep: Tensor,
    num_kept: Tensor,
    cu_seqlens_new: Tensor,
    *,
    capacity: int,
) -> Segments:
    """Copy the kept rows of every segment, in order, into a new store with its own slots.

    Args:
        segments: the old store.
        keep: ``[C]`` uint8; num_kept: ``[S]``, the number of ones among the live rows.
        cu_seqlens_new: ``[S + 1]`` slots of the new store, each at least num_kept long.
        capacity: rows of the new store, ``cu_seqlens_new[S]``.

    Returns:
        The new store, with ``cu_seqlens_new`` and ``num_kept`` as its layout.

    Raises:
        ValueError: if num_kept disagrees with keep or a slot is too short.
    """
    new = tuple(x.new_zeros(capacity, *x.shape[1:]) for x in segments.tokens)
    starts = cu_seqlens_new.tolist()
    for s, live in enumerate(segments.slices()):
        rows = live.start + torch.nonzero(keep[live]).squeeze(-1)
        n = rows.numel()
        if n != int(num_kept[s]):
            raise ValueError(f"compact: num_kept[{s}] must be {n}, got {int(num_kept[s])}")
        if starts[s] + n > starts[s + 1]:
            raise ValueError(
                f"compact: slot {s} must hold {n} rows, got {starts[s + 1] - starts[s]}"
            )
        for target, source in zip(new, segments.tokens, strict=True):
            target[starts[s] : starts[s] + n] = source[rows]
    return Segments._make((*new, cu_seqlens_new, num_kept))
