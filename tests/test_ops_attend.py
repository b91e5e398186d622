"""attend_ against the law in float64, on every device and instruction set, and its promises.

A promise of equal bits is tested on the CPU here, and on a GPU in ``test_cuda.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from namm_ext import ops, reference, testing
from namm_ext.values import Segments
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNTOUCHED = 5.0

# name: lengths before the new tokens, H, G, D, Dv, new tokens per batch row
CASES: dict[str, tuple[list[int], int, int, int, int, list[int]]] = {
    "one-row": ([0, 0, 0, 0], 2, 2, 24, 20, [1, 1]),
    "some-empty": ([0, 17, 33, 0], 2, 2, 24, 20, [0, 7]),
    "one-number": ([37, 5], 1, 3, 1, 1, [9, 2]),
    "decode-G4": ([300, 0, 63, 77], 2, 4, 128, 128, [1, 1]),
    "decode-G1": ([64, 129, 1], 3, 1, 40, 24, [1]),
    "decode-G7": ([70, 500], 1, 7, 64, 72, [1, 1]),
    "decode-odd-dims": ([65, 30], 1, 3, 13, 7, [2, 1]),
    "decode-split": ([4500, 2047], 2, 4, 32, 32, [1]),
    "few-rows-split": ([2100], 1, 16, 64, 64, [3]),
    "multi-query": ([333], 1, 71, 64, 64, [1]),
    "prefill-empty": ([0, 0, 0, 0], 2, 2, 32, 32, [40, 33]),
    "prefill-ragged": ([300, 100, 0, 6], 2, 2, 32, 32, [64, 17]),
    "prefill-one-row-idle": ([50, 60], 1, 5, 8, 256, [37, 0]),
    "prefill-odd-dims": ([65], 1, 3, 33, 51, [20]),
    "prefill-wide": ([600], 1, 4, 128, 128, [150]),
    "prefill-256": ([257], 1, 2, 256, 8, [20]),
    "latents": ([70], 1, 16, 576, 576, [20]),
    "latents-decode": ([300, 20], 1, 128, 576, 576, [1, 1]),
}


IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))


@pytest.fixture(params=IMPLS, ids="-".join)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.force_isa(request.param[1]):
        yield request.param[0]


@pytest.fixture(params=testing.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.force_isa(request.param):
        yield request.param


@dataclass
class Call:
    """Arguments of ``attend_`` but its outputs."""

    q: Tensor
    store: Segments
    first: Tensor
    num_new: Tensor
    pos_first: Tensor
    softmax_scale: float
    softcap: float = 0.0

    @property
    def columns(self) -> Tensor:
        """``[B, L]``: the new columns."""
        column = torch.arange(self.q.shape[2], device=self.q.device)
        first, num_new = self.first[:, None], self.num_new[:, None]
        return (column >= first) & (column < first + num_new)

    def attend(self) -> tuple[Tensor, Tensor]:
        """ops.attend_ into strided, marked outputs."""
        batch_size, num_heads, num_cols, _ = self.q.shape
        head_dim_v = self.store.v.shape[1]
        shape = (batch_size, num_cols, num_heads, head_dim_v + 5)
        out = self.q.new_full(shape, UNTOUCHED)[..., 2 : 2 + head_dim_v]
        lse = torch.full((num_cols, batch_size, num_heads), UNTOUCHED, device=self.q.device)
        lse = lse.permute(1, 2, 0)
        ops.attend_(
            out, lse, self.q, self.store, self.first, self.num_new, self.pos_first,
            softmax_scale=self.softmax_scale, softcap=self.softcap,
        )  # fmt: skip
        return out, lse

    def exact(self) -> tuple[Tensor, Tensor]:
        """The law in float64, marked outside of the new columns."""
        out, lse = reference.attend(
            self.q.double(), self.store.double(), self.first, self.num_new, self.pos_first,
            softmax_scale=self.softmax_scale, softcap=self.softcap,
        )  # fmt: skip
        outside = ~self.columns
        out[outside] = UNTOUCHED
        lse.transpose(1, 2)[outside] = UNTOUCHED
        return out, lse

    def torch_attend(self, want: Tensor) -> Tensor:
        """PyTorch's own attention at the same precision, segment by segment."""
        out = want.to(self.q.dtype)
        store = self.store
        num_kv_heads = store.seqused_k.numel() // self.q.shape[0]
        num_groups = self.q.shape[1] // num_kv_heads
        for s, rows in enumerate(store.slices()):
            b, h = divmod(s, num_kv_heads)
            first, n = int(self.first[b]), int(self.num_new[b])
            heads = slice(h * num_groups, (h + 1) * num_groups)
            if rows.start == rows.stop or not n:
                continue
            position = int(self.pos_first[b]) + torch.arange(n, device=self.q.device)
            out[b, first : first + n, heads] = scaled_dot_product_attention(
                self.q[b, heads, first : first + n][None],
                store.k[rows].expand(1, num_groups, -1, -1),
                store.v[rows].expand(1, num_groups, -1, -1),
                attn_mask=store.pos[rows] <= position[:, None],
                scale=self.softmax_scale,
            )[0].transpose(0, 1)
        return out

    def row(self, b: int) -> Call:
        """Batch row b alone."""
        heads = self.store.seqused_k.numel() // self.q.shape[0]
        store = Segments._make(t.contiguous() for t in self.store.part(b * heads, (b + 1) * heads))
        tensors = (self.q, self.first, self.num_new, self.pos_first)
        q, first, num_new, pos_first = (t[b : b + 1] for t in tensors)
        return Call(q, store, first, num_new, pos_first, self.softmax_scale)


def make(name: str, dtype: torch.dtype, device: str = "cpu", spread: float = 1.0) -> Call:
    """A case: appended, ragged, poisoned, q strided. New keys are in before their queries come."""
    lengths, num_kv_heads, num_groups, head_dim, head_dim_v, num_new = CASES[name]
    assert len(lengths) == num_kv_heads * len(num_new)
    store = testing.ragged_store(
        lengths, head_dim=head_dim, head_dim_v=head_dim_v, room=max(num_new) + 3, dtype=dtype,
        device=device,
    )  # fmt: skip
    new = testing.new_tokens(store, num_new, num_groups=num_groups, num_cols=max(num_new) + 2)
    columns = (new["first"], new["num_new"], new["pos_first"])
    ops.append_(store, new["k_new"], new["v_new"], *columns)
    return Call(new["q"] * spread, store, *columns, head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_torch(name: str, dtype: str, device: str) -> None:
    call = make(name, DTYPES[dtype], device, spread=2.0)
    out, lse = call.attend()
    want_out, want_lse = call.exact()
    wide = max(1.0, call.q.shape[-1] / 256)  # products are summed one after the other
    testing.assert_no_worse_than(out, call.torch_attend(want_out), want_out, factor=2 * wide)
    testing.assert_no_worse_than(lse, want_lse.float(), want_lse, floor=3e-6 * wide)
    assert bool((out[~call.columns] == UNTOUCHED).all())
    assert bool((lse.transpose(1, 2)[~call.columns] == UNTOUCHED).all())


def _written_out(call: Call) -> tuple[Tensor, Tensor]:
    """The law at the precision of the call."""
    store = call.store._replace(v=call.store.v.float())
    return reference.attend(
        call.q, store, call.first, call.num_new, call.pos_first,
        softmax_scale=call.softmax_scale, softcap=call.softcap,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["some-empty", "decode-odd-dims", "decode-split", "prefill-odd-dims", "prefill-wide"]
)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 3.0), (-1.0, 3.0), (0.0, 1.0)])
def test_bounded_logits(name: str, dtype: str, scale: float, softcap: float, device: str) -> None:
    """Of standard deviation 4 before the bound: most logits are near it, or none."""
    call = make(name, DTYPES[dtype], device, spread=4.0)
    call = replace(call, softmax_scale=scale * call.softmax_scale, softcap=softcap)
    out, lse = call.attend()
    want_out, want_lse = call.exact()
    new, live = call.columns, want_lse.isfinite()
    plain_out, plain_lse = _written_out(call)
    testing.assert_no_worse_than(out[new], plain_out[new].to(out.dtype), want_out[new], floor=2e-6)
    plain_lse = torch.where(live, plain_lse, want_lse.float())
    testing.assert_no_worse_than(
        lse.transpose(1, 2)[new], plain_lse.transpose(1, 2)[new], want_lse.transpose(1, 2)[new],
        floor=6e-6,
    )  # fmt: skip
    assert bool((out[~new] == UNTOUCHED).all())
    if softcap == 3.0:  # it does bound
        assert float(lse.transpose(1, 2)[new].max()) <= 3.0 + math.log(call.store.capacity)
        assert not torch.equal(out, replace(call, softcap=0.0).attend()[0])


def test_nan_passes_the_bound(device: str) -> None:
    """A NaN or infinite key spoils its own rows only, as without a bound."""
    for name in ("decode-G4", "prefill-wide"):
        call = replace(make(name, torch.float32, device), softcap=3.0)
        rows = call.store.slices()[0]
        call.store.k[rows.start + 2] = math.nan
        out, _ = call.attend()
        heads = CASES[name][2]
        assert bool(out[0, :, :heads][call.columns[0]].isnan().all())


def test_wrong_bound(device: str) -> None:
    call = make("some-empty", torch.float32, device)
    for softcap in (-1.0, math.nan, math.inf):
        with pytest.raises(
            RuntimeError, match=r"attend_: softcap must (not be negative|be finite)"
        ):
            replace(call, softcap=softcap).attend()


def test_attend_is_attend_into_new_tensors(device: str) -> None:
    call = make("some-empty", torch.float32, device)
    out, lse = call.attend()
    new_out, new_lse = ops.attend(
        call.q, call.store, call.first, call.num_new, call.pos_first,
        softmax_scale=call.softmax_scale,
    )  # fmt: skip
    new = call.columns
    assert torch.equal(new_out[new], out[new])
    assert torch.equal(new_lse.transpose(1, 2)[new], lse.transpose(1, 2)[new])
    assert bool((new_out[~new] == 0).all())
    assert bool((new_lse.transpose(1, 2)[~new] == -math.inf).all())


def test_float64_runs_the_reference() -> None:
    call = make("prefill-ragged", torch.float32)
    call = replace(call, q=call.q.double(), store=call.store.double())
    args = (call.q, call.store, call.first, call.num_new, call.pos_first)
    got = ops.attend(*args, softmax_scale=0.3)
    for ours, law in zip(got, reference.attend(*args, softmax_scale=0.3), strict=True):
        assert ours.dtype == torch.float64
        assert torch.equal(ours, law)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode-split", "few-rows-split", "prefill-wide"])
def test_threads_change_nothing(name: str, dtype: str, isa: str) -> None:
    call = make(name, DTYPES[dtype])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [call.attend() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode-G4", "decode-G7", "prefill-ragged"])
def test_rows_of_a_batch_are_apart(name: str, dtype: str, isa: str) -> None:
    call = make(name, DTYPES[dtype])
    out, lse = call.attend()
    for b in range(call.q.shape[0]):
        alone_out, alone_lse = call.row(b).attend()
        assert torch.equal(alone_out[0], out[b])
        assert torch.equal(alone_lse[0], lse[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_may_be_cut(dtype: str, isa: str) -> None:
    """Above the row counts of the other ways, a query's bits do not depend on its neighbours."""
    call = make("prefill-wide", DTYPES[dtype])
    out, lse = call.attend()
    for begin, end in ((0, 50), (50, 117), (117, int(call.num_new[0]))):
        part = replace(
            call,
            first=call.first + begin,
            num_new=torch.tensor([end - begin], dtype=torch.int32),
            pos_first=call.pos_first + begin,
        )
        part_out, part_lse = part.attend()
        inside = part.columns
        assert torch.equal(part_out[inside], out[inside])
        assert torch.equal(part_lse.transpose(1, 2)[inside], lse.transpose(1, 2)[inside])


@pytest.mark.parametrize("name", ["decode-G4", "prefill-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_reversed_logits(name: str, dtype: str, device: str) -> None:
    """A standard deviation of 60, both signs of the scale: one key takes nearly everything."""
    call = make(name, DTYPES[dtype], device, spread=60.0)
    for sign in (1, -1):
        call.softmax_scale = sign * abs(call.softmax_scale)
        out, lse = call.attend()
        want_out, want_lse = call.exact()
        testing.assert_no_worse_than(out, call.torch_attend(want_out), want_out, floor=1e-4)
        testing.assert_no_worse_than(lse, want_lse.float(), want_lse, floor=1e-4)


def test_zero_scale_is_the_mean(device: str) -> None:
    call = make("prefill-wide", torch.float32, device)
    call.softmax_scale = 0.0
    out, lse = call.attend()
    new = call.columns[0]
    visible = 600 + 1 + torch.arange(int(call.num_new[0]), device=device)
    torch.testing.assert_close(lse[0, 0, new], visible.float().log())
    mean = call.store.v[: 600 + visible.numel()].cumsum(0)[visible - 1] / visible[:, None]
    torch.testing.assert_close(out[0, new, 0], mean, atol=1e-5, rtol=1e-4)


# Segments of few queries and many keys are split; no part of them has seen anything then.
@pytest.mark.parametrize(
    ("name", "num_new"), [("prefill-wide", 1), ("prefill-wide", 20), ("few-rows-split", 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_nothing(name: str, num_new: int, dtype: str, device: str) -> None:
    call = make(name, DTYPES[dtype], device)
    call.num_new.fill_(num_new)
    call.pos_first.fill_(-num_new // 2)
    out, lse = call.attend()
    new = call.columns[0]
    position = int(call.pos_first[0]) + torch.arange(num_new, device=device)
    blind = position < call.store.pos[0]
    assert bool(blind.any())
    assert bool((out[0, new][blind] == 0).all())
    assert bool((lse[0, :, new][:, blind] == -math.inf).all())
    assert bool(lse[0, :, new][:, ~blind].isfinite().all())


@pytest.mark.parametrize("name", ["decode-G4", "prefill-ragged"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_segment(name: str, dtype: str, device: str) -> None:
    """A live NaN must show, and only where it was seen."""
    call = make(name, DTYPES[dtype], device)
    clean, _ = call.attend()
    num_groups = CASES[name][2]
    row = call.store.slices()[2].stop - 1  # newest of batch row 1, head 0
    call.store.k[row] = math.nan
    out, _ = call.attend()
    new = call.columns
    position = int(call.pos_first[1]) + torch.arange(int(call.num_new[1]), device=device)
    sees = position >= call.store.pos[row]
    assert bool(out[1, new[1], :num_groups][sees].isnan().all())
    assert torch.equal(out[1, new[1]][~sees], clean[1, new[1]][~sees])
    assert torch.equal(out[1, :, num_groups:], clean[1, :, num_groups:])
    assert torch.equal(out[0], clean[0])
