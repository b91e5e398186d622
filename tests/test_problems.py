"""What memories are evolved on: batches, splits, fitness and fingerprints of each problem."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_models import COMMON, build
from namm_ext import NAMM, NAMMCache, zoo
from namm_ext.evolution import (
    Evaluation,
    ImitateConfig,
    JsonlProblem,
    PlainContext,
    Problem,
    RecordProblem,
    TextProblem,
    evolve,
)
from namm_ext.zoo import evolve_bundled
from small_evolution import CONFIG, MEMORY, bank, make_problem, without_time

pytest.importorskip("cma")

WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "no",
    "wind",
    "moved",
    "over",
    "it",
    "until",
    "at",
    "last",
    "a",
    "light",
    "came",
    "up",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.load_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(transformers.LlamaConfig(**{**COMMON, "vocab_size": len(tokenizer)}))


def sentence(rng: np.random.Generator, size: int) -> str:
    return " ".join(rng.choice(WORDS, size=size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty small texts, some in a subfolder, and what is not text."""
    rng = np.random.default_rng(0)
    (tmp_path / "notes" / "old").mkdir(parents=True)
    for i in range(30):
        path = tmp_path / "notes" / ("old" if i % 3 == 0 else "") / f"note-{i}.txt"
        path.write_text("\n".join(f"note {i}: {sentence(rng, 9)}" for _ in range(20)))
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "notes" / ".hidden").write_text("secret")
    (tmp_path / "notes" / "empty.txt").write_text("\n")
    return tmp_path / "notes"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    path = tmp_path / "questions.jsonl"
    with open(path, "w") as file:
        for i in range(40):
            prompt = f"{sentence(rng, 40 + i)}. The code is"
            line = {"prompt": prompt, "answer": f" {1000 + i}", "source": i}
            file.write(json.dumps(line) + "\n\n")
    return path


def small_text(folder: Path, tokenizer: Any) -> TextProblem:
    sizes = {"lengths": (96, 128), "num_examples": 2, "validation_lengths": (128,)}
    return TextProblem(folder, tokenizer, **sizes, num_validation=3)


# Text --------------------------------------------------------------------------------------------


def test_windows_of_text_come_from_their_own_split(folder: Path, tokenizer: Any) -> None:
    problem = small_text(folder, tokenizer)
    train, validation = (problem.documents[split] for split in ("train", "validation"))
    assert len(train) + len(validation) == 30
    assert 1 <= len(validation) <= 9
    batches = [problem.training_batch(0, g) for g in range(4)]
    assert [len(c.input_ids) for batch in batches for c in batch] == [96, 96, 128, 128] * 2
    (checked,) = problem.validation_batches()
    assert [len(c.input_ids) for c in checked] == [128] * 3
    for contexts, own, other in (
        ([c for batch in batches for c in batch], train, validation),
        (checked, validation, train),
    ):
        for context in contexts:
            assert context.input_ids[0] == tokenizer.bos_token_id
            for line in tokenizer.decode(context.input_ids[1:]).splitlines()[1:]:
                assert any(line in text for text in own)
                assert not any(line in text for text in other)


def test_batches_are_fixed_by_seed_and_generation(folder: Path, tokenizer: Any) -> None:
    for problem in (small_text(folder, tokenizer), make_problem(tokenizer)):
        assert problem.training_batch(0, 2) == problem.training_batch(0, 2)
        assert problem.training_batch(0, 2) != problem.training_batch(0, 0)
        assert problem.training_batch(0, 2) != problem.training_batch(1, 2)
        assert problem.validation_batches() == problem.validation_batches()
        first, second = (problem.fit_batches(0, round_, 500) for round_ in (0, 1))
        assert first == problem.fit_batches(0, 0, 500)
        assert [len(batch[0].input_ids) for batch in first] == list(problem.lengths)
        assert first[0][0] != second[0][0] != problem.training_batch(0, 0)[0]


def test_statistics_are_those_of_the_longest_contexts(tokenizer: Any) -> None:
    problem = make_problem(tokenizer, validation_lengths=(96, 160, 128))
    assert {len(c.input_ids) for c in problem.calibration_batch(0)} == {160}


def test_the_fitness_of_text_is_its_likelihood(model: Any, folder: Path, tokenizer: Any) -> None:
    problem = small_text(folder, tokenizer)
    batch = problem.training_batch(0, 0)
    params = bank(2)
    result = problem.fitness(model, NAMM(MEMORY, params), batch, 2)
    assert set(result.metrics) == {"text_ll"}
    for p in range(2):
        values = []
        for context in batch:
            ids = torch.tensor([context.input_ids])
            with torch.no_grad():
                cache = NAMMCache(model, NAMM(MEMORY, params[p]))
                logits = model(ids, past_key_values=cache).logits[0, :-1]
            values.append(-torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
        assert result.fitness()[p].item() == pytest.approx(np.mean(values), abs=1e-4)


def test_two_files_are_enough_and_one_is_not(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("one text\n" * 50)
    expected = "TextProblem: folder must hold two text files at least, one to train and one to "
    with pytest.raises(ValueError) as error:
        TextProblem(tmp_path, tokenizer)
    assert str(error.value) == f"{expected}validate on, got {str(tmp_path)!r} with 1"
    (tmp_path / "b.txt").write_text("another text\n" * 50)
    documents = TextProblem(tmp_path, tokenizer).documents
    assert {len(texts) for texts in documents.values()} == {1}
    with pytest.raises(ValueError, match="TextProblem: folder must be a folder, got"):
        TextProblem(tmp_path / "a.txt", tokenizer)


# Prompts and answers -----------------------------------------------------------------------------


def test_prompts_and_answers(questions: Path, tokenizer: Any) -> None:
    problem = JsonlProblem(questions, tokenizer, num_examples=4, num_validation=6)
    train, validation = (problem.contexts[split] for split in ("train", "validation"))
    assert len(train) + len(validation) == 40
    assert 1 <= len(validation) <= 10
    assert not {c.input_ids for c in train} & {c.input_ids for c in validation}
    for context in (*train, *validation):
        ((start, stop),) = context.answer_spans
        assert tokenizer.decode(context.input_ids[:start]).endswith(". The code is")
        answer = tokenizer.decode(context.input_ids[start:stop])
        assert answer.startswith(" 10")
        assert stop == len(context.input_ids)
    for generation in range(5):
        lengths = [len(c.input_ids) for c in problem.training_batch(0, generation)]
        assert len(lengths) == 4
        assert max(lengths) - min(lengths) <= 20  # of 40 different lengths
    assert problem.training_batch(0, 1) == problem.training_batch(0, 1)
    assert len({problem.training_batch(0, g)[0] for g in range(9)}) > 3
    checked = [c for batch in problem.validation_batches() for c in batch]
    assert len(checked) == min(6, len(validation))
    assert set(checked) <= set(validation)
    assert sum(map(len, problem.fit_batches(0, 0, 1000))) >= 10


def test_the_fitness_of_answers(model: Any, questions: Path, tokenizer: Any) -> None:
    """A changed answer is less likely and no longer exact; contexts differ in length."""
    problem = JsonlProblem(questions, tokenizer, num_examples=3)
    policy = NAMM(MEMORY, bank(1)[0])
    right = []
    for context in problem.training_batch(0, 0):
        ids = list(context.input_ids)
        ((start, _),) = context.answer_spans
        with torch.no_grad():
            cache = NAMMCache(model, policy)
            logits = model(torch.tensor([ids[:start]]), past_key_values=cache).logits
        best = int(logits[0, -1].argmax())
        right.append(PlainContext((*ids[:start], best), ((start, start + 1),)))
    wrong = [replace(c, input_ids=(*c.input_ids[:-1], 7)) for c in right]
    good, bad = (problem.fitness(model, policy, batch) for batch in (right, wrong))
    assert good.exact_match.tolist() == [[1.0] * 3]
    assert bad.exact_match.tolist() == [[0.0] * 3]
    assert good.fitness().item() > bad.fitness().item()
    assert torch.equal(good.fitness(), good.answer_ll.mean(1))


def test_a_chat_template_goes_around_the_prompt(questions: Path) -> None:
    tokenizer = zoo.load_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    problem = JsonlProblem(questions, tokenizer, chat_template=True)
    context = problem.contexts["train"][0]
    text = tokenizer.decode(context.input_ids)
    assert text.startswith("<user> ")
    assert ". The code is\n<assistant> 10" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 2 must be a JSON object with the texts"),
        ('{"prompt": "a", "answer": 3}', "line 2 must be a JSON object with the texts"),
        ("prompt, answer", "line 2 must be a JSON object with the texts"),
        ('{"prompt": "a", "answer": ""}', "prompt and answer must have a token at least"),
        ('{"prompt": "x", "answer": "y"}', "file must hold two different prompts at least"),
    ],
)
def test_wrong_lines(tmp_path: Path, tokenizer: Any, line: str, message: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        JsonlProblem(path, tokenizer)


# Any problem -------------------------------------------------------------------------------------


def test_runs_on_text_and_on_answers(
    model: Any, folder: Path, questions: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """With a fit before, and twice the same."""
    imitation = ImitateConfig(rounds=1, steps=50, num_tokens=300, batch_size=2)
    config = replace(CONFIG, generations=2, imitation=imitation)
    for problem in (
        small_text(folder, tokenizer),
        JsonlProblem(questions, tokenizer, num_examples=3),
    ):
        name = type(problem).__name__
        result = evolve(model, problem, config, tmp_path / name)
        assert [record["generation"] for record in result.log] == [0, 1, 2]
        assert f"{problem.metric}_best" in result.log[1]
        assert f"validation_{problem.metric}" in result.log[2]
        again = evolve(model, problem, config)
        assert without_time(again.log) == without_time(result.log)
        assert torch.equal(again.policy.params, result.policy.params)


class Repeat(Problem):
    """The example of `Problem`: a line is to be repeated."""

    context_lengths = (96,)

    def draw(self, key: tuple[int, ...], size: int) -> list[PlainContext]:
        rows = np.random.default_rng(key).integers(5, 2000, (size, 88)).tolist()
        return [PlainContext((*ids, *ids[:8]), ((88, 96),)) for ids in rows]

    def training_batch(self, seed: int, generation: int) -> list[PlainContext]:
        return self.draw((0, seed, generation), 2)

    def validation_batches(self) -> list[list[PlainContext]]:
        return [self.draw((1,), 2)]


class Halved(Repeat):
    """A fitness of one's own."""

    metric = "half"

    def fitness(self, *arguments: Any) -> Evaluation:
        result = super().fitness(*arguments)
        return Evaluation({"half": result.answer_ll / 2}, result.kept, {"half": 1.0})


def test_a_problem_of_ones_own(model: Any, tmp_path: Path) -> None:
    whole = evolve(model, Repeat(), CONFIG)
    half = evolve(model, Halved(), CONFIG, tmp_path)
    assert torch.equal(whole.policy.params, half.policy.params)  # ranks are what counts
    for one, two in zip(whole.log, half.log, strict=True):
        assert two["half_best"] == two["fitness_best"] == pytest.approx(one["fitness_best"] / 2)
    assert {"problem"} == set(Repeat().fingerprint())


def test_the_bundled_memory_has_its_recipe(tokenizer: Any) -> None:
    """What was run is what the recipe would run."""
    path = Path(zoo.__file__).parent / "policies" / "stdlib-1m" / "evolution.json"
    problem = evolve_bundled.records(tokenizer)
    settings = evolve_bundled.settings(problem, evolve_bundled.EVOLUTION)
    assert json.loads(json.dumps(settings)) == json.loads(path.read_text())


def test_problem_settings_are_checked(tokenizer: Any) -> None:
    lengths = RecordProblem(tokenizer, ("text",), ("text",)).context_lengths
    assert lengths == (256, 512, 1024)
    for changes, message in (
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"lengths": ()}, "lengths must be positive, at least one, got ()"),
        ({"text_weight": float("nan")}, "text_weight must be finite, got nan"),
        (
            {"mixes": ()},
            "mixes must have 1 to 2 entries, one example of each in every batch, got 0",
        ),
    ):
        with pytest.raises(ValueError) as error:
            make_problem(tokenizer, **changes)
        assert str(error.value) == f"RecordProblem: {message}"
