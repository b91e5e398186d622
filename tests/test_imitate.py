"""The start of an evolution: targets, loss, and what the fit promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, NAMMConfig, reference, tasks, zoo
from namm_ext.evolution import (
    EvolveConfig,
    ImitateConfig,
    calibrate_statistics,
    calibration_batch,
    evolve,
    imitate,
    train,
)

pytest.importorskip("cma")
# The package exports the function under the module's name.
import importlib

module = importlib.import_module("namm_ext.evolution.imitate")

N_UP = 16
IMITATION = ImitateConfig(
    rounds=2, steps=50, lengths=(96, 112), num_tokens=200, batch_size=2, learning_rate=0.02
)
CONFIG = EvolveConfig(
    namm=NAMMConfig(
        n_up=N_UP,
        feature_transform="log",
        threshold=None,
        cache_size=24,
        budget="per_layer",
        layer_shares=(0.5, 1.5),
    ),
    generations=1,
    popsize=4,
    num_examples=2,
    num_records=2,
    lengths=(96,),
    validation_lengths=(96,),
    num_validation=2,
    imitation=IMITATION,
)
STATISTICS = torch.zeros(17), torch.ones(17)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


@pytest.fixture(autouse=True)
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("\n".join(f"name_{i} = {i} * value" for i in range(200)),)
    for where in (train, module):
        monkeypatch.setattr(where, "load_documents", lambda split: text)


def examples(tokenizer: Any, length: int = 96) -> list[tasks.Example]:
    text = ("\n".join(f"name_{i} = {i} * value" for i in range(200)),)
    return tasks.make_batch(
        ("assign",), tokenizer, text, length=length, num_records=2, seed=5, batch_size=2
    )


def test_targets_are_the_attention_of_later_queries(model: Any, tokenizer: Any) -> None:
    some = examples(tokenizer, 100)  # not a multiple of n_up
    before = model.config._attn_implementation
    (future,) = module._future_attention(model, [some], N_UP, 10.0)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    ids = torch.tensor([example.input_ids for example in some])
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    heads = model.config.num_key_value_heads
    assert future.shape == (len(attentions), 2, heads, 7, 100)
    for layer, attn in enumerate(attentions):
        for row, example in enumerate(some):
            weight = torch.ones(100)
            for start, stop in example.answer_spans:
                weight[start - 1 : stop - 1] = 10.0
            mean = attn[row].unflatten(0, (heads, -1)).mean(1)
            for update in (0, 3, 6):
                later = (mean * weight[:, None])[:, update * N_UP :].sum(1)
                torch.testing.assert_close(future[layer, row, :, update], later)


def test_a_batch_is_the_mean_of_its_tokens() -> None:
    """Padding is seen by no token and counts for none."""
    generator = torch.Generator().manual_seed(0)
    params = 0.3 * torch.randn(4172, generator=generator)
    segments = [
        module._Segment(0, torch.randn(n, 25, generator=generator), torch.rand(n) * 3)
        for n in (5, 9)
    ]
    together = module._loss(CONFIG.namm, params, segments, 2.0)
    alone = [module._loss(CONFIG.namm, params, [segment], 2.0) for segment in segments]
    torch.testing.assert_close(together, (5 * alone[0] + 9 * alone[1]) / 14)
    scores = reference.bam(segments[0].features, params)
    y = segments[0].target / 2.0
    loss = y * torch.log1p(torch.exp(-scores)) + torch.log1p(torch.exp(scores))
    torch.testing.assert_close(alone[0], loss.mean())


def test_segments_are_what_the_memory_scores(model: Any, tokenizer: Any) -> None:
    params = 0.1 * torch.randn(4172, generator=torch.Generator().manual_seed(0))
    policy = NAMM(CONFIG.namm, params, *STATISTICS)
    segments = module._read(model, policy, examples(tokenizer), 10.0)
    assert {segment.layer for segment in segments} == {0, 1}
    for s in segments:
        assert len(s.features) == len(s.target)
        assert s.target.min() >= 0
    live = [max(len(s.target) for s in segments if s.layer == layer) for layer in (0, 1)]
    # layer_shares of a cache_size of 24, both heads together, and a period
    assert live[0] <= 2 * 12 + N_UP < live[1] <= 2 * 36 + N_UP


@pytest.mark.parametrize("scorer", ["bam", "mlp"])
def test_the_fit_learns_and_repeats(model: Any, tokenizer: Any, scorer: str) -> None:
    config = replace(CONFIG, namm=CONFIG.namm.replace(scorer=scorer))
    longer = replace(IMITATION, rounds=1, steps=200)
    statistics = calibrate_statistics(model, config.namm, calibration_batch(tokenizer, config))
    records: list[dict[str, Any]] = []
    params = imitate(model, tokenizer, config, longer, *statistics, on_step=records.append)
    assert params.shape == (config.namm.num_params,)
    assert bool(params.isfinite().all())
    assert [record["step"] for record in records] == [0, 50, 100, 150, 200]
    everything = config.namm.replace(cache_size=None, budget="per_head", layer_shares=None)
    read = module._read(model, NAMM(everything, params, *statistics), examples(tokenizer), 50.0)
    mean = float(torch.cat([segment.target for segment in read]).mean())
    fitted, zero = (module._loss(config.namm, p, read, mean) for p in (params, 0 * params))
    assert fitted < 0.99 * zero
    again = imitate(model, tokenizer, config, longer, *statistics)
    assert torch.equal(params, again)
    other = imitate(model, tokenizer, replace(config, seed=1), longer, *statistics)
    assert not torch.equal(params, other)


def test_a_run_starts_with_the_fit_and_resumes(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[dict[str, Any]] = []
    first = evolve(model, tokenizer, CONFIG, tmp_path, on_imitation=steps.append)
    assert [(r["round"], r["step"]) for r in steps] == [(1, 0), (1, 50), (2, 0), (2, 50)]
    assert [record["generation"] for record in first.log] == [0, 1]
    assert first.log[0]["validation_fitness"] > -100.0
    monkeypatch.setattr(train, "imitate", None)  # the state holds the start
    more = replace(CONFIG, generations=2)
    resumed = evolve(model, tokenizer, more, tmp_path)
    assert [record["generation"] for record in resumed.log] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "ImitateConfig: rounds must be at least 1, got 0"),
        ({"steps": -1}, "ImitateConfig: steps must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "ImitateConfig: learning_rate must be positive, got 0.0"),
        ({"answer_weight": float("nan")}, "ImitateConfig: answer_weight must be positive, got nan"),
        ({"lengths": ()}, "ImitateConfig: lengths must not be empty, got ()"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(IMITATION, **change)
    assert str(error.value) == message


def test_the_configuration_survives_json() -> None:
    assert EvolveConfig.from_dict(CONFIG.to_dict()) == CONFIG
