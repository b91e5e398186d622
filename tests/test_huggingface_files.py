"""A saved memory goes on as if it had not been away; whatever does not fit is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, positions, tokens
from namm_ext import NAMM, Budget, NAMMCache
from namm_ext.baselines import StreamingLLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def model():
    return build(FAMILIES["llama"](), torch.float64)


@pytest.fixture
def policy():
    return evicting_policy(budget=Budget(10, scope="per_layer"))


@pytest.mark.parametrize("pad", [0, 9])
@torch.no_grad()
def test_saved_cache_continues(model, policy, pad, tmp_path):
    ids = tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    bank = policy.with_params(torch.stack([policy.params, -policy.params]))
    cache = NAMMCache(model, bank, param_index=[0, 1])
    model(ids[:, :45], attention_mask=mask[:, :45], past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, bank)
    assert loaded.get_seq_length() == 45
    for a, b in zip(cache.layers, loaded.layers, strict=True):
        assert a.kv.ledger.kv == b.kv.ledger.kv
        assert a.kv.ledger.memory == b.kv.ledger.memory
    want, got = (
        model(ids[:, 45:], attention_mask=mask, past_key_values=c).logits for c in (cache, loaded)
    )
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert [positions(x, 1) for x in loaded.layers] == [positions(x, 1) for x in cache.layers]


@torch.no_grad()
def test_reordered_rows_are_saved_with_their_parameters(model, policy, tmp_path):
    ids = tokens(2, 75)
    bank = policy.with_params(torch.stack([policy.params, -policy.params]))
    cache = NAMMCache(model, bank, param_index=[0, 1])
    model(ids[:, :45], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.save(tmp_path / "memory.safetensors")
    loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, bank)
    assert loaded.session.param_index.tolist() == [1, 1]
    want, got = (model(ids[[1, 1], 45:], past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert [positions(x, 0) for x in loaded.layers] == [positions(x, 0) for x in cache.layers]


@torch.no_grad()
def test_a_model_of_one_head(policy, tmp_path):
    config = FAMILIES["llama"]()
    config.num_attention_heads = config.num_key_value_heads = 1
    model, path = build(config, torch.float64), tmp_path / "memory.safetensors"
    cache = NAMMCache(model, policy)
    model(tokens(1, 45), past_key_values=cache)
    cache.save(path)
    loaded = NAMMCache.load(path, model, policy)
    want, got = (model(tokens(1, 5), past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_file_holds_only_what_is_kept(model, tmp_path):
    cache = NAMMCache(model, StreamingLLM(8, 16))
    model(tokens(1, 640), past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    live = cache.report().kv_bytes_live
    assert live <= (tmp_path / "memory.safetensors").stat().st_size < live + 8192


@torch.no_grad()
def test_hybrid(tmp_path):
    model = build(gemma3_config())
    ids, cache = tokens(1, 75), NAMMCache(model, StreamingLLM(8, 16))
    model(ids[:, :45], past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    loaded = NAMMCache.load(tmp_path / "memory.safetensors", model, StreamingLLM(8, 16))
    want, got = (model(ids[:, 45:], past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    with pytest.raises(TypeError, match=r"layer 0 has no memory, it is a .*Layer"):
        loaded.memory_layer(0)


@torch.no_grad()
def test_a_loaded_cache_does_not_hang_on_its_file(tmp_path):
    """The file is mapped while it is read; what it becomes later is nothing to the cache."""
    model, path = build(gemma3_config()), tmp_path / "memory.safetensors"
    ids, cache = tokens(1, 75), NAMMCache(model, StreamingLLM(8, 16))
    model(ids[:, :45], past_key_values=cache)
    cache.save(path)
    loaded = NAMMCache.load(path, model, StreamingLLM(8, 16))
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    want, got = (model(ids[:, 45:], past_key_values=c).logits for c in (cache, loaded))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@torch.no_grad()
def test_empty_cache(model, policy, tmp_path):
    NAMMCache(model, policy).save(tmp_path / "memory.safetensors")
    assert NAMMCache.load(tmp_path / "memory.safetensors", model, policy).get_seq_length() == 0


@pytest.mark.parametrize("name", ["reference", "global", "per_layer"])
@torch.no_grad()
def test_fingerprints_of_version_1_are_known(model, name, tmp_path):
    """A cache written before budgets were values names its policy by another hash."""
    data = Path(__file__).parent / "data" / "version_1"
    policy = NAMM.from_pretrained(data / name)
    path = tmp_path / "memory.safetensors"
    cache = NAMMCache(model, policy)
    model(tokens(1, 45), past_key_values=cache)
    cache.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["namm"]) | {"format_version": "1"}
    del metadata["checksum"]  # of version 2
    written = json.loads((data / "expected.json").read_text())[name]["fingerprint"]
    for fingerprint, known in ((written, True), ("0" * 16, False)):
        metadata["policy"] = fingerprint
        save_file(load_file(path), path, {"namm": json.dumps(metadata)})
        if known:
            assert NAMMCache.load(path, model, policy).get_seq_length() == 45
        else:
            with pytest.raises(ValueError, match="filled with another policy"):
                NAMMCache.load(path, model, policy)


@torch.no_grad()
def test_what_does_not_fit(model, policy, tmp_path):
    path = tmp_path / "memory.safetensors"
    cache = NAMMCache(model, policy)
    model(tokens(1, 45), past_key_values=cache)
    cache.save(path)
    with pytest.raises(ValueError, match="filled with another policy"):
        NAMMCache.load(path, model, policy.with_budget(size=11))
    with pytest.raises(ValueError, match="filled with another model"):
        NAMMCache.load(path, build(FAMILIES["llama"](), torch.float64, seed=1), policy)
    with pytest.raises(FileNotFoundError, match="no such file"):
        NAMMCache.load(tmp_path / "none", model, policy)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"k": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match=r"must be a cache saved by NAMMCache.save"):
        NAMMCache.load(foreign, model, policy)
    foreign.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        NAMMCache.load(foreign, model, policy)
    with pytest.raises(ValueError, match="save: the cache must be made with NAMMCache"):
        NAMMCache(model.config, policy).save(path)
