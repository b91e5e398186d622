"""record_ against the reference: bit-equal, and nothing is written when it refuses."""

import pytest
import torch
from namm_ext import ops, reference, testing

N_UP = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ints(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def window(dtype=torch.float32, device="cpu"):
    """Two rows, four heads; what must not be written is NaN."""
    shape = (2, 4, 16 + N_UP)
    nan = {"device": device, "dtype": dtype}
    return torch.full((*shape, 5), torch.nan, **nan), torch.full(shape, torch.nan, device=device)


def queries(num_cols, dtype=torch.float32, device="cpu"):
    """As a model makes them: heads behind columns in memory; lse with columns in front."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, num_cols, 4, 5, generator=generator).transpose(1, 2)
    lse = torch.randn(2, num_cols, 4, generator=generator).transpose(1, 2)
    return q.to(device, dtype), lse.to(device)


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("first", "num_new", "pos_first"),
    [((0, 0), (1, 1), (7, 7)), ((1, 0), (3, 4), (21, 48)), ((0, 2), (0, 2), (5, 46))],
    ids=str,
)
def test_record(first, num_new, pos_first, dtype, device):
    q, lse = queries(4, dtype, device)
    columns = [ints(*values, device=device) for values in (first, num_new, pos_first)]
    got, want = window(dtype, device), window(dtype, device)
    reference.record_(*want, q, lse, *columns)
    ops.record_(*got, q, lse, *columns)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    # One row by hand: position p at row 16 + p mod n_up, nothing else.
    begin = 16 + pos_first[1] % N_UP
    rows, cols = slice(begin, begin + num_new[1]), slice(first[1], first[1] + num_new[1])
    assert torch.equal(got[0][1, :, rows], q[1, :, cols])
    assert torch.equal(got[1][1, :, rows], lse[1, :, cols])
    assert int(got[1][1].isfinite().sum()) == 4 * num_new[1]


BAD = {
    "past the period": (
        {"pos_first": (22, 0)},
        "record_: num_new[0] must be at most the 2 queries up to the row's next update, got 3",
    ),
    "columns outside": (
        {"first": (0, 2)},
        "record_: first[1] and first[1] + num_new[1] must be in [0, 4], got 2 and 5",
    ),
    "negative position": (
        {"pos_first": (0, -1)}, "record_: pos_first[1] must not be negative, got -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_record_refuses_before_writing(case):
    changes, message = BAD[case]
    columns = {"first": (0, 0), "num_new": (3, 3), "pos_first": (0, 0), **changes}
    got = window()
    with pytest.raises(RuntimeError) as error:
        ops.record_(*got, *queries(4), *(ints(*values) for values in columns.values()))
    assert str(error.value).endswith(message)
    assert all(bool(t.isnan().all()) for t in got)


def test_the_reference_refuses_what_passes_a_period():
    with pytest.raises(ValueError, match="row 0 must have at most 2 queries up to its next"):
        reference.record_(*window(), *queries(4), ints(0, 0), ints(3, 3), ints(22, 0))


def test_record_float64_runs_the_reference():
    q, lse = (t.double() for t in queries(2))
    got = tuple(t.double() for t in window())
    ops.record_(*got, q, lse, ints(0, 0), ints(2, 2), ints(0, 30))
    assert torch.equal(got[0][1, :, 22:24], q[1])
