"""attend_ of the CUDA kernels, run on the CPU, against the law in float64."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor


@dataclass
class Queries:
    """Columns of a call; those outside ``[first, first + num_new)`` are NaN."""

    q: Tensor
    first: Tensor
    num_new: Tensor
    pos_first: Tensor
    scale: float


def make_queries(
    store: values.Segments,
    num_groups: int,
    num_new: list[int],
    first: list[int],
    num_cols: int,
    pos_first: list[int] | None = None,
    strided: bool = False,
) -> Queries:
    """Queries of the newest tokens, unless ``pos_first`` says otherwise."""
    gen = torch.Generator().manual_seed(2)
    batch_size = len(num_new)
    heads = store.seqused_k.numel() // batch_size
    dim = store.k.shape[1]
    q = torch.randn(batch_size, num_cols, heads * num_groups, dim + 8, generator=gen) * 1.5
    q = q.to(store.k.dtype)[..., :dim].transpose(1, 2)
    if not strided:
        q = q.contiguous()
    for b in range(batch_size):
        q[b, :, : first[b]] = float("nan")
        q[b, :, first[b] + num_new[b] :] = float("nan")
    if pos_first is None:
        live = store.pos[store.live_rows()[0]]
        pos_first = [int(live.max()) + 1 - n if live.numel() else 0 for n in num_new]
    int32 = {"dtype": torch.int32}
    return Queries(
        q,
        torch.tensor(first, **int32),
        torch.tensor(num_new, **int32),
        torch.tensor(pos_first, **int32),
        dim**-0.5,
    )


def run(
    store: values.Segments,
    new: Queries,
    order: tuple[int, int] = (0, 0),
    simt: bool = False,
    launch_capacity: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    held = store._make(emulated.guarded(t) for t in store)
    columns = [emulated.guarded(t) for t in (new.first, new.num_new, new.pos_first)]
    batch_size, num_heads, num_cols, dim = new.q.shape
    dim_v = store.v.shape[1]
    out = torch.full((batch_size, num_cols, num_heads, dim_v), 7.0, dtype=store.k.dtype)
    out = emulated.guarded(out)
    lse = emulated.guarded(torch.full((batch_size, num_heads, num_cols), 7.0))
    ptr = emulated.pointer
    q = new.q if not new.q.is_contiguous() else emulated.guarded(new.q)
    params = emulated.AttendParams(
        emulated.segments(held, batch_size),
        ptr(q), ptr(held.k), ptr(held.v), ptr(held.pos), *(ptr(t) for t in columns),
        ptr(out), ptr(lse),
        q.stride()[:3], out.stride()[:3], lse.stride(),
        num_heads * batch_size // store.seqused_k.numel(), dim, dim_v, num_cols,
        new.scale, softcap, emulated.DTYPES[q.dtype],
    )  # fmt: skip
    emulated.launch("attend", params, launch_capacity or store.capacity, order=order, simt=simt)
    return out, lse


def check(
    store: values.Segments, new: Queries, softcap: float = 0.0, **kwargs
) -> tuple[Tensor, Tensor]:
    def law(dtype: torch.dtype, round_to: torch.dtype | None) -> tuple[Tensor, Tensor]:
        return reference.attend(
            new.q.to(dtype), store._replace(k=store.k.to(dtype), v=store.v.to(dtype)),
            new.first, new.num_new, new.pos_first, softmax_scale=new.scale, softcap=softcap,
            round_to=round_to,
        )  # fmt: skip

    exact, exact_lse = law(torch.float64, None)
    dtype = store.k.dtype
    out, lse = run(store, new, softcap=softcap, **kwargs)
    written = torch.zeros(lse.shape, dtype=torch.bool)
    for b, (c, n) in enumerate(zip(new.first.tolist(), new.num_new.tolist(), strict=True)):
        written[b, :, c : c + n] = True
    assert bool((lse[~written] == 7.0).all())
    columns = written.transpose(1, 2)
    assert bool((out[~columns] == 7.0).all())
    sees = exact_lse > -torch.inf
    assert bool((lse[written & ~sees] == -torch.inf).all())
    assert bool((out[(written & ~sees).transpose(1, 2)] == 0).all())
    if bool(sees.any()):
        seen_lse = exact_lse[written & sees]
        floor = 2e-5 + 2e-7 * seen_lse.abs().max()
        assert (lse[written & sees] - seen_lse).abs().max() < floor
        # At most twice the error of the same formula in plain PyTorch at the same precision.
        same, _ = law(dtype, None if dtype == torch.float32 else dtype)
        ours = (out.double() - exact)[columns].abs().max().item()
        theirs = (same.double() - exact)[columns].abs().max().item()
        assert ours <= 2 * theirs + 2e-6, f"{ours:.2e} > 2 * {theirs:.2e}"
    return out, lse


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ORDER_IDS = ["forwards", "backwards", "random"]


@pytest.mark.parametrize("softcap", [0.7, 30.0])
@pytest.mark.parametrize("simt", [False, True], ids=["mma", "simt"])
@pytest.mark.parametrize("num_new", [1, 40], ids=["decode", "prefill"])
def test_bounded_logits(num_new, simt, softcap):
    store = make_store([[256, 300], [1, 130]], 64, dtype=BF16, num_tail=num_new)
    new = make_queries(store, 4, [num_new] * 2, [0, 0], num_new)
    _, bound = check(store, new, softcap, simt=simt)
    _, free = check(store, new, simt=simt)
    assert not torch.equal(bound, free)


@pytest.mark.parametrize("order", emulated.ORDERS, ids=ORDER_IDS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_decode(dtype, order):
    # One part, two parts with a short tail, three parts; a segment with a single row.
    store = make_store([[256, 300], [1, 530]], 64, dtype=dtype, num_tail=1)
    check(store, make_queries(store, 4, [1, 1], [0, 0], 1), order=order)


def test_places_of_parts():
    """Both ways to give the parts of long segments a place, each with one that just fits."""
    # 128 parts of 512 keys, none, 32 of 256.
    store = make_store([[65529, 0, 8180]], 64, dtype=BF16, num_tail=1)
    new = make_queries(store, 1, [1], [0], 1)
    first, other = check(store, new), run(store, new, launch_capacity=200_000)
    assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert workspace_bytes(store.capacity) // 4 == (store.capacity // 512 + 3 * 17) * 66


def workspace_bytes(capacity: int) -> int:
    """Of one query row per segment, three segments, head_dim 64."""
    params = emulated.AttendParams()
    params.seg.batch_size, params.seg.num_kv_heads = 1, 3
    params.num_groups, params.num_cols, params.head_dim_v = 1, 1, 64
    return emulated.library().emulated_workspace(
        b"attend", ctypes.byref(params), ctypes.c_int64(capacity)
    )


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "groups"),
    [
        (64, 64, 1), (96, 96, 3), (128, 128, 4), (128, 128, 8), (256, 256, 2), (80, 80, 7),
        (192, 128, 2),
    ],
)  # fmt: skip
def test_decode_shapes(head_dim, head_dim_v, groups):
    store = make_store([[270, 35]], head_dim, head_dim_v, dtype=BF16, num_tail=1)
    check(store, make_queries(store, groups, [1], [0], 1, strided=True), order=(17, 23))


def test_decode_of_several_columns():
    # 3 columns of 7 heads are 21 rows: two row tiles. Causal inside the call.
    store = make_store([[300, 90], [40, 260]], 64, dtype=BF16, num_tail=3)
    check(store, make_queries(store, 7, [3, 2], [0, 1], 3), order=(17, 23))


@pytest.mark.parametrize("order", emulated.ORDERS, ids=ORDER_IDS)
def test_prefill(order):
    # 40 columns of 4 heads are 160 rows: two row tiles, the second one short.
    store = make_store([[150, 40], [64, 100]], 64, dtype=BF16, num_tail=40)
    check(store, make_queries(store, 4, [40, 33], [0, 5], 40), order=order)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "groups", "dtype"),
    [
        (96, 96, 3, BF16), (128, 128, 2, FP16), (256, 256, 2, BF16), (72, 40, 1, BF16),
        (64, 64, 9, FP16),
    ],
)  # fmt: skip
def test_prefill_shapes(head_dim, head_dim_v, groups, dtype):
    columns = 64 // groups + 3
    store = make_store([[columns + 70]], head_dim, head_dim_v, dtype=dtype, num_tail=columns)
    new = make_queries(store, groups, [columns], [0], columns, strided=True)
    check(store, new, order=(17, 23))


@pytest.mark.parametrize("split", [True, False], ids=["decode", "prefill"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "groups", "dtype"),
    [
        (16, 16, 2, FP32),
        (33, 7, 3, FP32),
        (5, 5, 1, BF16),
        (64, 64, 4, FP16),
        (130, 200, 2, FP32),
        (576, 576, 16, BF16),
    ],
)
def test_simt(head_dim, head_dim_v, groups, dtype, split):
    columns = 1 if split else 64 // groups + 2
    store = make_store([[300, 20]], head_dim, head_dim_v, dtype=dtype, num_tail=columns)
    new = make_queries(store, groups, [columns], [0], columns, strided=True)
    check(store, new, simt=True, order=(17, 23))


@pytest.mark.parametrize("simt", [False, True], ids=["mma", "simt"])
@pytest.mark.parametrize("num_cols", [2, 80], ids=["decode", "prefill"])
def test_queries_in_the_middle_of_a_segment(num_cols, simt):
    # Positions with gaps and queries older than the newest keys: the guess at the number of visible
    # keys lies before the segment (60) or in it and wrong (200), and the search takes over.
    store = make_store([[140, 90]], 64, dtype=BF16, seed=3)
    for pos_first in (60, 200):
        new = make_queries(store, 1, [num_cols], [0], num_cols, pos_first=[pos_first])
        check(store, new, simt=simt)


@pytest.mark.parametrize("simt", [False, True], ids=["mma", "simt"])
@pytest.mark.parametrize("num_cols", [1, 70], ids=["decode", "prefill"])
def test_queries_that_see_nothing(num_cols, simt):
    store = make_store([[10, 0]], 64, dtype=BF16)
    store.pos.add_(1000)
    _, lse = check(store, make_queries(store, 1, [num_cols], [0], num_cols, [1]), simt=simt)
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("num_cols", [1, 70], ids=["decode", "prefill"])
def test_batch_does_not_change_a_row(num_cols):
    lengths = [[300, 90], [580, 77]]
    store = make_store(lengths, 64, dtype=BF16, num_tail=num_cols)
    new = make_queries(store, 2, [num_cols] * 2, [0, 0], num_cols)
    out, lse = run(store, new, (17, 23))
    for b in range(2):
        alone = store.part(2 * b, 2 * b + 2)
        mine = Queries(new.q[b : b + 1], new.first[:1], new.num_new[:1],
                       new.pos_first[b : b + 1], new.scale)  # fmt: skip
        got, got_lse = run(alone, mine)
        assert torch.equal(got[0], out[b])
        assert torch.equal(got_lse[0], lse[b])


def test_large_logits_and_negative_scale():
    store = make_store([[270, 60]], 64, dtype=FP16, num_tail=1)
    new = make_queries(store, 4, [1], [0], 1)
    new.scale = -3.0
    store.k.mul_(4)
    check(store, new)


def test_parts_of_a_long_segment():
    # Above 8192 rows a part has 512 keys.
    store = make_store([[8200, 30]], 16, dtype=FP32, num_tail=1, num_state=0)
    check(store, make_queries(store, 1, [1], [0], 1))
