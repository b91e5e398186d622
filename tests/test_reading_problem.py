"""Evolution on readings: a population of whole memories, judged by their answers."""

import pytest
import torch
from namm_ext import NAMM, NAMMConfig, zoo
from namm_ext.answers import answer_readings
from namm_ext.baselines import StreamingLLM
from namm_ext.budget import Budget
from namm_ext.evolution import EvolveConfig, PlainContext, Population, ReadingProblem, evolve
from namm_ext.evolution.evaluate import evaluate_population, score_text
from namm_ext.tasks.suite import HELD_OUT_TASKS


@pytest.fixture(scope="module")
def bundled():
    return zoo.load_model(), zoo.load_tokenizer()


def _problem(tokenizer, **changes):
    return ReadingProblem(
        tokenizer,
        **{
            "tasks": ("single", "code"), "lengths": (512,), "num_examples": 2,
            "validation_lengths": (512,), "num_validation": 2, **changes,
        },
    )  # fmt: skip


def test_fitness_is_the_answers_of_each_member(bundled):
    model, tokenizer = bundled
    problem = _problem(tokenizer)
    batch = problem.training_batch(0, 0)
    members = [StreamingLLM(64), StreamingLLM(400)]
    found = problem.fitness(model, Population(members), batch, 2)
    for p, member in enumerate(members):
        answers = answer_readings(model, member, [context.reading for context in batch])
        expected = torch.stack(
            [torch.tensor(answers.loglik[answers.reading == i]).mean() for i in range(2)]
        )
        torch.testing.assert_close(found.answer_ll[p], expected)
        torch.testing.assert_close(found.kept[p], torch.tensor(answers.kept))
    with pytest.raises(ValueError, match="must have 2 members"):
        problem.fitness(model, members[0], batch, 2)
    with pytest.raises(ValueError, match="at least one policy"):
        Population([])


def test_the_context_counts_as_text(bundled):
    model, tokenizer = bundled
    problem = _problem(tokenizer, text_weight=5.0)
    batch = problem.training_batch(0, 0)
    found = problem.fitness(model, StreamingLLM(64), batch)
    for i, context in enumerate(batch):
        alone = evaluate_population(
            model, StreamingLLM(64), [PlainContext(context.input_ids)], score=score_text,
            weights={"text_ll": 1.0},
        )  # fmt: skip
        torch.testing.assert_close(found.text_ll[0, i], alone.text_ll[0, 0], atol=1e-5, rtol=1e-5)
    expected = found.answer_ll.mean(1) + 5 * found.text_ll.mean(1)
    torch.testing.assert_close(found.fitness(), expected)
    assert problem.fingerprint() != _problem(tokenizer).fingerprint()


def test_batches_are_fixed_and_differ(bundled):
    _, tokenizer = bundled
    problem = _problem(tokenizer)
    first, again = problem.training_batch(0, 0), problem.training_batch(0, 0)
    assert [c.input_ids for c in first] == [c.input_ids for c in again]
    assert {c.input_ids for c in first}.isdisjoint(
        c.input_ids for c in problem.training_batch(0, 1)
    )
    assert problem.fingerprint() == _problem(tokenizer).fingerprint()
    assert problem.fingerprint() != _problem(tokenizer, tasks=("single",)).fingerprint()
    with pytest.raises(ValueError, match="never trained on"):
        _problem(tokenizer, tasks=HELD_OUT_TASKS).training_batch(0, 0)


def test_a_memory_goes_on_evolving(bundled, tmp_path):
    model, tokenizer = bundled
    start = NAMM(NAMMConfig(n_up=64, scorer="mlp"), torch.full((25,), 0.1))
    config = EvolveConfig(
        budget=Budget(0.25, scope="per_layer"), generations=1, popsize=2, validate_every=1
    )
    result = evolve(
        model, _problem(tokenizer), config, tmp_path / "run", x0=start.params,
        policy_of=lambda x: Population.of(start.with_params, x),
    )  # fmt: skip
    assert [record["generation"] for record in result.log] == [0, 1]
    assert NAMM.from_pretrained(tmp_path / "run" / "policy").config == start.config
