"""Replays whole models of the original, ``e2e_*``, through the drop-in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_files import assert_near, golden_files, load
from namm_ext import NAMM, Budget, NAMMConfig, policy, reference, testing
from torch import Tensor


class Recorder(policy.Policy):
    """Writes down what another policy decides: scores and kept rows of every update, by layer."""

    def __init__(self, inner: NAMM) -> None:
        self.inner, self.n_up, self.num_state = inner, inner.n_up, inner.num_state
        self.updates: dict[int, list[dict[str, Tensor]]] = {}

    def update(self, ctx):
        return self.inner.update(ctx)

    def select(self, scores, ctx):
        keep, num_kept = self.inner.select(scores, ctx)
        live = ctx.segments.slices()
        kept = [keep[rows].nonzero().flatten() for rows in live]
        self.updates.setdefault(ctx.layer_idx, []).append(
            {
                "scores": torch.stack([scores[rows] for rows in live]),
                "retained_idx": torch.stack(kept),
                "retained_pos": torch.stack(
                    [ctx.segments.pos[rows][i] for rows, i in zip(live, kept, strict=True)]
                ),
            }
        )
        return keep, num_kept

    def fingerprint(self):
        return self.inner.fingerprint()


def e2e_model(path: Path, v: dict):
    """The model of an e2e file under a current transformers: static NTK base, then its weights."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    stem = path.name.removesuffix("_fp32.npz")
    settings = json.loads((path.parent / f"{stem}_config.json").read_text())
    scaling = settings.pop("rope_scaling", None)
    theta = settings.pop("rope_theta")
    config = transformers.LlamaConfig(**settings)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    weights = safetensors.load_file(str(path.parent / f"{stem}_weights.safetensors"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing or (missing == ["lm_head.weight"] and config.tie_word_embeddings)
    assert all("inv_freq" in name for name in unexpected)
    if scaling is None:
        return model
    inv_freq = reference.rope_ntk_inv_freq(
        config.head_dim, theta, scaling["factor"], scaling["alpha"],
        round_to_bf16=bool(v["inv_freq_is_bf16"]),
    )  # fmt: skip
    assert_near(inv_freq, v["inv_freq"], 1e-7, "inv_freq")
    model.model.rotary_emb.inv_freq = inv_freq.float()
    return model


def e2e_policy(v: dict, params: Tensor) -> Recorder:
    config, budget = NAMMConfig(n_up=int(v["n_up"])), Budget(threshold=0.0, selection="original")
    return Recorder(NAMM(config, params, v["norm_mean"], v["norm_var"], budget=budget))


def check_updates(got: Recorder, v: dict, first: int, prefix: str) -> int:
    """Compare updates ``first ...`` with ``<prefix>u<k>_l<l>_*``; how many there were."""
    layers = sorted(got.updates)
    k = first
    while f"{prefix}u{k}_l0_scores" in v:
        for layer in layers:
            update, name = got.updates[layer][k], f"{prefix}u{k}_l{layer}"
            assert_near(update["scores"], v[f"{name}_scores"], 1e-4, f"{name} scores")
            assert torch.equal(update["retained_idx"], v[f"{name}_retained_idx"].long()), name
            assert torch.equal(update["retained_pos"], v[f"{name}_retained_pos"]), name
        k += 1
    assert all(len(updates) == k for updates in got.updates.values())
    return k - first


@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
@pytest.mark.parametrize("cut", [None, "chunk", 1], ids=["whole", "pieces", "one_by_one"])
def test_e2e(path, cut):
    from namm_ext import NAMMCache

    v = load(path)
    model = e2e_model(path, v)
    ids = v["input_ids"].long()
    recorder = e2e_policy(v, v["params"])
    cache = NAMMCache(model, recorder)
    width = {None: ids.shape[1], "chunk": int(v["chunk"])}.get(cut, cut)
    with torch.no_grad():
        logits = torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split(width, 1)], 1
        )
    assert check_updates(recorder, v, 0, "") == int(v["n_updates"])
    last = v["logits_last_chunk"]
    assert_near(logits[0, -last.shape[0] :], last, 3e-4, "logits")

    for layer in cache.layers:
        store, name = layer.kv.store.segments, f"l{layer.layer_idx}"
        rows = store.slices()
        for x in ("k", "v"):
            held = torch.stack([getattr(store, x)[r] for r in rows])
            assert_near(held, v[f"final_{x}_{name}"], 1e-4, f"{x} {name}")
        old = v[f"final_cache_pos_{name}"]
        pos = torch.stack([store.pos[r] for r in rows])
        assert torch.equal(pos[:, : old.shape[1]], old)

    wanted = v["gen_tokens"].long()
    with torch.no_grad():
        for i, token in enumerate(wanted.tolist()):
            assert_near(logits[0, -1], v["gen_logits"][i], 3e-4, f"logits of token {i}")
            assert int(logits[0, -1].argmax()) == token, f"token {i}"
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    assert check_updates(recorder, v, int(v["n_updates"]), "gen_") + int(v["n_updates"]) == int(
        v["gen_n_updates"]
    )


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
def test_e2e_generate(path, device):
    """The same tokens from ``generate`` on a patched model, update in the middle of decoding."""
    from namm_ext import patch

    v = load(path)
    model = e2e_model(path, v).to(device)
    recorder = e2e_policy(v, v["params"])
    ids, wanted = v["input_ids"].long(), v["gen_tokens"].long()
    with patch(model, recorder):
        out = model.generate(
            ids.to(device), max_new_tokens=len(wanted), do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids).to(device),
        )  # fmt: skip
    assert torch.equal(out[0, ids.shape[1] :].cpu(), wanted)
    assert len(recorder.updates[0]) == int(v["gen_n_updates"])


@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
def test_e2e_without_eviction(path):
    from namm_ext import NAMMCache

    v = load(path)
    model = e2e_model(path, v)
    cache = NAMMCache(model, e2e_policy(v, torch.zeros_like(v["params"])))
    with torch.no_grad():
        logits = model(v["input_ids"].long(), past_key_values=cache).logits
    want = v["noevict_logits_last_chunk"]
    assert_near(logits[0, -want.shape[0] :], want, 3e-4, "logits")
    assert set(cache.layers[0].kv.lengths) == {v["input_ids"].shape[1]}
