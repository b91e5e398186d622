"""attend against PyTorch's scaled_dot_product_attention and a memory copy, on one CPU.

``pytest bench/bench_attend.py`` times every case with pytest-benchmark;
``python bench/bench_attend.py [--threads N] [--quick]`` prints the ratios of one interleaved run.
A case is checked against the rival's result (prefill) or the float64 law (decode) first.

Prefill: 512 new tokens on a cache in which all segments are equally long; the rival gets the same
keys densely and the causal mask. Decode: one new token; ours reads a ragged cache of which a
quarter was kept, the rival the whole cache, which is what it would have to read without eviction.
The floor is a copy of the bytes of K and V that are alive.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from namm_ext import ops, reference, testing
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# B, KV heads, query heads per KV head, head_dim
LLAMA = (1, 8, 4, 128)
BUNDLED = (128, 2, 2, 32)


@dataclass(frozen=True)
class Case:
    """One comparison: three things to time and a check to pass before."""

    name: str
    ours: Callable[[], Any]
    rival: Callable[[], Any]
    floor: Callable[[], Any]
    check: Callable[[], None]
    flops: int
    kv_bytes: int


def _store(lengths: list[int], shape: tuple[int, int, int, int], num_new: int, dtype: str) -> Any:
    batch_size, num_kv_heads, num_groups, head_dim = shape
    store = testing.ragged_store(
        lengths, num_kv_heads=num_kv_heads, head_dim=head_dim, num_state=0, room=num_new,
        dtype=DTYPES[dtype],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    heads = num_kv_heads * num_groups
    q = torch.randn(batch_size, heads, num_new, head_dim, generator=generator).to(DTYPES[dtype])
    kv = torch.randn(2, batch_size, num_kv_heads, num_new, head_dim, generator=generator).to(
        DTYPES[dtype]
    )
    first = torch.zeros(batch_size, dtype=torch.int32)
    count = torch.full((batch_size,), num_new, dtype=torch.int32)
    position = store.newest() + 1
    ops.append_(
        store.k, store.v, store.pos, store.state, store.seqused_k, store.cu_seqlens_k,
        kv[0], kv[1], first, count, position,
    )  # fmt: skip
    args = {
        "q": q, "k": store.k, "v": store.v, "pos": store.pos,
        "cu_seqlens_k": store.cu_seqlens_k, "seqused_k": store.seqused_k,
        "first": first, "num_new": count, "pos_first": position,
        "softmax_scale": head_dim**-0.5,
    }  # fmt: skip
    out = torch.zeros(batch_size, num_new, heads, head_dim, dtype=DTYPES[dtype])
    lse = torch.zeros(batch_size, heads, num_new)
    return args, out, lse


def _floor(args: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    live = int(args["seqused_k"].sum()) * args["k"].shape[1]
    source = torch.zeros(2 * live, dtype=args["k"].dtype)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), source.numel() * source.element_size()


def prefill(
    cached: int, num_new: int, dtype: str, shape: tuple[int, int, int, int] = LLAMA
) -> Case:
    """``num_new`` tokens on ``cached`` ones in every segment, against the same densely.

    Args:
        cached: rows per segment before.
        num_new: new tokens per batch row.
        dtype: key of DTYPES.
        shape: B, KV heads, group, head_dim.
    """
    batch_size, num_kv_heads, num_groups, head_dim = shape
    args, out, lse = _store([cached] * (batch_size * num_kv_heads), shape, num_new, dtype)
    keys = cached + num_new
    k = args["k"].view(batch_size, num_kv_heads, keys, head_dim)
    v = args["v"].view(batch_size, num_kv_heads, keys, head_dim)
    mask = torch.ones(num_new, keys, dtype=torch.bool).tril(cached)

    def ours() -> Tensor:
        ops.attend_(out, lse, **args)
        return out

    def rival() -> Tensor:
        return scaled_dot_product_attention(
            args["q"], k, v, attn_mask=mask, enable_gqa=num_groups > 1
        )

    def check() -> None:
        want, _ = reference.attend(**{**args, **{n: args[n].double() for n in "qkv"}})
        testing.assert_no_worse_than(ours(), rival().transpose(1, 2), want)

    floor, kv_bytes = _floor(args)
    flops = 4 * batch_size * num_kv_heads * num_groups * head_dim * num_new * keys
    name = f"prefill-{_name(shape)}-L{num_new}-N{cached}-{dtype}"
    return Case(name, ours, rival, floor, check, flops, kv_bytes)


def decode(
    context: int, dtype: str, kept: float = 0.25, shape: tuple[int, int, int, int] = LLAMA
) -> Case:
    """One token on a ragged cache of ``kept * context`` rows on average, against the whole cache.

    Args:
        context: rows per segment of the whole cache.
        dtype: key of DTYPES.
        kept: average part of it that is left; segments lie between half and one and a half of it.
        shape: B, KV heads, group, head_dim.
    """
    batch_size, num_kv_heads, num_groups, head_dim = shape
    num_segments = batch_size * num_kv_heads
    if kept == 1.0:
        lengths = [context - 1] * num_segments
    else:
        steps = [0.5 + i / max(1, num_segments - 1) for i in range(num_segments)]
        lengths = [int(kept * context * step) for step in steps]
    args, out, lse = _store(lengths, shape, 1, dtype)
    dense = torch.randn(2, batch_size, num_kv_heads, context, head_dim).to(DTYPES[dtype])

    def ours() -> Tensor:
        ops.attend_(out, lse, **args)
        return out

    def rival() -> Tensor:
        return scaled_dot_product_attention(
            args["q"], dense[0], dense[1], enable_gqa=num_groups > 1
        )

    def check() -> None:
        same, _ = reference.attend(**args)
        want, _ = reference.attend(**{**args, **{n: args[n].double() for n in "qkv"}})
        testing.assert_no_worse_than(ours(), same, want)

    floor, kv_bytes = _floor(args)
    flops = 4 * num_groups * head_dim * sum(lengths)
    name = f"decode-{_name(shape)}-N{context}-keep{kept:.0%}-{dtype}"
    return Case(name, ours, rival, floor, check, flops, kv_bytes)


def _name(shape: tuple[int, int, int, int]) -> str:
    return "B{}-H{}-G{}-D{}".format(*shape)


#: name: how to make the case. bench/ratios.py takes its lines from here.
CASES: dict[str, Callable[[], Case]] = {}
for _dtype in ("fp32", "bf16"):
    for _cached in (4096, 16384):
        CASES[f"prefill-{_cached}-{_dtype}"] = lambda n=_cached, d=_dtype: prefill(n, 512, d)  # type: ignore[misc]
    for _context in (4096, 16384, 65536):
        CASES[f"decode-{_context}-{_dtype}"] = lambda n=_context, d=_dtype: decode(n, d)  # type: ignore[misc]
    CASES[f"prefill-bundled-{_dtype}"] = lambda d=_dtype: prefill(250, 64, d, BUNDLED)  # type: ignore[misc]
    CASES[f"decode-bundled-{_dtype}"] = lambda d=_dtype: decode(250, d, 1.0, BUNDLED)  # type: ignore[misc]
QUICK = ("prefill-bundled-fp32", "decode-bundled-bf16")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    made = CASES[request.param]()
    made.check()
    return made


@pytest.mark.parametrize("what", ["ours", "rival", "floor"])
def test_attend(benchmark: Any, case: Case, what: str) -> None:
    benchmark.group = case.name
    benchmark(getattr(case, what))


def interleaved(case: Case, seconds: float = 2.0, least: int = 5) -> dict[str, float]:
    """Shortest time in seconds of each of the three, taken in turns."""
    case.check()
    best = {"ours": float("inf"), "rival": float("inf"), "floor": float("inf")}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or time.perf_counter() < end:
        for what in best:
            run = getattr(case, what)
            start = time.perf_counter()
            run()
            best[what] = min(best[what], time.perf_counter() - start)
        rounds += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small cases, as a smoke test")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.ops.namm_ext.cpu_isa()}, {arguments.threads} thread(s)"
    )
    print(f"{'case':<44}{'ours ms':>10}{'torch ms':>10}{'ratio':>7}{'copy ms':>9}{'GF/s':>7}")
    with torch.no_grad():
        for key, make in CASES.items():
            if (arguments.quick and key not in QUICK) or arguments.only not in key:
                continue
            case = make()
            best = interleaved(case, seconds=0.1 if arguments.quick else 2.0)
            print(
                f"{case.name:<44}{best['ours'] * 1e3:>10.3f}{best['rival'] * 1e3:>10.3f}"
                f"{best['rival'] / best['ours']:>7.2f}{best['floor'] * 1e3:>9.3f}"
                f"{case.flops / best['ours'] / 1e9:>7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
