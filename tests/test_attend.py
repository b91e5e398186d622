"""attend_ on the CPU: every instruction set against float64, and its promises bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from namm_ext import ops, reference, testing
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNTOUCHED = 5.0

# name: lengths before the new tokens, H, G, D, Dv, new tokens per batch row
CASES: dict[str, tuple[list[int], int, int, int, int, list[int]]] = {
    "decode-G4": ([300, 0, 63, 77], 2, 4, 128, 128, [1, 1]),
    "decode-G1": ([64, 129, 1], 3, 1, 40, 24, [1]),
    "decode-G7": ([70, 500], 1, 7, 64, 72, [1, 1]),
    "decode-odd-dims": ([65, 30], 1, 3, 13, 7, [2, 1]),
    "decode-split": ([4500, 2047], 2, 4, 32, 32, [1]),
    "few-rows-split": ([2100], 1, 16, 64, 64, [3]),
    "multi-query": ([333], 1, 71, 64, 64, [1]),
    "prefill-empty": ([0, 0, 0, 0], 2, 2, 32, 32, [40, 33]),
    "prefill-ragged": ([300, 100, 0, 6], 2, 2, 32, 32, [64, 17]),
    "prefill-one-row-idle": ([50, 60], 1, 5, 8, 256, [37, 0]),
    "prefill-odd-dims": ([65], 1, 3, 33, 51, [20]),
    "prefill-wide": ([600], 1, 4, 128, 128, [150]),
    "prefill-256": ([257], 1, 2, 256, 8, [20]),
}


@pytest.fixture(params=testing.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.force_isa(request.param):
        yield request.param


def arguments(name: str, dtype: torch.dtype, spread: float = 1.0) -> dict[str, Any]:
    """Arguments of ops.attend for a case: appended, ragged, poisoned, q strided."""
    lengths, num_kv_heads, num_groups, head_dim, head_dim_v, num_new = CASES[name]
    store = testing.ragged_store(
        lengths,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        room=max(num_new) + 3,
        dtype=dtype,
    )
    new = testing.new_tokens(store, num_new, num_groups=num_groups, num_cols=max(num_new) + 2)
    k_new, v_new = new.pop("k_new"), new.pop("v_new")
    ops.append_(
        store.k, store.v, store.pos, store.state, store.seqused_k, store.cu_seqlens_k,
        k_new, v_new, new["first"], new["num_new"], new["pos_first"],
    )  # fmt: skip
    return {
        **new,
        "q": new["q"] * spread,
        "k": store.k,
        "v": store.v,
        "pos": store.pos,
        "cu_seqlens_k": store.cu_seqlens_k,
        "seqused_k": store.seqused_k,
        "softmax_scale": head_dim**-0.5,
    }


def attend(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """ops.attend_ into strided, marked outputs."""
    batch_size, num_heads, num_cols, _ = args["q"].shape
    head_dim_v = args["v"].shape[1]
    shape = (batch_size, num_cols, num_heads, head_dim_v + 5)
    out = torch.full(shape, UNTOUCHED, dtype=args["q"].dtype)[..., 2 : 2 + head_dim_v]
    lse = torch.full((num_cols, batch_size, num_heads), UNTOUCHED).permute(1, 2, 0)
    ops.attend_(out, lse, **args)
    return out, lse


def exact(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The law in float64, marked outside of the new columns."""
    double = {name: args[name].double() for name in ("q", "k", "v")}
    out, lse = reference.attend(**{**args, **double})
    outside = ~columns(args)
    out[outside] = UNTOUCHED
    lse.transpose(1, 2)[outside] = UNTOUCHED
    return out, lse


def columns(args: dict[str, Any]) -> Tensor:
    """``[B, L]``: the new columns."""
    column = torch.arange(args["q"].shape[2])
    first, num_new = args["first"][:, None], args["num_new"][:, None]
    return (column >= first) & (column < first + num_new)


def torch_attend(args: dict[str, Any], want: Tensor) -> Tensor:
    """PyTorch's own attention at the same precision, segment by segment."""
    out = want.to(args["q"].dtype)
    num_kv_heads = args["seqused_k"].numel() // args["q"].shape[0]
    num_groups = args["q"].shape[1] // num_kv_heads
    for s, used in enumerate(args["seqused_k"].tolist()):
        b, h = divmod(s, num_kv_heads)
        first, n = int(args["first"][b]), int(args["num_new"][b])
        begin = int(args["cu_seqlens_k"][s])
        rows, heads = slice(begin, begin + used), slice(h * num_groups, (h + 1) * num_groups)
        if not (used and n):
            continue
        position = int(args["pos_first"][b]) + torch.arange(n)
        out[b, first : first + n, heads] = scaled_dot_product_attention(
            args["q"][b, heads, first : first + n][None],
            args["k"][rows].expand(1, num_groups, -1, -1),
            args["v"][rows].expand(1, num_groups, -1, -1),
            attn_mask=args["pos"][rows] <= position[:, None],
            scale=args["softmax_scale"],
        )[0].transpose(0, 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_torch(name: str, dtype: str, isa: str) -> None:
    args = arguments(name, DTYPES[dtype], spread=2.0)
    out, lse = attend(args)
    want_out, want_lse = exact(args)
    testing.assert_no_worse_than(out, torch_attend(args, want_out), want_out)
    testing.assert_no_worse_than(lse, want_lse.float(), want_lse, floor=3e-6)
    assert bool((out[~columns(args)] == UNTOUCHED).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode-split", "few-rows-split", "prefill-wide"])
def test_threads_change_nothing(name: str, dtype: str, isa: str) -> None:
    args = arguments(name, DTYPES[dtype])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [attend(args) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode-G4", "decode-G7", "prefill-ragged"])
def test_rows_of_a_batch_are_apart(name: str, dtype: str, isa: str) -> None:
    args = arguments(name, DTYPES[dtype])
    out, lse = attend(args)
    num_kv_heads = CASES[name][1]
    for b in range(args["q"].shape[0]):
        alone = {key: args[key][b : b + 1] for key in ("q", "first", "num_new", "pos_first")}
        segments = slice(b * num_kv_heads, (b + 1) * num_kv_heads)
        cu = args["cu_seqlens_k"][segments.start : segments.stop + 1]
        rows = slice(int(cu[0]), int(cu[-1]))
        for key in ("k", "v", "pos"):
            alone[key] = args[key][rows].contiguous()
        alone["cu_seqlens_k"] = cu - cu[0]
        alone["seqused_k"] = args["seqused_k"][segments].contiguous()
        alone["softmax_scale"] = args["softmax_scale"]
        alone_out, alone_lse = attend(alone)
        assert torch.equal(alone_out[0], out[b])
        assert torch.equal(alone_lse[0], lse[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_may_be_cut(dtype: str, isa: str) -> None:
    """Above the row counts of the other ways, a query's bits do not depend on its neighbours."""
    args = arguments("prefill-wide", DTYPES[dtype])
    out, lse = attend(args)
    num_new = int(args["num_new"][0])
    for begin, end in ((0, 50), (50, 117), (117, num_new)):
        part = dict(args)
        part["first"] = args["first"] + begin
        part["num_new"] = torch.tensor([end - begin], dtype=torch.int32)
        part["pos_first"] = args["pos_first"] + begin
        part_out, part_lse = attend(part)
        inside = columns(part)
        assert torch.equal(part_out[inside], out[inside])
        assert torch.equal(part_lse.transpose(1, 2)[inside], lse.transpose(1, 2)[inside])


@pytest.mark.parametrize("name", ["decode-G4", "prefill-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_reversed_logits(name: str, dtype: str, isa: str) -> None:
    """A standard deviation of 60, both signs of the scale: one key takes nearly everything."""
    args = arguments(name, DTYPES[dtype], spread=60.0)
    for sign in (1, -1):
        args["softmax_scale"] = sign * abs(args["softmax_scale"])
        out, lse = attend(args)
        want_out, want_lse = exact(args)
        testing.assert_no_worse_than(out, torch_attend(args, want_out), want_out, floor=1e-4)
        testing.assert_no_worse_than(lse, want_lse.float(), want_lse, floor=1e-4)


def test_zero_scale_is_the_mean(isa: str) -> None:
    args = arguments("prefill-wide", torch.float32)
    args["softmax_scale"] = 0.0
    out, lse = attend(args)
    new = columns(args)[0]
    visible = 600 + 1 + torch.arange(int(args["num_new"][0]))
    torch.testing.assert_close(lse[0, 0, new], visible.float().log())
    mean = args["v"][: 600 + visible.numel()].cumsum(0)[visible - 1] / visible[:, None]
    torch.testing.assert_close(out[0, new, 0], mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_new", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing(num_new: int, dtype: str, isa: str) -> None:
    args = arguments("prefill-wide", DTYPES[dtype])
    args["num_new"].fill_(num_new)
    args["pos_first"].fill_(-num_new // 2)
    out, lse = attend(args)
    new = columns(args)[0]
    blind = int(args["pos_first"][0]) + torch.arange(num_new) < args["pos"][0]
    assert bool(blind.any())
    assert bool((out[0, new][blind] == 0).all())
    assert bool((lse[0, :, new][:, blind] == -math.inf).all())
    assert bool(lse[0, :, new][:, ~blind].isfinite().all())


@pytest.mark.parametrize("name", ["decode-G4", "prefill-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_segment(name: str, dtype: str, isa: str) -> None:
    """A live NaN must show, and only where it was seen."""
    args = arguments(name, DTYPES[dtype])
    clean, _ = attend(args)
    num_groups = CASES[name][2]
    row = int(args["cu_seqlens_k"][2]) + int(args["seqused_k"][2]) - 1  # batch row 1, head 0
    args["k"][row] = math.nan
    out, _ = attend(args)
    new = columns(args)
    position = int(args["pos_first"][1]) + torch.arange(int(args["num_new"][1]))
    sees = position >= args["pos"][row]
    assert bool(out[1, new[1], :num_groups][sees].isnan().all())
    assert torch.equal(out[1, new[1]][~sees], clean[1, new[1]][~sees])
    assert torch.equal(out[1, :, num_groups:], clean[1, :, num_groups:])
    assert torch.equal(out[0], clean[0])
