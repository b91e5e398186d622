"""Tools of the tests: the tolerance rule, instruction sets, and samples with ugly inputs.

Samples are ragged (empty and one-row segments included), strided where an op allows strides, and
**poisoned**: every row an op must not read is NaN, or an absurd integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import reference
from ._library import libraries
from .values import Segments, Window

#: What dead positions hold: below every real position, so that a reader would count them as seen.
POISON_POS = -(2**31)

#: Live rows per segment of two batch rows with two KV heads each.
LENGTHS: dict[str, tuple[int, ...]] = {
    "ragged": (37, 5, 64, 129),
    "one_row": (1, 1, 1, 1),
    "some_empty": (0, 17, 33, 0),
    "equal": (48, 48, 48, 48),
}


def devices() -> list[str]:
    """``["cpu"]``, and ``"cuda"`` if there is one and the CUDA ops are loaded.

    Example:
        >>> devices()[0]
        'cpu'
    """
    return ["cpu", "cuda"] if torch.cuda.is_available() and libraries.has_cuda else ["cpu"]


def isas() -> list[str]:
    """Instruction sets of this CPU that :func:`force_isa` accepts, worst first.

    Example:
        >>> isas()[0]
        'base'
    """
    return libraries.supported_isas


@contextmanager
def force_isa(isa: str) -> Iterator[None]:
    """Run the CPU kernels with this instruction set, or the best one below it that they have.

    Raises:
        RuntimeError: if the name is unknown or this CPU lacks it.

    Example:
        >>> with force_isa("base"):
        ...     torch.ops.namm_ext.cpu_isa()
        'base'
    """
    previous = torch.ops.namm_ext.force_isa(isa)
    try:
        yield
    finally:
        torch.ops.namm_ext.force_isa(previous)


def assert_no_worse_than(
    got: Tensor, same_dtype: Tensor, exact: Tensor, factor: float = 2.0, floor: float | None = None
) -> None:
    """Our error is at most ``factor`` times PyTorch's own error at the same precision.

    Args:
        got: result of the kernel.
        same_dtype: the reference formula run in the dtype of the inputs.
        exact: the reference formula run in float64.
        factor: see above.
        floor: error that is always allowed; by default 4 units in the last place of float32 at
            the largest exact value.

    Raises:
        AssertionError: if the error is larger, or a value is not finite where it should be.

    Example:
        >>> x = torch.ones(3)
        >>> assert_no_worse_than(x, x, x.double())
    """
    exact = exact.double()
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact[~finite]), "infinities differ"
    if not bool(finite.any()):
        return
    exact = exact[finite]
    ours = (got.double()[finite] - exact).abs().max().item()
    theirs = (same_dtype.double()[finite] - exact).abs().max().item()
    if floor is None:
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert ours <= factor * theirs + floor, (
        f"error {ours:.3e} > {factor} * {theirs:.3e} + {floor:.0e}"
    )


def ragged_store(
    lengths: Sequence[int] | str = "ragged",
    *,
    head_dim: int = 24,
    head_dim_v: int | None = None,
    num_state: int = reference.NUM_BINS,
    room: int | Sequence[int] = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Segments:
    """A store with gaps between positions, as evictions leave them, and NaN in every free row.

    Args:
        lengths: live rows per segment, or a key of :data:`LENGTHS`.
        head_dim: D. head_dim_v: Dv, D if None.
        num_state: F.
        room: free rows behind the live ones, one number or one per segment.
        dtype: of k and v.
        device: of all tensors.
        seed: of the generator; the same on every device.

    Example:
        >>> store = ragged_store([2, 0], room=1)
        >>> store.live.tolist(), store.cu_seqlens_k.tolist()
        ([True, True, False, False], [0, 3, 4])
    """
    if isinstance(lengths, str):
        lengths = LENGTHS[lengths]
    rooms = [room] * len(lengths) if isinstance(room, int) else list(room)
    generator = torch.Generator().manual_seed(seed)
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    starts = [0]
    for length, free in zip(lengths, rooms, strict=True):
        starts.append(starts[-1] + length + free)
    capacity = starts[-1]
    k = torch.randn(capacity, head_dim, generator=generator)
    v = torch.randn(capacity, head_dim_v, generator=generator)
    state = torch.rand(capacity, num_state, generator=generator) * 4
    pos = torch.full((capacity,), POISON_POS, dtype=torch.int64)
    dead = torch.ones(capacity, dtype=torch.bool)
    for start, length in zip(starts, lengths, strict=False):
        steps = torch.randint(1, 4, (length,), generator=generator)
        pos[start : start + length] = torch.cumsum(steps, 0) - 1
        dead[start : start + length] = False
    for tensor in (k, v, state):
        tensor[dead] = math.nan
    cu = torch.tensor(starts, dtype=torch.int32)
    used = torch.tensor(lengths, dtype=torch.int32)
    tensors = (k.to(dtype), v.to(dtype), pos.to(torch.int32), state, cu, used)
    return Segments(*(t.to(device) for t in tensors))


def same_newest(store: Segments, num_new: int) -> Segments:
    """The store with equal positions in the newest rows of all segments, as appends leave them.

    Example:
        >>> store = same_newest(ragged_store([9, 3]), 2)
        >>> bool((store.pos[7:9] == store.pos[15:17]).all())
        True
    """
    pos = store.pos.clone()
    new = int(pos.max()) + 1 + torch.arange(num_new, dtype=pos.dtype, device=pos.device)
    for live in store.slices():
        first = max(live.start, live.stop - num_new)
        pos[first : live.stop] = new[num_new - (live.stop - first) :]
    return store._replace(pos=pos)


def newest_of_rows(store: Segments, batch_size: int) -> Tensor:
    """``[B]`` int32: largest position of each batch row, -1 if it has none.

    Example:
        >>> newest_of_rows(ragged_store("some_empty"), 2).tolist()[0] > 0
        True
    """
    newest = torch.where(store.seqused_k > 0, store.newest(), -1)
    return newest.view(batch_size, -1).amax(1).int()


def strided_randn(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers inside a wider, transposed, NaN-filled tensor: last dimension contiguous.

    Example:
        >>> strided_randn(2, 3, 4, 8, dtype=torch.float32, device="cpu", seed=0).is_contiguous()
        False
    """
    generator = torch.Generator().manual_seed(seed)
    *outer, a, b, width = shape
    wide = torch.full((*outer, b, a, width + 3), math.nan)
    wide[..., 1 : 1 + width] = torch.randn(*outer, b, a, width, generator=generator)
    return wide.to(device, dtype)[..., 1 : 1 + width].transpose(-2, -3)


def new_tokens(
    store: Segments, num_new: Sequence[int], *, num_groups: int = 1, num_cols: int, seed: int = 1
) -> dict[str, Tensor]:
    """Arguments of ``append_`` and ``attend_`` that bring new tokens: right-aligned, strided.

    Args:
        store: where they go.
        num_new: real tokens of each batch row, at most ``num_cols``.
        num_groups: G.
        num_cols: L; the columns in front are padding and NaN.
        seed: of the generator.

    Returns:
        ``k_new, v_new, q, first, num_new, pos_first``.
    """
    dtype, device = store.k.dtype, str(store.k.device)
    batch_size = len(num_new)
    heads = store.seqused_k.numel() // batch_size
    shape = (batch_size, heads, num_cols)
    first = [num_cols - n for n in num_new]
    out = {
        "k_new": strided_randn(*shape, store.k.shape[1], dtype=dtype, device=device, seed=seed),
        "v_new": strided_randn(*shape, store.v.shape[1], dtype=dtype, device=device, seed=seed + 1),
        "q": strided_randn(
            batch_size,
            heads * num_groups,
            num_cols,
            store.k.shape[1],
            dtype=dtype,
            device=device,
            seed=seed + 2,
        ),
    }
    for tensor in out.values():
        for b, padding in enumerate(first):
            tensor[b, :, :padding] = math.nan
    out["first"] = torch.tensor(first, dtype=torch.int32, device=device)
    out["num_new"] = torch.tensor(list(num_new), dtype=torch.int32, device=device)
    out["pos_first"] = newest_of_rows(store, batch_size) + 1
    return out


def window(
    store: Segments,
    *,
    n_up: int = 32,
    num_kv_heads: int = 2,
    num_groups: int = 2,
    scale: float,
    active: Sequence[bool] | None = None,
    seed: int = 2,
) -> Window:
    """A window that belongs to the store.

    The last window row stands at the newest token of each batch row. The log-sum-exps are those of
    attention over the visible live keys, so that probabilities are probabilities; rows that see
    nothing, or stand before the start, have ``lse = 0``, as in a real window.

    Args:
        store: where the keys are.
        n_up: rows of the period.
        num_kv_heads: H.
        num_groups: G.
        scale: ``softmax_scale`` of the log-sum-exps.
        active: batch rows that are, all by default.
        seed: of the generator.

    Example:
        >>> window(ragged_store(), scale=0.2).q.shape
        torch.Size([2, 4, 48, 24])
    """
    dtype, device = store.k.dtype, str(store.k.device)
    batch_size = store.seqused_k.numel() // num_kv_heads
    num_rows = reference.CARRY + n_up
    heads = num_kv_heads * num_groups
    q = strided_randn(
        batch_size, heads, num_rows, store.k.shape[1], dtype=dtype, device=device, seed=seed
    )
    pos_q = newest_of_rows(store, batch_size) + 1 - num_rows
    wide = torch.full((batch_size, heads, num_rows + 3), math.nan, device=device)
    lse = wide[..., :num_rows]
    lse[...] = 0
    slices = store.slices()
    for b in range(batch_size):
        before = max(0, -int(pos_q[b]))
        q[b, :, :before] = 0
        for head in range(heads):
            rows = slices[b * num_kv_heads + head // num_groups]
            logits = q[b, head].double() @ store.k[rows].double().T * scale
            query_pos = int(pos_q[b]) + torch.arange(num_rows, device=device)
            logits = logits.masked_fill(store.pos[rows] > query_pos[:, None], -math.inf)
            row_lse = torch.logsumexp(logits, dim=-1)
            lse[b, head] = torch.where(row_lse.isfinite(), row_lse, 0.0).float()
    flags = [True] * batch_size if active is None else list(active)
    return Window(q, lse, pos_q, torch.tensor(flags, device=device))


def bank(num_candidates: int, num_params: int, *, device: str = "cpu", seed: int = 3) -> Tensor:
    """``[num_candidates, num_params]`` parameter vectors of the size evolution uses.

    Example:
        >>> bank(2, 25).shape
        torch.Size([2, 25])
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_candidates, num_params, generator=generator) * 0.2).to(device)
