"""Decision Transformers with a memory: one step at a time, in their own forward, in episodes."""

from __future__ import annotations

import copy
import doctest
import importlib
import threading
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import evicting_policy, namm_oracle, positions, under_oracle
from namm_ext import Budget, NAMMCache, NAMMConfig, apply, patch, remove
from namm_ext.baselines import H2O, KeyDiff, NeverEvict, StreamingLLM
from namm_ext.cache import borrow
from namm_ext.fitting import FitConfig, calibrate, calibrate_statistics, fit, targets_of
from namm_ext.integrations.control import Stepper, kept_tokens, one_hot, roll_out
from namm_ext.integrations.episodes import as_texts

STATE, ACT, STEPS = 5, 3, 25  # 75 tokens, not a multiple of anything


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.DecisionTransformerConfig(
        state_dim=STATE, act_dim=ACT, hidden_size=32, n_layer=2, n_head=4, max_ep_len=64,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None, **changes,
    )  # fmt: skip
    model = transformers.DecisionTransformerModel(config)
    return model.to(dtype).eval().requires_grad_(False)


def episode(batch: int = 1, steps: int = STEPS, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """States, actions and returns to go at random."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, steps, STATE), (batch, steps, ACT), (batch, steps))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def stock(model: Any, states: Any, actions: Any, returns_to_go: Any) -> torch.Tensor:
    """Actions of the model's own forward over whole episodes."""
    steps = states.shape[1]
    return model(
        states=states, actions=actions, returns_to_go=returns_to_go[..., None],
        timesteps=torch.arange(steps).expand(states.shape[0], -1),
    ).action_preds  # fmt: skip


def walk(stepper: Stepper, states: Any, actions: Any, returns_to_go: Any) -> torch.Tensor:
    """The same one step at a time."""
    given = [None, *actions.unbind(1)]
    steps = zip(states.unbind(1), returns_to_go.unbind(1), given, strict=False)
    return torch.stack([stepper.step(s, r, a) for s, r, a in steps], dim=1)


def is_clean(model: Any) -> bool:
    hooks = [hook for m in model.modules() for hook in m._forward_pre_hooks]
    stock = build().config._attn_implementation
    return model.config._attn_implementation == stock and not hooks and not {
        name for name in vars(model) if "namm" in name
    }  # fmt: skip


@pytest.mark.parametrize("module", ["control", "episodes"])
def test_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"namm_ext.integrations.{module}"))
    assert result.failed == 0
    assert result.attempted or module == "episodes"


# One step at a time -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [NeverEvict(n_up=16), None], ids=["NeverEvict", "stock cache"])
def test_never_evicting_equals_the_stock_forward_at_every_step(policy: Any) -> None:
    model = build()
    states, actions, returns_to_go = episode(batch=3)
    got = walk(Stepper(model, policy), states, actions, returns_to_go)
    remove(model)
    for t in range(STEPS):
        # As transformers' own example does: the last action is a placeholder.
        padded = torch.cat([actions[:, :t], torch.zeros(3, 1, ACT, dtype=torch.float64)], dim=1)
        want = stock(model, states[:, : t + 1], padded, returns_to_go[:, : t + 1])[:, -1]
        torch.testing.assert_close(got[:, t], want, rtol=0, atol=1e-12)


def test_evicting_equals_the_dense_oracle() -> None:
    policy = evicting_policy(budget=12)
    model, seen = build(), episode()
    stepper = Stepper(model, policy)
    got = walk(stepper, *seen)
    remove(model)
    oracle = namm_oracle(policy)
    with under_oracle(model, oracle):
        want = stock(model, *seen)
    full = stock(model, *seen)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert (want - full).abs().max() > 1e-3
    for i, layer in enumerate(stepper.cache.memory_layers):
        # The placeholder of the last action was never fed.
        assert positions(layer) == [[p for p in row if p < 3 * STEPS - 1]
                                    for row in oracle.kept_positions(i)]  # fmt: skip


def test_rows_that_end_early_equal_rows_alone() -> None:
    model, policy = build(), evicting_policy(budget=12)
    states, actions, returns_to_go = episode(batch=3)
    ends = torch.tensor([STEPS, 7, 18])
    stepper, got = Stepper(model, policy), []
    for t in range(STEPS):
        last = actions[:, t - 1] if t else None
        got.append(stepper.step(states[:, t], returns_to_go[:, t], last, t < ends))
    together = torch.stack(got, dim=1)
    for row, end in enumerate(ends.tolist()):
        part = (slice(row, row + 1), slice(end))
        alone = Stepper(model, policy)
        want = walk(alone, states[part], actions[part], returns_to_go[part])
        torch.testing.assert_close(together[part], want, rtol=0, atol=1e-9)
        for one, all_ in zip(alone.cache.memory_layers, stepper.cache.memory_layers, strict=True):
            assert positions(one) == positions(all_, row)


def test_wrong_calls_are_errors() -> None:
    model = build()
    stepper = Stepper(model, NeverEvict())
    states, actions, returns_to_go = (x[:, 0] for x in episode(batch=2))
    with pytest.raises(ValueError, match="actions must be None in step 1, got some"):
        stepper.step(states, returns_to_go, actions)
    stepper.step(states, returns_to_go)
    with pytest.raises(ValueError, match="actions must be those of the last step in step 2"):
        stepper.step(states, returns_to_go)
    with pytest.raises(ValueError, match=r"states must be \[2, 5\], got \[2, 4\]"):
        stepper.step(states[:, 1:], returns_to_go, actions)
    with pytest.raises(ValueError, match=r"returns_to_go must be \[2\], got \[2, 1\]"):
        stepper.step(states, returns_to_go[:, None], actions)
    stepper.time = 64
    with pytest.raises(ValueError, match="at most max_ep_len = 64 steps, got step 65"):
        stepper.step(states, returns_to_go, actions)
    with pytest.raises(TypeError, match="model must be a DecisionTransformerModel"):
        Stepper(model.encoder, NeverEvict())


# In the model's own forward -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", [evicting_policy(budget=12), H2O(12, 16), StreamingLLM(8, 16)],
                         ids=["NAMM", "H2O", "StreamingLLM"])  # fmt: skip
def test_a_patched_forward_equals_the_steps(policy: Any) -> None:
    model, seen = build(), episode(batch=2)
    stepper = Stepper(model, policy)
    want = walk(stepper, *seen)
    remove(model)
    assert is_clean(model)
    with patch(model, policy) as memory:
        got = stock(model, *seen)
        again = stock(model, *seen)  # a fresh memory in every call
    assert is_clean(model)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert torch.equal(got, again)
    assert memory.report().layers[0].num_updates == 3 * STEPS // 16
    assert memory.cache is not None
    # The forward has also read the last action.
    held = kept_tokens(memory.cache, STEPS)
    assert held[..., -1, 2].all()
    held[..., -1, 2] = False
    assert torch.equal(held, kept_tokens(stepper.cache, STEPS))


def test_a_patched_forward_that_never_evicts_is_stock() -> None:
    model, seen = build(), episode(batch=2)
    want = stock(model, *seen)
    with patch(model, NeverEvict(n_up=16)):
        got = stock(model, *seen)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_padding_in_front_of_a_patched_forward() -> None:
    model, policy = build(), evicting_policy(budget=12)
    states, actions, returns_to_go = episode()
    with patch(model, policy):
        want = stock(model, states, actions, returns_to_go)
        pad = lambda x: torch.cat([torch.ones_like(x[:, :5]), x], dim=1)  # noqa: E731
        got = model(
            states=pad(states), actions=pad(actions), returns_to_go=pad(returns_to_go)[..., None],
            timesteps=torch.cat([torch.zeros(5).long(), torch.arange(STEPS)])[None],
            attention_mask=pad(torch.ones(1, STEPS)) * (torch.arange(STEPS + 5) >= 5),
        ).action_preds[:, 5:]  # fmt: skip
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_blocks_copies_and_threads() -> None:
    model, seen = build(), episode()
    full = stock(model, *seen)
    want = {}
    policies = {"a": StreamingLLM(8, 16), "b": H2O(12, 16)}
    for name, policy in policies.items():
        with patch(model, policy):
            want[name] = stock(model, *seen)
    apply(model, policies["a"])
    with patch(model, policies["b"]):
        assert torch.equal(stock(model, *seen), want["b"])
        with borrow(model, None):  # its own attention, without any memory
            assert torch.equal(stock(model, *seen), full)
        other = copy.deepcopy(model)
    assert torch.equal(stock(model, *seen), want["a"])
    remove(model)
    assert is_clean(model)
    assert torch.equal(stock(model, *seen), full)
    assert torch.equal(stock(other, *seen), want["b"])
    remove(other)
    assert is_clean(other)

    found: dict[str, Any] = {}

    def work(name: str) -> None:
        with patch(model, policies[name]) as memory:
            for _ in range(3):
                found[name] = stock(model, *seen)
            found[name + " policy"] = memory.cache.policy  # type: ignore[union-attr]

    threads = [threading.Thread(target=work, args=(name,)) for name in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], want[name]) for name in policies)
    assert all(found[f"{name} policy"] is policy for name, policy in policies.items())
    assert is_clean(model)


def test_a_cache_of_ones_own_is_left_alone() -> None:
    model, seen = build(), episode()
    with patch(model, StreamingLLM(8, 16)) as memory:
        got = walk(Stepper(model, None), *seen)
    torch.testing.assert_close(got, stock(model, *seen), rtol=0, atol=1e-12)
    assert memory.cache is None


def test_a_model_whose_decoder_takes_its_cache_is_refused_whole() -> None:
    model = build()
    for refused in (model.encoder, transformers.LlamaModel(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    ))):  # fmt: skip
        with pytest.raises(ValueError, match="model must have generate, which"):
            apply(refused, NeverEvict())
        assert not refused._forward_pre_hooks
    assert is_clean(model)


# Episodes -----------------------------------------------------------------------------------------


class Counting:
    """States hold the step and the row; the reward is the first action; rows end at ``ends``."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = np.array(ends)

    def reset(self) -> np.ndarray:
        self.time = 0
        return self._states()

    def _states(self) -> np.ndarray:
        states = np.zeros((len(self.ends), STATE))
        states[:, 0], states[:, 1] = self.time / 10, np.arange(len(self.ends))
        return states

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.time += 1
        return self._states(), actions[:, 0].astype(float), self.time >= self.ends


def test_roll_out() -> None:
    model, policy, ends = build(), evicting_policy(budget=12), [20, 11, 30]
    targets = [1.0, -1.0, 0.5]
    found = roll_out(model, policy, Counting(ends), targets, max_steps=25, reward_scale=2.0)
    assert is_clean(model)
    assert found.steps.tolist() == [20, 11, 25]
    assert found.actions.shape == (3, 25, ACT)
    torch.testing.assert_close(found.returns, found.rewards.sum(1))
    for row, steps in enumerate(found.steps.tolist()):
        actions = found.actions[row : row + 1, :steps]
        assert (found.rewards[row, steps:] == 0).all()
        torch.testing.assert_close(found.rewards[row, :steps], actions[0, :, 0])
        states = torch.zeros(1, steps, STATE, dtype=torch.float64)
        states[..., 0], states[..., 1] = torch.arange(steps).double() / 10, row
        earned = torch.cat([torch.zeros(1), actions[0, :-1, 0]]).cumsum(0)
        stepper = Stepper(model, policy)
        want = walk(stepper, states, actions, (targets[row] - earned / 2)[None])
        remove(model)
        torch.testing.assert_close(actions, want, rtol=0, atol=1e-9)
        assert found.kept is not None
        held = kept_tokens(stepper.cache, 25)
        assert torch.equal(found.kept[:, row], held[:, 0])
        gone = 1 - held[:, 0, :, :steps].double().mean((0, 1))
        assert found.dropped("state")[row].item() == pytest.approx(gone[:, 1].mean().item())
        fed = gone[:-1, 2]  # the last action never comes in
        assert found.dropped("action")[row].item() == pytest.approx(fed.mean().item())
        early = (torch.arange(25) < 5).expand(3, -1)
        assert found.dropped("action", early)[row].item() == pytest.approx(fed[:5].mean().item())
    with pytest.raises(ValueError, match="kind must be one of return, state, action, got 'reward'"):
        found.dropped("reward")
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        roll_out(model, None, Counting([3]), [0.0], max_steps=0)


def test_roll_out_with_the_stock_cache_and_chosen_actions() -> None:
    model = build()
    found = roll_out(model, None, Counting([6, 6]), [0.0, 0.0], max_steps=9, choose=one_hot)
    assert found.kept is None
    assert found.kept_fraction == 1.0
    assert found.dropped("return").tolist() == [0.0, 0.0]
    assert (found.actions.sum(-1) == 1).all()
    assert found.actions.shape[1] == 6
    never = roll_out(model, NeverEvict(), Counting([6, 6]), [0.0, 0.0], max_steps=9, choose=one_hot)
    assert torch.equal(never.actions, found.actions)
    assert never.dropped("state").tolist() == [0.0, 0.0]


# Calibration --------------------------------------------------------------------------------------


def test_episodes_are_texts() -> None:
    model, seen = build(), episode(batch=2)
    reader, texts = as_texts(model, *seen, length=48)
    assert len(texts) == 2
    with torch.no_grad():
        ids = torch.tensor([text.ids + text.later[0].ids for text in texts])
        hidden = reader(ids).last_hidden_state
    want = stock(model, *seen)
    torch.testing.assert_close(model.predict_action(hidden[:, 1::3]), want, rtol=0, atol=1e-12)
    target = targets_of(reader, texts)[1]
    assert is_clean(model)
    model.set_attn_implementation("eager")
    states, actions, returns_to_go = (x[1:] for x in seen)
    attentions = model(
        states=states, actions=actions, returns_to_go=returns_to_go[..., None],
        timesteps=torch.arange(STEPS)[None], output_attentions=True,
    ).attentions  # fmt: skip
    largest = torch.stack([a[0, :, 48:, :48].amax(1) for a in attentions])
    torch.testing.assert_close(target.double(), (largest + 1e-4).log(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="length must be positive and below the 75 tokens"):
        as_texts(model, *seen, length=75)


def test_memories_are_calibrated_on_episodes() -> None:
    model, seen = build(torch.float32), episode(batch=3)
    reader, texts = as_texts(model, *(x.float() for x in seen), length=64)
    for policy in (evicting_policy(), KeyDiff(0.25, n_up=16)):
        policy = policy.with_budget(size=20, scope="global", threshold=None)
        if hasattr(policy, "with_statistics"):
            policy = calibrate_statistics(policy, reader, texts)
        policy = calibrate(policy, reader, texts)
        stepper = Stepper(model, policy)
        walk(stepper, *seen)
        report = stepper.cache.report()
        assert report.tokens_kept / (3 * 2 * 4) == pytest.approx(20, abs=1.01)
    heads = {n for layer in report.layers for row in layer.kept for n in row}
    assert len(heads) > 3  # KeyDiff gives each its own part
    remove(model)


def test_a_gate_is_fitted_to_episodes() -> None:
    model, seen = build(torch.float32), episode(batch=4)
    reader, texts = as_texts(model, *(x.float() for x in seen), length=48)
    config = FitConfig(namm=NAMMConfig(n_up=16, scorer="none"), budget=Budget(20))
    found = fit(reader, texts, config)
    assert found.gate is not None
    assert found.gate.recall > 0.35  # a quarter by chance
    walk(Stepper(model, found.policy), *seen)
    remove(model)


def test_a_cache_of_the_trunk_itself() -> None:
    """What a memory needs of a Decision Transformer is its trunk."""
    model = build()
    assert NAMMCache(model, NeverEvict()).session.config is model.encoder.config
    remove(model)
