"""Every CUDA op against its floor and its natural rival, at the shapes of one Llama-3-8B layer.

``python bench/bench_cuda.py [--out FILE.json] [--smoke]`` prints one line per case. Times are
medians of CUDA events around single calls, enqueued behind a sleeping kernel so that no launch is
waited for; inputs rotate over copies larger than the L2 cache. A case is compared with its rival or
the reference first and prints nothing if it differs. ``--smoke`` runs tiny shapes once, also on a
machine without a GPU.

Floors count what cannot be avoided: bytes at the copy bandwidth measured in the same run, matrix
products at 790 TFLOP/s (what cuBLAS reaches on an H200 with random data).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from namm_ext import ops, reference
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._pytree import tree_leaves, tree_map_only

HEADS, GROUPS, DIM, N_UP, LAYERS = 8, 4, 128, 512, 32
SCALE = DIM**-0.5
MATRIX_FLOPS = 790e12
ROTATE_BYTES = 160 << 20
DTYPE = torch.bfloat16


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


def check_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"bench_cuda: {name} differs from its rival: relative error {error:.1e}")


def flash(device: str) -> Any:
    """FlashAttention where there is one to choose, so that the rival is the same everywhere."""
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device == "cuda" else contextlib.nullcontext()


def bench_spectrogram(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    for n in sizes:
        layer = make_layer([n] * HEADS, timer.device)
        q = layer.window.q[0, :, reference.CARRY :].reshape(HEADS, GROUPS * N_UP, DIM)
        k = layer.store.k.view(HEADS, n, DIM)
        bmm = timer(lambda q, k: torch.bmm(q, k.transpose(1, 2)), (q, k))
        q4 = layer.window.q[:, :, reference.CARRY :].contiguous()
        kv = (q4, k[None], layer.store.v.view(1, HEADS, n, DIM))
        with flash(timer.device):
            sdpa_ms = timer(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), kv)
        flops = 2 * N_UP * HEADS * GROUPS * DIM * n
        for name, run, plain in (
            ("spectrogram", spectrogram, plain_spectrogram),
            ("received", received, plain_received),
        ):
            rivals = {"bmm": bmm, "sdpa": sdpa_ms}
            if n <= 8192:
                check_close(name, run(*layer), plain(*layer), 2e-2)
                rivals["plain"] = timer(plain, layer)
            ms = timer(run, layer)
            rate, target, met = flops / ms / 1e9, "", None
            if name == "spectrogram" and n >= 8192:
                target = ">= 340 TFLOP/s, <= 1.6x bmm, <= 0.8x sdpa"
                met = rate >= 340 and ms <= 1.6 * bmm and ms <= 0.8 * sdpa_ms
            elif name == "spectrogram":
                target, met = "<= 0.065 ms", ms <= 0.065
            yield Row(
                name, f"N={n}", ms, flops / MATRIX_FLOPS * 1e3, rivals, f"{rate:.0f} TFLOP/s",
                target, met,
            )  # fmt: skip


def score_args(
    layer: Layer, device: str, num_params: int = reference.NUM_BAM_PARAMS
) -> tuple[Any, ...]:
    gen = torch.Generator(device).manual_seed(1)
    params = torch.randn(1, num_params, generator=gen, device=device) * 0.1
    index = torch.zeros(1, dtype=torch.int32, device=device)
    mean, var = torch.full((17,), 0.5, device=device), torch.full((17,), 0.1, device=device)
    return layer.store, params, index, mean, var, layer.window.active


def bam(*args: Any) -> Tensor:
    return ops.bam_scores(*args, log_transform=False, log_eps=1e-6)


def plain_bam(*args: Any) -> Tensor:
    return reference.bam_scores(*args, log_transform=False, log_eps=1e-6)


def bench_bam(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    for n in sizes:
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
        yield Row(
            "bam_scores", f"N={n}", ms, floor, rivals, f"{rate:.2e} pairs/s", target,
            rate >= 2.6e12 if target else None,
        )  # fmt: skip


def bench_mlp(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    network: dict[str, Any] = {"hidden": 25, "depth": 2, "bias": True, "residual_first": True}
    options = {"log_transform": False, "log_eps": 1e-6, **network}
    num_params = reference.num_mlp_params(25, 2, True)

    def run(*args: Any) -> Tensor:
        return ops.mlp_scores(*args, **options)

    def plain(*args: Any) -> Tensor:
        return reference.mlp_scores(*args, **options)

    for n in sizes:
        layer = make_layer([n] * HEADS, timer.device)
        args = score_args(layer, timer.device, num_params)
        check_close("mlp_scores", run(*args), plain(*args), 1e-3)
        # Features, position and score of each token.
        floor = timer.bytes_floor(HEADS * n * (17 * 4 + 4 + 4))
        yield Row("mlp_scores", f"N={n}", timer(run, args), floor, {"plain": timer(plain, args)})


def bench_select(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    rules: dict[str, dict[str, Any]] = {
        "threshold": {"cache_size": -1, "fill": False, "budget": "per_head"},
        "fill": {"cache_size": -1, "fill": True, "budget": "per_head"},
        "per_layer": {"cache_size": 0, "fill": False, "budget": "per_layer"},
    }
    for n in sizes:
        layer = make_layer([n] * HEADS, timer.device)
        scores = torch.randn(n * HEADS, device=timer.device)
        for name, rule in rules.items():
            size = max(1, n // 4) if rule["cache_size"] == 0 else rule["cache_size"]
            options = {
                "threshold": 0.0, "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0,
                **rule, "cache_size": size,
            }  # fmt: skip

            def run(*args: Any, options: dict[str, Any] = options) -> Any:
                return ops.select(*args, **options)

            args = (scores, layer.store, layer.window.active)
            by_head = scores.view(HEADS, n)
            rivals = {"topk": timer(lambda s: s.topk(max(1, s.shape[1] // 4)), (by_head,))}
            yield Row(
                "select", f"N={n} {name}", timer(run, args),
                timer.bytes_floor(9 * n * HEADS), rivals,
            )  # fmt: skip


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


def bench_compact(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    for n in sizes:
        for fraction in (0.5, 0.25):
            layer = make_layer([n] * HEADS, timer.device)
            args, capacity = compact_case(layer, fraction)

            def run(*args: Any, capacity: int = capacity) -> Any:
                return ops.compact(*args, capacity=capacity)

            store, keep = args[:2]
            rows = torch.nonzero(keep).squeeze(-1)
            if not torch.equal(run(*args).k, store.k[rows]):
                raise SystemExit("bench_cuda: compact differs from indexing")
            num_bytes = capacity * (4 * DIM + 4 + 17 * 4) * 2 + n * HEADS
            floor = timer.bytes_floor(num_bytes)
            ms = timer(run, args)
            index = (store.k, store.v, store.state, store.pos, rows)
            rival = timer(lambda k, v, s, p, r: (k[r], v[r], s[r], p[r]), index)
            target = ">= 70 % of copy" if n >= 32768 and fraction == 0.5 else ""
            yield Row(
                "compact", f"N={n} keep={fraction}", ms, floor, {"indexing": rival},
                f"{floor / ms:.0%} of copy", target, floor / ms >= 0.7 if target else None,
            )  # fmt: skip


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    return ops.attend(*args, softmax_scale=SCALE)


def attend_args(layer: Layer, columns: int) -> tuple[Any, ...]:
    device = layer.store.k.device
    q = layer.window.q[:, :, -columns:].contiguous()
    newest = int(layer.store.pos.max())
    int32: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return (
        q, layer.store, torch.tensor([0], **int32), torch.tensor([columns], **int32),
        torch.tensor([newest + 1 - columns], **int32),
    )  # fmt: skip


def bench_decode(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    for n in sizes:
        ragged = [max(1, 2 * n * (i + 1) // (HEADS + 1)) for i in range(HEADS)]
        ragged[0], ragged[-1] = max(1, ragged[-1] // 32), ragged[-1] + ragged[0] - ragged[-1] // 32
        for name, lengths in (("even", [n] * HEADS), ("ragged", ragged)):
            layer = make_layer(lengths, timer.device)
            args = attend_args(layer, 1)
            if name == "even":
                rivals = {}
                shape = (1, HEADS, n, DIM)
                dense = (args[0], layer.store.k.view(shape), layer.store.v.view(shape))

                def rival(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    return sdpa(q, k, v, enable_gqa=True)

                check_close("attend", attend(*args)[0].transpose(1, 2), rival(*dense), 2e-2)
                rivals["sdpa"] = timer(rival, dense)
            ms = timer(attend, args)
            num_bytes = layer.store.k.nbytes + layer.store.v.nbytes
            # A copy moves every byte twice, reading alone moves it once.
            floor = timer.bytes_floor(num_bytes)
            target, met = "", None
            if num_bytes >= 64 << 20:
                target, met = ">= 80 % of copy", floor / ms >= 0.8
            if name == "even":
                even = ms
            else:  # the same bytes in segments of 1 to 32
                rivals = {"even": even}
                if target:
                    target, met = f"{target}, <= 1.1x even", met and ms <= 1.1 * even
            yield Row(
                "attend decode", f"N={n} {name}", ms, floor, rivals, f"{floor / ms:.0%} of copy",
                target, met,
            )  # fmt: skip


def bench_prefill(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    for n in sizes:
        columns = min(N_UP, n)
        layer = make_layer([n] * HEADS, timer.device)
        args = attend_args(layer, columns)
        shape = (1, HEADS, n, DIM)
        dense = (args[0], layer.store.k.view(shape), layer.store.v.view(shape))

        def rival(q: Tensor, k: Tensor, v: Tensor, columns: int = columns, n: int = n) -> Tensor:
            bias = causal_lower_right(columns, n)
            return sdpa(q, k, v, attn_mask=bias, enable_gqa=True)

        check_close("attend", attend(*args)[0].transpose(1, 2), rival(*dense), 2e-2)
        ms = timer(attend, args)
        flops = 4 * columns * HEADS * GROUPS * DIM * (n - columns / 2)
        yield Row(
            "attend prefill", f"{columns} on N={n}", ms, flops / MATRIX_FLOPS * 1e3,
            {"sdpa": timer(rival, dense)}, f"{flops / ms / 1e9:.0f} TFLOP/s",
        )  # fmt: skip


def bench_append(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    n = sizes[0]  # room for all calls of a measurement
    for columns in (1, min(N_UP, n // 64)):
        layer = make_layer([n] * HEADS, timer.device)
        int32: dict[str, Any] = {"dtype": torch.int32, "device": timer.device}
        new = torch.randn(1, HEADS, columns, DIM, device=timer.device).to(DTYPE)
        store = layer.store._replace(seqused_k=torch.zeros_like(layer.store.seqused_k))
        args = (
            store, new, new, torch.tensor([0], **int32), torch.tensor([columns], **int32),
            torch.tensor([0], **int32),
        )  # fmt: skip
        num_bytes = HEADS * columns * (4 * DIM * 2 + 17 * 4 + 4)
        yield Row("append_", f"L={columns}", timer(ops.append_, args), timer.bytes_floor(num_bytes))


def bench_step(timer: Timer, sizes: list[int]) -> Iterator[Row]:
    """A whole memory update of one layer, half of it kept; 32 layers in a row.

    The plain rival does the same with PyTorch's own ops; it needs memory for ``n_up x N`` and
    ``N x N`` per head, which is why it stops at 8k.
    """
    must = {4096: 3.0, 8192: 7.5, 16384: 22.0, 32768: 72.0}
    for n in sizes:
        layer = make_layer([n] * HEADS, timer.device)
        scoring = score_args(layer, timer.device)
        cu_new = torch.arange(0, (HEADS + 1) * (n // 2), n // 2, dtype=torch.int32)
        cu_new = cu_new.to(timer.device)
        options: dict[str, Any] = {
            "threshold": -math.inf, "cache_size": n // 2, "budget": "per_head", "fill": False,
            "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0,
        }  # fmt: skip

        def step(
            window: Window, store: Segments, scoring: Any = scoring, cu_new: Tensor = cu_new,
            options: dict[str, Any] = options, n: int = n,
        ) -> None:  # fmt: skip
            store = store._replace(state=spectrogram(window, store))
            scores = bam(store, *scoring[1:])
            keep, kept = ops.select(scores, store, window.active, **options)
            ops.compact(store, keep, kept, cu_new, capacity=HEADS * (n // 2))

        def plain_step(
            window: Window, store: Segments, scoring: Any = scoring, n: int = n
        ) -> tuple[Tensor, ...]:
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
        yield Row("whole step x 32", f"N={n}", ms, None, rivals, "", target, met)


BENCHES: dict[str, tuple[Callable[[Timer, list[int]], Iterator[Row]], list[int]]] = {
    "spectrogram": (bench_spectrogram, [4096, 8192, 16384, 32768]),
    "bam": (bench_bam, [4096, 8192, 16384, 32768]),
    "mlp": (bench_mlp, [8192, 32768]),
    "select": (bench_select, [8192, 32768]),
    "compact": (bench_compact, [8192, 32768, 131072]),
    "decode": (bench_decode, [2048, 8192, 32768, 131072]),
    "prefill": (bench_prefill, [4096, 16384, 32768]),
    "append": (bench_append, [32768]),
    "step": (bench_step, [4096, 8192, 16384, 32768]),
}


def environment(device: str) -> dict[str, str]:
    """What a figure depends on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "commit": os.environ.get("NAMM_CHECK_COMMIT") or commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
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
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no GPU: only --smoke can run")
    timer = Timer(device, args.smoke)
    timer.measure_copy()
    print(f"copy bandwidth {timer.copy_bytes_per_ms / 1e9:.2f} TB/s")
    rows: list[Row] = []
    for name in args.only or BENCHES:
        bench, sizes = BENCHES[name]
        for row in bench(timer, [256] if args.smoke else sizes):
            if args.smoke:
                row.target, row.met = "", None
            rows.append(row)
            print(show(row), flush=True)
            if args.out:  # written after every row: a run that is cut short leaves its part
                report = {
                    **environment(device),
                    "copy_tb_per_s": timer.copy_bytes_per_ms / 1e9,
                    "rows": [asdict(r) for r in rows],
                }
                args.out.write_text(json.dumps(report, indent=1))
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
