"""gate_ of the CUDA kernels, run on the CPU, against the law."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
#: head_dim, head_dim_v, rotary_dim, interleaved, state columns, dtype
SHAPES = {
    "half_split": (64, 40, 64, False, 18, BF16),
    "interleaved": (48, 32, 48, True, 18, FP16),
    "partial": (27, 33, 10, False, 1, FP32),
    "partial_interleaved": (80, 7, 66, True, 3, BF16),
    "no_rope": (5, 3, 0, False, 2, FP32),
}
LENGTHS = [[9, 12, 7], [7, 7, 20]]


def make_case(
    shape: str, lengths: list[list[int]], num_new: int, active: list[bool]
) -> tuple[values.Segments, dict]:
    head_dim, head_dim_v, rotary_dim, interleaved, num_state, dtype = SHAPES[shape]
    store = make_store(
        lengths, head_dim, head_dim_v, dtype, num_state=num_state, num_tail=num_new, room=2
    )
    # Keys and values of dead rows are NaN, so a gate written there would be one too.
    store.state[~store.live] = 7.0
    heads = len(lengths[0])
    gen = torch.Generator().manual_seed(5)
    return store, {
        "active": torch.tensor(active),
        "weight": torch.randn(heads, heads * (head_dim + head_dim_v + 2), generator=gen),
        "bias": torch.randn(heads, generator=gen),
        "num_new": num_new,
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
    }


def run(store: values.Segments, args: dict, order: tuple[int, int] = (0, 0)) -> Tensor:
    """The state afterwards."""
    got = store._make(emulated.guarded(t) for t in store)
    active, weight, bias = (emulated.guarded(args[n]) for n in ("active", "weight", "bias"))
    ptr = emulated.pointer
    params = emulated.GateParams(
        emulated.segments(got, active.numel()), ptr(got.k), ptr(got.v), ptr(got.pos), ptr(active),
        ptr(weight), ptr(bias), ptr(got.state), weight.shape[1], args["num_new"], store.k.shape[1],
        store.v.shape[1], store.state.shape[1], args["rotary_dim"], args["interleaved"], 1e-6,
        emulated.DTYPES[store.k.dtype],
    )  # fmt: skip
    emulated.launch("gate", params, store.capacity, order=order)
    return got.state


def check(store: values.Segments, args: dict, order: tuple[int, int] = (0, 0)) -> None:
    want = store.double()
    reference.gate_(want, **args)
    got = run(store, args, order)
    torch.testing.assert_close(got.double(), want.state, rtol=2e-6, atol=1e-4)
    kept = want.state == store.state
    assert torch.equal(got[kept], store.state[kept])


@pytest.mark.parametrize("order", emulated.ORDERS, ids=["forwards", "backwards", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape, order):
    check(*make_case(shape, LENGTHS, 7, [True, True]), order)


def test_more_heads_than_one_warp_takes():
    check(*make_case("partial", [[3] * 19], 3, [True]))


def test_inactive_rows_stay():
    check(*make_case("half_split", [[5, 6], [6, 5]], 5, [True, False]))


def test_nothing_new():
    check(*make_case("half_split", [[5, 0]], 0, [True]))


def test_same_bits_alone():
    store, args = make_case("interleaved", LENGTHS, 7, [True, True])
    want = run(store, args)
    end = int(store.cu_seqlens_k[3])
    alone = run(store.part(0, 3), {**args, "active": args["active"][:1]}, emulated.ORDERS[2])
    assert torch.equal(alone, want[:end])
    newest = run(store, {**args, "num_new": 1})
    rows = (store.cu_seqlens_k[:-1] + store.seqused_k - 1).long()
    assert torch.equal(newest[rows, -1], want[rows, -1])


def test_writes_stay_inside_their_slot():
    """A promise that was broken: tokens that one head has no row for are left alone."""
    store, args = make_case("partial", [[5, 3], [6, 5]], 5, [True, True])
    got, want = run(store, args), store.clone()
    reference.gate_(want, **{**args, "active": torch.tensor([False, True])})
    reference.gate_(want, **{**args, "active": torch.tensor([True, False]), "num_new": 3})
    torch.testing.assert_close(got, want.state, rtol=2e-6, atol=1e-4)
