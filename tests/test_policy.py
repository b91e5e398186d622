"""NAMM: its parameters, and that it calls the ops with what a layer shows it."""

from __future__ import annotations

import dataclasses
import doctest
import math

import pytest
import torch
from namm_ext import NAMM, NAMMConfig, policy, reference
from namm_ext.policy import (
    StatisticsCalibrator,
)
from small_context import NONFINITE, context, expected_state, ints, random_namm, with_due


def test_docstring_examples():
    result = doctest.testmod(policy.namm, extraglobs={"torch": torch})
    assert result.attempted > 1
    assert result.failed == 0


# Parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"scorer": "mlp", "mlp_depth": 2, "mlp_bias": True}])
def test_named_parameters_are_views_in_the_published_order(changes):
    namm = random_namm(**changes)
    named = namm.named_parameters()
    assert torch.equal(torch.cat([t.flatten() for t in named.values()]), namm.params)
    named["b1"][3] = 123.0
    start = named["W1"].numel()
    assert namm.params[start + 3] == 123.0
    back = NAMM.from_named(namm.config, named, namm.mean, namm.var)
    assert back.fingerprint() == namm.fingerprint()


def test_from_named_names_what_is_wrong():
    named = random_namm().named_parameters()
    with pytest.raises(ValueError, match="parameters must be W1, b1, W2, b2, W3, b3, got W1, b1"):
        NAMM.from_named(NAMMConfig(), {"W1": named["W1"], "b1": named["b1"]})
    with pytest.raises(ValueError, match=r"NAMM: W2 must be \[32, 50\], got \[50, 32\]"):
        NAMM.from_named(NAMMConfig(), {**named, "W2": named["W2"].T})


def test_arguments_are_copied():
    params = torch.ones(4172)
    namm = NAMM(NAMMConfig(), params)
    params.zero_()
    assert namm.params.min() == 1


@pytest.mark.parametrize(("values", "message"), [
    ({"params": torch.zeros(4171)}, "NAMM: params must be [4172] or [P, 4172], got [4171]"),
    ({"params": torch.zeros(1, 1, 9)}, "NAMM: params must be [4172] or [P, 4172], got [1, 1, 9]"),
    ({"params": torch.zeros(0, 4172)}, "NAMM: params must hold at least one vector, got none"),
    ({"params": ints(*[0] * 4172)}, "NAMM: params must be a floating tensor, got torch.int32"),
    ({"params": [0.0] * 4172}, "NAMM: params must be a floating tensor, got list"),
    ({"params": NONFINITE}, "NAMM: params must be finite, got 2 NaN or infinite values"),
    ({"mean": torch.zeros(16)}, "NAMM: mean must be [17], got [16]"),
    ({"var": -torch.ones(17)}, "NAMM: var must not be negative, got -1.0"),
], ids=range(8))  # fmt: skip
def test_bad_parameters(values, message):
    with pytest.raises(ValueError) as error:
        NAMM(NAMMConfig(), **values)
    assert str(error.value) == message


def test_fingerprint_sees_every_part():
    namm = random_namm()
    bumped = namm.params.clone()
    bumped[-1] += 1e-3
    others = [
        namm.with_params(bumped),
        namm.with_config(ema_coeff=0.9),
        namm.with_budget(size=9),
        NAMM(namm.config, namm.params, namm.mean + 1, namm.var),
        NAMM(namm.config, namm.params, namm.mean, namm.var + 1),
        StatisticsCalibrator(namm.config),
    ]
    assert len({namm.fingerprint(), *(o.fingerprint() for o in others)}) == 7
    assert NAMM(namm.config, namm.params, namm.mean, namm.var).fingerprint() == namm.fingerprint()


def test_to_moves_all_tensors():
    namm = random_namm()
    assert namm.to("cpu") is namm
    moved = namm.to("meta")
    assert {t.device.type for t in (moved.params, moved.mean, moved.var)} == {"meta"}
    assert moved.config == namm.config
    assert moved.count == 12
    assert namm.params.device.type == "cpu"


# Deciding: the policy calls the ops with what the layer shows it ---------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"feature_transform": "log", "log_eps": 1e-3}, {"ema_coeff": 0.9},
    {"scorer": "mlp"}, {"scorer": "mlp", "mlp_depth": 2, "mlp_bias": True, "mlp_hidden": 6},
    {"scorer": "mlp", "mlp_depth": 2, "mlp_residual_first": True, "feature_transform": "log"},
], ids=str)  # fmt: skip
def test_update_is_spectrogram_then_scores(changes, dtype):
    ctx = context(dtype)
    namm = random_namm(n_up=16, **changes)
    c = namm.config
    bank = torch.stack([namm.params, -namm.params])
    scores, state = namm.with_params(bank).update(dataclasses.replace(ctx, param_index=ints(1, 0)))
    want_state = expected_state(ctx, c.ema_coeff)
    live = ctx.segments.live
    assert scores.dtype == state.dtype == dtype
    torch.testing.assert_close(state[live], want_state[live])
    features = torch.cat([
        reference.token_features(
            want_state[rows], ctx.segments.pos[rows], namm.mean, namm.var,
            c.feature_transform == "log", c.log_eps,
        ) for rows in ctx.segments.slices()[:2]
    ]).view(2, 40, 25)  # fmt: skip
    if c.scorer == "bam":
        want = reference.bam(features, -namm.params)
    else:
        want = reference.mlp(
            features, -namm.params, c.mlp_hidden, c.mlp_depth, c.mlp_bias, c.mlp_residual_first
        )
    got = scores[live].view(4, 40)
    torch.testing.assert_close(got[:2], want, rtol=1e-4, atol=1e-4)
    assert not got[2:].any()  # the row that is not due


def test_one_vector_serves_every_row():
    ctx = with_due(dataclasses.replace(context(), param_index=ints(0, 0)), (True, True))
    namm = random_namm(n_up=16)
    scores, _ = namm.update(ctx)
    bank = namm.with_params(torch.stack([torch.zeros(4172), namm.params]))
    again, _ = bank.update(dataclasses.replace(ctx, param_index=ints(1, 1)))
    live = ctx.segments.live
    assert torch.equal(scores[live], again[live])
    assert repr(bank).endswith("params: 2 candidates of 4172)")


def test_zero_parameters_keep_everything():
    ctx = context()
    namm = NAMM(NAMMConfig(n_up=16))
    scores, _ = namm.update(dataclasses.replace(ctx, param_index=ints(0, 0)))
    assert namm.select(scores, ctx)[1].tolist() == [40] * 4


def test_nan_scores_are_named():
    ctx = context()
    scores = torch.zeros(ctx.segments.capacity)
    _, counts = NAMM(NAMMConfig(n_up=16)).select(scores, ctx)
    assert policy.check_num_kept(counts, ctx) == [40] * 4
    scores[43 + 7] = math.nan
    _, counts = NAMM(NAMMConfig(n_up=16)).select(scores, ctx)
    message = "select: scores must not be NaN, got NaN in layer 4, batch row 0, KV head 1"
    with pytest.raises(ValueError, match=message):
        policy.check_num_kept(counts, ctx)
