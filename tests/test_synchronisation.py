"""How often the host waits for a device: never at a token, once at an update of all layers.

There is a CPU only, so the test says that reading its tensors waits, and watches everything that
would: numbers that Python asks for, results whose size the host must know, copies of lists.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import namm_ext
import pytest
import torch
from hf_models import COMMON, build, evicting_policy, positions, tokens
from namm_ext import NAMM, NAMMCache
from namm_ext.cache import attention, layer, session
from namm_ext.policy import Calibration, Gate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

N_UP, LAYERS = 16, 3
PACKAGE = str(Path(namm_ext.__file__).parent)
#: Functions of a tensor whose answer is a number on the host, or has a size that only the device
#: knows.
ASKING = {
    *(
        "tolist",
        "item",
        "cpu",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__iter__",
    ),
    *("equal", "allclose", "nonzero", "unique", "masked_select", "repeat_interleave"),
}
INSIDE = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "repeat_interleave"}


class Waits:
    """What made the host wait, by name, where ``namm_ext`` asked for it."""

    def __init__(self):
        self.seen = []

    def add(self, name):
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.seen.append(f"{name} in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")


class Functions(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ASKING or (name == "tensor" and "device" in (kwargs or {})):
            self.waits.add(name)
        return function(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        # ``tolist`` and its like are seen above.
        if masks or (name in INSIDE and name != "_local_scalar_dense"):
            self.waits.add(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def watched():
    waits = Waits()
    with Functions(waits), Kernels(waits):
        yield waits.seen


@pytest.fixture
def device(monkeypatch):
    """A CPU that is as far away as a GPU."""
    for module in (layer, session):
        monkeypatch.setattr(module, "waits", lambda device: True)


@pytest.fixture(scope="module")
def model():
    return build(LlamaConfig(**{**COMMON, "num_hidden_layers": LAYERS}))


def gated(policy, config):
    generator = torch.Generator().manual_seed(0)
    heads, size = config.num_key_value_heads, 2 * config.head_dim + 2
    weight = torch.randn(LAYERS, heads, heads * size, generator=generator)
    gate = Gate(weight, torch.zeros(LAYERS, heads), config.head_dim)
    return policy.with_gate(gate)


def calibrated(policy):
    fractions = torch.tensor([0.5, 1.0])
    layers = torch.tensor([[0.25, 1.0], [0.5, 1.0], [0.75, 1.0]])
    calibration = Calibration(torch.randn(LAYERS, 2), fractions, layers)
    return policy.with_calibration(calibration).with_budget(size=12, scope="global")


def policies(config):
    plain = evicting_policy(N_UP, budget=8)
    return {
        "bam": plain,
        "gate": gated(plain, config),
        "global": calibrated(plain),
    }


@torch.no_grad()
def talk(model, policy, rows, *, masked, steps=30, padding=0, look=watched):
    """A prompt of 20 tokens, then one at a time: last logits, waits of each step, cache."""
    ids = tokens(rows, 20 + steps)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : padding * row] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    cache = NAMMCache(model, policy)
    seen, logits = [], []
    for begin, end in [(0, 20), *((t, t + 1) for t in range(20, 20 + steps))]:
        with look() as waits:
            out = model(
                ids[:, begin:end], position_ids=position_ids[:, begin:end], past_key_values=cache,
                attention_mask=mask[:, :end] if masked else None,
            )  # fmt: skip
        logits.append(out.logits[:, -1])
        seen.append(list(waits))
    return torch.stack(logits), seen, cache


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("name", ["bam", "gate", "global"])
def test_one_wait_at_an_update_and_none_at_other_tokens(name, masked, model, device):
    _, waits, cache = talk(model, policies(model.config)[name], 2, masked=masked)
    updates = [t for t in range(21, 51) if t % N_UP == 0]
    for t, seen in enumerate(waits[1:], 21):
        assert len(seen) == (t in updates), (t, seen)
    assert [x.kv.num_updates for x in cache.memory_layers] == [3] * LAYERS


def test_rows_with_padding_that_update_apart(model, device):
    _, waits, cache = talk(model, policies(model.config)["bam"], 3, masked=True, padding=3)
    updates = [t for t in range(21, 51) if any((t - pad) % N_UP == 0 for pad in (0, 3, 6))]
    for t, seen in enumerate(waits[1:], 21):
        assert len(seen) == (t in updates), (t, seen)
    assert cache.session.past_mask.shape == (3, 50)
    assert cache.session.past_mask.sum(dim=1).tolist() == [50, 47, 44]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", ["bam", "gate", "global"])
def test_the_same_as_without_a_device(name, padding, model, monkeypatch):
    policy = policies(model.config)[name]
    want, waits, cache = talk(model, policy, 3, masked=True, padding=padding)
    assert sum(map(len, waits)) > 20  # the watch works: reading is free here
    for module in (layer, session):
        monkeypatch.setattr(module, "waits", lambda device: True)
    got, _, other = talk(model, policy, 3, masked=True, padding=padding)
    assert torch.equal(got, want)
    for a, b in zip(other.memory_layers, cache.memory_layers, strict=True):
        assert [positions(a, row) for row in range(3)] == [positions(b, row) for row in range(3)]
        assert a.kv.held == b.kv.held


@torch.no_grad()
def test_a_mask_that_nobody_read_is_an_error_at_the_update(model, device):
    cache = NAMMCache(model, policies(model.config)["bam"])
    ids, mask = tokens(1, 40), torch.ones(1, 40, dtype=torch.long)
    mask[0, 22] = 0
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    for t in range(20, 31):
        model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    for _ in range(2):  # and again: the memory does not go on with it
        with pytest.raises(ValueError, match=r"attention_mask must be what it was .*reset\(\)"):
            model(ids[:, 31:32], attention_mask=mask[:, :32], past_key_values=cache)
        assert cache.get_seq_length() == 31
    assert [x.kv.num_updates for x in cache.memory_layers] == [1] * LAYERS


@torch.no_grad()
def test_text_may_still_become_padding_for_a_later_turn(model, device):
    """As ``generate`` does with rows that have ended: what nobody read is not fixed."""
    policy = policies(model.config)["bam"]
    cache, alone = NAMMCache(model, policy), NAMMCache(model, policy)
    ids, mask = tokens(1, 36), torch.ones(1, 36, dtype=torch.long)
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    for t in range(20, 24):
        model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
    mask[0, 22:24] = 0
    places = (mask.cumsum(1) - 1)[:, 24:30]
    got = model(
        ids[:, 24:30], attention_mask=mask[:, :30], position_ids=places, past_key_values=cache
    )
    model(ids[:, :22], past_key_values=alone)
    want = model(ids[:, 24:30], past_key_values=alone)
    torch.testing.assert_close(got.logits, want.logits)


@torch.no_grad()
def test_a_policy_that_fails_in_one_layer_leaves_all_as_they_were(model, device, monkeypatch):
    policy = policies(model.config)["bam"]
    want, _, _ = talk(model, policy, 1, masked=False, steps=16)
    ids, cache = tokens(1, 36), NAMMCache(model, policy)
    model(ids[:, :20], past_key_values=cache)
    for t in range(20, 31):
        model(ids[:, t : t + 1], past_key_values=cache)

    update = NAMM.update

    def failing(self, ctx):
        if ctx.layer_idx == LAYERS - 1:
            raise KeyboardInterrupt
        return update(self, ctx)

    monkeypatch.setattr(NAMM, "update", failing)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 31:32], past_key_values=cache)
    assert [x.kv.num_updates for x in cache.memory_layers] == [1] * LAYERS
    monkeypatch.setattr(NAMM, "update", update)
    for t in range(31, 36):
        out = model(ids[:, t : t + 1], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -1], want[-1])


def test_the_mask_of_one_token_is_not_looked_at():
    def overlay(batch, head, q, k):
        return q >= k

    with watched() as waits:
        mask = attention.namm_mask(
            1, 1, 1, 7, 7, mask_function=overlay, allow_is_causal_skip=False,
            attention_mask=torch.ones(1, 8, dtype=torch.bool),
        )  # fmt: skip
    assert not waits
    assert mask.shape == (1, 8)


@torch.no_grad()
def test_padding_in_front_comes_token_by_token(model, device):
    """Until every row has begun, masks are read at once."""
    policy = policies(model.config)["bam"]
    whole, single = NAMMCache(model, policy), NAMMCache(model, policy)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(ids, attention_mask=mask, position_ids=places, past_key_values=whole).logits
    for t in range(40):
        step = slice(t, t + 1)
        got = model(
            ids[:, step], attention_mask=mask[:, : t + 1], position_ids=places[:, step],
            past_key_values=single,
        ).logits  # fmt: skip
    torch.testing.assert_close(got[:, -1], want[:, -1], atol=1e-4, rtol=1e-4)
    assert single.memory_layers[0].kv.seen == whole.memory_layers[0].kv.seen == (40, 35)
