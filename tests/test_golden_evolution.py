"""Replays what the original evolved: its checkpoints and its CMA-ES."""

from __future__ import annotations

import dataclasses
import json

import cma_reference
import numpy as np
import pytest
import torch
from golden_files import golden_files
from namm_ext import NAMM, Budget, policy

# Checkpoints of the original ----------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files("ckpt_*.pt"))
@pytest.mark.parametrize(("which", "key"), [("mean", "mean"), ("best", "best_member")])
def test_checkpoint(path, which, key):
    raw = torch.load(path, weights_only=True)["evolution_state"]
    got = policy.read_original_checkpoint(path, which)
    stored = "stored_buffers_to_save.token_embedding_0_output_"
    assert torch.equal(got.params, raw[key])
    assert torch.equal(got.mean, raw[f"{stored}mean"].flatten())
    assert torch.equal(got.var, raw[f"{stored}var"].flatten())
    assert got.count == int(raw[f"{stored}num"].max()) > 0


@pytest.mark.parametrize("path", golden_files("ckpt_layout_*.json"))
def test_checkpoint_full_layout(path, tmp_path):
    layout = json.loads(path.read_text())["evolution_state"]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, (shape, dtype) in layout.items():
        dtype = getattr(torch, dtype.removeprefix("torch."))
        if len(shape) == 2:  # stored as one number: the loader must not touch the n x n matrices
            state[key] = torch.zeros(1, dtype=dtype).expand(shape)
        elif dtype == torch.int64:
            state[key] = torch.full(shape, 7, dtype=dtype)
        else:
            state[key] = torch.rand(shape, generator=generator, dtype=dtype)
    file = tmp_path / "full.pt"
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    torch.save({"evolution_state": compiled, "iter_num": 3, "best_val_loss": 0.5}, file)
    for which, key in (("mean", "mean"), ("best", "best_member")):
        namm = NAMM.load_original_checkpoint(file, which)
        assert namm.budget == Budget(threshold=0.0, selection="original")
        assert torch.equal(namm.params, state[key])
        assert torch.equal(namm.params[4146:4171, None], namm.named_parameters()["W3"])
        stored = "stored_buffers_to_save.token_embedding_0_output_"
        assert torch.equal(namm.mean, state[f"{stored}mean"].flatten())
        assert torch.equal(namm.var, state[f"{stored}var"].flatten())
        assert namm.count == 7


# CMA-ES of the original -------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files("cma_constants*.json"))
def test_cma_constants(path):
    content = json.loads(path.read_text())
    assert content
    for name, want in content.items():
        n, popsize = (int(part[1:]) for part in name.split("_"))
        got = cma_reference.constants(n, popsize)
        values = {
            **dataclasses.asdict(got),
            "weights_truncated": np.maximum(got.weights, 0),
            "sum_weights": got.weights.sum(),
        }
        assert set(want) == set(values)
        for key, value in want.items():
            np.testing.assert_allclose(
                values[key], value, rtol=1e-5, atol=1e-7, err_msg=f"{name} {key}"
            )


@pytest.mark.parametrize("path", golden_files("cma_traj*.npz"))
def test_cma_trajectory(path):
    with np.load(path) as v:
        es = cma_reference.CMAES(v["init_mean"], float(v["init_sigma"]), int(v["pop"]))
        assert es.n == int(v["n"])
        for g in range(int(v["gens"])):
            B, D = es.decompose()
            y = v[f"g{g}_y"].astype(np.float64)
            want = {
                "sampleC": es.sample_C,
                "D": D,
                "x": es.mean + es.sigma * y,
            }
            golden_B, golden_D = v[f"g{g}_B"], v[f"g{g}_D"]
            near(golden_B * golden_D**2 @ golden_B.T, B * D**2 @ B.T, f"g{g} B")
            es.tell(y, v[f"g{g}_fitness"].astype(np.float64))
            want |= {
                "after_mean": es.mean,
                "after_sigma": es.sigma,
                "after_C": es.C,
                "after_evo_path_sigma": es.p_sigma,
                "after_evo_path_c": es.p_c,
                "after_best_member": es.best_member,
                "after_best_fitness": es.best_fitness,
                "after_g": es.generation,
            }
            for key, value in want.items():
                near(v[f"g{g}_{key}"], value, f"g{g} {key}")


def near(golden, value, what):
    np.testing.assert_allclose(golden, value, rtol=0, atol=2e-4, err_msg=what)
