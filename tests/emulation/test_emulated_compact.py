"""compact of the CUDA kernels, run on the CPU, against the law: equal bits."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor


def run(
    store: values.Segments,
    keep: Tensor,
    num_kept: Tensor,
    cu_new: Tensor,
    capacity: int,
    order: tuple[int, int] = (0, 0),
    launch_capacity: int | None = None,
) -> values.Segments:
    held = store._make(emulated.guarded(t) for t in store)
    inputs = [emulated.guarded(t) for t in (cu_new, keep, num_kept)]
    outputs = []
    for source in store.tokens:
        fill = float("nan") if source.is_floating_point() else -7
        outputs.append(emulated.guarded(source.new_full((capacity, *source.shape[1:]), fill)))
    ptr = emulated.pointer
    params = emulated.CompactParams(
        emulated.segments(held, 1),
        *(ptr(t) for t in (*inputs, *held.tokens, *outputs)),
        store.k.shape[1] * store.k.element_size(),
        store.v.shape[1] * store.v.element_size(),
        store.state.shape[1],
        capacity,
    )
    emulated.launch("compact", params, launch_capacity or store.capacity, order=order)
    return store._make((*outputs, cu_new, num_kept))


def make_keep(store: values.Segments, kept: str) -> Tensor:
    keep = torch.full((store.capacity,), 255, dtype=torch.uint8)  # dead rows must not count
    rows = store.live_rows()[0]
    gen = torch.Generator().manual_seed(5)
    keep[rows] = {
        "none": lambda: torch.zeros(rows.numel()),
        "all": lambda: torch.ones(rows.numel()),
        "every_third": lambda: torch.arange(rows.numel()) % 3 == 0,
        "random": lambda: torch.rand(rows.numel(), generator=gen) < 0.6,
    }[kept]().to(torch.uint8)
    return keep


def check(
    store: values.Segments, kept: str, order: tuple[int, int], room: int = 2, **kwargs
) -> None:
    keep = make_keep(store, kept)
    num_kept = torch.tensor([int(keep[r].sum()) for r in store.slices()], dtype=torch.int32)
    cu_new = torch.cat([torch.zeros(1), (num_kept + room).cumsum(0)]).to(torch.int32)
    capacity = int(cu_new[-1])
    want = reference.compact(store, keep, num_kept, cu_new, capacity=capacity)
    got = run(store, keep, num_kept, cu_new, capacity, order, **kwargs)
    written = want.live
    for new, ref in zip(got.tokens, want.tokens, strict=True):
        assert torch.equal(new[written], ref[written])
        untouched = new[~written]
        if untouched.numel():
            assert bool((untouched.isnan() if new.is_floating_point() else untouched == -7).all())


@pytest.mark.parametrize("order", emulated.ORDERS, ids=["forwards", "backwards", "random"])
@pytest.mark.parametrize("kept", ["none", "all", "every_third", "random"])
def test_compact(kept, order):
    store = make_store([[300, 0, 17], [1, 257, 64]], 16, 8, torch.bfloat16)
    check(store, kept, order)


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "dtype", "num_state"),
    [
        pytest.param(8, 16, torch.float32, 17, id="fp32"),
        pytest.param(128, 64, torch.float16, 17, id="D128-fp16"),
        pytest.param(5, 3, torch.bfloat16, 0, id="D5-bf16-no_state"),
        pytest.param(6, 2, torch.bfloat16, 2, id="D6-bf16"),
        pytest.param(8, 0, torch.bfloat16, 2, id="no_values"),
    ],
)
def test_rows_of_every_size(head_dim, head_dim_v, dtype, num_state):
    store = make_store([[40, 33]], head_dim, head_dim_v, dtype, num_state=num_state)
    check(store, "random", (17, 23), room=0)


def test_long_tiles():
    # A long store makes tiles of 1024 rows; the launcher sees its length only.
    store = make_store([[1500, 900]], 8, 8, torch.bfloat16, num_state=1)
    check(store, "random", (3, 4), launch_capacity=1 << 20)


def test_no_write_leaves_its_slot():
    store = make_store([[20, 20]], 8, dtype=torch.float32)
    keep = make_keep(store, "all")
    cu_new = torch.tensor([0, 6, 26], dtype=torch.int32)  # the first slot is too short
    second = int(store.cu_seqlens_k[1])
    for order in emulated.ORDERS:
        got = run(store, keep, torch.tensor([20, 20], dtype=torch.int32), cu_new, 26, order)
        assert torch.equal(got.k[:6], store.k[:6])
        assert torch.equal(got.k[6:], store.k[second : second + 20])


def test_empty_store():
    store = make_store([[0]], 8, room=0)
    check(store, "none", (0, 0))
