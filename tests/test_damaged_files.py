"""A saved cache or policy that was damaged is refused with its name, or it is the same."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, tokens
from namm_ext import NAMM, NAMMCache, NAMMConfig
from namm_ext.baselines import StreamingLLM
from namm_ext.evolution.run_folder import CONFIG_FILE, STATE_FILE, RunFolder
from namm_ext.fitting.checkpoint import Checkpoint
from namm_ext.fitting.importance import Later, Text
from namm_ext.fitting.ridge import Ridge
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_original import checkpoint


class Saved:
    """A file of a cache of one kind, and what the cache says next."""

    def __init__(self, kind, path):
        self.path, hybrid = path, kind == "hybrid"
        self.model = build(gemma3_config() if hybrid else FAMILIES["llama"]())
        self.policy = StreamingLLM(8, 16) if hybrid else evicting_policy(budget=10)
        ids, self.mask = tokens(2, 46), torch.ones(2, 46, dtype=torch.long)
        if kind == "padded":
            self.mask[0, :9] = 0
        cache = NAMMCache(self.model, self.policy)
        with torch.no_grad():
            self.model(ids[:, :45], attention_mask=self.mask[:, :45], past_key_values=cache)
        cache.save(path)
        self.last = ids[:, 45:]
        self.want = self.next(cache)

    @torch.no_grad()
    def next(self, cache):
        return self.model(self.last, attention_mask=self.mask, past_key_values=cache).logits

    def load(self):
        return NAMMCache.load(self.path, self.model, self.policy)

    def is_refused_or_equal(self):
        try:
            cache = self.load()
        except ValueError as error:
            if str(self.path) not in str(error):
                raise
            return True
        torch.testing.assert_close(self.next(cache), self.want, atol=0, rtol=0)
        return False


def flip_bit(data, draw):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def set_byte(data, draw):
    data[draw.randrange(len(data))] = draw.randrange(256)


def set_header_byte(data, draw):
    size = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    data[draw.randrange(size)] = draw.randrange(256)


def zero_block(data, draw):
    start = draw.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def cut_off(data, draw):
    del data[draw.randrange(len(data)) :]


def swap_blocks(data, draw):
    a, b = sorted(draw.randrange(len(data) // 64) * 64 for _ in range(2))
    data[a : a + 64], data[b : b + 64] = data[b : b + 64], data[a : a + 64]


DAMAGES = [flip_bit, set_byte, set_header_byte, zero_block, cut_off, swap_blocks]


def damaged(good, count):
    """``count`` times some bytes with damage that changes them."""
    draw = random.Random(0)
    for i in range(count):
        data = bytearray(good)
        DAMAGES[i % len(DAMAGES)](data, draw)
        if bytes(data) != good:
            yield data


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "padded", "hybrid"])
def test_damaged_caches(kind, count, tmp_path):
    saved = Saved(kind, tmp_path / "memory.safetensors")
    good = saved.path.read_bytes()
    assert not saved.is_refused_or_equal()
    refused = 0
    for data in damaged(good, count):
        saved.path.write_bytes(data)
        refused += saved.is_refused_or_equal()
    assert refused > 0.9 * count


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["config.json", "namm.safetensors"])
def test_damaged_policies(name, count, tmp_path):
    policy = evicting_policy(budget=10, seed=3)
    policy.save_pretrained(tmp_path)
    path, refused = tmp_path / name, 0
    for data in damaged(path.read_bytes(), count):
        path.write_bytes(data)
        try:
            loaded = NAMM.from_pretrained(tmp_path)
        except ValueError as error:
            refused += 1
            if str(tmp_path) not in str(error):
                raise
        else:
            assert loaded.to_dict() == policy.to_dict()
            assert loaded.fingerprint() == policy.fingerprint()
    assert refused > 0.9 * count


@pytest.mark.filterwarnings("ignore:.*no normalisation statistics")
@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", ["mean", "best"])
def test_damaged_checkpoints_of_the_original(which, count, tmp_path):
    path, refused = checkpoint(tmp_path / "ckpt.pt", n=25), 0
    config = NAMMConfig(scorer="mlp")
    whole = NAMM.load_original_checkpoint(path, which, config)
    for data in damaged(path.read_bytes(), count):
        path.write_bytes(data)
        try:
            loaded = NAMM.load_original_checkpoint(path, which, config)
        except ValueError as error:
            refused += 1
            if str(path) not in str(error):
                raise
        else:
            assert loaded.fingerprint() == whole.fingerprint()
            assert loaded.count == whole.count
    # Much of a small zip file is padding.
    assert refused > 0.2 * count


class Resumed:
    """A file that a later run goes on from, and what is read from it."""

    def __init__(self, name, folder):
        self.path = folder / name
        self.folder = RunFolder(folder)
        draw = torch.Generator().manual_seed(0)
        self.texts = [Text((1, 2, 3), (Later((4, 5)),))]
        self.model = build(FAMILIES["llama"]())
        if name == "gate.npz":
            sums = [Ridge(20, 2) for _ in range(3)]
            for ridge in sums:
                ridge.add(torch.randn(9, 20, generator=draw), torch.randn(9, 2, generator=draw))
            Checkpoint(self.path, self.model, self.texts).save(1, sums)
            return
        self.run = {"popsize": 4, "seed": 0, "problem": {"lengths": [96, 112], "weight": 0.5}}
        self.folder.check(self.run)
        arrays = {key: torch.randn(40, generator=draw).numpy() for key in ("x0", "history")}
        self.folder.save(STATE_FILE, {**arrays, "log": np.array(["{}", '{"a": 1}'])})

    def read(self):
        if self.path.name == CONFIG_FILE:
            return self.folder.check(self.run)
        if self.path.name == STATE_FILE:
            return self.folder.load(STATE_FILE, ("x0", "history", "log"))
        done, sums = Checkpoint(self.path, self.model, self.texts).load()
        counts = {"done": done, "count": [ridge.count for ridge in sums]}
        return {**counts, "sums": np.stack([[*r.total, *r.products.flatten()] for r in sums])}


@pytest.mark.parametrize("count", [100, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [STATE_FILE, CONFIG_FILE, "gate.npz"])
def test_damaged_states_of_runs(name, count, tmp_path):
    resumed, refused = Resumed(name, tmp_path), 0
    whole = resumed.read()
    for data in damaged(resumed.path.read_bytes(), count):
        resumed.path.write_bytes(data)
        try:
            np.testing.assert_equal(resumed.read(), whole)
        except ValueError as error:
            refused += 1
            if str(tmp_path) not in str(error):
                raise
    assert refused > 0.5 * count


@pytest.mark.parametrize("section", ["config", "budget", "checksum"])
def test_a_policy_without_a_section(section, tmp_path):
    evicting_policy(budget=10).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content[section]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="save the policy again"):
        NAMM.from_pretrained(tmp_path)


def test_files_of_two_policies_do_not_mix(tmp_path):
    for seed in (1, 2):
        evicting_policy(budget=10, seed=seed).save_pretrained(tmp_path / str(seed))
    (tmp_path / "1/config.json").rename(tmp_path / "2/config.json")
    with pytest.raises(ValueError, match="damaged or do not belong together"):
        NAMM.from_pretrained(tmp_path / "2")


# Without a checksum -------------------------------------------------------------------------------


def _set(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def _replace(name, function):
    def change(tensors):
        tensors[name] = function(tensors[name])

    return change


WRONG = {
    "missing": (lambda t: t.pop("0.pos"), "pos is missing"),
    "unknown": (lambda t: t.update(other=torch.zeros(1)), "unknown tensors"),
    "no_layer": (lambda t: [t.pop(n) for n in list(t) if n.startswith("1.")], "the same columns"),
    "order": (_replace("0.pos", lambda x: x.flip(0)), "pos must increase"),
    "beyond": (_set("0.pos", -1, 99), "pos must increase and end with the newest"),
    "negative": (_set("0.pos", 0, -3), "pos must increase"),
    "nan": (_set("0.k", (0, 0), torch.nan), "k must be finite"),
    "state": (_set("1.state", (3, 0), torch.inf), "state must be finite"),
    "lse": (_set("1.lse_window", (0, 0, 3), torch.nan), "lse_window must be finite"),
    "dtype": (_replace("0.v", torch.Tensor.half), "v must be torch.float32"),
    "int": (_replace("0.k", torch.Tensor.int), "k must be a float tensor"),
    "rank": (_replace("0.seen", lambda x: x[0].clone()), "seen must have 1 dimensions"),
    "short": (_replace("0.v", lambda x: x[:-1].clone()), "v must be torch.float32"),
    "window": (_replace("0.q_window", lambda x: x[:, :, 1:].clone()), "q_window must be"),
    "heads": (_replace("0.q_window", lambda x: x[:, :3].clone()), "a multiple of the KV heads"),
    "kept": (_set("0.kept", 0, 11), "must be torch.float32"),
    "many_kept": (_replace("0.kept", lambda x: x[:3].clone()), "entries for every row"),
    "no_rows": (_replace("0.seen", lambda x: x[:0].clone()), "seen must not be empty"),
    "seen": (_set("0.seen", 0, 37), "must be torch.float32|must have seen"),
    "other_seen": (_set("past_mask", (0, 9), False), "must have seen what the others have"),
    "mask": (_replace("past_mask", lambda x: x[:, 1:].clone()), "past_mask must be"),
    "scale": (_set("0.softmax_scale", (), torch.nan), "softmax_scale must be finite"),
    "overdue": (_set("0.overdue", 0, True), "overdue must be at a period's end"),
    "padded": (_set("1.padded", (), 46), "all layers must have seen the same columns"),
    "param_index": (lambda t: t.update(param_index=torch.zeros(3, dtype=torch.int32)), "per row"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_no_cache_can_have_written(name, tmp_path):
    """Files of version 1 have no checksum; their content is checked like any other."""
    saved = Saved("padded", tmp_path / "memory.safetensors")
    tensors = load_file(saved.path)
    with safe_open(saved.path, framework="pt") as file:
        text = file.metadata()["namm"].replace('"format_version": "2"', '"format_version": "1"')
    metadata = {"namm": re.sub(r', "checksum": "\w+"', "", text)}
    save_file(tensors, saved.path, metadata)
    torch.testing.assert_close(saved.next(saved.load()), saved.want, atol=0, rtol=0)
    change, message = WRONG[name]
    change(tensors)
    save_file(tensors, saved.path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        saved.load()
    assert str(error.value).startswith(f"{saved.path}: the saved cache is damaged: ")
    assert "save it again" in str(error.value)


def test_a_load_that_fails_leaves_the_model_alone(tmp_path):
    saved = Saved("plain", tmp_path / "memory.safetensors")
    other = build(FAMILIES["llama"](), seed=1)
    with pytest.raises(ValueError, match="filled with another model"):
        NAMMCache.load(saved.path, other, saved.policy)
    assert other.config._attn_implementation == "sdpa"
