"""Calibration: what it refuses, what its offsets and fractions do, and its files."""

from __future__ import annotations

import doctest
import itertools
import math

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, build
from namm_ext import NAMM, Budget, Calibration, NAMMCache, NAMMConfig
from namm_ext.baselines import KNorm
from namm_ext.fitting.calibrate import calibration_of
from namm_ext.policy import calibration, regress
from safetensors.torch import load_file, save_file
from small_context import context, kept_positions
from test_budget import small_calibration


def test_docstring_examples():
    result = doctest.testmod(calibration, extraglobs={"torch": torch})
    assert result.attempted > 1
    assert result.failed == 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"offsets": torch.zeros(2)}, "offsets must be 2-dimensional and not empty, got [2]"),
    ({"offsets": torch.zeros(2, 2).int()}, "offsets must be a floating tensor, got torch.int32"),
    ({"offsets": torch.full((2, 2), math.inf)}, "offsets must be finite, got NaN or infinite"),
    ({"fractions": torch.tensor([0.5, 0.25, 1.0])}, "fractions must be ascending in (0, 1] and"),
    ({"fractions": torch.tensor([0.0, 0.5, 1.0])}, "fractions must be ascending in (0, 1] and"),
    ({"fractions": torch.tensor([0.25, 0.5, 0.9])}, "fractions must be ascending in (0, 1] and"),
    ({"layer_fractions": torch.ones(2, 2)}, "layer_fractions must be [2, 3], layers and fractions"),
    ({"layer_fractions": torch.ones(3, 3)}, "layer_fractions must be [2, 3], layers and fractions"),
    ({"layer_fractions": torch.tensor([[0.3, 0.2, 1.0], [0.2, 0.8, 1.0]])},
     "layer_fractions must be at least 0 and never fall along a row"),
    ({"layer_fractions": torch.tensor([[-0.1, 0.2, 1.0], [0.6, 0.8, 1.0]])},
     "layer_fractions must be at least 0 and never fall along a row"),
    ({"layer_fractions": torch.tensor([[0.1, 0.3, 0.9], [0.4, 0.7, 1.1]])},
     "layer_fractions must be 1 in the last column"),
    ({"layer_fractions": torch.tensor([[0.1, 0.3, 1.0], [0.4, 0.8, 1.0]])},
     "layer_fractions must be [0.25, 0.5, 1.0] on average over layers"),
    ({"scales": torch.ones(2, 3)}, "scales must be [2, 2] as offsets, got [2, 3]"),
    ({"scales": torch.tensor([[1.0, 1.0], [-0.5, 1.0]])}, "scales must be at least 0, got"),
    ({"scales": torch.full((2, 2), math.nan)}, "scales must be finite, got NaN or infinite"),
], ids=range(15))  # fmt: skip
def test_bad_values(changes, message):
    with pytest.raises(ValueError) as error:
        small_calibration(**changes)
    assert str(error.value).startswith(f"Calibration: {message}")


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.25, 0.3, 0.5, 0.77, 1.0])
def test_layers_keep_the_fraction_together(fraction):
    value = small_calibration()
    parts = [value.layer_fraction(layer, fraction) for layer in range(value.num_layers)]
    assert sum(parts) / 2 == pytest.approx(fraction, abs=1e-7)
    assert parts[0] <= parts[1]


def test_global_scope_needs_one():
    message = "scope 'global' needs a calibration .*, got none; run `namm calibrate MODEL`"
    with pytest.raises(ValueError, match=message):
        KNorm(Budget(9, scope="global")).select(torch.zeros(172), context(layer_idx=0))


def test_another_model_is_refused():
    policy = KNorm(9).with_calibration(small_calibration(
        offsets=torch.zeros(3, 2), layer_fractions=torch.tensor([[0.25, 0.5, 1.0]] * 3)
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"model must have 3 layers, .*, got 2; run `namm calib"):
        NAMMCache(build(FAMILIES["llama"]()), policy)
    policy = policy.with_calibration(small_calibration(offsets=torch.zeros(2, 8)))
    with pytest.raises(ValueError, match=r"model must have 8 KV heads, .*, got 2"):
        NAMMCache(build(FAMILIES["llama"]()), policy)
    with pytest.raises(ValueError, match=r"model must have 8 KV heads, .*, got 2"):
        policy.with_budget(scope="per_layer").select(torch.zeros(172), context(layer_idx=0))


def test_moves_divide_the_budget_anew():
    value = small_calibration()
    assert value.num_moves == 6
    same = value.moved(torch.zeros(6))
    torch.testing.assert_close(same.layer_fractions, value.layer_fractions)
    assert torch.equal(same.offsets, value.offsets)
    moved = value.moved(torch.tensor([1.0, 0.5, 0.0, -1.0, 0.0, -2.0]))
    odds = (moved.layer_fractions.logit() - value.layer_fractions.logit())[:, :-1]
    torch.testing.assert_close(odds[0] - odds[1], torch.full_like(odds[0], 2.0))
    torch.testing.assert_close(moved.layer_fractions.mean(0), value.fractions)
    expected = value.offsets + torch.tensor([[0.5, 0.0], [0.0, -2.0]])
    assert torch.equal(moved.offsets, expected)
    everywhere = value.moved(torch.tensor([3.0, 0.0, 0.0, 3.0, 0.0, 0.0]))
    torch.testing.assert_close(everywhere.layer_fractions, value.layer_fractions)
    with pytest.raises(ValueError, match=r"moves must be 6 numbers, L \(1 \+ H\), got 5"):
        value.moved(torch.zeros(5))


@pytest.mark.parametrize("seed", range(20))
def test_moved_fractions_never_fall(seed):
    generator = torch.Generator().manual_seed(seed)
    value = small_calibration(
        layer_fractions=torch.tensor([[0.0, 0.02, 1.0], [0.5, 0.98, 1.0]]),
    )
    value.moved(4 * torch.randn(6, generator=generator))  # checks itself


def test_offsets_make_heads_comparable():
    ctx = context(due=(True,), layer_idx=1)
    scores = torch.zeros(86)
    scores[:43] = 10.0  # one head is louder
    shared = KNorm(Budget(9, scope="per_layer"))
    level = shared.with_calibration(small_calibration(offsets=torch.tensor([[0, 0], [0, 10.0]])))
    assert shared.select(scores, ctx)[1].tolist() == [17, 1]
    # Level heads decide by position; the lower head has the first word in a draw.
    assert level.select(scores, ctx)[1].tolist() == [9, 9]
    alone = [p.with_budget(scope="per_head").select(scores, ctx)[0] for p in (shared, level)]
    assert kept_positions(alone[0], ctx) == kept_positions(alone[1], ctx)


def test_scales_make_heads_comparable():
    """Head 0 speaks in halves and head 1 in tens; what they say is the same."""
    ctx = context(due=(True,), layer_idx=1)
    generator = torch.Generator().manual_seed(0)
    meant = torch.rand(86, generator=generator)
    spoken = torch.cat([0.5 * meant[:43] - 3, 10 * meant[43:] + 1])
    policy = KNorm(Budget(9, scope="per_layer"))
    value = small_calibration(
        scales=torch.tensor([[1, 1], [2.0, 0.1]]), offsets=torch.tensor([[0, 0], [6.0, -0.1]])
    )
    keep, _ = policy.with_calibration(value).select(spoken, ctx)
    assert kept_positions(keep, ctx) == kept_positions(policy.select(meant, ctx)[0], ctx)
    assert kept_positions(keep, ctx) != kept_positions(policy.select(spoken, ctx)[0], ctx)
    silent = policy.with_calibration(small_calibration(scales=torch.tensor([[1, 1], [0, 0.0]])))
    assert silent.select(spoken, ctx)[1].tolist() == [17, 1]  # offsets alone decide
    same = policy.with_calibration(small_calibration())
    ones = policy.with_calibration(small_calibration(scales=torch.ones(2, 2)))
    assert same.fingerprint() == ones.fingerprint() != silent.fingerprint()


def test_regression_against_numpy():
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(2, 3, n, generator=generator) for n in (40, 25)]
    slope = torch.tensor([[0.5, 2.0, -1.0], [1.0, 0.01, 30.0]])[..., None]
    targets = [slope * s + 3 + torch.randn(s.shape, generator=generator) for s in scores]
    scores[0][1, 1], scores[1][1, 1] = 7.0, 7.0  # a head that says nothing
    scales, offsets = regress(scores, targets)
    x, y = (torch.cat(parts, 2).double().numpy() for parts in (scores, targets))
    for layer, head in itertools.product(range(2), range(3)):
        if (layer, head) in ((0, 2), (1, 1)):
            want = [0.0, y[layer, head].mean()]
        else:
            want = np.polyfit(x[layer, head], y[layer, head], 1).tolist()
        got = [float(scales[layer, head]), float(offsets[layer, head])]
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    with pytest.raises(ValueError, match="scores must hold at least one token, got none"):
        regress([torch.zeros(2, 3, 0)], [torch.zeros(2, 3, 0)])


def test_the_threshold_is_for_scores_before_offsets():
    ctx = context(due=(True,), layer_idx=1)
    scores = torch.full((86,), -1.0)
    scores[:10], scores[43:48] = 2.0, 1.0
    policy = KNorm(Budget(40, scope="per_layer", threshold=0.0)).with_calibration(
        small_calibration(offsets=torch.tensor([[0, 0], [-50.0, 50.0]]))
    )
    assert policy.select(scores, ctx)[1].tolist() == [11, 6]
    scores[4] = math.nan
    assert policy.select(scores, ctx)[1].tolist() == [-1, 6]


def test_saved_with_a_policy(tmp_path):
    namm = NAMM(NAMMConfig(scorer="mlp"), budget=Budget(9, scope="global"))
    calibrated = namm.with_calibration(small_calibration())
    assert calibrated.fingerprint() != namm.fingerprint()
    calibrated.save_pretrained(tmp_path)
    back = NAMM.from_pretrained(tmp_path)
    assert back.fingerprint() == calibrated.fingerprint()
    assert back.budget == calibrated.budget
    for name, tensor in calibrated.calibration.tensors().items():
        assert torch.equal(back.calibration.tensors()[name], tensor)
    assert torch.equal(back.calibration.scales, torch.ones(2, 2))
    assert "calibration.scales" not in load_file(tmp_path / "namm.safetensors")
    scaled = namm.with_calibration(small_calibration(scales=torch.tensor([[1, 2], [3.0, 0]])))
    scaled.save_pretrained(tmp_path / "scaled")
    again = NAMM.from_pretrained(tmp_path / "scaled")
    assert again.fingerprint() == scaled.fingerprint() != calibrated.fingerprint()

    path = tmp_path / "namm.safetensors"
    content = load_file(path)
    content["calibration.offsets"][0, 0] = math.nan
    save_file(content, path)
    with pytest.raises(ValueError, match="their checksum is another"):
        NAMM.from_pretrained(tmp_path)
    tensors = calibrated.calibration.tensors()
    with pytest.raises(ValueError, match="offsets must be finite"):
        Calibration.from_tensors({**tensors, "offsets": content["calibration.offsets"]})
    del tensors["offsets"]
    with pytest.raises(ValueError, match="tensors must be offsets, fractions, layer_fractions, sc"):
        Calibration.from_tensors(tensors)


def test_moves_with_its_policy():
    value = small_calibration()
    assert value.to("cpu") is value
    assert value.to("meta").offsets.device.type == "meta"
    assert value.to("meta").scales.device.type == "meta"
    assert value.to("meta").layer_fraction(1, 0.25) == pytest.approx(0.4)
    for policy in (KNorm(9), NAMM(NAMMConfig())):
        assert policy.to("meta") is policy or isinstance(policy, NAMM)
        moved = policy.with_calibration(value).to("meta")
        assert moved.calibration.offsets.device.type == "meta"
        assert policy.calibration is None
    assert isinstance(Calibration.from_tensors(value.tensors()), Calibration)


def test_the_shares_whose_division_is_stored():
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 2, 160, generator=g)]
    found = calibration_of(scores, [2 * scores[0]])
    want = [1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0]
    assert found.fractions.tolist() == want
