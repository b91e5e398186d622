"""append_ against the reference: bit-equal, and nothing is written when it refuses."""

import pytest
import torch
from namm_ext import ops, reference, testing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _bits(tensor):
    """Compares NaN too: poison outside of the new rows must stay what it was."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _call(function, store, new):
    function(store, new["k_new"], new["v_new"], new["first"], new["num_new"], new["pos_first"])


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_new", [(4, 4), (0, 5), (1, 0), (5, 3)], ids=str)
@pytest.mark.parametrize("lengths", testing.LENGTHS)
def test_append(lengths, num_new, dtype, device):
    store = testing.ragged_store(lengths, dtype=dtype, device=device, head_dim_v=7)
    new = testing.new_tokens(store, num_new, num_cols=6)
    expected = store.clone()
    _call(reference.append_, expected, new)
    _call(ops.append_, store, new)
    for name in ("k", "v", "pos", "state", "seqused_k"):
        assert torch.equal(_bits(getattr(store, name)), _bits(getattr(expected, name))), name
    assert bool(store.k[store.live].isfinite().all())


@pytest.mark.parametrize("num_state", [0, 1])
def test_append_other_states(num_state):
    store = testing.ragged_store("ragged", num_state=num_state)
    new = testing.new_tokens(store, (2, 3), num_cols=3)
    _call(ops.append_, store, new)
    assert store.state.shape[1] == num_state
    assert bool(store.state[store.live].isfinite().all())


def test_append_without_values():
    """Where keys are values too."""
    store = testing.ragged_store("ragged", head_dim_v=0)
    expected, new = store.clone(), testing.new_tokens(store, (2, 3), num_cols=3)
    _call(reference.append_, expected, new)
    _call(ops.append_, store, new)
    assert torch.equal(_bits(store.k), _bits(expected.k))
    assert torch.equal(store.seqused_k, expected.seqused_k)
    assert store.with_values.v is store.k


def test_append_many_rows_uses_threads_and_stays_equal():
    store = testing.ragged_store((3, 0, 9, 1), head_dim=64, room=700)
    new = testing.new_tokens(store, (700, 650), num_cols=700)
    expected = store.clone()
    _call(reference.append_, expected, new)
    _call(ops.append_, store, new)
    assert torch.equal(_bits(store.k), _bits(expected.k))
    assert torch.equal(store.pos, expected.pos)


BAD = {
    "no room": (
        {"num_new": [6, 0], "first": [0, 0]},
        "append_: num_new[0] must be at most the room of 5 rows in segment 0, got 6",
    ),
    "second row has no room": (
        {"num_new": [1, 6], "first": [0, 0]},
        "append_: num_new[1] must be at most the room of 5 rows in segment 2, got 6",
    ),
    "columns outside": (
        {"num_new": [4, 0], "first": [3, 0]},
        "append_: first[0] and first[0] + num_new[0] must be in [0, 6], got 3 and 7",
    ),
    "negative count": (
        {"num_new": [1, -1]},
        "append_: first[1] and first[1] + num_new[1] must be in [0, 6], got 0 and -1",
    ),
    "negative position": (
        {"pos_first": [0, -3]},
        "append_: pos_first[1] must be in [0, 2147483647], got -3",
    ),
    "used beyond slot": (
        {"seqused_k": [43, 5, 64, 129]},
        "append_: seqused_k[0] must be in [0, 42], got 43",
    ),
    "slots not from 0": (
        {"cu_seqlens_k": [1, 42, 52, 121, 255]},
        "append_: cu_seqlens_k must start with 0, got 1",
    ),
    "slots decrease": (
        {"cu_seqlens_k": [0, 42, 41, 121, 255]},
        "append_: cu_seqlens_k must not decrease, got 42 before 41",
    ),
    "slots beyond the store": (
        {"cu_seqlens_k": [0, 42, 52, 121, 256]},
        "append_: cu_seqlens_k must end at 255 or before, got 256",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_append_refuses_before_writing(case):
    changes, message = BAD[case]
    store = testing.ragged_store("ragged")
    new = testing.new_tokens(store, (0, 0), num_cols=6)
    new["first"].zero_()
    for name, values in changes.items():
        tensor = torch.tensor(values, dtype=torch.int32)
        if name in new:
            new[name] = tensor
        else:
            store = store._replace(**{name: tensor})
    before = store.clone()
    with pytest.raises(RuntimeError) as error:
        _call(ops.append_, store, new)
    assert str(error.value).endswith(message)
    for name in ("k", "v", "pos", "state", "seqused_k"):
        assert torch.equal(_bits(getattr(store, name)), _bits(getattr(before, name))), name


def test_append_float64_runs_the_reference():
    store = testing.ragged_store("ragged").double()
    new = testing.new_tokens(store, (2, 1), num_cols=2)
    expected = store.clone()
    _call(reference.append_, expected, new)
    _call(ops.append_, store, new)
    assert torch.equal(store.k[store.live], expected.k[expected.live])
