"""compact against the reference: bit-equal, in a store that owns its memory."""

import pytest
import torch
from namm_ext import ops, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEEP = {
    "none": lambda i, n: i < 0,
    "all": lambda i, n: i >= 0,
    "every_third": lambda i, n: i % 3 == 0,
    "last_only": lambda i, n: i == n - 1,
    "runs": lambda i, n: i // 7 % 2 == 0,
}


def _keep(store, rule):
    """Poisoned outside of the live rows: a dead row marked to stay must not."""
    keep = torch.ones(store.k.shape[0], dtype=torch.uint8, device=store.k.device)
    num_kept = []
    for rows in store.slices():
        n = rows.stop - rows.start
        mask = KEEP[rule](torch.arange(n), n)
        keep[rows] = mask.to(keep)
        num_kept.append(int(mask.sum()))
    return keep, torch.tensor(num_kept, dtype=torch.int32, device=store.k.device)


def _slots(num_kept, room=3):
    cu = [0]
    for n in num_kept.tolist():
        cu.append(cu[-1] + n + room)
    return torch.tensor(cu, dtype=torch.int32, device=num_kept.device)


def _compact(function, store, keep, num_kept, cu_new, capacity=None):
    capacity = int(cu_new[-1]) if capacity is None else capacity
    return function(store, keep, num_kept, cu_new, capacity=capacity)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", KEEP)
@pytest.mark.parametrize("lengths", [*testing.LENGTHS, "long"])
def test_compact(lengths, rule, dtype, device):
    lengths = (3000, 1024, 1025, 7) if lengths == "long" else lengths
    store = testing.ragged_store(lengths, dtype=dtype, device=device, head_dim=5, head_dim_v=8)
    keep, num_kept = _keep(store, rule)
    cu_new = _slots(num_kept)
    got = _compact(ops.compact, store, keep, num_kept, cu_new)
    expected = _compact(reference.compact, store, keep, num_kept, cu_new)
    assert got.cu_seqlens_k is cu_new
    assert got.seqused_k is num_kept
    live = got.live
    for name, new, old in zip(got._fields, got.tokens, expected.tokens, strict=False):
        assert torch.equal(new[live], old[live]), name
        assert bool(new[live].isfinite().all()), name
        # The memory of evicted rows is really gone.
        assert new.untyped_storage().nbytes() == new.numel() * new.element_size()
    for rows in got.slices():
        pos = got.pos[rows]
        assert bool((pos[1:] > pos[:-1]).all()), "kept rows stay in order"


@pytest.mark.parametrize("num_state", [0, 1])
def test_compact_other_states(num_state):
    store = testing.ragged_store("ragged", num_state=num_state)
    keep, num_kept = _keep(store, "runs")
    cu_new = _slots(num_kept, room=0)
    got = _compact(ops.compact, store, keep, num_kept, cu_new)
    expected = _compact(reference.compact, store, keep, num_kept, cu_new)
    for new, old in zip(got, expected, strict=True):
        assert torch.equal(new, old)


def test_compact_keeping_all_is_the_identity():
    store = testing.ragged_store("ragged")
    keep, num_kept = _keep(store, "all")
    got = _compact(ops.compact, store, keep, num_kept, store.cu_seqlens_k)
    for new, old in zip(got.tokens, store.tokens, strict=True):
        assert torch.equal(new[store.live], old[store.live])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_matter(threads):
    store = testing.ragged_store((5000, 3, 2500, 0), dtype=torch.bfloat16)
    keep, num_kept = _keep(store, "runs")
    cu_new = _slots(num_kept, room=0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = _compact(ops.compact, store, keep, num_kept, cu_new)
    finally:
        torch.set_num_threads(before)
    for new, old in zip(
        got, _compact(reference.compact, store, keep, num_kept, cu_new), strict=True
    ):
        assert torch.equal(new, old)


def _i32(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "num_kept": (
        {"num_kept": _i32(37, 5, 63, 129)},
        "compact: num_kept[2] must be 64, got 63",
    ),
    "nan of select": (
        {"num_kept": _i32(-1, 5, 64, 129)},
        "compact: num_kept[0] must be 37, got -1",
    ),
    "slot too short": (
        {"cu_new": _i32(0, 37, 41, 105, 234)},
        "compact: slot 1 of cu_seqlens_new must hold 5 rows, got 4",
    ),
    "slots not from 0": (
        {"cu_new": _i32(1, 38, 43, 107, 236)},
        "compact: cu_seqlens_new must start with 0, got 1",
    ),
    "capacity": (
        {"capacity": 234},
        "compact: capacity must be at least 235, got 234",
    ),
    "negative capacity": (
        {"capacity": -1},
        "compact: capacity must be in [0, 2147483647], got -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_compact_refuses(case):
    changes, message = BAD[case]
    store = testing.ragged_store("ragged")
    keep, num_kept = _keep(store, "all")
    args = {"num_kept": num_kept, "cu_new": _slots(num_kept, 0), "capacity": None, **changes}
    with pytest.raises(RuntimeError) as error:
        _compact(ops.compact, store, keep, args["num_kept"], args["cu_new"], args["capacity"])
    assert str(error.value).endswith(message)


def test_compact_float64_runs_the_reference():
    store = testing.ragged_store("ragged").double()
    keep, num_kept = _keep(store, "runs")
    cu_new = _slots(num_kept)
    got = _compact(ops.compact, store, keep, num_kept, cu_new)
    for new, old in zip(
        got, _compact(reference.compact, store, keep, num_kept, cu_new), strict=True
    ):
        assert torch.equal(new, old)
