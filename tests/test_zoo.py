"""The bundled models do what their figures say, and the recipe can be run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from namm_ext import corpus, tasks, zoo

pytest.importorskip("transformers")

from hf_models import FAMILIES, build
from namm_ext._files import lock_folder
from namm_ext.zoo import evaluate_lm as evaluation
from namm_ext.zoo import train_lm as recipe

MODELS = zoo.bundled_models()
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def model():
    return zoo.load_model()


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load_tokenizer()


@pytest.fixture
def small_corpus(monkeypatch):
    documents = corpus.load_documents("validation")[:12]
    monkeypatch.setattr(recipe, "load_documents", lambda split: documents)


def metrics_of(name):
    return json.loads((zoo.model_path(name) / "metrics.json").read_text())


def test_splits_depend_on_the_name_alone():
    assert corpus.split_of("typing.py") == "test"
    assert corpus.split_of("asyncio/queues.py") == "train"
    shares = [corpus.split_of(f"module_{i}.py") for i in range(2000)]
    assert 0.02 < shares.count("test") / 2000 < 0.06
    assert 0.02 < shares.count("validation") / 2000 < 0.06


def test_test_documents_are_not_validation_documents():
    validation, test = (set(corpus.load_documents(split)) for split in ("validation", "test"))
    assert validation
    assert test
    assert validation.isdisjoint(test)
    with pytest.raises(ValueError, match="split must be one of"):
        corpus.load_documents("dev")


@pytest.mark.parametrize("name", MODELS)
def test_bundled_files(name):
    folder = zoo.model_path(name)
    expected = {
        "config.json",
        "generation_config.json",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.jsonl",
    }
    assert {path.name for path in folder.iterdir()} == expected
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6 * MEBIBYTE
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert lines[-1]["tokens"] == metrics_of(name)["training"]["tokens"]


def test_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="name must be one of"):
        zoo.load_model("gpt-5")


def test_a_model_that_lacks_weights_is_refused(tmp_path) -> None:
    """transformers would make them up."""
    model = build(FAMILIES["llama"]())
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"got none for 1 such as 'model.layers.1.mlp.up_proj"):
        zoo.load_model(str(tmp_path))


def test_bundled_model_recalls(model, tokenizer):
    figures = metrics_of(zoo.DEFAULT_MODEL)
    assert sum(p.numel() for p in model.parameters()) == figures["training"]["parameters"]
    examples = tasks.make_batch(
        evaluation.ALL_FAMILIES[:6],
        tokenizer,
        corpus.load_documents("test"),
        length=512,
        num_records=4,
        seed=tasks.TEST_SEED,
        batch_size=12,
    )
    input_ids = tasks.stack(examples)
    with torch.inference_mode():
        logits = model(input_ids=input_ids[:, :-1]).logits
    scores = tasks.score_examples(tasks.score_tokens(logits, input_ids[:, 1:]), examples)
    assert scores.accuracy() == pytest.approx(
        figures["recall"]["512"]["known"]["exact_match"], abs=0.1
    )
    assert scores.text_logprob.mean() > -2.6


def test_generation_gives_the_teacher_forced_answer(model, tokenizer):
    """What exact match calls right, greedy generation writes."""
    example = tasks.make_example(
        "mapping",
        tokenizer,
        corpus.load_documents("test"),
        length=256,
        num_records=4,
        seed=tasks.TEST_SEED,
    )
    input_ids = tasks.stack([example])
    with torch.inference_mode():
        logits = model(input_ids=input_ids[:, :-1]).logits
    scores = tasks.score_examples(tasks.score_tokens(logits, input_ids[:, 1:]), [example])
    prompt = tasks.make_prompt(example)
    generated = model.generate(
        torch.tensor([prompt.input_ids]),
        max_new_tokens=len(prompt.answer_ids),
        do_sample=False,
    )
    answer = tuple(generated[0, len(prompt.input_ids) :].tolist())
    assert (answer == prompt.answer_ids) == bool(scores.exact_match[0])


def test_bits_per_byte_is_reproducible(model, tokenizer):
    measured = evaluation.text_bits_per_byte(model, tokenizer, 256, 24)
    published = metrics_of(zoo.DEFAULT_MODEL)["bits_per_byte"]["256"]
    assert measured == pytest.approx(published, rel=0.1)
    with torch.no_grad():
        blank = zoo.load_model()
        blank.model.norm.weight.zero_()  # every token equally likely
    uniform = evaluation.text_bits_per_byte(blank, tokenizer, 256, 2)
    assert uniform > 3.0


def test_readme_figures_are_the_measured_ones():
    readme = (Path(zoo.__file__).parent / "README.md").read_text(encoding="utf-8")
    for name in MODELS:
        figures = metrics_of(name)
        for length, recall in figures["recall"].items():
            row = (
                f"| {length} | {figures['bits_per_byte'][length]:.3f} "
                f"| {recall['known']['exact_match']:.3f} |"
            )
            assert row in readme


def test_readme_tells_how_the_memory_came_about():
    readme = (Path(zoo.__file__).parent / "README.md").read_text(encoding="utf-8")
    prose = " ".join(readme.split())
    folder = Path(zoo.__file__).parent / "policies" / "stdlib-1m"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    best = max((r for r in log if "validation_fitness" in r), key=lambda r: r["validation_fitness"])
    assert best["generation"] == json.loads((folder / "metrics.json").read_text())["generation"]
    for record in (log[0], best):
        assert f"{record['validation_fitness']:.3f} with" in prose
        assert f"with {100 * record['validation_exact_match']:.1f} %" in prose
    assert f"(generation {best['generation']} of {log[-1]['generation']}" in prose


@pytest.mark.usefixtures("small_corpus")
def test_quick_recipe(tmp_path):
    entries = []
    folder = recipe.train_lm(tmp_path / "lm", quick=True, on_log=entries.append)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["training"]["tokens"] == 1024
    assert figures["recall"]["256"]["known"]["exact_match"] < 0.5
    assert entries[-1]["step"] == entries[-1]["total_steps"] == 2
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.usefixtures("small_corpus")
def test_resumed_training_equals_an_unbroken_one(tmp_path):
    def run(folder, steps):
        training = recipe._Run(folder, 3, recipe.QUICK_STAGES, recipe.LMConfig(), None)
        training.resume()
        for _ in range(steps):
            training.train_step()
        training.save_checkpoint()
        return training.model.state_dict()

    unbroken = run(tmp_path / "unbroken", 2)
    once = run(tmp_path / "resumed", 1)
    resumed = run(tmp_path / "resumed", 1)
    assert not torch.equal(once["lm_head.weight"], resumed["lm_head.weight"])
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name]), name

    other = recipe._Run(tmp_path / "resumed", 4, recipe.QUICK_STAGES, recipe.LMConfig(), None)
    with pytest.raises(ValueError, match="other arguments"):
        other.resume()


def test_a_training_has_its_folder_for_itself(tmp_path):
    with lock_folder(tmp_path), pytest.raises(ValueError, match="another process works on"):
        recipe.train_lm(tmp_path, quick=True)


def test_stage_lengths_must_fill_a_step():
    with pytest.raises(ValueError, match="step_tokens must be a multiple"):
        recipe.Stage(lengths=(128, 200), step_tokens=512, tokens=1024)
