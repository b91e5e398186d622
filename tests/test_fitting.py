"""Fits: importance, gate, calibration and scorer, against the same written out densely."""

import contextlib
import itertools
import json
import math
import os
from pathlib import Path

import namm_ext
import namm_ext.fitting.attention as attention_fit
import namm_ext.fitting.gate as gate_fit
import pytest
import torch
import transformers
from namm_ext import NAMM, NAMMConfig, zoo
from namm_ext.baselines import KeyDiff
from namm_ext.budget import Budget
from namm_ext.cache import NAMMCache, cache_keyword
from namm_ext.fitting import (
    AttentionFitConfig,
    Checkpoint,
    FitConfig,
    Later,
    Text,
    calibrate,
    calibrate_statistics,
    calibration_of,
    fit,
    fit_gate,
    folder_texts,
    read_twice,
    repeated,
    targets_of,
    training_texts,
)
from namm_ext.fitting.gate import fit_quality
from namm_ext.fitting.ridge import Ridge
from namm_ext.policy import Gate
from namm_ext.reference import gate_inputs


@pytest.fixture(scope="module")
def bundled():
    return zoo.load_model(), zoo.load_tokenizer()


def _model(**changes):
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
            "eos_token_id": None, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def _ids(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 97, (count,), generator=generator).tolist())


@torch.no_grad()
def _dense_importance(model, ids, later):
    """[L, H, T] from attention matrices."""
    model.set_attn_implementation("eager")
    weights = model(torch.tensor([[*ids, *later]]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    late = torch.stack([w[0, :, len(ids) :, : len(ids)] for w in weights])  # [L, Hq, N, T]
    return late.unflatten(1, (2, -1)).amax((2, 3))


def test_importance_is_the_largest_attention_of_what_comes_later():
    model, ids = _model(), _ids(50)
    later = (Later(_ids(300, 1)), Later(_ids(7, 2), weight=3.0))
    got = read_twice(model, Text(ids, later))
    expected = torch.maximum(
        _dense_importance(model, ids, later[0].ids), 3 * _dense_importance(model, ids, later[1].ids)
    )
    torch.testing.assert_close(
        torch.stack([r.importance for r in got]), expected, rtol=1e-4, atol=1e-6
    )
    assert [r.layer_idx for r in got] == [0, 1]
    assert got[0].k.shape == (2, 50, 8)
    assert not torch.allclose(got[1].importance, _dense_importance(model, ids, later[0].ids)[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Later(()), "ids must not be empty"),
        (lambda: Later((1,), 0.0), "weight must be positive"),
        (lambda: Text((), (Later((1,)),)), "must not be empty"),
        (lambda: Text((1,), ()), "must not be empty"),
        (lambda: AttentionFitConfig(steps=0), "steps must be positive"),
        (lambda: AttentionFitConfig(size=2.0), "size must be in"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ridge_is_least_squares():
    torch.manual_seed(0)
    x, w = torch.randn(200, 5) * torch.tensor([1.0, 10, 0.1, 3, 1]), torch.randn(2, 5)
    y = x @ w.T + torch.tensor([1.0, -2.0]) + 0.1 * torch.randn(200, 2)
    ridge = Ridge(5, 2)
    for part in range(0, 200, 50):
        ridge.add(x[part : part + 50], y[part : part + 50])
    weight, bias = ridge.solve(0.0)
    ones = torch.cat([x, torch.ones(200, 1)], 1).double()
    exact = torch.linalg.lstsq(ones, y.double()).solution
    torch.testing.assert_close(weight.double(), exact[:5].T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.double(), exact[5], rtol=1e-5, atol=1e-5)
    smaller, _ = ridge.solve(10.0)
    assert smaller.norm() < weight.norm()
    with pytest.raises(ValueError, match="at least two rows"):
        Ridge(1, 1).solve(0.0)


def test_gate_is_the_ridge_of_its_inputs():
    model = _model()
    texts = [Text(_ids(64, i), (Later(_ids(64, 10 + i)),)) for i in range(4)]
    found = fit_gate(model, texts, held_out=1, penalty=1e-2)
    ridge = Ridge(2 * (8 + 8 + 2), 2)
    for text in texts[:3]:
        layer = read_twice(model, text)[1]
        x = gate_inputs(layer.k.transpose(0, 1), layer.v.transpose(0, 1), rotary_dim=8)
        ridge.add(x, layer.target.T)
    weight, bias = ridge.solve(1e-2)
    torch.testing.assert_close(found.gate.weight[1], weight)
    torch.testing.assert_close(found.gate.bias[1], bias)
    assert (found.num_tokens, found.num_held_out) == (192, 1)
    with pytest.raises(ValueError, match="held_out must be at least 1"):
        fit_gate(model, texts, held_out=4)


def test_an_interrupted_gate_fit_goes_on(tmp_path):
    model = _model()
    texts = [Text(_ids(32, i), (Later(_ids(32, 100 + i)),)) for i in range(20)]
    whole = fit_gate(model, texts, held_out=1)
    path = tmp_path / "gate.npz"

    def stop(number):
        if number == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_gate(model, texts, held_out=1, checkpoint=Checkpoint(path, model, texts), on_text=stop)
    read = []
    again = fit_gate(
        model, texts, held_out=1, checkpoint=Checkpoint(path, model, texts), on_text=read.append
    )
    assert read[0] == 9
    assert torch.equal(again.gate.weight, whole.gate.weight)
    assert again.num_tokens == whole.num_tokens
    with pytest.raises(ValueError, match="another model or to other texts"):
        Checkpoint(path, model, texts[1:]).load()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(path, model, texts).load()


@pytest.mark.parametrize("place", ["read_twice", "Ridge.add", "Checkpoint.save", "os.replace"])
def test_whatever_fails_in_a_fit_it_goes_on(place, tmp_path, monkeypatch):
    model = _model()
    texts = [Text(_ids(20, i), (Later(_ids(20, 100 + i)),)) for i in range(6)]
    whole = fit_gate(model, texts, held_out=2)
    monkeypatch.setattr(gate_fit, "EVERY", 2)
    owner, name = {
        "read_twice": (gate_fit, "read_twice"), "Ridge.add": (Ridge, "add"),
        "Checkpoint.save": (Checkpoint, "save"), "os.replace": (os, "replace"),
    }[place]  # fmt: skip
    inner = getattr(owner, name)
    for after, at in itertools.product((False, True), (1, 2, 3, 4, 6)):
        calls = itertools.count(1)

        def failing(*args, after=after, at=at, calls=calls, **kwargs):
            now = next(calls) == at
            if now and not after:
                raise KeyboardInterrupt
            result = inner(*args, **kwargs)
            if now:
                raise KeyboardInterrupt
            return result

        path = tmp_path / f"{after}-{at}.npz"
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(owner, name, failing)
            fit_gate(model, texts, held_out=2, checkpoint=Checkpoint(path, model, texts))
            assert next(calls) <= at  # nothing failed: there are no more such places
        assert model.config._attn_implementation == "sdpa"
        again = fit_gate(model, texts, held_out=2, checkpoint=Checkpoint(path, model, texts))
        assert torch.equal(again.gate.weight, whole.gate.weight)
        assert again.r2 == whole.r2


def test_fit_quality_of_a_perfect_and_a_constant_guess():
    target = torch.randn(2, 3, 40)
    assert fit_quality([target], [target]) == (1.0, 1.0, 1.0)
    r2, within, _ = fit_quality([torch.full_like(target, float(target.mean()))], [target])
    assert abs(r2) < 1e-6
    assert abs(within) < 1e-6


def _gate(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    heads, size = config.num_key_value_heads, 2 * config.head_dim + 2
    shape = (config.num_hidden_layers, heads, heads * size)
    weight = torch.randn(shape, generator=generator)
    return Gate(weight, torch.randn(shape[:2], generator=generator), config.head_dim)


@torch.no_grad()
def _run(model, policy, ids, chunks=(1000,)):
    cache = NAMMCache(model, policy)
    place = 0
    while place < len(ids):
        step = chunks[min(place, len(chunks) - 1)]
        part = torch.tensor([ids[place : place + step]])
        out = model(part, **{cache_keyword(model): cache}, use_cache=True)
        place += step
    return cache, out


@pytest.mark.parametrize("scorer", ["none", "bam", "mlp"])
def test_scores_are_gate_plus_attention(scorer):
    """At the end of one period the gate adds to what the scorer says without it."""
    model, ids = _model(), _ids(16)
    config = NAMMConfig(n_up=16, scorer=scorer)
    params = 0.3 * torch.randn(config.num_params, generator=torch.Generator().manual_seed(1))
    policy = NAMM(config, params, gate=_gate(model), budget=Budget(8))
    seen = {}

    class Spy(NAMM):
        def update(self, ctx):
            scores, state = super().update(ctx)
            seen[self.gate is not None, ctx.layer_idx] = (scores, state, ctx)
            return scores, state

    for gate in (policy.gate, None) if scorer != "none" else (policy.gate,):
        _run(model, Spy(config, params, gate=gate, budget=policy.budget), ids)
    for layer in range(2):
        scores, state, ctx = seen[True, layer]
        k, v = (t.view(2, 16, 8).transpose(0, 1) for t in (ctx.segments.k, ctx.segments.v))
        x = gate_inputs(k, v, rotary_dim=8)
        expected = (x @ policy.gate.weight[layer].T + policy.gate.bias[layer]).T.flatten()
        torch.testing.assert_close(state[:, -1], expected, rtol=1e-4, atol=1e-4)
        if scorer != "none":
            plain, spectrum, _ = seen[False, layer]
            torch.testing.assert_close(state[:, :-1], spectrum)
            expected = expected + plain
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_gate_alone_keeps_no_queries_and_one_number():
    model = _model()
    policy = NAMM(NAMMConfig(n_up=16, scorer="none"), gate=_gate(model), budget=Budget(8))
    cache, _ = _run(model, policy, _ids(40))
    store = cache.memory_layers[0].kv
    assert store.q_window.shape[2] == 0
    assert store.store.segments.state.shape[1] == 1
    with pytest.raises(ValueError, match="gate must be given"):
        policy.with_gate(None)


@pytest.mark.parametrize("scorer", ["none", "bam"])
def test_a_gated_memory_does_not_depend_on_chunks(scorer):
    model, ids = _model(), _ids(100)
    config = NAMMConfig(n_up=16, scorer=scorer)
    params = 0.3 * torch.randn(config.num_params, generator=torch.Generator().manual_seed(1))
    policy = NAMM(config, params, gate=_gate(model), budget=Budget(8, scope="per_layer"))
    caches = [_run(model, policy, ids, chunks)[0] for chunks in ((100,), (7,), (1,))]
    for layer in range(2):
        kept = [c.memory_layers[layer].kv.store.segments for c in caches]
        live = [torch.cat([s.pos[r] for r in s.slices()]).tolist() for s in kept]
        assert live[0] == live[1] == live[2]


def test_a_gate_of_another_model_is_refused():
    policy = NAMM(NAMMConfig(n_up=16, scorer="none"), gate=_gate(_model()), budget=Budget(8))
    for changes in ({"num_key_value_heads": 4}, {"num_hidden_layers": 3}, {"head_dim": 16}):
        with pytest.raises(
            ValueError, match=r"Gate: .* fitted to a model with 2 layers, 2 KV heads"
        ):
            _run(_model(**changes), policy, _ids(40))


def test_saved_gates_come_back(tmp_path):
    model = _model()
    policy = NAMM(NAMMConfig(n_up=16), gate=_gate(model), budget=Budget(8))
    policy.save_pretrained(tmp_path)
    back = NAMM.from_pretrained(tmp_path)
    assert back.fingerprint() == policy.fingerprint() != policy.with_gate(None).fingerprint()
    assert back.gate.rotary_dim == 8
    assert not Gate(torch.zeros(1, 1, 4), torch.zeros(1, 1), 2).interleaved  # as Llama rotates
    for wrong, got in ((torch.zeros(2), r"\[2\]"), ([0.0], "list")):
        with pytest.raises(ValueError, match=f"weight must be .*, got {got}"):
            Gate(wrong, torch.zeros(2, 2), 8)
    with pytest.raises(ValueError, match="finite"):
        Gate(torch.full((1, 1, 4), math.nan), torch.zeros(1, 1), 2)
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        Gate(torch.zeros(1, 1, 4), torch.zeros(1, 1), 3)


def test_calibration_by_hand():
    """Two heads of two layers; offsets bring means together, shares follow the global cut.

    The newest token of each head stays, 3, 5, 7 and 9; then 8, 7, 6 and 6, all of layer 1.
    """
    target = torch.tensor([[[0.0, 1, 2, 3], [2, 3, 4, 5]], [[4, 5, 6, 7], [6, 7, 8, 9.0]]])
    score = target - torch.tensor([[1.0, 2], [3, 4]])[..., None]
    found = calibration_of([score], [target])
    torch.testing.assert_close(found.offsets, torch.tensor([[1.0, 2], [3, 4]]))
    assert found.layer_fraction(1, 0.5) == pytest.approx(0.75)
    assert found.layer_fraction(0, 1.0) == 1.0


def test_scores_on_a_scale_of_their_own_are_fitted():
    """A baseline's scores are scaled head by head, a memory's are not."""
    target = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    found = calibration_of([target * 0.01 + 5], [target], Budget(sink_tokens=2), scaled=True)
    torch.testing.assert_close(found.scales, torch.full((2, 3), 100.0), rtol=1e-3, atol=0)
    assert calibration_of([target], [target]).scales.eq(1).all()


def test_calibrated_baselines_meet_a_global_budget(bundled):
    model, tokenizer = bundled
    texts = training_texts(tokenizer, length=512, count=2)
    rule = KeyDiff(Budget(128, scope="global", sink_tokens=4, recent_tokens=0.1))
    targets = targets_of(model, texts)
    ready = calibrate(rule, model, texts, targets=targets)
    assert torch.equal(ready.calibration.offsets, calibrate(rule, model, texts).calibration.offsets)
    cache, _ = _run(model, ready, texts[0].ids)
    assert cache.report().kept_fraction == pytest.approx(0.25, abs=0.01)


def test_floors_count_in_a_calibration():
    """A layer that nobody looks at still has room for its floors."""
    target = torch.stack([torch.full((1, 64), -9.0), torch.arange(64.0)[None]])
    target[0] += torch.arange(64.0) / 1000
    with_floors = calibration_of([target * 0], [target], Budget(recent_tokens=8))
    assert with_floors.layer_fraction(0, 0.25) >= 8 / 64 - 1e-6
    assert calibration_of([target * 0], [target]).layer_fraction(0, 0.25) <= 2 / 64 + 1e-6


def test_fit_of_a_bundled_model_needs_no_code(bundled, tmp_path):
    model, tokenizer = bundled
    texts = training_texts(tokenizer, length=512, count=4)
    config = FitConfig(
        attention=AttentionFitConfig(rounds=1, steps=50, batch_size=8), attention_texts=2,
        calibration_texts=1,
    )  # fmt: skip
    steps = []
    found = fit(model, texts, config, on_step=lambda what, share: steps.append((what, share)))
    assert found.policy.calibration.num_layers == model.config.num_hidden_layers
    assert found.policy.gate.num_kv_heads == model.config.num_key_value_heads
    assert [share for what, share in steps if what == "gate"] == [0.25, 0.5, 0.75, 1.0]
    assert math.isfinite(found.report()["scorer_losses"][0])
    again = fit(model, texts, config)
    assert again.policy.fingerprint() == found.policy.fingerprint()
    cache, _ = _run(model, found.policy.with_budget(size=128), texts[0].ids)
    assert cache.report().kept_fraction == pytest.approx(0.25, abs=0.01)


def test_a_fit_without_a_gate_is_the_universal_part(bundled):
    model, tokenizer = bundled
    texts = training_texts(tokenizer, length=512, count=2)
    config = FitConfig(
        namm=NAMMConfig(n_up=64, scorer="mlp"), gate=False, calibration_texts=1,
        attention=AttentionFitConfig(rounds=1, steps=50, batch_size=4), attention_texts=2,
    )  # fmt: skip
    found = fit(model, texts, config)
    assert found.policy.gate is found.gate is found.gate_alone is None
    assert found.policy.params.any()
    assert found.report()["gate"] is None
    with pytest.raises(ValueError, match="gate must be True"):
        FitConfig(namm=NAMMConfig(scorer="none"), gate=False)


def test_calibrate_makes_a_memory_of_one_model_ready_for_another(bundled):
    model, tokenizer = bundled
    texts = training_texts(tokenizer, length=256, count=2)
    policy = NAMM.from_pretrained("bundled:stdlib-1m").with_budget(
        Budget(64, scope="global", sink_tokens=4, recent_tokens=16)
    )
    with pytest.raises(ValueError, match="namm calibrate"):
        _run(model, policy, texts[0].ids)
    ready = calibrate(calibrate_statistics(policy, model, texts), model, texts)
    assert not torch.equal(ready.mean, policy.mean)
    cache, _ = _run(model, ready, texts[0].ids)
    assert cache.report().kept_fraction == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="at least one text"):
        calibrate(policy, model, [])
    with pytest.raises(ValueError, match="at least n_up"):
        calibrate(policy, model, [repeated(tokenizer, texts[0].ids[:20])])


def test_texts_of_a_folder(bundled, tmp_path):
    _, tokenizer = bundled
    (tmp_path / "a.txt").write_text("one two three\n" * 200)
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\x00")
    texts = folder_texts(tokenizer, tmp_path, length=64, count=3)
    assert [len(text.ids) for text in texts] == [64, 64, 64]
    assert texts[0].later[0].ids[-64:] == texts[0].ids
    assert folder_texts(tokenizer, tmp_path, length=64, count=3, seed=0) == texts
    assert folder_texts(tokenizer, tmp_path, length=64, count=3, seed=1) != texts
    with pytest.raises(ValueError, match="tokens of text"):
        folder_texts(tokenizer, tmp_path, length=10**6, count=1)


@pytest.mark.parametrize("name", ["smollm2-135m-attention", "smollm2-135m"])
def test_the_bundled_fits_are_what_a_fit_does_by_default(name):
    folder = Path(namm_ext.__file__).parent / "zoo/policies" / name
    config = json.loads((folder / "fit.json").read_text())["config"]
    want = json.loads(json.dumps(FitConfig().to_dict()))
    assert config | {"namm": None, "budget": None} == want | {"namm": None, "budget": None}
    assert Budget(**config["budget"]) == FitConfig().budget


def test_offsets_start_where_the_target_is():
    """What a scorer of zeros leaves then is how the target varies within a head."""
    g = torch.Generator().manual_seed(0)
    heads = [
        attention_fit._Head(
            h % 2, torch.rand(20, 17, generator=g), torch.arange(20.0),
            3.0 * (h % 2) - 5 + torch.randn(20, generator=g),
        )
        for h in range(4)
    ]  # fmt: skip
    policy = NAMM(NAMMConfig(n_up=16))
    offsets = attention_fit._mean_rest(heads, 2)
    loss = attention_fit._loss(policy, heads, torch.zeros(policy.config.num_params), offsets)
    rests = [torch.cat([x.rest for x in heads if x.head == h]) for h in range(2)]
    want = torch.stack([(rest - rest.mean()).square().mean() for rest in rests]).mean()
    torch.testing.assert_close(loss, want)
