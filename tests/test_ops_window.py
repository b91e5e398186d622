"""spectrogram and attention_received against the reference in float64, on every instruction set."""

import pytest
import torch
from namm_ext import ops, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))
impls = pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])


def _case(lengths, dtype, device="cpu", *, n_up=32, num_groups=2, head_dim=24, active=(True, True)):
    store = testing.ragged_store(lengths, dtype=dtype, device=device, head_dim=head_dim)
    args = testing.window(store, n_up=n_up, num_groups=num_groups, scale=head_dim**-0.5)
    args["active"] = torch.tensor(active, device=device)
    return store, args


def _spectrogram(function, store, args, q=None, state=None):
    return function(
        args["q_window"] if q is None else q, args["lse_window"], store.k, store.pos,
        store.state, store.cu_seqlens_k, store.seqused_k,
        args["pos_q"], args["active"],
        softmax_scale=args["q_window"].shape[-1] ** -0.5, ema_coeff=0.99,
    )  # fmt: skip


def _received(function, store, args, first_row, q=None):
    return function(
        args["q_window"] if q is None else q, args["lse_window"], store.k, store.pos,
        store.cu_seqlens_k, store.seqused_k, args["pos_q"], args["active"],
        softmax_scale=args["q_window"].shape[-1] ** -0.5, first_row=first_row,
    )  # fmt: skip


def _check(store, args, isa):
    live, q = store.live, args["q_window"]
    double = store.double()
    exact = _spectrogram(reference.spectrogram, double, args, q.double())
    same = _spectrogram(reference.spectrogram, store, args)
    with testing.force_isa(isa):
        got = _spectrogram(ops.spectrogram, store, args)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    # A frame is a sum of 32 products; 16 units in the last place of its largest value are noise.
    floor = 16 * torch.finfo(torch.float32).eps * float(exact[live].abs().max())
    testing.assert_no_worse_than(got[live], same[live], exact[live], floor=floor)

    for first_row in (0, 16, q.shape[2] - 1):
        exact = _received(reference.attention_received, double, args, first_row, q.double())
        same = _received(reference.attention_received, store, args, first_row)
        with testing.force_isa(isa):
            got = _received(ops.attention_received, store, args, first_row)
        floor = 16 * torch.finfo(torch.float32).eps * float(exact[live].abs().max())
        testing.assert_no_worse_than(got[live], same[live], exact[live], floor=floor)


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", testing.LENGTHS)
def test_window_ops(lengths, dtype, device, isa):
    _check(*_case(lengths, dtype, device), isa)


@impls
@pytest.mark.parametrize("n_up", [16, 48, 128])
@pytest.mark.parametrize(("num_groups", "head_dim"), [(1, 1), (3, 33), (4, 64), (1, 128)])
def test_window_shapes(n_up, num_groups, head_dim, device, isa):
    case = _case(
        "ragged", torch.float32, device, n_up=n_up, num_groups=num_groups, head_dim=head_dim
    )
    _check(*case, isa)


@impls
def test_inactive_rows_keep_their_state(device, isa):
    store, args = _case("ragged", torch.float32, device, active=(False, True))
    row = slice(0, int(store.cu_seqlens_k[2]))
    # A row that is not active must not even be looked at.
    args["q_window"][0] = float("nan")
    args["lse_window"][0] = float("nan")
    live = store.live
    with testing.force_isa(isa):
        state = _spectrogram(ops.spectrogram, store, args)
        received = _received(ops.attention_received, store, args, 16)
    assert torch.equal(state[row][live[row]], store.state[row][live[row]])
    assert bool((received[row][live[row]] == 0).all())
    assert bool(state[live].isfinite().all())


@pytest.mark.parametrize("isa", testing.isas())
def test_invisible_values_never_reach_the_sum(isa):
    """Keys newer than every query, and queries of before the start: selected, not multiplied."""
    store, args = _case("ragged", torch.float32)
    expected = _spectrogram(ops.spectrogram, store, args)[store.live]
    args["pos_q"] = args["pos_q"].clone()
    newest = store.cu_seqlens_k[1:] - 6
    store.k[newest[store.seqused_k > 0].long()] = float("inf")
    with testing.force_isa(isa):
        got = _spectrogram(ops.spectrogram, store, args)
    seen = store.live.clone()
    seen[newest.long()] = False
    assert bool(got[seen].isfinite().all())
    assert expected.isfinite().all()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_ops_are_deterministic_and_batch_invariant(dtype, isa):
    store, args = _case((70, 5, 64, 200), dtype, n_up=64)
    live = store.live
    with testing.force_isa(isa):
        state = _spectrogram(ops.spectrogram, store, args)
        received = _received(ops.attention_received, store, args, 16)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            again = _spectrogram(ops.spectrogram, store, args)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(state[live], again[live])
        for b in range(2):
            rows = slice(int(store.cu_seqlens_k[2 * b]), int(store.cu_seqlens_k[2 * b + 2]))
            one = testing.Store(
                store.k[rows], store.v[rows], store.pos[rows], store.state[rows],
                store.cu_seqlens_k[2 * b : 2 * b + 3] - store.cu_seqlens_k[2 * b],
                store.seqused_k[2 * b : 2 * b + 2].clone(), 1, 2,
            )  # fmt: skip
            part = {name: tensor[b : b + 1] for name, tensor in args.items()}
            mine = live[rows]
            assert torch.equal(_spectrogram(ops.spectrogram, one, part)[mine], state[rows][mine])
            got = _received(ops.attention_received, one, part, 16)
            assert torch.equal(got[mine], received[rows][mine])


def test_window_float64_runs_the_reference():
    store, args = _case("ragged", torch.float32)
    store, q = store.double(), args["q_window"].double()
    live = store.live
    got = _spectrogram(ops.spectrogram, store, args, q)
    assert torch.equal(got[live], _spectrogram(reference.spectrogram, store, args, q)[live])
    got = _received(ops.attention_received, store, args, 3, q)
    assert torch.equal(got[live], _received(reference.attention_received, store, args, 3, q)[live])
