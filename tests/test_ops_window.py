"""spectrogram and attention_received against the law in float64, on every instruction set."""

import pytest
import torch
from namm_ext import ops, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))
impls = pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])


def _case(lengths, dtype, device="cpu", *, n_up=32, num_groups=2, head_dim=24, std=1.0, **kwargs):
    """A window and its store; logits have the standard deviation ``std``."""
    store = testing.ragged_store(lengths, dtype=dtype, device=device, head_dim=head_dim)
    window = testing.window(
        store, n_up=n_up, num_groups=num_groups, scale=std * head_dim**-0.5, **kwargs
    )
    return store, window


def _spectrogram(module, store, window, std=1.0, softcap=0.0):
    scale = std * window.q.shape[-1] ** -0.5
    return module.spectrogram(window, store, softmax_scale=scale, ema_coeff=0.99, softcap=softcap)


def _received(module, store, window, first_row, softcap=0.0):
    scale = window.q.shape[-1] ** -0.5
    return module.attention_received(
        window, store, softmax_scale=scale, first_row=first_row, softcap=softcap
    )


def _double(window):
    return window._replace(q=window.q.double())


def _check(store, window, isa, softcap=0.0):
    live = store.live
    law = (reference, store.double(), _double(window))
    cap = {"softcap": softcap}
    exact = _spectrogram(*law, **cap)
    same = _spectrogram(reference, store, window, **cap)
    with testing.force_isa(isa):
        got = _spectrogram(ops, store, window, **cap)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    # A frame is a sum of 32 products; 16 units in the last place of its largest value are noise.
    floor = 16 * torch.finfo(torch.float32).eps * float(exact[live].abs().max())
    testing.assert_no_worse_than(got[live], same[live], exact[live], floor=floor)

    for first_row in (0, 16, window.q.shape[2] - 1):
        exact = _received(*law, first_row, **cap)
        same = _received(reference, store, window, first_row, **cap)
        with testing.force_isa(isa):
            got = _received(ops, store, window, first_row, **cap)
        floor = 16 * torch.finfo(torch.float32).eps * float(exact[live].abs().max())
        testing.assert_no_worse_than(got[live], same[live], exact[live], floor=floor)


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", testing.LENGTHS)
def test_window_ops(lengths, dtype, device, isa):
    _check(*_case(lengths, dtype, device), isa)


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize(("num_groups", "head_dim"), [(3, 33), (2, 64)])
def test_bounded_logits(num_groups, head_dim, softcap, dtype, device, isa):
    store, window = _case("ragged", dtype, device, num_groups=num_groups, head_dim=head_dim)
    # The log-sum-exps are those of free logits; P may be anything positive.
    _check(store, window, isa, softcap)
    free, bound = (_received(ops, store, window, 0, cap)[store.live] for cap in (0.0, softcap))
    assert not torch.equal(free, bound)


@impls
def test_wrong_bound(device, isa):
    store, window = _case("ragged", torch.float32, device)
    for call in (_spectrogram, lambda *a, softcap: _received(*a, 0, softcap)):
        with pytest.raises(RuntimeError, match="softcap must not be negative, got -1"):
            call(ops, store, window, softcap=-1.0)


@impls
@pytest.mark.parametrize("n_up", [16, 48, 128])
@pytest.mark.parametrize(("num_groups", "head_dim"), [(1, 1), (3, 33), (4, 64), (1, 128)])
def test_window_shapes(n_up, num_groups, head_dim, device, isa):
    case = _case(
        "ragged", torch.float32, device, n_up=n_up, num_groups=num_groups, head_dim=head_dim
    )
    _check(*case, isa)


def _check_relative(store, window, isa, std=1.0):
    want = _spectrogram(reference, store.double(), _double(window), std)[store.live]
    with testing.force_isa(isa):
        got = _spectrogram(ops, store, window, std)[store.live]
    assert float((got - want).norm() / want.norm()) <= 1e-6


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [1.0, 4.0])
def test_relative_error_of_long_segments(isa, dtype, std):
    store, window = _case(
        [600, 433], dtype, n_up=256, num_groups=4, head_dim=128, std=std, num_kv_heads=2
    )
    store.state.mul_(0.01)  # so that the new frames weigh
    _check_relative(store, window, isa, std)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 33, 40, 80, 256, 576])
@pytest.mark.parametrize("num_groups", [1, 3])
def test_relative_error_of_head_dims(isa, dtype, head_dim, num_groups):
    store, window = _case(
        [50, 97], dtype, n_up=48, num_groups=num_groups, head_dim=head_dim, num_kv_heads=1
    )
    _check_relative(store, window, isa)


@impls
def test_inactive_rows_keep_their_state(device, isa):
    store, window = _case("ragged", torch.float32, device, active=(False, True))
    # A row that is not active must not even be looked at.
    window.q[0] = float("nan")
    window.lse[0] = float("nan")
    rows, segment = store.live_rows()
    idle = rows[segment < 2]
    with testing.force_isa(isa):
        state = _spectrogram(ops, store, window)
        received = _received(ops, store, window, 16)
    assert torch.equal(state[idle], store.state[idle])
    assert bool((received[idle] == 0).all())
    assert bool(state[rows].isfinite().all())


@pytest.mark.parametrize("isa", testing.isas())
def test_invisible_values_never_reach_the_sum(isa):
    """Keys newer than every query, and queries of before the start: selected, not multiplied."""
    store, window = _case("ragged", torch.float32)
    newest = torch.tensor([rows.stop - 1 for rows in store.slices()])
    store.k[newest] = float("inf")
    store.pos[newest] = 10**6
    with testing.force_isa(isa):
        got = _spectrogram(ops, store, window)
    assert bool(got[store.live].isfinite().all())


@impls
def test_keys_nobody_sees_are_exact_zeros(device, isa):
    """Keys newer than every query keep exactly the decayed old state."""
    store, window = _case([70, 3], torch.float32, device, num_kv_heads=1)
    window = window._replace(pos_q=torch.full_like(window.pos_q, -1000))
    store.state[:] = 0
    with testing.force_isa(isa):
        assert not _spectrogram(ops, store, window)[store.live].any()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_ops_are_deterministic_and_batch_invariant(dtype, isa):
    """A segment alone, in a batch, and on several threads: equal bits."""
    store, window = _case((130, 61, 1, 200), dtype, n_up=64, head_dim=64)
    live = store.live
    with testing.force_isa(isa):
        state = _spectrogram(ops, store, window)
        received = _received(ops, store, window, 16)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 3)
        try:
            again = _spectrogram(ops, store, window)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(state[live], again[live])
        for b in range(2):
            rows = slice(int(store.cu_seqlens_k[2 * b]), int(store.cu_seqlens_k[2 * b + 2]))
            one = store.part(2 * b, 2 * b + 2)
            mine = window._make(tensor[b : b + 1] for tensor in window)
            assert torch.equal(_spectrogram(ops, one, mine)[one.live], state[rows][one.live])
            assert torch.equal(_received(ops, one, mine, 16)[one.live], received[rows][one.live])


def test_window_float64_runs_the_reference():
    store, window = _case("ragged", torch.float32)
    store, window = store.double(), _double(window)
    live = store.live
    got, want = (_spectrogram(module, store, window) for module in (ops, reference))
    assert torch.equal(got[live], want[live])
    got, want = (_received(module, store, window, 3) for module in (ops, reference))
    assert torch.equal(got[live], want[live])
