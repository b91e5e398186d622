"""Thousands of random steps: whatever happens to a cache, it is the cache of the text it has."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, build, evicting_policy, gemma3_config, positions, tokens
from injection import AroundParts, Interrupt
from namm_ext import NAMMCache
from namm_ext.baselines import H2O, StreamingLLM

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule  # noqa: E402


class CacheMachine(RuleBasedStateMachine):
    """Two rows of text, padded differently, that grow, shrink, swap, fail, move and come back."""

    config = staticmethod(FAMILIES["llama"])
    policy = evicting_policy(budget=10)

    def __init__(self):
        super().__init__()
        self.model = build(self.config(), torch.float64)
        self.patch = pytest.MonkeyPatch()
        self.injector = AroundParts(self.patch, self.model)
        self.ids = torch.zeros(2, 0, dtype=torch.long)
        self.mask = torch.zeros(2, 0, dtype=torch.long)
        self.cache = NAMMCache(self.model, self.policy)
        self.calls = 0

    @torch.no_grad()
    def read(self, cache, ids, mask):
        width = ids.shape[1]
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        return self.model(
            ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
        ).logits

    def draw(self, width, pads):
        self.calls += 1
        mask = torch.ones(2, width, dtype=torch.long)
        if not self.ids.shape[1]:  # padding is on the left
            for row, pad in enumerate(pads):
                mask[row, : min(pad, width)] = 0
        return tokens(2, width, seed=self.calls), torch.cat([self.mask, mask], 1)

    def took(self, ids, mask):
        self.ids, self.mask = torch.cat([self.ids, ids], 1), mask

    @rule(width=st.integers(1, 16), pads=st.tuples(st.integers(0, 9), st.integers(0, 9)))
    def feed(self, width, pads):
        ids, mask = self.draw(width, pads)
        self.read(self.cache, ids, mask)
        self.took(ids, mask)

    @rule()
    def step(self):
        self.feed(1, (0, 0))

    @rule(width=st.integers(1, 20), at=st.integers(1, 60))
    def fail(self, width, at):
        ids, mask = self.draw(width, (0, 0))
        self.injector.count, self.injector.at = 0, at
        before = self.cache.get_seq_length()
        try:
            self.read(self.cache, ids, mask)
        except Interrupt:
            if self.cache.get_seq_length() == before:
                self.injector.at = None
                try:
                    self.read(self.cache, ids, mask)
                except ValueError as error:
                    if "cache.reset()" not in str(error):
                        raise
                    self.start_again()
                    return
        self.injector.at = None
        self.took(ids, mask)

    @rule()
    def start_again(self):
        self.cache.reset()
        if self.ids.shape[1]:
            self.read(self.cache, self.ids, self.mask)

    @rule(removed=st.integers(0, 16))
    def crop(self, removed):
        removed = min(removed, self.ids.shape[1])
        try:
            self.cache.crop(-removed)
        except RuntimeError:
            return
        left = self.ids.shape[1] - removed
        self.ids, self.mask = self.ids[:, :left], self.mask[:, :left]

    @rule()
    def record(self):
        self.cache.activate_past_recording()

    @rule()
    def stop_recording(self):
        self.cache.end_past_recording()

    @rule(rows=st.sampled_from([[1, 0], [0, 0], [1, 1], [-1, -2]]))
    def choose_rows(self, rows):
        self.cache.reorder_cache(torch.tensor(rows))
        if self.ids.shape[1]:
            self.ids, self.mask = self.ids[rows], self.mask[rows]

    @rule()
    def copy(self):
        self.cache = copy.deepcopy(self.cache)

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory.safetensors"
            self.cache.save(path)
            self.cache = NAMMCache.load(path, self.model, self.policy)

    @invariant()
    def books_agree(self):
        assert self.cache.get_seq_length() == self.ids.shape[1]
        held = [0, 0]
        for layer in self.cache.memory_layers:
            kv = layer.kv
            if kv is not None:
                assert list(kv.seen) == self.mask.sum(1).tolist()
                assert list(kv.lengths) == kv.store.segments.seqused_k.tolist()
                held[0] += kv.held[0] + kv.recorded_bytes
                held[1] += kv.held[1]
        ledger = self.cache.session.ledger
        assert ledger.kv + ledger.memory == sum(held)

    def teardown(self):
        self.injector.at = None
        try:
            ids, mask = self.draw(3, (0, 0))
            got = self.read(self.cache, ids, mask)
            fresh = NAMMCache(self.model, self.policy)
            if self.ids.shape[1]:
                self.read(fresh, self.ids, self.mask)
            want = self.read(fresh, ids, mask)
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
            for a, b in zip(self.cache.memory_layers, fresh.memory_layers, strict=True):
                assert [positions(a, r) for r in (0, 1)] == [positions(b, r) for r in (0, 1)]
        finally:
            self.patch.undo()


class HybridMachine(CacheMachine):
    config = staticmethod(gemma3_config)
    policy = H2O(12, 16)


class WindowMachine(CacheMachine):
    config = staticmethod(FAMILIES["qwen3"])
    policy = StreamingLLM(8, 5)  # periods shorter than the 16 queries that are carried


MACHINES = [CacheMachine, HybridMachine, WindowMachine]
# Steps in all, of the slow test: 3 x 340 x 50.
SIZES = [(6, 24), pytest.param((340, 50), marks=pytest.mark.slow)]


@pytest.mark.parametrize("size", SIZES, ids=["few", "many"])
@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.__name__)
def test_random_steps(machine, size):
    examples, steps = size
    hypothesis.stateful.run_state_machine_as_test(
        machine,
        settings=hypothesis.settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, database=None,
            phases=[hypothesis.Phase.generate], derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_a_hundred_thousand_tokens():
    """What is held does not grow with the text, nor does the number of Python objects."""
    import gc

    model = build(FAMILIES["llama"]())
    model.config.max_position_embeddings = 10**6
    cache = NAMMCache(model, StreamingLLM(32, 16))
    ids, held, objects = tokens(1, 1000), [], []
    for part in range(100):
        model(ids[:, :990], past_key_values=cache)
        for n in range(10):
            model(ids[:, 990 + n : 991 + n], past_key_values=cache)
        if part % 10 == 9:
            gc.collect()
            report = cache.report()
            held.append((report.kv_bytes, report.memory_bytes, report.peak_bytes))
            objects.append(len(gc.get_objects()))
    assert cache.get_seq_length() == 100_000
    assert len(set(held)) == 1
    assert objects[-1] - objects[1] < 100
