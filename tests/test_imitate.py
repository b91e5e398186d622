"""The start of an evolution: targets, loss, and what the fit promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, Budget, NAMMConfig, reference, tasks, zoo
from namm_ext.evolution import (
    EvolveConfig,
    ImitateConfig,
    Problem,
    RecordProblem,
    evolve,
    imitate,
    train,
)
from small_evolution import TRAIN, make_problem

pytest.importorskip("cma")
# The package exports the function under the module's name.
import importlib

module = importlib.import_module("namm_ext.evolution.imitate")

N_UP = 16
IMITATION = ImitateConfig(rounds=2, steps=50, num_tokens=200, batch_size=2, learning_rate=0.02)
CONFIG = EvolveConfig(
    namm=NAMMConfig(
        n_up=N_UP,
        feature_transform="log",
    ),
    budget=Budget(0.25, scope="per_layer", layer_shares=(0.5, 1.5)),
    generations=1,
    popsize=4,
    imitation=IMITATION,
)
STATISTICS = torch.zeros(17), torch.ones(17)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


@pytest.fixture(scope="module")
def problem(tokenizer: Any) -> RecordProblem:
    return make_problem(tokenizer)


def fit(
    model: Any,
    problem: Problem,
    imitation: ImitateConfig,
    config: EvolveConfig = CONFIG,
    **kwargs: Any,
) -> torch.Tensor:
    return imitate(
        *(model, problem, config.namm, imitation, *STATISTICS),
        **{"budget": config.budget, "seed": config.seed, **kwargs},
    )


def examples(tokenizer: Any, length: int = 96) -> list[tasks.Example]:
    return tasks.make_batch(
        ("assign",), tokenizer, TRAIN, length=length, num_records=2, seed=5, batch_size=2
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


def test_a_batch_is_the_mean_of_its_evictions() -> None:
    """Padding is seen by no token; heads that share a budget share the mean."""
    generator = torch.Generator().manual_seed(0)
    params = 0.3 * torch.randn(4172, generator=generator)

    def choice(*sizes: int) -> Any:
        x = tuple(torch.randn(n, 25, generator=generator) for n in sizes)
        return module._Choice(0, x, tuple(torch.rand(n, generator=generator) for n in sizes))

    one, two = choice(4, 3), choice(9, 2)
    together = module._loss(CONFIG.namm, params, [one, two])
    alone = [module._loss(CONFIG.namm, params, [c]) for c in (one, two)]
    torch.testing.assert_close(together, (alone[0] + alone[1]) / 2)
    scores = torch.cat([reference.bam(x, params) for x in one.features])
    target = torch.cat(one.target)
    relative = target / target.mean()
    log1p = torch.log1p
    loss = (relative * log1p(torch.exp(-scores)) + log1p(torch.exp(scores))).mean()
    torch.testing.assert_close(alone[0], loss)


def test_the_best_score_is_the_logarithm_of_relative_attention() -> None:
    target = torch.tensor([0.1, 0.4, 2.0, 1.5])
    best = (target / target.mean()).log()
    choice = module._Choice(0, (best.unsqueeze(1).expand(4, 25),), (target,))
    # An MLP of depth 1 without bias is linear: the first weight passes the feature through.
    config = CONFIG.namm.replace(scorer="mlp", mlp_bias=False, mlp_depth=1)
    params = torch.zeros(config.num_params)
    params[0] = 1.0
    params.requires_grad_()
    (gradient,) = torch.autograd.grad(module._loss(config, params, [choice]), params)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("scope", ["per_head", "per_layer"])
def test_choices_are_what_the_memory_chooses_from(model: Any, tokenizer: Any, scope: str) -> None:
    budget = replace(CONFIG.budget, size=24, scope=scope)
    params = 0.1 * torch.randn(4172, generator=torch.Generator().manual_seed(0))
    policy = NAMM(CONFIG.namm, params, *STATISTICS, budget=budget)
    choices = module._read(model, policy, examples(tokenizer), 10.0)
    heads = 2 if scope == "per_layer" else 1
    assert {c.layer for c in choices} == {0, 1}
    assert {len(c.features) for c in choices} == {heads}
    for c in choices:
        room = (12, 36)[c.layer] * heads  # layer_shares of 24 tokens
        assert c.size == room + N_UP * heads or room < c.size <= 2 * room
        for x, y in zip(c.features, c.target, strict=True):
            assert len(x) == len(y)
            assert y.min() >= 0


@pytest.mark.parametrize("scorer", ["bam", "mlp"])
def test_the_fit_learns_and_repeats(model: Any, problem: RecordProblem, scorer: str) -> None:
    config = replace(CONFIG, namm=CONFIG.namm.replace(scorer=scorer))
    longer = replace(IMITATION, rounds=1, steps=200)
    records: list[dict[str, Any]] = []
    params = fit(model, problem, longer, config, on_step=records.append)
    assert params.shape == (config.namm.num_params,)
    assert bool(params.isfinite().all())
    assert [record["step"] for record in records] == [0, 50, 100, 150, 200]
    assert records[-1]["loss"] < records[1]["loss"]
    assert records[-1]["loss"] < 2 * math.log(2)  # of scores that are all zero
    again = fit(model, problem, longer, config)
    assert torch.equal(params, again)
    other = fit(model, problem, longer, config, seed=1)
    assert not torch.equal(params, other)


def test_a_run_starts_with_the_fit_and_resumes(
    model: Any, problem: RecordProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[dict[str, Any]] = []
    first = evolve(model, problem, CONFIG, tmp_path, on_imitation=steps.append)
    assert [(r["round"], r["step"]) for r in steps] == [(1, 0), (1, 50), (2, 0), (2, 50)]
    assert [record["generation"] for record in first.log] == [0, 1]
    assert first.log[0]["validation_fitness"] > -100.0
    monkeypatch.setattr(train, "imitate", None)  # the state holds the start
    more = replace(CONFIG, generations=2)
    resumed = evolve(model, problem, more, tmp_path)
    assert [record["generation"] for record in resumed.log] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "ImitateConfig: rounds must be at least 1, got 0"),
        ({"steps": -1}, "ImitateConfig: steps must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "ImitateConfig: learning_rate must be positive, got 0.0"),
        ({"answer_weight": float("nan")}, "ImitateConfig: answer_weight must be positive, got nan"),
        (
            {"layer_weights": (1.0, -1.0)},
            "ImitateConfig: layer_weights must not be negative, one per layer, got (1.0, -1.0)",
        ),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(IMITATION, **change)
    assert str(error.value) == message


def test_contexts_without_evictions_are_refused(model: Any, problem: RecordProblem) -> None:
    config = replace(CONFIG, budget=Budget(1.0))
    with pytest.raises(ValueError) as error:
        fit(model, problem, IMITATION, config)
    assert str(error.value) == (
        "imitate: contexts must be long enough for evictions, got lengths [96, 112] with "
        "Budget(1.0)"
    )


def test_every_layer_needs_a_weight(model: Any, problem: RecordProblem) -> None:
    with pytest.raises(ValueError) as error:
        fit(model, problem, replace(IMITATION, layer_weights=(1.0,)))
    assert str(error.value) == (
        "imitate: layer_weights must have 2 entries, one per layer, got (1.0,)"
    )


def test_a_layer_without_weight_does_not_count(model: Any, problem: RecordProblem) -> None:
    """Of layers, one at a time has less loss than both together."""
    short = replace(IMITATION, rounds=1, steps=50)
    losses = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        some: list[dict[str, Any]] = []
        fit(model, problem, replace(short, layer_weights=weights), on_step=some.append)
        losses.append(some[-1]["loss"])
    assert losses[2] > max(losses[:2])


@pytest.mark.parametrize("stop", [(1, 0), (1, 30), (1, 50), (2, 0), (2, 20)])
def test_an_interrupted_fit_goes_on_bit_for_bit(
    model: Any, problem: RecordProblem, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    """Wherever Ctrl-C comes: while contexts are read, in a step, between rounds."""
    unbroken = fit(model, problem, IMITATION)
    states: list[dict[str, Any]] = []
    place = [0, 0]
    step, read_round = module._Fit._step, module._Fit._read_round

    def interrupt() -> None:
        if tuple(place) == stop:
            raise KeyboardInterrupt

    def counted_step(self: Any, layers: Any) -> None:
        step(self, layers)
        place[1] += 1
        interrupt()  # the parameters have changed, the state has not been taken

    def counted_read(self: Any, round_: int, layers: Any) -> None:
        place[:] = [round_ + 1, 0]
        interrupt()
        read_round(self, round_, layers)

    with monkeypatch.context() as patched:
        patched.setattr(module._Fit, "_step", counted_step)
        patched.setattr(module._Fit, "_read_round", counted_read)
        with pytest.raises(KeyboardInterrupt):
            fit(model, problem, IMITATION, on_state=states.append)
    assert len(states) == (0 if stop == (1, 0) else 1 if stop <= (1, 50) else 2)
    resumed = fit(model, problem, IMITATION, state=states[-1] if states else None)
    assert torch.equal(resumed, unbroken)
