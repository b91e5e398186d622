"""What a NAMM normalises with, collected, and thresholds for a share of scores."""

from __future__ import annotations

import dataclasses
import doctest
import math

import pytest
import torch
from namm_ext import NAMM, NAMMConfig, policy
from namm_ext.policy import (
    StatisticsCalibrator,
    StatisticsCollector,
    calibrate_threshold,
)
from small_context import context, expected_state, with_due


def test_docstring_examples():
    result = doctest.testmod(policy.statistics, extraglobs={"torch": torch})
    assert result.attempted > 1
    assert result.failed == 0


def test_collector_pools_batches():
    parts = [torch.randn(n, 2, 17) for n in (5, 1, 60)]
    collector = StatisticsCollector()
    for part in parts:
        collector.add(part)
    pooled = torch.cat(parts).reshape(-1, 17)
    assert collector.count == 132
    torch.testing.assert_close(collector.mean, pooled.mean(0))
    torch.testing.assert_close(collector.var, pooled.var(0, correction=0))


@pytest.mark.parametrize("transform", ["none", "log"])
def test_calibrator_collects_due_rows_and_evicts_nothing(transform):
    settings = NAMMConfig(n_up=16, feature_transform=transform, log_eps=1e-3, ema_coeff=0.9)
    calibrator = StatisticsCalibrator(settings)
    with pytest.raises(ValueError, match="at least one update must have run, got none"):
        _ = calibrator.mean
    ctx = context()
    features = []
    for active in ((True, False), (False, False), (True, True)):
        ctx = with_due(ctx, active)
        scores, state = calibrator.update(ctx)
        _, counts = calibrator.select(scores, ctx)
        assert counts.tolist() == [40] * 4
        want = expected_state(ctx, 0.9).view(2, 2, 43, 17)[:, :, :40]
        features.append(want[torch.tensor(active)].reshape(-1, 17))
        ctx = dataclasses.replace(ctx, segments=ctx.segments._replace(state=state))
    pooled = torch.cat(features)
    pooled = (pooled + 1e-3).log() if transform == "log" else pooled
    assert calibrator.count == pooled.shape[0] == 240
    torch.testing.assert_close(calibrator.mean, pooled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrator.var, pooled.var(0, correction=0), rtol=1e-4, atol=1e-5)
    namm = NAMM(settings).with_statistics(calibrator)
    assert torch.equal(namm.mean, calibrator.mean)
    assert torch.equal(namm.var, calibrator.var)
    assert namm.count == 240


def test_calibrated_threshold_meets_the_goal():
    scores = [torch.randn(300), torch.randn(100) * 4 - 3]
    pooled = torch.cat(scores)
    for goal, wanted in (({"keep_fraction": 0.25}, 100), ({"target_tokens": 30}, 60)):
        threshold = calibrate_threshold(scores, **goal)
        assert int((pooled >= threshold).sum()) == wanted
    assert calibrate_threshold(scores, keep_fraction=1.0) == pooled.min().item()
    assert calibrate_threshold(scores, target_tokens=10**6) == pooled.min().item()
    assert calibrate_threshold(scores, keep_fraction=1e-9) == pooled.max().item()


@pytest.mark.parametrize(("args", "message"), [
    (([], 0.5), "scores must hold at least one score, got none"),
    (([torch.tensor([math.nan])], 0.5), "scores must not be NaN, got NaN"),
    (([torch.ones(1)],), "exactly one of keep_fraction and target_tokens must be given, got None"),
    (([torch.ones(1)], 0.5, 3), "exactly one of keep_fraction and target_tokens must be given"),
    (([torch.ones(1)], 1.5), r"keep_fraction must be in \(0, 1\], got 1.5"),
    (([torch.ones(1)], None, 0), "target_tokens must be positive, got 0"),
], ids=range(6))  # fmt: skip
def test_bad_calibration(args, message):
    with pytest.raises(ValueError, match=message):
        calibrate_threshold(*args)
