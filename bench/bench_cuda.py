"""Every CUDA op against its floor and its natural rival, at the shapes of one Llama-3-8B layer.

``python bench/bench_cuda.py [--out FILE.json] [--smoke]`` prints one line per case. Times are
medians of CUDA events around single calls, enqueued behind a sleeping kernel so that no launch is
waited for; inputs rotate over copies larger than the L2 cache. A case is compared with its rival or
the reference first and fails if it differs; the others go on, and the exit status is 1.
``--smoke`` runs tiny shapes once, also on a machine without a GPU.

Floors count what cannot be avoided: bytes at the copy bandwidth measured in the same run, matrix
products at 790 TFLOP/s (what cuBLAS reaches on an H200 with random data).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_layer import (
    DIM,
    DTYPE,
    GROUPS,
    HEADS,
    LAYERS,
    N_UP,
    SCALE,
    Layer,
    Timer,
    check_close,
    flash,
    make_layer,
    plain_received,
    plain_spectrogram,
    received,
    redone_share,
    score_args,
    spectrogram,
)  # fmt: skip
from cuda_report import Report
from namm_ext import ops, reference
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

MATRIX_FLOPS = 790e12


@dataclass
class Row:
    """One measured case. ``ratio``: ours to the rival, below 1 is faster."""

    op: str
    case: str
    ms: float
    floor_ms: float | None = None
    rivals_ms: dict[str, float] = field(default_factory=dict)
    rate: str = ""
    target: str = ""
    met: bool | None = None


FEATURES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "spectrogram": (spectrogram, plain_spectrogram),
    "received": (received, plain_received),
}


def bench_features(timer: Timer, n: int, name: str) -> Row:
    run, plain = FEATURES[name]
    layer = make_layer([n] * HEADS, timer.device)
    q = layer.window.q[0, :, reference.CARRY :].reshape(HEADS, GROUPS * N_UP, DIM)
    k = layer.store.k.view(HEADS, n, DIM)
    rivals = {}
    if n <= 8192:
        check_close(name, run(*layer), plain(*layer), 2e-2)
        rivals["plain"] = timer(plain, layer)
    ms = timer(run, layer)
    rivals["bmm"] = timer(lambda q, k: torch.bmm(q, k.transpose(1, 2)), (q, k))
    q4 = layer.window.q[:, :, reference.CARRY :].contiguous()
    kv = (q4, k[None], layer.store.v.view(1, HEADS, n, DIM))
    with flash(timer.device):
        rivals["sdpa"] = timer(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), kv)
    flops = 2 * N_UP * HEADS * GROUPS * DIM * n
    rate, target, met = flops / ms / 1e9, "", None
    if name == "spectrogram" and n >= 8192:
        target = ">= 340 TFLOP/s, <= 1.6x bmm, <= 0.8x sdpa"
        met = rate >= 340 and ms <= 1.6 * rivals["bmm"] and ms <= 0.8 * rivals["sdpa"]
    elif name == "spectrogram":
        target, met = "<= 0.065 ms", ms <= 0.065
    return Row(
        name, f"N={n}", ms, flops / MATRIX_FLOPS * 1e3, rivals, f"{rate:.0f} TFLOP/s", target, met
    )


def bam(*args: Any) -> Tensor:
    return ops.bam_scores(*args, log_transform=False, log_eps=1e-6)


def plain_bam(*args: Any) -> Tensor:
    return reference.bam_scores(*args, log_transform=False, log_eps=1e-6)


def bench_bam(timer: Timer, n: int) -> Row:
    layer = make_layer([n] * HEADS, timer.device)
    args = score_args(layer, timer.device)
    rivals = {}
    if n <= 8192:
        check_close("bam_scores", bam(*args), plain_bam(*args), 2e-3)
        rivals["plain"] = timer(plain_bam, args)
    ms = timer(bam, args)
    pairs = HEADS * n * (n + 1) / 2
    rate = pairs / ms * 1e3
    # One exponential per pair: 16 per clock and SM, 132 SMs, 1.755 GHz.
    floor = pairs / (16 * 132 * 1.755e9) * 1e3
    target = ">= 2.6e12 pairs/s" if n >= 8192 else ""
    return Row(
        "bam_scores", f"N={n} redone={redone_share(*args):.2%}", ms, floor, rivals,
        f"{rate:.2e} pairs/s", target, rate >= 2.6e12 if target else None,
    )  # fmt: skip


def bench_mlp(timer: Timer, n: int) -> Row:
    network: dict[str, Any] = {"hidden": 25, "depth": 2, "bias": True, "residual_first": True}
    options = {"log_transform": False, "log_eps": 1e-6, **network}

    def run(*args: Any) -> Tensor:
        return ops.mlp_scores(*args, **options)

    def plain(*args: Any) -> Tensor:
        return reference.mlp_scores(*args, **options)

    layer = make_layer([n] * HEADS, timer.device)
    args = score_args(layer, timer.device, reference.num_mlp_params(25, 2, True))
    check_close("mlp_scores", run(*args), plain(*args), 1e-3)
    # Features, position and score of each token.
    floor = timer.bytes_floor(HEADS * n * (17 * 4 + 4 + 4))
    return Row("mlp_scores", f"N={n}", timer(run, args), floor, {"plain": timer(plain, args)})


def bench_gate(timer: Timer, n: int) -> Row:
    """The newest 64 tokens of a layer whose heads keep n each."""
    layer = make_layer([n] * HEADS, timer.device)
    num_inputs = HEADS * (2 * DIM + 2)
    gen = torch.Generator(timer.device).manual_seed(3)
    weight = torch.randn(HEADS, num_inputs, generator=gen, device=timer.device) * 0.05
    args = (layer.store, layer.window.active, weight, torch.ones(HEADS, device=timer.device))
    options: dict[str, Any] = {"num_new": min(64, n), "rotary_dim": DIM}

    def run(*args: Any) -> None:
        ops.gate_(*args, **options)

    def plain(*args: Any) -> None:
        reference.gate_(*args, **options)

    ours, theirs = layer.store.clone(), layer.store.clone()
    run(ours, *args[1:])
    plain(theirs, *args[1:])
    check_close("gate_", ours.state, theirs.state, 1e-3)
    ms, num_bytes = timer(run, args), options["num_new"] * HEADS * DIM * 4 + weight.nbytes
    return Row("gate_", f"N={n}", ms, timer.bytes_floor(num_bytes), {"plain": timer(plain, args)})


SELECTIONS: dict[str, dict[str, Any]] = {
    "threshold": {"cache_size": -1, "fill": False, "budget": "per_head"},
    "fill": {"cache_size": -1, "fill": True, "budget": "per_head"},
    "per_layer": {"cache_size": 0, "fill": False, "budget": "per_layer"},
}


def bench_select(timer: Timer, n: int, name: str) -> Row:
    rule = SELECTIONS[name]
    layer = make_layer([n] * HEADS, timer.device)
    scores = torch.randn(n * HEADS, device=timer.device)
    size = max(1, n // 4) if rule["cache_size"] == 0 else rule["cache_size"]
    options = {
        "threshold": 0.0, "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0, **rule,
        "cache_size": size,
    }  # fmt: skip
    args = (scores, layer.store, layer.window.active)
    rivals = {"topk": timer(lambda s: s.topk(max(1, s.shape[1] // 4)), (scores.view(HEADS, n),))}
    ms = timer(lambda *args: ops.select(*args, **options), args)
    return Row("select", f"N={n} {name}", ms, timer.bytes_floor(9 * n * HEADS), rivals)


def compact_case(layer: Layer, kept_fraction: float) -> tuple[tuple[Any, ...], int]:
    store = layer.store
    device = store.k.device
    gen = torch.Generator(device).manual_seed(2)
    keep = torch.rand(store.capacity, generator=gen, device=device) < kept_fraction
    keep = keep.to(torch.uint8)
    ends = keep.cumsum(0)[store.cu_seqlens_k[1:].long() - 1]
    cu_new = torch.cat([torch.zeros(1, device=device), ends]).to(torch.int32)
    num_kept = cu_new.diff().to(torch.int32)
    return (store, keep, num_kept, cu_new), int(cu_new[-1])


def bench_compact(timer: Timer, n: int, fraction: float) -> Row:
    layer = make_layer([n] * HEADS, timer.device)
    args, capacity = compact_case(layer, fraction)

    def run(*args: Any) -> Any:
        return ops.compact(*args, capacity=capacity)

    store, keep = args[:2]
    rows = torch.nonzero(keep).squeeze(-1)
    if not torch.equal(run(*args).k, store.k[rows]):
        raise ArithmeticError("compact differs from indexing")
    num_bytes = capacity * (4 * DIM + 4 + 17 * 4) * 2 + n * HEADS
    floor = timer.bytes_floor(num_bytes)
    ms = timer(run, args)
    index = (store.k, store.v, store.state, store.pos, rows)
    rival = timer(lambda k, v, s, p, r: (k[r], v[r], s[r], p[r]), index)
    target = ">= 70 % of copy" if n >= 32768 and fraction == 0.5 else ""
    return Row(
        "compact", f"N={n} keep={fraction}", ms, floor, {"indexing": rival},
        f"{floor / ms:.0%} of copy", target, floor / ms >= 0.7 if target else None,
    )  # fmt: skip


def attend_(out: Tensor, lse: Tensor, *args: Any) -> Tensor:
    """In place, as the cache calls it: ``attend`` fills its outputs first."""
    ops.attend_(out, lse, *args, softmax_scale=SCALE)
    return out


def attend_args(layer: Layer, columns: int) -> tuple[Any, ...]:
    device = layer.store.k.device
    q = layer.window.q[:, :, -columns:].contiguous()
    newest = int(layer.store.pos.max())
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return (
        q.new_empty(1, columns, HEADS * GROUPS, DIM),
        torch.empty(1, HEADS * GROUPS, columns, device=device),
        q, layer.store, torch.tensor([0], **int32), torch.tensor([columns], **int32),
        torch.tensor([newest + 1 - columns], **int32),
    )  # fmt: skip


def dense(layer: Layer, q: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of equally long heads for torch's own attention."""
    shape = (1, HEADS, -1, DIM)
    return q, layer.store.k.view(shape), layer.store.v.view(shape)


def bench_decode(timer: Timer, n: int, name: str) -> Row:
    layer = make_layer([n] * HEADS, timer.device)
    args = attend_args(layer, 1)
    if name == "even":

        def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, enable_gqa=True)

        inputs = dense(layer, args[2])
        check_close("attend_", attend_(*args).transpose(1, 2), rival(*inputs), 2e-2)
        rivals, ms = {"sdpa": timer(rival, inputs)}, timer(attend_, args)
    else:  # the same bytes in segments of 1 to 32
        rivals = {"even": timer(attend_, args)}
        lengths = [max(1, 2 * n * (i + 1) // (HEADS + 1)) for i in range(HEADS)]
        short = max(1, lengths[-1] // 32)
        lengths[0], lengths[-1] = short, lengths[-1] + lengths[0] - short
        layer = make_layer(lengths, timer.device)
        ms = timer(attend_, attend_args(layer, 1))
    num_bytes = layer.store.k.nbytes + layer.store.v.nbytes
    # A copy moves every byte twice, reading alone moves it once.
    floor = timer.bytes_floor(num_bytes)
    target, met = "", None
    if num_bytes >= 64 << 20:
        target, met = ">= 80 % of copy", floor / ms >= 0.8
        if name == "ragged":
            target, met = f"{target}, <= 1.1x even", met and ms <= 1.1 * rivals["even"]
    return Row(
        "attend decode", f"N={n} {name}", ms, floor, rivals, f"{floor / ms:.0%} of copy", target,
        met,
    )  # fmt: skip


def bench_prefill(timer: Timer, n: int) -> Row:
    columns = min(N_UP, n)
    layer = make_layer([n] * HEADS, timer.device)
    args = attend_args(layer, columns)
    inputs = dense(layer, args[2])

    def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=causal_lower_right(columns, n), enable_gqa=True)

    check_close("attend_", attend_(*args).transpose(1, 2), rival(*inputs), 2e-2)
    ms = timer(attend_, args)
    flops = 4 * columns * HEADS * GROUPS * DIM * (n - columns / 2)
    return Row(
        "attend prefill", f"{columns} on N={n}", ms, flops / MATRIX_FLOPS * 1e3,
        {"sdpa": timer(rival, inputs)}, f"{flops / ms / 1e9:.0f} TFLOP/s",
    )  # fmt: skip


def bench_append(timer: Timer, n: int, what: str) -> Row:
    """``n``: room for all calls of a measurement."""
    columns = 1 if what == "token" else min(N_UP, n // 64)
    layer = make_layer([n] * HEADS, timer.device)
    int32: dict[str, Any] = {"dtype": torch.int32, "device": timer.device}
    new = torch.randn(1, HEADS, columns, DIM, device=timer.device).to(DTYPE)
    store = layer.store._replace(seqused_k=torch.zeros_like(layer.store.seqused_k))
    args = (
        store, new, new, torch.tensor([0], **int32), torch.tensor([columns], **int32),
        torch.tensor([0], **int32),
    )  # fmt: skip
    num_bytes = HEADS * columns * (4 * DIM * 2 + 17 * 4 + 4)
    return Row("append_", f"L={columns}", timer(ops.append_, args), timer.bytes_floor(num_bytes))


def bench_record(timer: Timer, columns: int) -> Row:
    int32: dict[str, Any] = {"dtype": torch.int32, "device": timer.device}
    q, lse, *_ = make_layer([columns] * HEADS, timer.device).window
    new = torch.randn(1, HEADS * GROUPS, columns, DIM, device=timer.device).to(DTYPE)
    args = (
        q, lse, new, torch.zeros(new.shape[:3], device=timer.device), torch.tensor([0], **int32),
        torch.tensor([columns], **int32), torch.tensor([0], **int32),
    )  # fmt: skip
    num_bytes = 2 * HEADS * GROUPS * columns * (DIM * 2 + 4)
    return Row("record_", f"L={columns}", timer(ops.record_, args), timer.bytes_floor(num_bytes))


def bench_step(timer: Timer, n: int) -> Row:
    """A whole memory update of one layer, half of it kept; 32 layers in a row.

    The plain rival does the same with PyTorch's own ops; it needs memory for ``n_up x N`` and
    ``N x N`` per head, which is why it stops at 8k.
    """
    must = {4096: 3.0, 8192: 7.5, 16384: 22.0, 32768: 72.0}
    layer = make_layer([n] * HEADS, timer.device)
    scoring = score_args(layer, timer.device)
    cu_new = torch.arange(0, (HEADS + 1) * (n // 2), n // 2, dtype=torch.int32)
    cu_new = cu_new.to(timer.device)
    options: dict[str, Any] = {
        "threshold": -math.inf, "cache_size": n // 2, "budget": "per_head", "fill": False,
        "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0,
    }  # fmt: skip

    def step(window: Window, store: Segments) -> None:
        store = store._replace(state=spectrogram(window, store))
        scores = bam(store, *scoring[1:])
        keep, kept = ops.select(scores, store, window.active, **options)
        ops.compact(store, keep, kept, cu_new, capacity=HEADS * (n // 2))

    def plain_step(window: Window, store: Segments) -> tuple[Tensor, ...]:
        store = store._replace(state=plain_spectrogram(window, store))
        scores = plain_bam(store, *scoring[1:]).view(HEADS, n)
        rows = scores.topk(n // 2, dim=-1).indices.sort(-1).values
        rows = (rows + torch.arange(HEADS, device=rows.device)[:, None] * n).flatten()
        return tuple(tensor[rows] for tensor in store.tokens)

    ms = LAYERS * timer(step, layer)
    target, met = f"<= {must.get(n, math.inf)} ms", ms <= must[n] if n in must else None
    rivals = {}
    if n <= 8192:
        rivals["plain"] = LAYERS * timer(plain_step, layer)
    if n == 8192:
        target, met = f"{target}, >= 15x plain", met and rivals["plain"] >= 15 * ms
    return Row("whole step x 32", f"N={n}", ms, None, rivals, "", target, met)


@dataclass
class Bench:
    """A function of timer and size, and of a variant if there are any; one case each."""

    run: Callable[..., Row]
    sizes: tuple[int, ...]
    variants: tuple[tuple[Any, ...], ...] = ((),)


#: What matters most comes first: a run may be cut short.
BENCHES = {
    "step": Bench(bench_step, (4096, 8192, 16384, 32768)),
    "decode": Bench(bench_decode, (2048, 8192, 32768, 131072), (("even",), ("ragged",))),
    "features": Bench(
        bench_features, (4096, 8192, 16384, 32768), (("spectrogram",), ("received",))
    ),
    "bam": Bench(bench_bam, (4096, 8192, 16384, 32768)),
    "prefill": Bench(bench_prefill, (4096, 16384, 32768)),
    "compact": Bench(bench_compact, (8192, 32768, 131072), ((0.5,), (0.25,))),
    "select": Bench(bench_select, (8192, 32768), tuple((name,) for name in SELECTIONS)),
    "gate": Bench(bench_gate, (8192,)),
    "append": Bench(bench_append, (32768,), (("token",), ("chunk",))),
    "record": Bench(bench_record, (1, N_UP)),
    "mlp": Bench(bench_mlp, (8192, 32768)),
}


def show(row: Row) -> str:
    """One line of the table."""
    floor = f"{row.ms / row.floor_ms:.2f}x floor" if row.floor_ms else ""
    rivals = ", ".join(f"{row.ms / t:.2f}x {name}" for name, t in row.rivals_ms.items())
    met = "" if row.met is None else ("met" if row.met else "NOT MET")
    return (
        f"{row.op:16} {row.case:20} {row.ms:9.4f} ms  {floor:14} {row.rate:18} "
        f"{rivals:44} {row.target:18} {met}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--only", choices=BENCHES, action="append", help="run these benches")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, once, any device")
    parser.add_argument("--skip", type=int, default=0, help="cases done before, see cuda_report")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no GPU: only --smoke can run")
    timer = Timer(device, args.smoke)
    timer.measure_copy()
    copy_rate = timer.copy_bytes_per_ms / 1e9
    print(f"copy bandwidth {copy_rate:.2f} TB/s")
    report = Report(args.out, device, args.skip, copy_tb_per_s=copy_rate)

    def measure(bench: Bench, n: int, variant: tuple[Any, ...]) -> Row:
        row = bench.run(timer, n, *variant)
        if args.smoke:
            row.target, row.met = "", None
        return row

    for name in args.only or BENCHES:
        bench = BENCHES[name]
        for n in [256] if args.smoke else bench.sizes:
            for variant in bench.variants:
                case = " ".join([name, f"N={n}", *map(str, variant)])
                report.run(case, partial(measure, bench, n, variant), show)
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
