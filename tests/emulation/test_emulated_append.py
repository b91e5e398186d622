"""append_ of the CUDA kernels, run on the CPU, against the law: equal bits."""

from __future__ import annotations

from dataclasses import dataclass

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor


@dataclass
class New:
    """Columns of a call; those outside ``[first, first + num_new)`` are NaN."""

    k: Tensor
    v: Tensor
    first: Tensor
    num_new: Tensor
    pos_first: Tensor


def make_new(
    store: values.Segments, num_new: list[int], first: list[int], num_cols: int, stride: int
) -> New:
    gen = torch.Generator().manual_seed(1)
    batch_size = len(num_new)
    heads = store.seqused_k.numel() // batch_size

    def columns(dim: int) -> Tensor:
        wide = torch.randn(
            batch_size, num_cols, heads, dim + stride, generator=gen, dtype=torch.float32
        )
        view = wide.to(store.k.dtype)[..., :dim].transpose(1, 2)
        for b in range(batch_size):
            view[b, :, : first[b]] = float("nan")
            view[b, :, first[b] + num_new[b] :] = float("nan")
        return view if stride else view.contiguous()

    int32 = {"dtype": torch.int32}
    return New(
        columns(store.k.shape[1]),
        columns(store.v.shape[1]),
        torch.tensor(first, **int32),
        torch.tensor(num_new, **int32),
        torch.tensor([100 * (b + 1) for b in range(batch_size)], **int32),
    )


def run(store: values.Segments, new: New, order: tuple[int, int] = (0, 0)) -> values.Segments:
    got = store._make(emulated.guarded(t) for t in store)
    k_new, first = new.k, emulated.guarded(new.first)
    num_new, pos_first = emulated.guarded(new.num_new), emulated.guarded(new.pos_first)
    ptr = emulated.pointer
    params = emulated.AppendParams(
        emulated.segments(got, first.numel()),
        *(ptr(t) for t in (*got.tokens, got.seqused_k, k_new, new.v, first, num_new, pos_first)),
        k_new.stride()[:3], new.v.stride()[:3],
        store.k.shape[1], store.v.shape[1], store.state.shape[1], k_new.shape[2],
        emulated.DTYPES[store.k.dtype],
    )  # fmt: skip
    emulated.launch("append", params, store.capacity, order=order)
    return got


CASES = {
    "one_column": ([[3, 0], [7, 1]], [1, 1], [0, 0], 1),
    "ragged_columns": ([[3, 0], [7, 1], [2, 2]], [4, 0, 2], [1, 0, 3], 6),
    "two_blocks": ([[3, 5]], [70], [1], 72),
    "nothing_new": ([[2]], [0], [0], 3),
    "no_columns": ([[2]], [0], [0], 0),
}


@pytest.mark.parametrize("order", emulated.ORDERS, ids=["forwards", "backwards", "random"])
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "stride", "num_state"),
    [
        pytest.param(16, 24, torch.float32, 0, 17, id="D16-fp32"),
        pytest.param(16, 8, torch.bfloat16, 8, 0, id="D16-bf16-strided-no_state"),
        pytest.param(5, 3, torch.float16, 1, 2, id="D5-fp16-strided"),
        pytest.param(3, 3, torch.float32, 0, 17, id="D3-fp32"),
        pytest.param(8, 0, torch.bfloat16, 0, 17, id="no_values"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_append(case, head_dim, head_dim_v, dtype, stride, num_state, order):
    lengths, num_new, first, num_cols = CASES[case]
    store = make_store(
        lengths, head_dim, head_dim_v, dtype, num_state=num_state, room=max(num_new) + 1
    )
    new = make_new(store, num_new, first, num_cols, stride)
    want = store.clone()
    reference.append_(want, new.k, new.v, new.first, new.num_new, new.pos_first)
    got = run(store, new, order)
    assert torch.equal(got.seqused_k, want.seqused_k)
    for name in ("k", "v", "pos", "state"):  # dead rows too: NaN stays NaN, nothing else is written
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=0, atol=0, equal_nan=True
        )


def test_writes_stay_inside_their_slot():
    store = make_store([[3, 4]], 16, dtype=torch.bfloat16, room=2)
    new = make_new(store, [6], [0], 6, 0)
    got = run(store, new)
    assert got.seqused_k.tolist() == [5, 7]  # room 2 and 3
    assert torch.equal(got.cu_seqlens_k, store.cu_seqlens_k)
    rows = got.live_rows()[0]
    assert rows.numel() == store.capacity
    assert not got.k[rows].isnan().any()
    assert torch.equal(got.k[3:5], new.k[0, 0, :2])
