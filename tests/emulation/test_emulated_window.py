"""spectrogram and attention_received of the CUDA kernels, run on the CPU, against the law."""

from __future__ import annotations

from dataclasses import dataclass

import emulated
import pytest
import torch
from emulated import reference
from torch import Tensor

EMA_COEFF = 0.99


@dataclass
class Sample:
    """Inputs of the window ops; dead rows are NaN and the slots have room."""

    q_window: Tensor
    lse_window: Tensor
    k: Tensor
    pos: Tensor
    state: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    pos_q: Tensor
    active: Tensor
    scale: float
    num_groups: int


def make_sample(
    lengths: list[list[int]],
    head_dim: int,
    num_groups: int,
    dtype: torch.dtype,
    n_up: int = 48,
    active: list[bool] | None = None,
    num_new: int | None = None,
    strided: bool = False,
) -> Sample:
    """A store of ``lengths[b][h]`` rows whose newest ``num_new`` rows were born in the window."""
    gen = torch.Generator().manual_seed(head_dim + num_groups)
    batch_size, num_kv_heads = len(lengths), len(lengths[0])
    rows, num_heads = 16 + n_up, num_kv_heads * num_groups
    used = torch.tensor([n for row in lengths for n in row], dtype=torch.int32)
    slots = used + torch.tensor([3 + i % 4 for i in range(used.numel())], dtype=torch.int32)
    cu = torch.cat([torch.zeros(1), slots.cumsum(0)]).to(torch.int32)
    capacity = int(cu[-1])
    num_new = n_up if num_new is None else num_new

    q_shape = (batch_size, num_heads, rows, head_dim)
    if strided:  # the layout of a projection: heads inside rows, with room behind
        wide = torch.randn(batch_size, rows, num_heads, head_dim + 8, generator=gen).to(dtype)
        q = wide[..., :head_dim].transpose(1, 2)
    else:
        q = torch.randn(q_shape, generator=gen).to(dtype)
    k = torch.full((capacity, head_dim), float("nan"), dtype=dtype)
    pos = torch.full((capacity,), -(2**31), dtype=torch.int32)
    state = torch.full((capacity, 17), float("nan"))
    seen = max(max(row) for row in lengths) * 2 + 5
    for s, length in enumerate(used.tolist()):
        live = slice(int(cu[s]), int(cu[s]) + length)
        k[live] = torch.randn(length, head_dim, generator=gen).to(dtype)
        old = max(length - num_new, 0)
        old_pos = torch.randperm(seen - num_new, generator=gen)[:old].sort().values
        new_pos = torch.arange(seen - (length - old), seen)
        pos[live] = torch.cat([old_pos, new_pos]).to(torch.int32)
        state[live] = torch.rand(length, 17, generator=gen) * 0.02
    pos_q = torch.full((batch_size,), seen - rows, dtype=torch.int32)
    sample = Sample(
        q, torch.zeros(q_shape[:3]), k, pos, state, cu, used, pos_q,
        torch.tensor(active or [True] * batch_size), head_dim**-0.5, num_groups,
    )  # fmt: skip
    # A row's own log-sum-exp over what it sees, as attention reports it; finite where it sees
    # nothing.
    for s, length in enumerate(used.tolist()):
        b, h = divmod(s, num_kv_heads)
        live = slice(int(cu[s]), int(cu[s]) + length)
        for g in range(num_groups):
            logits = q[b, h * num_groups + g].double() @ k[live].double().T * sample.scale
            hidden = pos[live][None, :] > (int(pos_q[b]) + torch.arange(rows))[:, None]
            lse = logits.masked_fill(hidden, float("-inf")).logsumexp(-1)
            sample.lse_window[b, h * num_groups + g] = torch.where(lse.isfinite(), lse, 0.0)
    return sample


def run(op: str, x: Sample, **kwargs: object) -> Tensor:
    """Run ``op`` under the emulation on guarded copies of the sample."""
    q = x.q_window
    if q.is_contiguous():
        q = emulated.guarded(q)
    keep = {
        name: emulated.guarded(getattr(x, name))
        for name in ["lse_window", "k", "pos", "state", "cu_seqlens_k", "seqused_k", "pos_q"]
    }
    active = emulated.guarded(x.active.to(torch.uint8))
    first_row = int(kwargs.pop("first_row", 0))
    window = emulated.Window(
        emulated.segments(keep["cu_seqlens_k"], keep["seqused_k"], q.shape[0]),
        q.data_ptr(), keep["lse_window"].data_ptr(), keep["k"].data_ptr(), keep["pos"].data_ptr(),
        keep["pos_q"].data_ptr(), active.data_ptr(),
        (emulated.I64 * 3)(*q.stride()[:3]), (emulated.I64 * 2)(*x.lse_window.stride()[:2]),
        x.num_groups, q.shape[3], q.shape[2], x.scale, emulated.DTYPES[q.dtype],
    )  # fmt: skip
    shape = x.state.shape if op == "spectrogram" else x.state.shape[:1]
    out = emulated.guarded(torch.full(shape, -7.0))
    params = (
        emulated.SpectrogramParams(window, keep["state"].data_ptr(), out.data_ptr(), EMA_COEFF)
        if op == "spectrogram"
        else emulated.ReceivedParams(window, out.data_ptr(), first_row)
    )
    emulated.launch(op, params, x.k.shape[0], **kwargs)
    return out


def expected(op: str, x: Sample, first_row: int = 0) -> Tensor:
    args = (x.q_window.double(), x.lse_window.double(), x.k.double(), x.pos)
    rest = (x.cu_seqlens_k, x.seqused_k, x.pos_q, x.active)
    if op == "spectrogram":
        return reference.spectrogram(
            *args, x.state.double(), *rest, softmax_scale=x.scale, ema_coeff=EMA_COEFF
        )
    return reference.attention_received(*args, *rest, softmax_scale=x.scale, first_row=first_row)


def live_rows(x: Sample) -> Tensor:
    """Bool ``[C]``: rows that an op may write."""
    mask = torch.zeros(x.k.shape[0], dtype=torch.bool)
    for start, used in zip(x.cu_seqlens_k.tolist(), x.seqused_k.tolist(), strict=False):
        mask[start : start + used] = True
    return mask


def check(got: Tensor, exact: Tensor, x: Sample, tolerance: float) -> None:
    """Error over the live rows relative to what the window added; dead rows stay untouched."""
    live = live_rows(x)
    assert (got[~live] == -7.0).all(), "dead rows were written"
    added = exact[live]
    if got.dim() == 2:  # without what the old state contributes, which is exact anyway
        added = added - EMA_COEFF ** (x.q_window.shape[2] - 16) * x.state[live].double()
    error = (got[live].double() - exact[live]).norm() / added.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.3e} > {tolerance:.0e}"


FLOAT = 5e-6
HALF = 5e-4  # P rounded to fp16; kernels.md allows this much
CASES = {
    # ragged, empty, one row, several tiles, GQA, an inactive row
    "bf16-D64-G2": dict(
        lengths=[[70, 1], [0, 131]], head_dim=64, num_groups=2, dtype=torch.bfloat16
    ),
    "fp16-D64-G1": dict(
        lengths=[[50, 33], [40, 64]], head_dim=64, num_groups=1, dtype=torch.float16, n_up=16,
        active=[False, True],
    ),
    "bf16-D96-G3": dict(lengths=[[66]], head_dim=96, num_groups=3, dtype=torch.bfloat16, n_up=32),
    "bf16-D128-G4": dict(
        lengths=[[100]], head_dim=128, num_groups=4, dtype=torch.bfloat16, n_up=32
    ),
    "fp16-D128-G7": dict(lengths=[[40]], head_dim=128, num_groups=7, dtype=torch.float16, n_up=32),
    "bf16-D64-G5": dict(lengths=[[40]], head_dim=64, num_groups=5, dtype=torch.bfloat16, n_up=32),
    "bf16-D256-G8": dict(lengths=[[70]], head_dim=256, num_groups=8, dtype=torch.bfloat16, n_up=16),
    "bf16-D64-G2-strided": dict(
        lengths=[[40, 20]], head_dim=64, num_groups=2, dtype=torch.bfloat16, n_up=32, strided=True
    ),
}  # fmt: skip
SIMT_CASES = {
    "fp32-D40-G3": dict(lengths=[[45, 1], [0, 70]], head_dim=40, num_groups=3, dtype=torch.float32),
    "fp32-D64-G1": dict(
        lengths=[[33], [20]], head_dim=64, num_groups=1, dtype=torch.float32, n_up=32,
        active=[True, False],
    ),
    "bf16-D80-G2": dict(lengths=[[40]], head_dim=80, num_groups=2, dtype=torch.bfloat16, n_up=32),
    "fp16-D64-G9": dict(lengths=[[40]], head_dim=64, num_groups=9, dtype=torch.float16, n_up=16),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *SIMT_CASES])
def test_spectrogram(name: str) -> None:
    x = make_sample(**{**CASES, **SIMT_CASES}[name])
    got = run("spectrogram", x)
    check(got, expected("spectrogram", x), x, HALF if name in CASES else FLOAT)
    for s in range(x.seqused_k.numel()):  # inactive rows are copied bit for bit
        if not x.active[s * x.active.numel() // x.seqused_k.numel()]:
            live = slice(int(x.cu_seqlens_k[s]), int(x.cu_seqlens_k[s] + x.seqused_k[s]))
            assert torch.equal(got[live], x.state[live])


@pytest.mark.parametrize("name", ["bf16-D64-G2", "fp16-D64-G1", "bf16-D256-G8", *SIMT_CASES])
@pytest.mark.parametrize("first_row", [0, 16, 21])
def test_attention_received(name: str, first_row: int) -> None:
    x = make_sample(**{**CASES, **SIMT_CASES}[name])
    got = run("attention_received", x, first_row=first_row)
    check(got, expected("attention_received", x, first_row), x, FLOAT)


@pytest.mark.parametrize("op", ["spectrogram", "attention_received"])
@pytest.mark.parametrize("simt", [False, True])
def test_same_bits_in_every_order_and_batch(op: str, simt: bool) -> None:
    """Thread and block order change nothing, and a row alone equals the row in its batch."""
    both = make_sample([[70, 3], [35, 40]], 64, 2, torch.bfloat16, n_up=32)
    results = [run(op, both, simt=simt, order=order) for order in emulated.ORDERS]
    assert all(torch.equal(results[0], r) for r in results[1:])
    start = int(both.cu_seqlens_k[2])
    alone = Sample(
        both.q_window[1:], both.lse_window[1:], both.k[start:].clone(), both.pos[start:],
        both.state[start:], both.cu_seqlens_k[2:] - start, both.seqused_k[2:], both.pos_q[1:],
        both.active[1:], both.scale, both.num_groups,
    )  # fmt: skip
    live = live_rows(alone)
    assert torch.equal(run(op, alone, simt=simt)[live], results[0][start:][live])


def test_new_sequence_and_late_keys() -> None:
    """Rows before the start are zero queries at negative positions; they count for nothing."""
    x = make_sample([[32, 9]], 64, 2, torch.bfloat16, n_up=32)
    for s, length in enumerate(x.seqused_k.tolist()):  # the second segment's keys are the newest
        live = slice(int(x.cu_seqlens_k[s]), int(x.cu_seqlens_k[s]) + length)
        x.pos[live] = torch.arange(32 - length, 32, dtype=torch.int32)
    x.pos_q[:] = -16
    x.q_window[:, :, :16] = 0
    # An lse that would make the hidden probabilities infinite.
    x.lse_window[:, :, :16] = -1e4
    for simt in (False, True):
        got = run("spectrogram", x, simt=simt)
        assert got[live_rows(x)].isfinite().all()


def test_wide_range_of_attention() -> None:
    """One key takes nearly everything; the others' bins stay accurate relative to the largest."""
    x = make_sample([[40]], 64, 1, torch.bfloat16, n_up=32, num_new=0)
    x.k[0] *= 6
    logits = x.q_window[0, 0].double() @ x.k[:40].double().T * x.scale
    x.lse_window[0, 0] = logits.logsumexp(-1)
    x.state[:40] = 0
    check(run("spectrogram", x), expected("spectrogram", x), x, HALF)
