"""Accuracy and determinism of the CPU kernels on every instruction set of this machine."""

import math

import pytest
import torch
from namm_ext import ops, reference, testing

ISAS = testing.isas()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
isas = pytest.mark.parametrize("isa", ISAS)


def _window_args(lengths, *, heads, groups, head_dim, n_up, dtype, std):
    """Logits of standard deviation ``std`` and their exact log-sum-exps."""
    store = testing.ragged_store(lengths, num_kv_heads=heads, head_dim=head_dim, dtype=dtype)
    args = testing.window(store, n_up=n_up, num_groups=groups, scale=std * head_dim**-0.5)
    args["active"] = torch.ones(store.batch_size, dtype=torch.bool)
    return store, args, std * head_dim**-0.5


def _spectrogram(module, store, args, scale, double=False):
    kind = torch.Tensor.double if double else (lambda x: x)
    return module.spectrogram(
        kind(args["q_window"]), args["lse_window"], kind(store.k), store.pos, kind(store.state),
        store.cu_seqlens_k, store.seqused_k, args["pos_q"], args["active"],
        softmax_scale=scale, ema_coeff=0.99,
    )  # fmt: skip


def _relative(got, want, live):
    return float((got[live] - want[live]).norm() / want[live].norm())


@isas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("std", [1.0, 4.0])
def test_spectrogram_relative_error(isa, dtype, std):
    store, args, scale = _window_args(
        [600, 433], heads=2, groups=4, head_dim=128, n_up=256, dtype=DTYPES[dtype], std=std
    )
    store.state.mul_(0.01)  # so that the new frames weigh
    want = _spectrogram(reference, store, args, scale, double=True)
    with testing.force_isa(isa):
        got = _spectrogram(ops, store, args, scale)
    assert _relative(got, want, store.live) <= 1e-6


@isas
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 33, 40, 80, 256])
@pytest.mark.parametrize("groups", [1, 3])
def test_head_dims_and_groups(isa, dtype, head_dim, groups):
    store, args, scale = _window_args(
        [50, 97], heads=1, groups=groups, head_dim=head_dim, n_up=48, dtype=DTYPES[dtype], std=1.0
    )
    want = _spectrogram(reference, store, args, scale, double=True)
    with testing.force_isa(isa):
        got = _spectrogram(ops, store, args, scale)
    assert _relative(got, want, store.live) <= 1e-6


@isas
def test_columns_nobody_sees_are_exact_zeros(isa):
    """Keys newer than every query keep exactly the decayed old state."""
    store, args, scale = _window_args(
        [70], heads=1, groups=2, head_dim=32, n_up=32, dtype=torch.float32, std=1.0
    )
    args["pos_q"] = torch.full_like(args["pos_q"], -1000)
    store.state[:] = 0
    with testing.force_isa(isa):
        assert not _spectrogram(ops, store, args, scale)[store.live].any()


@isas
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_do_not_depend_on_their_neighbours(isa, dtype):
    """A segment alone, in a batch, and on several threads: equal bits."""
    store, args, scale = _window_args(
        [130, 61, 1, 200], heads=2, groups=2, head_dim=64, n_up=64, dtype=DTYPES[dtype], std=2.0
    )
    bank = testing.bank(2, reference.NUM_BAM_PARAMS)
    mean, var = torch.full((17,), 0.1), torch.full((17,), 0.5)

    def scores(state, pos, cu, used, index, active):
        return ops.bam_scores(
            state, pos, cu, used, bank, index, mean, var, active, log_transform=False, log_eps=1e-6
        )

    index = torch.tensor([1, 0], dtype=torch.int32)
    threads = torch.get_num_threads()
    with testing.force_isa(isa):
        whole = _spectrogram(ops, store, args, scale)
        scored = scores(
            whole, store.pos, store.cu_seqlens_k, store.seqused_k, index, args["active"]
        )
        torch.set_num_threads(3)
        try:
            again = _spectrogram(ops, store, args, scale)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again[store.live], whole[store.live])
        start = int(store.cu_seqlens_k[2])
        cu, used = store.cu_seqlens_k[2:] - start, store.seqused_k[2:]
        alone = ops.spectrogram(
            args["q_window"][1:], args["lse_window"][1:], store.k[start:], store.pos[start:],
            store.state[start:], cu, used, args["pos_q"][1:], args["active"][1:],
            softmax_scale=scale, ema_coeff=0.99,
        )  # fmt: skip
        live = store.live[start:]
        assert torch.equal(alone[live], whole[start:][live])
        part = scores(alone, store.pos[start:], cu, used, index[1:], args["active"][1:])
        assert torch.equal(part[live], scored[start:][live])


@isas
@pytest.mark.parametrize("log_transform", [False, True])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 257, 700])
def test_bam_scores_error(isa, log_transform, length):
    store = testing.ragged_store([length], num_kv_heads=1, head_dim=8)
    bank = testing.bank(1, reference.NUM_BAM_PARAMS)
    rest = (
        store.cu_seqlens_k, store.seqused_k, bank, torch.zeros(1, dtype=torch.int32),
        torch.full((17,), 0.5), torch.full((17,), 2.0), torch.tensor([True]),
    )  # fmt: skip
    how = {"log_transform": log_transform, "log_eps": 1e-6}
    want = reference.bam_scores(store.state.double(), store.pos, *rest, **how)
    with testing.force_isa(isa):
        got = ops.bam_scores(store.state, store.pos, *rest, **how)
    assert float((got - want)[store.live].abs().max()) <= 1e-4


@isas
def test_bam_scores_are_redone_where_the_anchor_overflows(isa):
    """Weights so large that 2^(logit - self logit) leaves float32."""
    store = testing.ragged_store([90], num_kv_heads=1, head_dim=8)
    bank = testing.bank(1, reference.NUM_BAM_PARAMS)
    bank[:, : 25 * 96] *= 12
    rest = (
        store.cu_seqlens_k, store.seqused_k, bank, torch.zeros(1, dtype=torch.int32),
        torch.full((17,), 0.5), torch.full((17,), 2.0), torch.tensor([True]),
    )  # fmt: skip
    how = {"log_transform": False, "log_eps": 1e-6}
    same = reference.bam_scores(store.state, store.pos, *rest, **how)[store.live]
    want = reference.bam_scores(store.state.double(), store.pos, *rest, **how)[store.live]
    with testing.force_isa(isa):
        got = ops.bam_scores(store.state, store.pos, *rest, **how)[store.live]
    assert got.isfinite().all()
    testing.assert_no_worse_than(got, same, want, factor=4.0)


@isas
def test_ages_beyond_the_table(isa):
    """Recency of positions up to 2^30, where float32 angles would be meaningless."""
    store = testing.ragged_store([3], num_kv_heads=1, head_dim=8)
    store.pos[:3] = torch.tensor([0, 2**30 - 131072, 2**30])
    bank = torch.zeros(1, reference.NUM_BAM_PARAMS)
    w3 = reference.split_params(bank)["W3"]
    w3[0, :8, 0] = torch.arange(1.0, 9.0)
    rest = (
        store.cu_seqlens_k, store.seqused_k, bank, torch.zeros(1, dtype=torch.int32),
        torch.zeros(17), torch.ones(17), torch.tensor([True]),
    )  # fmt: skip
    how = {"log_transform": False, "log_eps": 1e-6}
    want = reference.bam_scores(store.state.double(), store.pos, *rest, **how)
    with testing.force_isa(isa):
        got = ops.bam_scores(store.state, store.pos, *rest, **how)
    assert math.isclose(float((got - want)[:3].abs().max()), 0.0, abs_tol=1e-5)
