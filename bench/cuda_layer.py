"""One Llama-3-8B layer for the CUDA benchmarks: its timer, its inputs, its plain rivals."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from namm_ext import ops, reference
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only

HEADS, GROUPS, DIM, N_UP, LAYERS = 8, 4, 128, 512, 32
SCALE = DIM**-0.5
ROTATE_BYTES = 160 << 20
DTYPE = torch.bfloat16
#: From this sum of powers on the row kernel scores a token (kMaxDenominator in bam.cuh).
BAM_LIMIT = 1e18


class Timer:
    """Times calls on the GPU, or once on the CPU if there is none."""

    def __init__(self, device: str, smoke: bool) -> None:
        self.device, self.smoke = device, smoke
        self.copy_bytes_per_ms = math.nan

    def __call__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> float:
        """Median milliseconds of ``function(*inputs)``."""
        if self.device == "cpu":
            start = time.perf_counter()
            function(*inputs)
            return (time.perf_counter() - start) * 1e3
        size = sum(t.nbytes for t in tree_leaves(inputs) if isinstance(t, Tensor))
        copies = 1 if self.smoke else min(8, max(1, math.ceil(ROTATE_BYTES / max(size, 1))))
        sets = [inputs]
        sets += [tree_map_only(Tensor, Tensor.clone, inputs) for _ in range(copies - 1)]
        for args in sets[:3]:
            function(*args)
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*inputs)
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        calls = 1 if self.smoke else int(min(30, max(5, 0.5 / once)))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
        torch.cuda._sleep(int(2e6 + calls * 2e5))  # the host enqueues all calls meanwhile
        for i in range(calls):
            events[2 * i].record()
            function(*sets[i % copies])
            events[2 * i + 1].record()
        torch.cuda.synchronize()
        times = [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(calls)]
        return statistics.median(times)

    def measure_copy(self) -> None:
        """Copy bandwidth in bytes read plus written per millisecond."""
        num_bytes = 1 << (20 if self.smoke else 30)
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.copy_bytes_per_ms = 2 * num_bytes / self(lambda a, b: b.copy_(a), (source, target))

    def bytes_floor(self, num_bytes: float) -> float:
        """Milliseconds that moving so many bytes takes."""
        return num_bytes / self.copy_bytes_per_ms


class Layer(NamedTuple):
    """One layer's full window, and its store with N live rows per head."""

    window: Window
    store: Segments


def make_layer(lengths: list[int], device: str, n_up: int = N_UP, seed: int = 0) -> Layer:
    gen = torch.Generator(device).manual_seed(seed)
    rand: dict[str, Any] = {"generator": gen, "device": device}
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    capacity, rows = ends[-1], reference.CARRY + n_up
    k = torch.randn(capacity, DIM, **rand).to(DTYPE)
    v = torch.randn(capacity, DIM, **rand).to(DTYPE)
    longest = max(lengths)
    pos = torch.cat([torch.arange(longest - n, longest, **int32) for n in lengths])
    q = torch.randn(1, HEADS * GROUPS, rows, DIM, **rand).to(DTYPE)
    # Log-sum-exps of about the right size; the time does not depend on them.
    lse = torch.full((1, HEADS * GROUPS, rows), math.log(longest) + 0.5, device=device)
    state = torch.rand(capacity, 17, **rand)
    active = torch.tensor([True], device=device)
    return Layer(
        Window(q, lse, torch.tensor([longest - rows], **int32), active),
        Segments(k, v, pos, state, torch.tensor(ends, **int32), torch.tensor(lengths, **int32)),
    )


def spectrogram(window: Window, store: Segments) -> Tensor:
    return ops.spectrogram(window, store, softmax_scale=SCALE, ema_coeff=0.99)


def received(window: Window, store: Segments) -> Tensor:
    return ops.attention_received(window, store, softmax_scale=SCALE, first_row=reference.CARRY)


def plain_received(window: Window, store: Segments) -> Tensor:
    return plain_attention(window, store)[:, reference.CARRY :].sum(1).flatten()


def plain_attention(window: Window, store: Segments) -> Tensor:
    """``[HEADS, rows, N]``: dense attention of equally long heads, the mean over each group."""
    q, lse, pos_q, _ = window
    k, pos = store.k, store.pos
    rows, n = q.shape[2], k.shape[0] // HEADS
    logits = q.view(HEADS, GROUPS, rows, DIM) @ k.view(HEADS, 1, n, DIM).transpose(-1, -2) * SCALE
    attn = (logits.float() - lse.view(HEADS, GROUPS, rows, 1)).exp_()
    row_pos = pos_q + torch.arange(rows, device=k.device)
    hidden = pos.view(HEADS, 1, 1, n) > row_pos[:, None]
    return attn.masked_fill_(hidden, 0.0).mean(1)


def plain_spectrogram(window: Window, store: Segments) -> Tensor:
    """The features as one first writes them in PyTorch, without a loop over heads."""
    state = store.state
    columns = plain_attention(window, store).transpose(-1, -2).flatten(0, 1)
    frames = torch.stft(
        columns, reference.N_FFT, reference.HOP, window=reference.hann_window(device=state.device),
        center=False, return_complex=True,
    ).abs()  # fmt: skip
    alpha, count = 0.99**reference.HOP, frames.shape[-1]
    weight = alpha ** torch.arange(count - 1, -1, -1, dtype=torch.float32, device=state.device)
    return (1 - alpha) * (frames @ weight) + alpha**count * state


def score_args(
    layer: Layer, device: str, num_params: int = reference.NUM_BAM_PARAMS
) -> tuple[Any, ...]:
    gen = torch.Generator(device).manual_seed(1)
    params = torch.randn(1, num_params, generator=gen, device=device) * 0.1
    index = torch.zeros(1, dtype=torch.int32, device=device)
    mean, var = torch.full((17,), 0.5, device=device), torch.full((17,), 0.1, device=device)
    return layer.store, params, index, mean, var, layer.window.active


def redone_share(
    store: Segments, params: Tensor, param_index: Tensor, mean: Tensor, var: Tensor, _: Tensor
) -> float:
    """Share of the live rows that ``bam_scores`` does again in float on CUDA.

    By the rule of its kernel, from unrounded numbers: the sum of ``2^(z_i.x_j - z_i.x_i)`` leaves
    the range, or a feature of the token or of a newer one leaves fp16.
    """
    redone = total = 0
    weights = reference.split_params(params[int(param_index[0])])
    for live in store.slices():
        x = reference.token_features(store.state[live], store.pos[live], mean, var, False, 1e-6)
        q, k, _v = (x @ weights["W1"] + weights["b1"]).split(reference.HIDDEN, dim=-1)
        large = (x.abs() > torch.finfo(torch.float16).max).any(-1).nonzero()
        newest_large = int(large.max()) if large.numel() else -1
        for start in range(0, x.shape[0], 1024):
            logits = q[start : start + 1024] @ k[start:].T / math.sqrt(reference.HIDDEN)
            sums = (logits - logits.diagonal()[:, None]).exp().triu().sum(-1)
            seen = torch.arange(start, start + len(sums), device=sums.device) <= newest_large
            redone += int((~(sums <= BAM_LIMIT) | seen).sum())
        total += x.shape[0]
    return redone / max(total, 1)


def check_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raises ArithmeticError if the relative L2 error is larger, or a value is NaN."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not error <= tolerance:
        raise ArithmeticError(f"{name} differs from its rival: relative error {error:.1e}")


def flash(device: str) -> Any:
    """FlashAttention where there is one to choose, so that the rival is the same everywhere."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else contextlib.nullcontext()
