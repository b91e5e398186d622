"""Policies and fingerprints written at version 1 mean the same today.

``data/version_1`` was written by the commit before budgets were values: policies of every kind of
selection, what each kept of the scores below, and fingerprints that saved caches refer to.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from namm_ext import NAMM, Budget, NAMMConfig, baselines
from namm_ext.policy import version1
from namm_ext.policy.files import FORMAT_VERSION
from small_context import context, kept_positions
from test_budget import small_calibration

FOLDER = Path(__file__).parent / "data" / "version_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_policies_keep_the_same(name):
    namm = NAMM.from_pretrained(FOLDER / name)
    assert EXPECTED[name]["fingerprint"] in namm.earlier_fingerprints()
    scores = ((torch.arange(172) * 37) % 101 - 50).float() / 50
    for layer_idx, want in enumerate(EXPECTED[name]["kept"]):
        ctx = context(layer_idx=layer_idx, seen=(40, 40))
        ctx.segments.pos.sub_(5).clamp_(min=-1)
        keep, _ = namm.select(scores, ctx)
        assert kept_positions(keep, ctx)[:2] == want


def test_written_again_they_are_of_this_version(tmp_path):
    namm = NAMM.from_pretrained(FOLDER / "reference")
    assert namm.budget == Budget(threshold=0.0, selection="original")
    namm.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION
    assert NAMM.from_pretrained(tmp_path).fingerprint() == namm.fingerprint()


def test_fingerprints_of_rules():
    expected = json.loads((FOLDER / "baselines.json").read_text())
    names = {**vars(baselines), "Budget": Budget}
    for rule, fingerprint in expected.items():
        assert fingerprint in eval(rule, names).earlier_fingerprints(), rule
    assert len(set(expected.values())) == len(expected) == 9


def test_a_part_of_the_config_takes_its_defaults():
    assert version1.split_config({"n_up": 64}) == (NAMMConfig(n_up=64), Budget(threshold=0.0))
    with pytest.raises(TypeError, match="values must be a mapping, got int"):
        version1.split_config(3)


def test_version_1_had_neither_gate_nor_calibration():
    memory = NAMM(NAMMConfig())
    assert memory.earlier_fingerprints()
    assert memory.with_calibration(small_calibration()).earlier_fingerprints() == ()
