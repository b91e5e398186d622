"""record_ of the CUDA kernels, run on the CPU, against the law: equal bits."""

from __future__ import annotations

import emulated
import pytest
import torch
from emulated import reference

NAN = float("nan")


def run(head_dim, dtype, first, num_new, pos_first, n_up, num_cols, pad, order):
    """(what the kernel, what the law made of the same windows)"""
    gen = torch.Generator().manual_seed(0)
    batch_size, heads = len(first), 6
    q = torch.randn(batch_size, num_cols, heads, head_dim + pad, generator=gen)
    q = q.to(dtype)[..., :head_dim].transpose(1, 2)
    lse = torch.randn(batch_size, heads, num_cols, generator=gen)
    window = torch.full((batch_size, heads, 16 + n_up, head_dim), NAN, dtype=dtype)
    lse_window = torch.full((batch_size, heads, 16 + n_up), NAN)
    ints = [torch.tensor(values, dtype=torch.int32) for values in (first, num_new, pos_first)]
    want = window.clone(), lse_window.clone()
    reference.record_(*want, q, lse, *ints)
    got = emulated.guarded(window), emulated.guarded(lse_window)
    ints = [emulated.guarded(t) for t in ints]
    params = emulated.RecordParams(
        *(emulated.pointer(t) for t in (q, lse, *ints, *got)),
        q.stride()[:3], lse.stride(), got[0].stride()[:3], got[1].stride(),
        batch_size, heads, head_dim, num_cols, 16 + n_up, emulated.DTYPES[dtype],
    )  # fmt: skip
    emulated.launch("record", params, 0, order=order)
    return got, want


@pytest.mark.parametrize("order", emulated.ORDERS, ids=["forwards", "backwards", "random"])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "pad"),
    [(16, torch.bfloat16, 0), (5, torch.float16, 1), (3, torch.float32, 0)],
    ids=str,
)
@pytest.mark.parametrize(
    ("first", "num_new", "pos_first", "n_up", "num_cols"),
    [
        pytest.param((0, 0), (1, 1), (40, 7), 32, 1, id="one_column"),
        pytest.param((1, 3), (4, 0), (60, 0), 32, 6, id="to_the_end"),
        pytest.param((1,), (70,), (130,), 128, 72, id="two_blocks"),
        pytest.param((0,), (0,), (0,), 16, 0, id="no_columns"),
    ],
)
def test_record(first, num_new, pos_first, n_up, num_cols, head_dim, dtype, pad, order):
    got, want = run(head_dim, dtype, first, num_new, pos_first, n_up, num_cols, pad, order)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
