"""Clips are what they say, and the model that watches them can be made again and answers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from namm_ext import zoo
from namm_ext.cache.versions import VERSION
from namm_ext.zoo import clips, train_video
from pages import run_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/video.json"


@pytest.fixture(scope="module")
def model():
    if VERSION < (5, 14):  # nothing random instead of what it does not find
        with pytest.raises(ValueError, match=r"clips: all weights must be there, got none for 39"):
            zoo.load_video_model()
        pytest.skip(f"transformers {transformers.__version__} calls the weights otherwise")
    return zoo.load_video_model()


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("video")


def draw(seed, frames=20, scenes=4):
    return clips.draw_clip(np.random.default_rng(seed), frames, scenes)


def centre(frame, color):
    """Row and column of the middle of what has a colour."""
    wanted = (np.array(clips.COLORS[color]) - 0.3) / 0.3
    found = np.argwhere((abs(frame - wanted[:, None, None]) < 1e-5).all(0))
    return (found.min(0) + found.max(0)) / 2 if len(found) else None


def test_a_clip_depends_on_its_seed_alone():
    one, same, other = draw(1), draw(1), draw(2)
    assert np.array_equal(one.pixels, same.pixels)
    assert one.questions() == same.questions()
    assert not np.array_equal(one.pixels, other.pixels)
    assert one.pixels.shape == (20, 3, clips.SIZE, clips.SIZE)
    assert one.pixels.dtype == np.float32


@pytest.mark.parametrize("seed", range(12))
def test_a_scene_shows_what_it_says(seed):
    clip = draw(seed)
    assert len({scene.shape for scene in clip.scenes}) == 4
    assert len({scene.color for scene in clip.scenes}) == 4
    assert clip.scenes[0].start == 0
    ends = [scene.start + scene.frames for scene in clip.scenes]
    assert [scene.start for scene in clip.scenes[1:]] == ends[:-1]
    assert ends[-1] == 20
    for scene, end in zip(clip.scenes, ends, strict=True):
        first, last = (centre(clip.pixels[i], scene.color) for i in (scene.start, end - 1))
        assert np.sign(last - first).tolist() == list(clips.DIRECTIONS[scene.direction])
        assert clip.pixels[scene.start : end].std() > 0
        for other in clip.scenes:
            if other is not scene:
                assert centre(clip.pixels[scene.start], other.color) is None


@pytest.mark.parametrize("seed", range(12))
def test_the_flash_is_two_frames_of_one_scene(seed):
    clip = draw(seed)
    background = np.median(clip.pixels, axis=(2, 3)).sum(1)
    brightest = np.argsort(background)[-2:]
    assert sorted(brightest.tolist()) == [clip.flash, clip.flash + 1]
    scene = clip.flash_scene
    assert scene.start <= clip.flash
    assert clip.flash + 2 <= scene.start + scene.frames


def test_questions_have_the_answers_of_the_scenes():
    clip = draw(5)
    asked = {question.text: question.answer for question in clip.questions()}
    assert len(asked) == 16
    assert {question.kind for question in clip.questions()} == set(clips.KINDS)
    a = clip.scenes[1]
    assert asked[f"what color is the {a.shape}"] == a.color
    assert asked[f"what shape is {a.color}"] == a.shape
    assert asked[f"where goes the {a.shape}"] == a.direction
    assert asked["what shape comes first"] == clip.scenes[0].shape
    assert asked["what shape comes last"] == clip.scenes[-1].shape
    assert asked["what color flashes"] == clip.flash_color
    assert asked["what shape is in the flash"] == clip.flash_scene.shape


def test_shapes_differ():
    masks = [mask.astype(int) for mask in clips._MASKS.values()]
    for i, one in enumerate(masks):
        assert one.sum() > 20
        for other in masks[:i]:
            assert abs(one - other).sum() > 15


def test_clips_that_do_not_fit():
    with pytest.raises(ValueError, match="got 4 scenes in 7 frames"):
        draw(0, frames=7)
    with pytest.raises(ValueError, match="scenes must be 1 to 5"):
        draw(0, frames=60, scenes=6)


def test_words_are_the_tokenizers():
    tokenizer = clips.make_tokenizer()
    text = " ".join(clips.WORDS)
    assert tokenizer.encode(text) == clips.encode(text) == list(range(len(clips.WORDS)))
    assert tokenizer.decode(clips.encode("what shape comes first")) == "what shape comes first"
    assert zoo.load_tokenizer(zoo.VIDEO_MODEL).get_vocab() == tokenizer.get_vocab()


def test_a_batch_asks_about_its_own_clips():
    batch = train_video.make_batch(np.random.default_rng(0), frames=8, count=3, questions=5)
    assert batch.pixels.shape == (3, 8, 3, clips.SIZE, clips.SIZE)
    assert batch.is_answer.sum(1).tolist() == [5, 5, 5]
    assert len(batch.kinds) == 15
    rng = np.random.default_rng(0)
    drawn = [clips.draw_clip(rng, 8, int(rng.integers(2, 5))) for _ in range(3)]
    for i, clip in enumerate(drawn):
        assert torch.equal(batch.pixels[i], torch.from_numpy(clip.pixels))
        pairs = {f"{q.text} {q.answer}" for q in clip.questions()}
        places = batch.is_answer[i].nonzero().flatten().tolist()
        assert len(places) == 5
        for begin, end in zip([16 * 8, *places], places, strict=False):
            assert (
                " ".join(clips.WORDS[t] for t in batch.input_ids[i, begin + 1 : end + 1]) in pairs
            )


def test_the_recipe_runs_and_goes_on(tmp_path, monkeypatch):
    stages = (
        train_video.Stage("look", (4,), 8, 0, 1),
        train_video.Stage("read", (4,), 8, 3, 1, decay=False),
        train_video.Stage("watch", (4,), 8, 3, 2),
    )
    whole = train_video.train_video(tmp_path / "whole", stages=stages)
    real = train_video._Run.train_step

    def stop(run):
        if run.step == 3:
            raise KeyboardInterrupt
        real(run)

    with monkeypatch.context() as patched:
        patched.setattr(train_video._Run, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train_video.train_video(tmp_path / "cut", stages=stages, checkpoint_every=1)
    with pytest.raises(ValueError, match="a checkpoint of a run with other arguments"):
        train_video.train_video(tmp_path / "cut", stages=stages, seed=1)
    seen = []
    cut = train_video.train_video(tmp_path / "cut", stages=stages, on_log=seen.append)
    assert [line["step"] for line in seen] == [4]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert not (cut / "checkpoint.pt").exists()
    assert zoo.load_video_model(str(cut)).config.model_type == "llava_next_video"
    other = train_video.train_video(tmp_path / "other", quick=True, seed=1)
    assert (other / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_bundled_files():
    folder = zoo.model_path(zoo.VIDEO_MODEL)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5 * 2**20
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == sum(stage.steps for stage in train_video.STAGES)
    assert zoo.VIDEO_MODEL not in zoo.bundled_models()
    config = json.loads((folder / "config.json").read_text())
    new = train_video.new_model(train_video.VideoConfig()).config.to_dict()
    for part in ("text_config", "vision_config"):
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            assert config[part][key] == new[part][key]


def test_the_bundled_model_answers(model, bench):
    measured = bench.measure(model, None, bench.clips_of(bench.TEST, 0, 6))
    full = json.loads(RESULTS.read_text())["rows"][0]
    assert np.mean(measured.correct) == pytest.approx(full["accuracy"], abs=0.08)


def test_one_memory_on_the_ragged_store_is_the_full_cache(model, bench):
    """The bench asks behind a memory as it asks behind the stock cache."""
    from namm_ext.baselines import NeverEvict, StreamingLLM

    videos = bench.clips_of(bench.TEST, 1, 2)
    full = bench.measure(model, None, videos)
    kept = bench.measure(model, NeverEvict(n_up=64), videos)
    assert kept.correct == full.correct
    assert kept.kept == 1
    little = bench.measure(model, StreamingLLM(80, n_up=64), videos)
    assert np.mean(little.correct) < np.mean(full.correct)
    assert little.kept < 0.13
    assert little.shares[0][20] == 0


@pytest.mark.usefixtures("model")
def test_the_page_runs(capsys):
    names = run_page("docs/video.md")
    printed = capsys.readouterr().out
    assert printed.count("frame ") == 40
    assert names["cache"].report().kept_fraction == pytest.approx(0.25, abs=0.01)


def test_the_page_has_the_measured_figures(bench, tmp_path):
    page = (ROOT / "docs/video.md").read_text(encoding="utf-8")
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert bench.filled(page, content) == page
    content["rows"][-1]["accuracy"] += 0.1
    assert bench.filled(page, content) != page
    assert (ROOT / "docs/video.svg").read_text(encoding="utf-8") == bench.picture(
        json.loads(RESULTS.read_text(encoding="utf-8"))
    )
