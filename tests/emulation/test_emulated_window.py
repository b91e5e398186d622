"""spectrogram and attention_received of the CUDA kernels, run on the CPU, against the law."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor

EMA_COEFF = 0.99


@dataclass
class Sample:
    """Inputs of the window ops; dead rows are NaN and the slots have room."""

    window: values.Window
    store: values.Segments
    scale: float
    num_groups: int
    softcap: float = 0.0


def make_sample(
    lengths: list[list[int]],
    head_dim: int,
    num_groups: int,
    dtype: torch.dtype,
    n_up: int = 48,
    active: list[bool] | None = None,
    num_new: int | None = None,
    strided: bool = False,
    softcap: float = 0.0,
) -> Sample:
    """A store of ``lengths[b][h]`` rows whose newest ``num_new`` rows were born in the window."""
    gen = torch.Generator().manual_seed(head_dim + num_groups)
    batch_size, num_kv_heads = len(lengths), len(lengths[0])
    rows, num_heads = 16 + n_up, num_kv_heads * num_groups
    num_new = n_up if num_new is None else num_new
    store = make_store(lengths, head_dim, dtype=dtype, num_tail=num_new, seed=head_dim)
    store.state.mul_(0.02)

    if strided:  # the layout of a projection: heads inside rows, with room behind
        wide = torch.randn(batch_size, rows, num_heads, head_dim + 8, generator=gen).to(dtype)
        q = wide[..., :head_dim].transpose(1, 2)
    else:
        q = torch.randn(batch_size, num_heads, rows, head_dim, generator=gen).to(dtype)
    newest = int(store.pos.max()) if num_new else 2 * int(store.seqused_k.max()) + 2
    sample = Sample(
        values.Window(
            q,
            torch.zeros(q.shape[:3]),
            torch.full((batch_size,), newest + 1 - rows, dtype=torch.int32),
            torch.tensor(active or [True] * batch_size),
        ),
        store,
        head_dim**-0.5,
        num_groups,
        softcap,
    )
    # A row's own log-sum-exp over what it sees, as attention reports it; finite where it sees
    # nothing.
    for s, live in enumerate(store.slices()):
        b, h = divmod(s, num_kv_heads)
        hidden = store.pos[live][None, :] > (newest + 1 - rows + torch.arange(rows))[:, None]
        for head in range(h * num_groups, (h + 1) * num_groups):
            logits = q[b, head].double() @ store.k[live].double().T * sample.scale
            logits = reference.soft_cap(logits, softcap)
            lse = logits.masked_fill(hidden, float("-inf")).logsumexp(-1)
            sample.window.lse[b, head] = torch.where(lse.isfinite(), lse, 0.0)
    return sample


def run(op: str, x: Sample, **kwargs: object) -> Tensor:
    """Run ``op`` under the emulation on guarded copies of the sample."""
    q = x.window.q
    if q.is_contiguous():
        q = emulated.guarded(q)
    lse, pos_q = emulated.guarded(x.window.lse), emulated.guarded(x.window.pos_q)
    active = emulated.guarded(x.window.active.to(torch.uint8))
    held = x.store._make(emulated.guarded(t) for t in x.store)
    first_row = int(kwargs.pop("first_row", 0))
    window = emulated.Window(
        emulated.segments(held, q.shape[0]),
        q.data_ptr(), lse.data_ptr(), held.k.data_ptr(), held.pos.data_ptr(), pos_q.data_ptr(),
        active.data_ptr(),
        (emulated.I64 * 3)(*q.stride()[:3]), (emulated.I64 * 2)(*x.window.lse.stride()[:2]),
        x.num_groups, q.shape[3], q.shape[2], x.scale, x.softcap, emulated.DTYPES[q.dtype],
    )  # fmt: skip
    shape = held.state.shape if op == "spectrogram" else held.pos.shape
    out = emulated.guarded(torch.full(shape, -7.0))
    params = (
        emulated.SpectrogramParams(window, held.state.data_ptr(), out.data_ptr(), EMA_COEFF)
        if op == "spectrogram"
        else emulated.ReceivedParams(window, out.data_ptr(), first_row)
    )
    emulated.launch(op, params, x.store.capacity, **kwargs)
    return out


def expected(op: str, x: Sample, first_row: int = 0) -> Tensor:
    window = x.window._replace(q=x.window.q.double(), lse=x.window.lse.double())
    args = (window, x.store.double())
    if op == "spectrogram":
        return reference.spectrogram(
            *args, softmax_scale=x.scale, ema_coeff=EMA_COEFF, softcap=x.softcap
        )
    return reference.attention_received(
        *args, softmax_scale=x.scale, first_row=first_row, softcap=x.softcap
    )


def check(got: Tensor, exact: Tensor, x: Sample, tolerance: float) -> None:
    """Error over the live rows relative to what the window added; dead rows stay untouched."""
    live = x.store.live
    assert (got[~live] == -7.0).all(), "dead rows were written"
    added = exact[live]
    if got.dim() == 2:  # without what the old state contributes, which is exact anyway
        added = added - EMA_COEFF ** (x.window.q.shape[2] - 16) * x.store.state[live].double()
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
# A head_dim padded to the next of the kernels', more heads than a stage or two hold.
ODD_CASES = {
    "bf16-D80-G2": dict(lengths=[[40]], head_dim=80, num_groups=2, dtype=torch.bfloat16, n_up=32),
    "bf16-D112-G1": dict(lengths=[[70]], head_dim=112, num_groups=1, dtype=torch.bfloat16, n_up=16),
    "fp16-D160-G12": dict(lengths=[[40]], head_dim=160, num_groups=12, dtype=torch.half, n_up=16),
    "bf16-D192-G3": dict(lengths=[[70]], head_dim=192, num_groups=3, dtype=torch.bfloat16, n_up=16),
    "fp16-D64-G9": dict(lengths=[[40]], head_dim=64, num_groups=9, dtype=torch.float16, n_up=16),
    "bf16-D24-G16": dict(
        lengths=[[40]], head_dim=24, num_groups=16, dtype=torch.bfloat16, n_up=16, strided=True
    ),
}  # fmt: skip
CASES |= ODD_CASES
SIMT_CASES = {
    "fp32-D40-G3": dict(lengths=[[45, 1], [0, 70]], head_dim=40, num_groups=3, dtype=torch.float32),
    "fp32-D64-G1": dict(
        lengths=[[33], [20]], head_dim=64, num_groups=1, dtype=torch.float32, n_up=32,
        active=[True, False],
    ),
    "bf16-D36-G2": dict(lengths=[[40]], head_dim=36, num_groups=2, dtype=torch.bfloat16, n_up=32),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *SIMT_CASES])
def test_spectrogram(name: str) -> None:
    x = make_sample(**{**CASES, **SIMT_CASES}[name])
    got = run("spectrogram", x)
    check(got, expected("spectrogram", x), x, HALF if name in CASES else FLOAT)
    rows, segment = x.store.live_rows()
    row_of_batch = segment * x.window.active.numel() // x.store.seqused_k.numel()
    idle = rows[~x.window.active[row_of_batch]]  # inactive rows are copied bit for bit
    assert torch.equal(got[idle], x.store.state[idle])


@pytest.mark.parametrize("name", ["bf16-D64-G2", "bf16-D256-G8", "bf16-D80-G2", *SIMT_CASES])
@pytest.mark.parametrize("first_row", [0, 16, 21])
def test_attention_received(name: str, first_row: int) -> None:
    x = make_sample(**{**CASES, **SIMT_CASES}[name])
    got = run("attention_received", x, first_row=first_row)
    check(got, expected("attention_received", x, first_row), x, FLOAT)


@pytest.mark.parametrize("softcap", [0.7, 30.0])
@pytest.mark.parametrize("name", ["bf16-D64-G2", "bf16-D128-G4", *SIMT_CASES])
def test_bounded_logits(name: str, softcap: float) -> None:
    x = make_sample(**{**CASES, **SIMT_CASES}[name], softcap=softcap)
    got = run("spectrogram", x)
    check(got, expected("spectrogram", x), x, HALF if name in CASES else FLOAT)
    received = run("attention_received", x, first_row=16)
    check(received, expected("attention_received", x, 16), x, 2 * FLOAT)
    live, free = x.store.live, dataclasses.replace(x, softcap=0.0)
    assert not torch.equal(received[live], run("attention_received", free, first_row=16)[live])


@pytest.mark.parametrize("name", ODD_CASES)
def test_odd_sizes_run_on_tensor_cores(name: str) -> None:
    x = make_sample(**ODD_CASES[name])
    live = x.store.live
    assert not torch.equal(run("spectrogram", x)[live], run("spectrogram", x, simt=True)[live])


@pytest.mark.parametrize("op", ["spectrogram", "attention_received"])
@pytest.mark.parametrize("simt", [False, True])
def test_same_bits_in_every_order_and_batch(op: str, simt: bool) -> None:
    """Thread and block order change nothing, and a row alone equals the row in its batch."""
    both = make_sample([[70, 3], [35, 40]], 64, 2, torch.bfloat16, n_up=32)
    results = [run(op, both, simt=simt, order=order) for order in emulated.ORDERS]
    assert all(torch.equal(results[0], r) for r in results[1:])
    start = int(both.store.cu_seqlens_k[2])
    alone = replace(
        both,
        window=both.window._make(t[1:] for t in both.window),
        store=both.store.part(2, 4).clone(),
    )
    live = alone.store.live
    assert torch.equal(run(op, alone, simt=simt)[live], results[0][start:][live])


def test_new_sequence_and_late_keys() -> None:
    """Rows before the start are zero queries at negative positions; they count for nothing."""
    x = make_sample([[32, 9]], 64, 2, torch.bfloat16, n_up=32)
    for live in x.store.slices():  # the second segment's keys are the newest
        x.store.pos[live] = torch.arange(32 - live.stop + live.start, 32, dtype=torch.int32)
    x.window.pos_q[:] = -16
    x.window.q[:, :, :16] = 0
    # An lse that would make the hidden probabilities infinite.
    x.window.lse[:, :, :16] = -1e4
    for simt in (False, True):
        got = run("spectrogram", x, simt=simt)
        assert got[x.store.live].isfinite().all()


def test_wide_range_of_attention() -> None:
    """One key takes nearly everything; the others' bins stay accurate relative to the largest."""
    x = make_sample([[40]], 64, 1, torch.bfloat16, n_up=32, num_new=0)
    x.store.k[0] *= 6
    logits = x.window.q[0, 0].double() @ x.store.k[:40].double().T * x.scale
    x.window.lse[0, 0] = logits.logsumexp(-1)
    x.store.state[:40] = 0
    check(run("spectrogram", x), expected("spectrogram", x), x, HALF)
