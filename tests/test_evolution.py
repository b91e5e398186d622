"""Evolution: the search, evaluation of a population, statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, NAMMCache, baselines, reference, tasks, zoo
from namm_ext.evolution import (
    DiagonalCMA,
    EvolveConfig,
    RecordProblem,
    calibrate_statistics,
    evaluate_policy,
    evaluate_population,
)
from small_evolution import CONFIG, MEMORY, N_UP, bank, make_problem

pytest.importorskip("cma")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """Two layers, two KV heads, random weights, the bundled vocabulary."""
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


@pytest.fixture(scope="module")
def problem(tokenizer: Any) -> RecordProblem:
    return make_problem(tokenizer)


# The search --------------------------------------------------------------------------------------


def search(seed: int = 1) -> DiagonalCMA:
    return DiagonalCMA(np.zeros(12), sigma0=0.3, popsize=6, seed=seed)


def run(engine: DiagonalCMA, generations: int) -> DiagonalCMA:
    for _ in range(generations):
        engine.tell([-float(np.sum((x - 1) ** 2)) for x in engine.ask()])
    return engine


def test_search_climbs_and_depends_on_its_seed_alone() -> None:
    np.random.seed(1)
    first = run(search(), 30)
    assert np.sum((first.mean - 1) ** 2) < 0.5 * 12
    np.random.seed(2)
    state = np.random.get_state()[1].copy()
    again = run(search(), 30)
    assert np.array_equal(np.random.get_state()[1], state)
    assert np.array_equal(first.mean, again.mean)
    assert first.sigma == again.sigma
    assert not np.array_equal(first.mean, run(search(seed=2), 30).mean)


@pytest.mark.parametrize("asked", [False, True])
def test_replay_is_bit_for_bit(asked: bool) -> None:
    unbroken = run(search(), 7)
    if asked:
        unbroken.ask()  # interrupted between ask and tell
    resumed = search()
    resumed.replay(unbroken.history)
    assert resumed.generation == 7
    assert np.array_equal(resumed.ask(), unbroken.ask())
    run(unbroken, 3)
    run(resumed, 3)
    assert np.array_equal(resumed.mean, unbroken.mean)
    assert resumed.sigma == unbroken.sigma


@pytest.mark.parametrize(
    ("fitness", "message"),
    [
        ([0.0] * 5, "fitness must hold 6 values, got 5"),
        ([0.0] * 5 + [float("nan")], "fitness must be finite, got nan for candidate 5"),
        ([float("-inf")] + [0.0] * 5, "fitness must be finite, got -inf for candidate 0"),
    ],
)
def test_bad_fitness_leaves_the_search_as_it_was(fitness: list[float], message: str) -> None:
    engine = run(search(), 2)
    candidates = engine.ask()
    with pytest.raises(ValueError) as error:
        engine.tell(fitness)
    assert str(error.value) == message
    assert engine.generation == 2
    assert np.array_equal(engine.ask(), candidates)


# Evaluation --------------------------------------------------------------------------------------


def test_every_candidate_is_evaluated_as_if_alone(model: Any, problem: RecordProblem) -> None:
    """Against each row by itself through the whole model, its logits scored by ``tasks``."""
    examples = problem.training_batch(0, 0)
    params = bank(3)
    together = evaluate_population(model, NAMM(MEMORY, params), examples, 3, max_tokens=400)
    assert len(set(together.answer_ll[:, 0].tolist())) == 3  # the candidates do differ
    for p in range(3):
        for e, example in enumerate(examples):
            cache = NAMMCache(model, NAMM(MEMORY, params[p]))
            ids = tasks.stack([example])
            with torch.no_grad():
                logits = model(ids, past_key_values=cache).logits
            tokens = tasks.score_tokens(logits[:, :-1], ids[:, 1:])
            scores = tasks.score_examples(tokens, [example])
            spans = [slice(i - 1, j - 1) for i, j in example.answer_spans]
            answers = torch.cat([tokens.logprob[0, span] for span in spans]).mean().item()
            assert together.answer_ll[p, e].item() == pytest.approx(answers, abs=1e-4)
            text = scores.text_logprob.item()
            assert together.text_ll[p, e].item() == pytest.approx(text, abs=1e-4)
            assert together.exact_match[p, e].item() == scores.accuracy()
            assert together.kept[p, e].item() == pytest.approx(cache.report().kept_fraction)
    assert torch.equal(together.fitness(), together.answer_ll.mean(1))
    weighted = problem.fitness(model, NAMM(MEMORY, params), examples, 3)
    expected = together.answer_ll.mean(1) + 4 * together.text_ll.mean(1)
    torch.testing.assert_close(weighted.fitness(), expected, rtol=1e-5, atol=0.0)


def test_exact_match_counts_answers(model: Any, problem: RecordProblem) -> None:
    """The greedy continuation of a context is right, one with a changed token is not."""
    example = problem.training_batch(0, 0)[0]
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        guess = model(ids, use_cache=False).logits.argmax(-1)[0]
    start, stop = example.answer_spans[0]
    assert stop - start == 1
    values = list(example.input_ids)
    values[start] = int(guess[start - 1])
    one_right = type(example)(**{**vars(example), "input_ids": tuple(values)})
    policy = baselines.NeverEvict(n_up=N_UP)
    before = evaluate_policy(model, policy, [example]).exact_match.item()
    after = evaluate_policy(model, policy, [one_right]).exact_match.item()
    assert (before, after) == (0.0, 0.5)


def test_contexts_of_any_lengths_are_evaluated_together(model: Any, problem: RecordProblem) -> None:
    short, long = (problem.training_batch(0, generation) for generation in (0, 1))
    mixed = [long[0], short[0], long[1], short[1]]
    together = evaluate_population(model, NAMM(MEMORY, bank(2)), mixed, 2)
    for columns, examples in (([0, 2], long), ([1, 3], short)):
        alone = evaluate_population(model, NAMM(MEMORY, bank(2)), examples, 2)
        for name, values in alone.metrics.items():
            assert torch.equal(together.metrics[name][:, columns], values)
        assert torch.equal(together.kept[:, columns], alone.kept)
    with pytest.raises(ValueError, match="contexts must not be empty"):
        evaluate_policy(model, NAMM(MEMORY), [])


# Statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "log"])
def test_statistics_are_those_of_a_direct_computation(
    model: Any, problem: RecordProblem, transform: str
) -> None:
    """From the attention matrices that transformers returns, with nothing of ours but the law."""
    config = MEMORY.replace(feature_transform=transform)
    examples = problem.training_batch(0, 0)
    mean, var = calibrate_statistics(model, config, examples)

    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = model(
                tasks.stack(examples), use_cache=False, output_attentions=True
            ).attentions
    finally:
        model.set_attn_implementation("sdpa")
    seen = []
    for attention in layers:
        grouped = attention.double().unflatten(1, (2, -1)).mean(2)  # [B, H, T, T]
        ema = torch.zeros(*grouped.shape[:2], 0, 17, dtype=torch.float64)
        for end in range(N_UP, grouped.shape[2] + 1, N_UP):
            window = grouped[:, :, end - N_UP : end, :end]
            tail = torch.zeros(*grouped.shape[:2], end, 16, dtype=torch.float64)
            if end > N_UP:
                tail = grouped[:, :, end - N_UP - 16 : end - N_UP, :end].transpose(-1, -2)
            ema = torch.cat([ema, ema.new_zeros(*ema.shape[:2], N_UP, 17)], dim=2)
            (magnitudes,) = reference.spectrogram_from_attention(window, tail).unbind(-3)
            alpha = config.ema_coeff**16
            ema = (1 - alpha) * magnitudes + alpha * ema
            features = ema if transform == "none" else (ema + config.log_eps).log()
            seen.append(features.flatten(0, 2))
    features = torch.cat(seen)
    torch.testing.assert_close(mean, features.mean(0).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, features.var(0, correction=0).float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"popsize": 1}, "popsize must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"sigma0": 0.0}, "sigma0 must be positive, got 0.0"),
    ],
)
def test_configuration_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        EvolveConfig(**{**vars(CONFIG), **changes})
    assert str(error.value) == f"EvolveConfig: {message}"
