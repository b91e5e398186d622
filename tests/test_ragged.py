"""The ragged store by itself: sizes, poison, failures, rows and undo."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hf_models import evicting_policy
from namm_ext import Budget
from namm_ext.baselines import H2O, KNorm, StreamingLLM
from namm_ext.policy import Policy
from namm_ext.ragged import CARRY, Ledger, Planner, RaggedKV

B, H, G, D, DV, N_UP = 3, 2, 2, 8, 6, 16
CPU = torch.device("cpu")


DTYPES = [torch.float64, torch.float32, torch.bfloat16]  # the law, and the kernels


def make(policy, batch_size=B, dtype=torch.float64, **kwargs):
    return RaggedKV(
        policy, batch_size=batch_size, num_kv_heads=H, num_heads=H * G, head_dim=D,
        head_dim_v=DV, softmax_scale=D**-0.5, dtype=dtype, **kwargs,
    )  # fmt: skip


def inputs(length, seed=0, batch_size=B, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((H * G, D), (H, D), (H, DV))
    return [
        2 * torch.randn(batch_size, h, length, d, dtype=torch.float64, generator=g).to(dtype)
        for h, d in shapes
    ]


def run(kv, q, k, v, cuts=(), planner=None):
    """Feed all tokens, cut at the given columns."""
    planner = planner or Planner(kv.n_up)
    ends = (0, *cuts, q.shape[2])
    out = []
    for a, b in pairwise(ends):
        pieces = planner(kv.seen, b - a, None, CPU)
        out.append(kv.forward(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], pieces))
    return torch.cat(out, dim=1)


def live(kv, name):
    """A store tensor's live rows, by segment."""
    rows = [getattr(kv.store.segments, name)[live] for live in kv.store.segments.slices()]
    return rows


def same(a, b):
    assert a.lengths == b.lengths
    assert a.seen == b.seen
    for each in (a, b):
        assert each.store.segments.seqused_k.tolist() == list(a.lengths)
    for name in ("k", "v", "pos", "state"):
        for x, y in zip(live(a, name), live(b, name), strict=True):
            torch.testing.assert_close(x, y)


def policy():
    return evicting_policy(N_UP, seed=3, budget=Budget(7, scope="per_layer"))


# Sizes and memory ---------------------------------------------------------------------------------


def test_slots_are_kept_plus_n_up():
    kv = make(policy())
    run(kv, *inputs(70))
    store, segments = kv.store, kv.store.segments
    assert store.slots == tuple(n + N_UP for n in store.kept)
    assert segments.cu_seqlens_k.diff().tolist() == list(store.slots)
    assert kv.lengths == tuple(n + 70 % N_UP for n in store.kept)
    assert len(set(store.kept)) > 1  # really ragged
    assert all(sum(store.kept[b * H : (b + 1) * H]) == 7 * H for b in range(B))
    rows = sum(store.slots)
    assert segments.k.untyped_storage().nbytes() == rows * D * 8
    assert segments.v.untyped_storage().nbytes() == rows * DV * 8
    assert segments.state.untyped_storage().nbytes() == rows * 17 * 8


def test_ledger_equals_the_tensors():
    total = Ledger()
    kv = make(policy(), ledger=total)
    run(kv, *inputs(70))
    k, v, *rest = kv.store.segments
    tensors = (*rest, kv.q_window, kv.lse_window)
    assert total.kv == kv.ledger.kv == k.nbytes + v.nbytes
    assert total.memory == sum(t.untyped_storage().nbytes() for t in tensors)
    # An update holds the old and the new store at once.
    assert total.peak_kv >= 2 * H * B * N_UP * (D + DV) * 8
    assert total.peak <= total.peak_kv + total.peak_memory
    kv.release()
    assert (total.kv, total.memory) == (0, 0)


def test_a_ledger_of_layers_knows_the_common_peak():
    total = Ledger()
    a, b = Ledger(total), Ledger(total)
    a.add(10, 0)
    b.add(10, 0)
    a.add(10, 1)
    a.add(-10, -1)
    b.add(10, 1)
    assert (total.peak_kv, total.peak_memory, total.peak, total.kv) == (30, 1, 31, 30)
    assert (a.peak_kv, b.peak_kv) == (20, 20)  # 40 together, but never at once


POLICIES = {"NAMM": policy, "H2O": lambda: H2O(7, N_UP), "KNorm": lambda: KNorm(7, N_UP)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_free_room_and_unused_window_are_never_read(name, dtype):
    q, k, v = inputs(70, dtype=dtype)
    clean, dirty = (make(POLICIES[name](), dtype=dtype) for _ in range(2))
    want = run(clean, q, k, v, cuts=(10, 11, 40))
    planner, out = Planner(N_UP), []
    for a, b in ((0, 10), (10, 11), (11, 40), (40, 70)):
        starts = dirty.store.segments.cu_seqlens_k.tolist()
        for s, n in enumerate(dirty.lengths):
            room = slice(starts[s] + n, starts[s + 1])
            for name in ("k", "v", "state"):
                getattr(dirty.store.segments, name)[room] = torch.nan
            dirty.store.segments.pos[room] = 10**9
        if dirty.q_window.shape[2]:
            since = CARRY + dirty.seen[0] % N_UP
            dirty.q_window[:, :, since:] = torch.nan
            dirty.lse_window[:, :, since:] = torch.nan
        pieces = planner(dirty.seen, b - a, None, CPU)
        out.append(dirty.forward(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], pieces))
    assert torch.equal(torch.cat(out, 1), want)
    same(clean, dirty)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POLICIES)
def test_rows_do_not_see_each_other(name, dtype):
    """Bit for bit: a padded row of a batch and the same row alone."""
    pads = (0, 9, 23)
    q, k, v = inputs(70, dtype=dtype)
    kv, planner, out = make(POLICIES[name](), dtype=dtype), Planner(N_UP), []
    for a, b in ((0, 40), (40, 41), (41, 70)):
        runs = tuple(((p, b - p),) for p in pads) if a == 0 else None
        pieces = planner(kv.seen, b - a, runs, CPU)
        out.append(kv.forward(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], pieces))
    got = torch.cat(out, 1)
    for row, pad in enumerate(pads):
        alone = make(POLICIES[name](), batch_size=1, dtype=dtype)
        one = [x[row : row + 1, :, pad:] for x in (q, k, v)]
        want = run(alone, *one, cuts=(40 - pad, 41 - pad))
        assert torch.equal(got[row : row + 1, pad:], want)
        assert not got[row, :pad].any()
        for name_ in ("k", "v", "pos", "state"):
            mine = live(kv, name_)[row * H : (row + 1) * H]
            assert all(torch.equal(x, y) for x, y in zip(mine, live(alone, name_), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_agree_with_the_law(dtype):
    """The same store in float64: outputs to rounding, and the state that was carried."""
    q, k, v = inputs(47, dtype=dtype)
    mine = make(evicting_policy(N_UP, budget=Budget(threshold=-1e9)), dtype=dtype)
    exact = make(evicting_policy(N_UP, budget=Budget(threshold=-1e9)))
    got = run(mine, q, k, v, cuts=(20,)).double()
    want = run(exact, q.double(), k.double(), v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    for x, y in zip(live(mine, "state"), live(exact, "state"), strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-4)


def test_no_window_for_policies_that_need_none():
    kv = make(StreamingLLM(8, N_UP))
    run(kv, *inputs(40))
    assert kv.q_window.numel() == kv.lse_window.numel() == 0
    assert kv.store.segments.state.shape[1] == 0


@pytest.mark.parametrize("name", POLICIES)
def test_padding_in_front_of_all_rows_at_different_phases(name):
    """The same columns for every row, which stand at different places of their periods."""
    q, k, v = inputs(40)
    kv, planner = make(POLICIES[name]()), Planner(N_UP)
    runs = tuple(((pad, 30 - pad),) for pad in (0, 5, 9))
    kv.forward(q[:, :, :30], k[:, :, :30], v[:, :, :30], planner(kv.seen, 30, runs, CPU))
    pieces = planner(kv.seen, 10, (((8, 2),),) * 3, CPU)
    assert pieces[0].columns == slice(8, 10)
    out = kv.forward(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], pieces)
    for row, pad in enumerate((0, 5, 9)):
        alone = make(POLICIES[name](), batch_size=1)
        columns = [*range(pad, 30), 38, 39]
        want = run(alone, *(x[row : row + 1, :, columns] for x in (q, k, v)))
        torch.testing.assert_close(out[row, 8:], want[0, -2:])
        rows = slice(0, CARRY + kv.seen[row] % N_UP)
        assert torch.equal(kv.q_window[row, :, rows], alone.q_window[0, :, rows])
        torch.testing.assert_close(kv.lse_window[row, :, rows], alone.lse_window[0, :, rows])


def test_window_holds_the_last_queries():
    kv = make(policy())
    q, k, v = inputs(37)
    run(kv, q, k, v, cuts=(5, 20))
    torch.testing.assert_close(kv.q_window[:, :, : CARRY + 5], q[:, :, 32 - CARRY :])
    assert torch.isfinite(kv.lse_window).all()


def test_short_periods():
    """n_up below the 16 carried queries: the carried rows come from more than one period."""
    kv = make(H2O(9, n_up=3))
    q, k, v = inputs(40)
    run(kv, q, k, v)
    torch.testing.assert_close(kv.q_window[:, :, : CARRY + 1], q[:, :, 40 - CARRY - 1 :])
    other = make(H2O(9, n_up=3))
    run(other, q, k, v, cuts=range(1, 40))
    same(kv, other)


# Failures -----------------------------------------------------------------------------------------


class Failing(Policy):
    """Fails once at the wanted update, in ``update`` or in ``select``."""

    def __init__(self, inner, at, where):
        self.inner, self.left, self.where = inner, at, where
        self.n_up, self.num_state = inner.n_up, inner.num_state

    def _maybe_fail(self, where):
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("none left")

    def update(self, ctx):
        self._maybe_fail("update")
        return self.inner.update(ctx)

    def select(self, scores, ctx):
        self._maybe_fail("select")
        return self.inner.select(scores, ctx)


@pytest.mark.parametrize("where", ["update", "select"])
def test_a_failing_update_leaves_the_store_and_is_made_up_for(where):
    q, k, v = inputs(70)
    good, bad = make(policy()), make(Failing(policy(), 2, where))
    want = run(good, q, k, v)
    run(bad, q[:, :, :31], k[:, :, :31], v[:, :, :31])
    store, held = bad.store, copy.deepcopy(bad.store)
    with pytest.raises(MemoryError):
        run(bad, q[:, :, 31:32], k[:, :, 31:32], v[:, :, 31:32])
    assert bad.store is store
    assert (
        bad.lengths
        == tuple(n + N_UP for n in store.kept)
        == tuple(store.segments.seqused_k.tolist())
    )
    for a, b in zip(live(bad, "state"), store.segments.cu_seqlens_k.tolist(), strict=False):
        torch.testing.assert_close(a[:-1], held.segments.state[b : b + a.shape[0] - 1])
    got = run(bad, q[:, :, 32:], k[:, :, 32:], v[:, :, 32:])
    torch.testing.assert_close(got, want[:, 32:])
    same(good, bad)


# Rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 0, 1], [1]], ids=["swap", "repeat", "one"])
def test_select_rows(rows):
    q, k, v = inputs(70)
    kv = make(policy())
    run(kv, q[:, :, :40], k[:, :, :40], v[:, :, :40])
    kv.select_rows(rows)
    assert kv.batch_size == len(rows)
    fresh = make(policy(), batch_size=len(rows))
    want = run(fresh, q[rows], k[rows], v[rows])
    assert kv.ledger.kv == kv.store.kv_bytes
    q, k, v = q[rows], k[rows], v[rows]
    got = run(kv, q[:, :, 40:], k[:, :, 40:], v[:, :, 40:])
    torch.testing.assert_close(got, want[:, 40:])
    same(kv, fresh)


def test_select_rows_behind_a_failed_update():
    q, k, v = inputs(32)
    kv, fresh = make(Failing(policy(), 2, "update")), make(policy(), batch_size=2)
    with pytest.raises(MemoryError):
        run(kv, q, k, v)
    kv.select_rows([2, 0])
    q, k, v = inputs(5, seed=3, batch_size=2)
    run(kv, q, k, v)
    q2, k2, v2 = inputs(32)
    run(fresh, q2[[2, 0]], k2[[2, 0]], v2[[2, 0]])
    run(fresh, q, k, v)
    same(kv, fresh)


# Undo ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [1, 6, 7, 20, 38, 60])
def test_crop_with_recorded_past(removed):
    q, k, v = inputs(70)
    kv, fresh = make(policy()), make(policy())
    kv.recording = True
    run(kv, q, k, v)
    kv.crop([removed] * B)
    kv.forget_past()
    kv.recording = False
    n = 70 - removed
    run(fresh, q[:, :, :n], k[:, :, :n], v[:, :, :n])
    same(kv, fresh)
    assert kv.num_updates == fresh.num_updates
    assert (kv.ledger.kv, kv.ledger.memory) == (fresh.ledger.kv, fresh.ledger.memory)
    run(kv, q[:, :, n:], k[:, :, n:], v[:, :, n:])
    run(fresh, q[:, :, n:], k[:, :, n:], v[:, :, n:])
    same(kv, fresh)


def test_the_recorded_past_is_bounded():
    kv = make(policy())
    kv.recording = True
    run(kv, *inputs(400))
    assert kv.num_updates == 25
    assert kv.ledger.kv < 12 * kv.store.kv_bytes
    with pytest.raises(RuntimeError, match="cannot undo the memory update"):
        kv.crop([300] * B)
    kv.crop([128] * B)
    assert kv.seen == (272,) * B


def test_the_recorded_past_is_what_128_tokens_need():
    kv = make(policy())
    kv.recording = True
    run(kv, *inputs(400))
    one = kv.recorded_bytes // 8
    assert kv.recorded_bytes == 8 * one  # updates behind 272, 288, ..., 384 tokens are gone
    assert one > 0
    assert kv.recorded_bytes + sum(kv.held) == kv.ledger.kv + kv.ledger.memory
    with pytest.raises(RuntimeError, match="cannot undo the memory update"):
        kv.crop([129] * B)
    kv.crop([128] * B)
    assert kv.recorded_bytes == 0


@pytest.mark.parametrize("length", [385, 399])
def test_128_tokens_can_be_taken_back_wherever_the_updates_were(length):
    q, k, v = inputs(length)
    kv, fresh = make(policy()), make(policy())
    kv.recording = True
    run(kv, q, k, v)
    kv.crop([128] * B)
    run(fresh, *(x[:, :, : length - 128] for x in (q, k, v)))
    same(kv, fresh)


def test_rows_can_go_back_128_tokens_each():
    """Rows that update apart make more versions of the store; none is dropped too early."""
    q, k, v = inputs(300)
    pads, planner = (0, 5, 9), Planner(N_UP)
    kv, fresh = make(policy()), make(policy())
    kv.recording = True
    for target, length in ((kv, 300), (fresh, 172)):
        runs = tuple(((pad, length - pad),) for pad in pads)
        part = [x[:, :, :length] for x in (q, k, v)]
        target.forward(*part, planner(target.seen, length, runs, CPU))
    kv.crop([128] * B)
    same(kv, fresh)


def test_a_crop_keeps_the_pending_updates_of_other_rows():
    q, k, v = inputs(32)
    kv, fresh = make(Failing(policy(), 2, "update")), make(policy())
    with pytest.raises(MemoryError):
        run(kv, q, k, v)
    kv.crop([3, 0, 0])
    assert kv.overdue_rows == (False, True, True)
    assert kv.overdue.pos_q.tolist() == [29 - CARRY - 13, 0, 0]
    pieces = Planner(N_UP)(kv.seen, 3, (((0, 3),), (), ()), CPU)
    kv.forward(*(x[:, :, 29:] for x in (q, k, v)), pieces)
    run(fresh, q, k, v)
    same(kv, fresh)


def test_nothing_is_rolled_back_behind_a_crop():
    kv = make(policy())
    kv.mark()
    run(kv, *inputs(21))
    kv.crop([2, 1, 0])
    kv.roll_back()
    assert kv.seen == (19, 20, 21)


def test_crop_refuses_what_it_cannot_do():
    q, k, v = inputs(40)
    kv = make(policy())
    run(kv, q, k, v)
    before = copy.deepcopy(kv.store.segments.seqused_k)
    with pytest.raises(RuntimeError, match=r"crop: cannot undo the memory update of layer 0 "
                       r"that dropped tokens, asked to remove 9 tokens"):  # fmt: skip
        kv.crop([0, 9, 0])
    assert torch.equal(kv.store.segments.seqused_k, before)
    assert kv.seen == (40,) * B
    kv.crop([8, 3, 0])  # rows by themselves
    assert kv.seen == (32, 37, 40)
    assert kv.store.segments.seqused_k.tolist() == list(kv.lengths)
