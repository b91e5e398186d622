"""attend against the reference in float64, on every instruction set."""

import math

import pytest
import torch
from namm_ext import ops, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))


def _case(lengths, num_new, dtype, device, *, num_groups=2, head_dim=24, head_dim_v=20, room=9):
    store = testing.ragged_store(
        lengths, dtype=dtype, device=device, head_dim=head_dim, head_dim_v=head_dim_v, room=room
    )
    new = testing.new_tokens(store, num_new, num_groups=num_groups, num_cols=max(*num_new, 1) + 2)
    # The new keys are in the store before their queries come, as in the model.
    ops.append_(
        store.k, store.v, store.pos, store.state, store.seqused_k, store.cu_seqlens_k,
        new["k_new"], new["v_new"], new["first"], new["num_new"], new["pos_first"],
    )  # fmt: skip
    return store, new


def _attend(function, q, store, new, **kwargs):
    return function(
        q, store.k, store.v, store.pos, store.cu_seqlens_k, store.seqused_k,
        new["first"], new["num_new"], new["pos_first"],
        softmax_scale=q.shape[-1] ** -0.5, **kwargs,
    )  # fmt: skip


def _check(store, new, isa):
    exact = _attend(reference.attend, new["q"].double(), store.double(), new)
    rounding = None if store.k.dtype == torch.float32 else store.k.dtype
    same = _attend(reference.attend, new["q"], store, new, round_to=rounding)
    with testing.force_isa(isa):
        out, lse = _attend(ops.attend, new["q"], store, new)
    assert out.dtype == new["q"].dtype
    assert lse.dtype == torch.float32
    testing.assert_no_worse_than(out, same[0], exact[0])
    testing.assert_no_worse_than(lse, same[1], exact[1])
    return out, lse


@pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_new", [(1, 1), (9, 4), (0, 7)], ids=str)
@pytest.mark.parametrize("lengths", testing.LENGTHS)
def test_attend(lengths, num_new, dtype, device, isa):
    _check(*_case(lengths, num_new, dtype, device), isa)


@pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])
@pytest.mark.parametrize("num_groups", [1, 3, 8])
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (33, 17), (64, 64), (128, 96)])
def test_attend_shapes(head_dim, head_dim_v, num_groups, device, isa):
    case = _case(
        "ragged", (9, 2), torch.float32, device,
        num_groups=num_groups, head_dim=head_dim, head_dim_v=head_dim_v,
    )  # fmt: skip
    _check(*case, isa)


@pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])
def test_attend_large_logits(device, isa):
    store, new = _case("ragged", (5, 5), torch.float32, device)
    new["q"] *= 40
    out, lse = _check(store, new, isa)
    assert lse[lse.isfinite()].abs().max() > 100
    assert bool(out.isfinite().all())


@pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])
def test_attend_leaves_other_columns_alone(device, isa):
    store, new = _case("some_empty", (3, 0), torch.float32, device)
    q = new["q"]
    out = q.new_full((q.shape[0], q.shape[2], q.shape[1], store.v.shape[1]), 7.0)
    lse = q.new_full(q.shape[:3], 7.0)
    with testing.force_isa(isa):
        ops.attend_(
            out, lse, q, store.k, store.v, store.pos, store.cu_seqlens_k, store.seqused_k,
            new["first"], new["num_new"], new["pos_first"], softmax_scale=0.2,
        )  # fmt: skip
    for b in range(2):
        first = int(new["first"][b])
        assert bool((out[b, :first] == 7).all())
        assert bool((lse[b, :, :first] == 7).all())
        assert bool((out[b, first:] != 7).all())


@pytest.mark.parametrize("isa", testing.isas())
def test_attend_nothing_visible(isa):
    store, new = _case("some_empty", (2, 2), torch.float32, "cpu")
    new["pos_first"] = torch.tensor([-5, -5], dtype=torch.int32)
    with testing.force_isa(isa):
        out, lse = _attend(ops.attend, new["q"], store, new)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_new", [(1, 1), (9, 9)], ids=str)
def test_attend_is_deterministic_and_batch_invariant(num_new, dtype, isa):
    store, new = _case((70, 5, 64, 200), num_new, dtype, "cpu")
    with testing.force_isa(isa):
        out, lse = _attend(ops.attend, new["q"], store, new)
        again = _attend(ops.attend, new["q"], store, new)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            again = _attend(ops.attend, new["q"], store, new)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(out, again[0])
        for b in range(2):
            rows = slice(int(store.cu_seqlens_k[2 * b]), int(store.cu_seqlens_k[2 * b + 2]))
            one = ops.attend(
                new["q"][b : b + 1], store.k[rows], store.v[rows], store.pos[rows],
                store.cu_seqlens_k[2 * b : 2 * b + 3] - store.cu_seqlens_k[2 * b],
                store.seqused_k[2 * b : 2 * b + 2].clone(),
                *(new[name][b : b + 1] for name in ("first", "num_new", "pos_first")),
                softmax_scale=new["q"].shape[-1] ** -0.5,
            )  # fmt: skip
            assert torch.equal(one[0], out[b : b + 1])
            assert torch.equal(one[1], lse[b : b + 1])


def test_attend_float64_runs_the_reference():
    store, new = _case("ragged", (2, 3), torch.float32, "cpu")
    store, q = store.double(), new["q"].double()
    for got, exact in zip(
        _attend(ops.attend, q, store, new), _attend(reference.attend, q, store, new), strict=True
    ):
        assert torch.equal(got, exact)
