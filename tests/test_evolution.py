"""Evolution: the search, evaluation of a population, interruption and resumption, statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, NAMMCache, NAMMConfig, baselines, reference, remove, tasks, zoo
from namm_ext.evolution import (
    DiagonalCMA,
    EvolveConfig,
    calibrate_statistics,
    evaluate_policy,
    evaluate_population,
    evolve,
    train,
    training_batch,
    validation_batches,
)

pytest.importorskip("cma")

N_UP = 16
MEMORY = NAMMConfig(
    n_up=N_UP, feature_transform="log", threshold=None, cache_size=24, budget="per_layer"
)
CONFIG = EvolveConfig(
    namm=MEMORY,
    generations=4,
    popsize=4,
    sigma0=0.3,
    lengths=(96, 112),
    num_examples=2,
    mixes=(tasks.RecordMix(2), tasks.RecordMix(1, mentions=2)),
    validate_every=2,
    validation_lengths=(128,),
    num_validation=2,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """Two layers, two KV heads, random weights, the bundled vocabulary."""
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


@pytest.fixture(autouse=True)
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small texts instead of the standard library, one per split."""
    texts = {
        split: (f"# {split}\n" + "\n".join(f"{split}_{i} = {i} * value" for i in range(200)),)
        for split in zoo.SPLITS
    }
    monkeypatch.setattr(train, "load_documents", texts.__getitem__)


def bank(size: int, config: NAMMConfig = MEMORY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, config.num_params, generator=generator)


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in log]


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


def test_every_candidate_is_evaluated_as_if_alone(model: Any, tokenizer: Any) -> None:
    """Against each row by itself through the whole model, its logits scored by ``tasks``."""
    examples = training_batch(tokenizer, CONFIG, 0)
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
    expected = together.answer_ll.mean(1) + 4 * together.text_ll.mean(1)
    assert torch.equal(together.fitness(4.0), expected)


def test_exact_match_counts_answers(model: Any, tokenizer: Any) -> None:
    """The greedy continuation of a context is right, one with a changed token is not."""
    (example,) = training_batch(tokenizer, CONFIG, 0)[:1]
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


def test_evaluation_wants_examples_of_one_length(model: Any, tokenizer: Any) -> None:
    policy = NAMM(MEMORY)
    mixed = training_batch(tokenizer, CONFIG, 0) + training_batch(tokenizer, CONFIG, 1)
    for examples, got in ((mixed, "[96, 112]"), ([], "[]")):
        with pytest.raises(ValueError) as error:
            evaluate_policy(model, policy, examples)
        assert str(error.value) == f"examples must be non-empty and of one length, got {got}"


def test_batches_are_fixed_by_seed_and_generation(tokenizer: Any) -> None:
    other = EvolveConfig(**{**vars(CONFIG), "seed": 1})
    assert training_batch(tokenizer, CONFIG, 2) == training_batch(tokenizer, CONFIG, 2)
    assert training_batch(tokenizer, CONFIG, 2) != training_batch(tokenizer, CONFIG, 0)
    assert training_batch(tokenizer, CONFIG, 2) != training_batch(tokenizer, other, 2)
    assert validation_batches(tokenizer, CONFIG) == validation_batches(tokenizer, other)
    assert {len(e.input_ids) for e in training_batch(tokenizer, CONFIG, 1)} == {112}


# Statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["none", "log"])
def test_statistics_are_those_of_a_direct_computation(
    model: Any, tokenizer: Any, transform: str
) -> None:
    """From the attention matrices that transformers returns, with nothing of ours but the law."""
    config = MEMORY.replace(feature_transform=transform)
    examples = training_batch(tokenizer, CONFIG, 0)
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


# Runs --------------------------------------------------------------------------------------------


def test_a_run_equals_itself_and_writes_what_it_found(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    records: list[dict[str, Any]] = []
    first = evolve(model, tokenizer, CONFIG, tmp_path / "run", on_generation=records.append)
    second = evolve(model, tokenizer, CONFIG)
    assert torch.equal(first.policy.params, second.policy.params)
    assert without_time(first.log) == without_time(second.log)
    assert records == first.log
    assert [r["length"] for r in records] == [96, 112, 96, 112]
    assert ["validation_fitness" in r for r in records] == [False, True, False, True]
    validated = {r["generation"]: r.get("validation_fitness", -np.inf) for r in records}
    assert first.generation == max(validated, key=lambda g: validated[g])

    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == first.log
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert EvolveConfig.from_dict(stored) == CONFIG
    saved = NAMM.from_pretrained(tmp_path / "run" / "policy")
    assert torch.equal(saved.params, first.policy.params)
    assert saved.config == MEMORY.replace(cache_size=32)  # a quarter of the validation length
    examples = validation_batches(tokenizer, CONFIG)[128]
    value = evaluate_policy(model, saved, examples).fitness(4.0).item()
    assert value == pytest.approx(validated[first.generation], abs=1e-9)


@pytest.mark.parametrize("calls_before", [1, 3, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls_before: int,
) -> None:
    remove(model)
    unbroken = evolve(model, tokenizer, CONFIG, tmp_path / "unbroken")

    calls: list[int] = []
    real_population, real_policy = train.evaluate_population, train.evaluate_policy

    def interrupted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == calls_before + 1:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_population", interrupted(real_population))
        patched.setattr(train, "evaluate_policy", interrupted(real_policy))
        with pytest.raises(KeyboardInterrupt):
            evolve(model, tokenizer, CONFIG, tmp_path / "broken")
    assert model.config._attn_implementation != "namm"
    resumed = evolve(model, tokenizer, CONFIG, tmp_path / "broken")

    assert torch.equal(resumed.policy.params, unbroken.policy.params)
    assert resumed.generation == unbroken.generation
    assert without_time(resumed.log) == without_time(unbroken.log)
    states = [np.load(tmp_path / name / "state.npz") for name in ("unbroken", "broken")]
    for key in set(states[0].files) - {"log"}:
        assert np.array_equal(states[0][key], states[1][key]), key
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("unbroken", "broken")]
    parsed = [without_time([json.loads(line) for line in log.splitlines()]) for log in logs]
    assert parsed[0] == parsed[1]


def test_more_generations_continue_a_finished_run(
    model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    half = EvolveConfig(**{**vars(CONFIG), "generations": 2})
    evolve(model, tokenizer, half, tmp_path)
    longer = evolve(model, tokenizer, CONFIG, tmp_path)
    assert without_time(longer.log) == without_time(evolve(model, tokenizer, CONFIG).log)


def test_a_start_and_a_stop(model: Any, tokenizer: Any) -> None:
    start = bank(1)[0]
    result = evolve(model, tokenizer, CONFIG, x0=start, should_stop=lambda: True)
    assert torch.equal(result.policy.params, start)
    assert [record["generation"] for record in result.log] == [0]  # the start is validated
    with pytest.raises(ValueError) as error:
        evolve(model, tokenizer, CONFIG, x0=torch.zeros(3))
    assert str(error.value) == "evolve: x0 must be [4172] and finite, got [3]"


@pytest.fixture
def finished(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    short = EvolveConfig(**{**vars(CONFIG), "generations": 1})
    evolve(model, tokenizer, short, tmp_path / "run")
    return tmp_path / "run"


def failure(model: Any, tokenizer: Any, config: EvolveConfig, folder: Path, **kwargs: Any) -> str:
    with pytest.raises(ValueError) as error:
        evolve(model, tokenizer, config, folder, **kwargs)
    return str(error.value)


def test_state_files_of_others_are_refused(model: Any, tokenizer: Any, finished: Path) -> None:
    path = finished / "state.npz"
    whole = path.read_bytes()
    with np.load(path) as file:
        values = dict(file)

    other = EvolveConfig(**{**vars(CONFIG), "sigma0": 0.1, "popsize": 8})
    assert failure(model, tokenizer, other, finished) == (
        f"evolve: {finished} holds a run with another configuration; these fields differ: "
        "popsize, sigma0"
    )
    assert failure(model, tokenizer, CONFIG, finished, x0=bank(1)[0]) == (
        f"evolve: {finished} holds a run that started from another x0"
    )
    damaged = f"evolve: {path} must be a state file, got a damaged one"
    path.write_bytes(whole[: len(whole) // 2])
    assert failure(model, tokenizer, CONFIG, finished) == damaged
    path.write_bytes(b"\x80\x04not a zip")  # the first bytes of a pickle
    assert failure(model, tokenizer, CONFIG, finished) == damaged
    np.savez(path, something=np.zeros(3))
    assert failure(model, tokenizer, CONFIG, finished) == (
        f"evolve: {path} must be a state of this program, got one without 'x0'"
    )
    np.savez(path, **{**values, "search_mean": values["search_mean"] + 1})
    assert failure(model, tokenizer, CONFIG, finished) == (
        f"evolve: {path} does not replay to the mean it holds; it was written with other "
        "versions of numpy or pycma: start a new run with its mean as x0"
    )
    path.write_bytes(whole)
    (finished / "config.json").write_text("{")
    assert failure(model, tokenizer, CONFIG, finished).startswith(
        f"evolve: {finished / 'config.json'} must be the run's configuration, got "
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generations": 0}, "generations must be at least 1, got 0"),
        ({"popsize": 1}, "popsize must be at least 2, got 1"),
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"keep_fraction": 0.0}, "keep_fraction must be in (0, 1], got 0.0"),
        ({"sigma0": 0.0}, "sigma0 must be positive, got 0.0"),
        ({"lengths": ()}, "lengths must be at least 2 * n_up = 32 tokens, got 0"),
        ({"lengths": (96, 16)}, "lengths must be at least 2 * n_up = 32 tokens, got 16"),
    ],
)
def test_configuration_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        EvolveConfig(**{**vars(CONFIG), **changes})
    assert str(error.value) == f"EvolveConfig: {message}"
