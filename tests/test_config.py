"""NAMMConfig: defaults, round trips, and what it refuses."""

from __future__ import annotations

import dataclasses
import doctest
import json

import pytest
import torch
from namm_ext import NAMMConfig, config, reference

CHANGED = {
    "n_up": 64, "ema_coeff": 0.9, "scorer": "mlp", "mlp_hidden": 25, "mlp_depth": 2,
    "mlp_bias": True, "mlp_residual_first": True, "feature_transform": "log", "log_eps": 1e-4,
}  # fmt: skip


def test_docstring_examples():
    result = doctest.testmod(config, extraglobs={"torch": torch})
    assert result.attempted > 1
    assert result.failed == 0


def test_defaults_are_the_first_stage_of_the_original():
    assert NAMMConfig().to_dict() == {
        "n_up": 512, "ema_coeff": 0.99, "scorer": "bam", "mlp_hidden": 25, "mlp_depth": 1,
        "mlp_bias": False, "mlp_residual_first": False, "feature_transform": "none",
        "log_eps": 1e-6,
    }  # fmt: skip


def test_config_round_trip():
    changed = NAMMConfig(**CHANGED)
    values = json.loads(json.dumps(changed.to_dict()))
    assert NAMMConfig.from_dict(values) == changed
    defaults = NAMMConfig().to_dict()
    same = {name for name in defaults if values[name] == defaults[name]}
    assert same <= {"mlp_hidden"}
    assert NAMMConfig().replace(**CHANGED) == changed
    assert hash(changed) == hash(NAMMConfig(**CHANGED))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMMConfig().n_up = 64  # type: ignore[misc]


BAD_CONFIGS = [
    ({"n_up": 0}, "n_up must be a positive multiple of 16, got 0"),
    ({"n_up": 40}, "n_up must be a positive multiple of 16, got 40"),
    ({"n_up": 64.0}, "n_up must be a positive multiple of 16, got 64.0"),
    ({"ema_coeff": 1.0}, "ema_coeff must be a number in (0, 1), got 1.0"),
    ({"ema_coeff": "x"}, "ema_coeff must be a number in (0, 1), got 'x'"),
    ({"scorer": "gnn"}, "scorer must be 'bam' or 'mlp' or 'none', got 'gnn'"),
    ({"mlp_hidden": 0}, "mlp_hidden must be an int in [1, 65536], got 0"),
    ({"mlp_depth": 0}, "mlp_depth must be an int in [1, 65536], got 0"),
    ({"mlp_depth": 2**40}, f"mlp_depth must be an int in [1, 65536], got {2**40}"),
    (
        {"scorer": "mlp", "mlp_hidden": 65536, "mlp_depth": 3},
        "mlp_depth must be at most what makes 2147483647 parameters, got 3",
    ),
    ({"mlp_bias": 1}, "mlp_bias must be a bool, got 1"),
    (
        {"mlp_residual_first": True, "mlp_depth": 2, "mlp_hidden": 16},
        "mlp_hidden must be 25 with mlp_residual_first, got 16",
    ),
    ({"feature_transform": "sqrt"}, "feature_transform must be 'none' or 'log', got 'sqrt'"),
    ({"log_eps": 0.0}, "log_eps must be a float32 in [1.2e-38, 3.4e+38], got 0.0"),
    ({"log_eps": 1e300}, "log_eps must be a float32 in [1.2e-38, 3.4e+38], got 1e+300"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS, ids=[str(b[0]) for b in BAD_CONFIGS])
def test_bad_config(values, message):
    with pytest.raises(ValueError) as error:
        NAMMConfig(**values)
    assert str(error.value) == f"NAMMConfig: {message}"


def test_unknown_key():
    with pytest.raises(ValueError, match=r"keys must be among n_up, .*, got nup, window"):
        NAMMConfig.from_dict({"window": 1, "nup": 2, "n_up": 64})
    with pytest.raises(TypeError, match="values must be a mapping, got list"):
        NAMMConfig.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(("hidden", "depth", "bias"), [(25, 1, False), (25, 2, True), (7, 3, True)])
def test_sizes_agree_with_the_reference(hidden, depth, bias):
    mlp = NAMMConfig(scorer="mlp", mlp_hidden=hidden, mlp_depth=depth, mlp_bias=bias)
    assert mlp.num_params == reference.num_mlp_params(hidden, depth, bias)
    assert NAMMConfig().num_params == reference.NUM_BAM_PARAMS
    assert NAMMConfig().num_bins == reference.NUM_BINS
