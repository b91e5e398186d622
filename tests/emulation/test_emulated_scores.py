"""bam_scores and mlp_scores of the CUDA kernels, run on the CPU, against the law."""

from __future__ import annotations

from dataclasses import dataclass, replace

import emulated
import pytest
import torch
from emulated import reference, values
from store import make_store
from torch import Tensor

LOG_EPS = 1e-6


@dataclass
class Sample:
    """Inputs of the scorers; dead rows are NaN and the slots have room."""

    store: values.Segments
    params: Tensor
    param_index: Tensor
    mean: Tensor
    var: Tensor
    active: Tensor


def make_sample(
    lengths: list[list[int]],
    num_params: int = reference.NUM_BAM_PARAMS,
    std: float = 0.1,
    active: list[bool] | None = None,
    last_pos: int = 100_000,
) -> Sample:
    """Heavy-tailed features, positions up to ``last_pos``, one parameter vector per batch row."""
    gen = torch.Generator().manual_seed(len(lengths))
    batch_size = len(lengths)
    store = make_store(lengths, head_dim=1)
    for live in store.slices():
        length = live.stop - live.start
        store.state[live] = torch.randn(length, 17, generator=gen).exp() * 0.1
        steps = torch.randint(1, max(last_pos // max(length, 1), 2), (length,), generator=gen)
        store.pos[live] = (last_pos - steps.flip(0).cumsum(0).flip(0)).to(torch.int32)
    return Sample(
        store,
        torch.randn(batch_size + 1, num_params, generator=gen) * std,
        torch.arange(batch_size, 0, -1, dtype=torch.int32),
        torch.rand(17, generator=gen) * 0.1, torch.rand(17, generator=gen) * 0.05 + 0.01,
        torch.tensor(active or [True] * batch_size),
    )  # fmt: skip


def run(
    op: str,
    x: Sample,
    log_transform: bool = False,
    mlp: tuple[int, int, bool, bool] = (0, 0, False, False),
    **kwargs: object,
) -> Tensor:
    held = x.store._make(emulated.guarded(t) for t in x.store)
    inputs = [emulated.guarded(t) for t in (x.params, x.param_index, x.mean, x.var)]
    active = emulated.guarded(x.active.to(torch.uint8))
    scores = emulated.guarded(torch.full(held.pos.shape, -7.0))
    params = emulated.ScoreParams(
        emulated.segments(held, x.active.numel()), held.state.data_ptr(), held.pos.data_ptr(),
        *(t.data_ptr() for t in inputs), active.data_ptr(), scores.data_ptr(),
        x.params.shape[1], x.params.shape[0], log_transform, LOG_EPS, *mlp,
    )  # fmt: skip
    emulated.launch(op, params, x.store.capacity, **kwargs)
    return scores


def expected(
    op: str,
    x: Sample,
    log_transform: bool = False,
    mlp: tuple[int, int, bool, bool] | None = None,
) -> Tensor:
    args = (
        x.store.double(), x.params.double(), x.param_index, x.mean.double(), x.var.double(),
        x.active,
    )  # fmt: skip
    names = ("hidden", "depth", "bias", "residual_first")
    extra = {} if mlp is None else dict(zip(names, mlp, strict=True))
    return getattr(reference, op)(*args, log_transform=log_transform, log_eps=LOG_EPS, **extra)


def check(got: Tensor, exact: Tensor, x: Sample, tolerance: float) -> None:
    live = x.store.live
    assert (got[~live] == -7.0).all(), "dead rows were written"
    error = (got[live].double() - exact[live]).norm() / exact[live].norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.3e} > {tolerance:.0e}"


FLOAT = 3e-6
HALF = 2e-3  # x, z and g in fp16; kernels.md section 15


def check_not_repaired(got: Tensor, x: Sample) -> None:
    """A fault that makes NaN would be repaired by the row kernel. A repaired row has its bits, and
    rounding to fp16 gives them to hardly any other."""
    scored = x.store.live & (got != 0)
    repaired = got[scored] == run("bam_scores", x, simt=True)[scored]
    assert repaired.float().mean() < 0.05, "rows were done again without need"


@pytest.mark.parametrize("log_transform", [False, True])
@pytest.mark.parametrize("simt", [False, True], ids=["mma", "simt"])
def test_bam_scores(simt: bool, log_transform: bool) -> None:
    """Ragged, empty and one-row segments, several tiles, an inactive row, two candidates."""
    lengths = [[1, 290], [0, 40], [70, 8]] if not simt else [[1, 60], [0, 40], [70, 8]]
    x = make_sample(lengths, active=[True, False, True])
    got = run("bam_scores", x, log_transform, simt=simt)
    check(got, expected("bam_scores", x, log_transform), x, FLOAT if simt else HALF)
    if not simt and not log_transform:  # logarithms are clamped at 20 and do leave the range
        check_not_repaired(got, x)
    assert (got[x.store.slices()[3]] == 0).all()


def test_bam_scores_in_parts() -> None:
    """Six whole parts, remainders of all lengths, one part; a segment alone has the same bits."""
    x = make_sample([[1920, 770, 256]])
    got = run("bam_scores", x, order=(3, 5))
    check(got, expected("bam_scores", x), x, HALF)
    alone = replace(x, store=x.store.part(1, 2))
    live = alone.store.live
    start = int(x.store.cu_seqlens_k[1])
    assert torch.equal(run("bam_scores", alone)[live], got[start:][: live.numel()][live])
    check_not_repaired(got, x)


def test_bam_scores_at_unit_weights() -> None:
    x = make_sample([[150]], std=0.3)
    check(run("bam_scores", x), expected("bam_scores", x), x, HALF)


def test_bam_rows_out_of_range_are_done_again() -> None:
    """Weights for which 2^(z.x) leaves the range of float, features that leave fp16."""
    x = make_sample([[80]], std=1.5)
    z_scale = reference.token_features(
        x.store.state[:80], x.store.pos[:80], x.mean, x.var, False, 0.0
    )
    assert z_scale.abs().max() > 3
    check(run("bam_scores", x), expected("bam_scores", x), x, 5e-2)
    x = make_sample([[80]])
    x.store.state[11, 3] = 1e6  # 1e7 standard deviations
    got, exact = run("bam_scores", x), expected("bam_scores", x)
    check(got, exact, x, 1e-3)


def test_bam_scores_of_zero_parameters_are_zero() -> None:
    x = make_sample([[70]], std=0.0)
    assert (run("bam_scores", x)[:70] == 0).all()


def test_bam_scores_show_nan() -> None:
    """A NaN state gives NaN to its own row and to the older rows that see it, to no other."""
    x = make_sample([[90]])
    x.store.state[33, 5] = float("nan")
    for simt in (False, True):
        got = run("bam_scores", x, simt=simt)[:90]
        assert got[:34].isnan().all()
        assert got[34:].isfinite().all()


@pytest.mark.parametrize("simt", [False, True], ids=["mma", "simt"])
def test_same_bits_in_every_order_and_batch(simt: bool) -> None:
    x = make_sample([[70, 3], [20, 66]])
    results = [run("bam_scores", x, simt=simt, order=order) for order in emulated.ORDERS]
    assert all(torch.equal(results[0], r) for r in results[1:])
    start = int(x.store.cu_seqlens_k[2])
    alone = replace(x, store=x.store.part(2, 4), param_index=x.param_index[1:], active=x.active[1:])
    live = alone.store.live
    assert torch.equal(run("bam_scores", alone, simt=simt)[live], results[0][start:][live])


@pytest.mark.parametrize(
    "mlp",
    [(25, 1, False, False), (25, 1, True, False), (25, 2, True, True), (7, 2, True, False),
     (25, 4, False, True), (9, 4, True, False)],
)  # fmt: skip
@pytest.mark.parametrize("log_transform", [False, True])
def test_mlp_scores(mlp: tuple[int, int, bool, bool], log_transform: bool) -> None:
    num_params = reference.num_mlp_params(*mlp[:3])
    x = make_sample([[1, 130], [0, 40]], num_params, std=0.3, active=[True, False])
    got = run("mlp_scores", x, log_transform, mlp, order=(5, 1))
    check(got, expected("mlp_scores", x, log_transform, mlp), x, FLOAT)
