"""Video language models with a memory: the stock model, the dense oracle, shares of frames."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hf_models import COMMON, VOCAB, evicting_policy, namm_oracle, oracle_logits, positions, tokens
from namm_ext import NAMMCache, NAMMConfig, patch
from namm_ext.baselines import H2O, NeverEvict, StreamingLLM
from namm_ext.budget import Budget
from namm_ext.cache import cache_keyword
from namm_ext.fitting import FitConfig, Later, Text, calibrate, fit
from namm_ext.integrations.video import calibrate_on_videos, fit_on_videos, frame_shares
from namm_ext.policy.origin import shape_of

VIDEO, IMAGE = VOCAB - 1, VOCAB - 2
FRAMES, PER_FRAME, BEFORE, AFTER = 10, 4, 3, 12


def _llava():
    torch.manual_seed(0)
    config = transformers.LlavaNextVideoConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=16, patch_size=4, projection_dim=16,
        ),
        text_config=transformers.LlamaConfig(**COMMON),
        video_token_index=VIDEO, image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    model = transformers.LlavaNextVideoForConditionalGeneration(config)
    return model.double().eval().requires_grad_(False)


def _qwen():
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **COMMON, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
            "use_sliding_window": False,
        },
        vision_config=dict(
            depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
            patch_size=4, window_size=16, fullatt_block_indexes=[1],
        ),
        video_token_id=VIDEO, image_token_id=IMAGE,
    )  # fmt: skip
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return model.double().eval().requires_grad_(False)


MODELS = {"llava_next_video": _llava, "qwen2_5_vl": _qwen}


def _inputs(name, frames=FRAMES, rows=1, seed=0):
    ids = tokens(rows, BEFORE + frames * PER_FRAME + AFTER, seed).clamp(max=IMAGE - 1)
    ids[:, BEFORE : BEFORE + frames * PER_FRAME] = VIDEO
    torch.manual_seed(seed)
    if name == "llava_next_video":
        pixels = torch.randn(rows, frames, 3, 16, 16, dtype=torch.float64)
        return {"input_ids": ids, "pixel_values_videos": pixels}
    return {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(rows * frames * 16, 2 * 3 * 4 * 4).double(),
        "video_grid_thw": torch.tensor([[frames, 4, 4]] * rows),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
    }


@pytest.fixture(params=list(MODELS))
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return MODELS[name]()


@pytest.fixture
def inputs(name):
    return _inputs(name)


def _read(model, inputs, policy):
    cache = NAMMCache(model, policy)
    return cache, model(**inputs, **{cache_keyword(model): cache}).logits


def test_a_memory_that_never_forgets_is_the_stock_model(model, inputs):
    want = model(**inputs).logits
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    cache, got = _read(model, inputs, NeverEvict(n_up=16))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    shares = frame_shares(cache, model.config, inputs)
    assert torch.equal(shares.per_head, torch.ones(2, 2, FRAMES, dtype=torch.float64))
    assert shares.video == shares.text == 1
    with patch(model, NeverEvict(n_up=16)):
        again = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(again, written)


def test_an_evicting_memory_is_the_dense_oracle(model, inputs):
    policy = evicting_policy(budget=10)
    oracle = namm_oracle(policy)
    video = {key: value for key, value in inputs.items() if key != "input_ids"}
    want = oracle_logits(model, oracle, inputs["input_ids"], **video)
    cache, got = _read(model, inputs, policy)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    kept = [positions(layer) for layer in cache.memory_layers]
    assert kept == [oracle.kept_positions(i) for i in range(2)]
    assert 0 < sum(map(len, kept[0])) < 2 * inputs["input_ids"].shape[1]

    shares = frame_shares(cache, model.config, inputs)
    is_video = inputs["input_ids"][0] == VIDEO
    first = BEFORE
    for i, heads in enumerate(kept):
        for h, held in enumerate(heads):
            counts = [0] * FRAMES
            for p in held:
                if is_video[p]:
                    counts[(p - first) // PER_FRAME] += 1
            assert shares.held[i, h].tolist() == counts
            assert int(shares.text_held[i, h]) == len(held) - sum(counts)


def test_shares_add_up(model, inputs):
    cache, _ = _read(model, inputs, evicting_policy(budget=10))
    shares = frame_shares(cache, model.config, inputs)
    report = cache.report()
    assert int(shares.held.sum() + shares.text_held.sum()) == report.tokens_live
    assert shares.layers == (0, 1)
    assert shares.sizes.tolist() == [PER_FRAME] * FRAMES
    assert shares.text_size == BEFORE + AFTER
    assert shares.held.shape == (2, 2, FRAMES)
    assert torch.equal(shares.per_layer, shares.per_head.mean(1))
    assert float(shares.overall.mean()) == pytest.approx(shares.video)
    lines = str(shares).splitlines()
    assert len(lines) == FRAMES + 1
    assert [line.count("#") for line in lines[:-1]] == (40 * shares.overall).round().tolist()


def test_tokens_that_come_later_are_text(model, inputs):
    cache = NAMMCache(model, StreamingLLM(Budget(16, sink_tokens=BEFORE + 4), n_up=16))
    model.generate(**inputs, **{"past_key_values": cache}, max_new_tokens=40, do_sample=False)
    shares = frame_shares(cache, model.config, inputs)
    assert shares.overall.tolist() == [1.0] + [0.0] * (FRAMES - 1)
    assert shares.text_size == BEFORE + AFTER + 39
    assert shares.text < 1


def test_rows_of_a_padded_batch(name, model):
    """Row 1 has two frames more; row 0 stands behind padding, which no position counts."""
    short, long = _inputs(name, FRAMES, seed=1), _inputs(name, FRAMES + 2, seed=2)
    if name == "llava_next_video":
        short, long = _inputs(name, FRAMES, seed=1), _inputs(name, FRAMES, seed=2)
        extra = torch.full((1, 8), 5)
        long["input_ids"] = torch.cat([extra, long["input_ids"]], 1)
    pad = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    mask = torch.ones(2, long["input_ids"].shape[1], dtype=torch.long)
    mask[0, :pad] = 0
    batch = {"attention_mask": mask}
    for key in short:
        one = short[key]
        if key in ("input_ids", "mm_token_type_ids"):
            one = torch.nn.functional.pad(one, (pad, 0))
        batch[key] = torch.cat([one, long[key]])
    policy = evicting_policy(budget=10)
    cache, _ = _read(model, batch, policy)
    for row, alone in enumerate((short, long)):
        own, _ = _read(model, alone, policy)
        want = frame_shares(own, model.config, alone)
        got = frame_shares(cache, model.config, batch, row=row)
        assert torch.equal(got.held, want.held)
        assert torch.equal(got.text_held, want.text_held)


def test_errors_of_shares(name, model, inputs):
    cache, _ = _read(model, inputs, NeverEvict(n_up=16))
    with pytest.raises(ValueError, match="row must be below 1, got 1"):
        frame_shares(cache, model.config, inputs, row=1)
    with pytest.raises(ValueError, match="must have seen the 55 tokens of row 0"):
        frame_shares(NAMMCache(model, NeverEvict(n_up=16)), model.config, inputs)
    with pytest.raises(ValueError, match="must have video_grid_thw or pixel_values_videos"):
        frame_shares(cache, model.config, {"input_ids": inputs["input_ids"]})
    fewer = dict(inputs, input_ids=inputs["input_ids"].clone())
    fewer["input_ids"][0, BEFORE] = 1
    with pytest.raises(ValueError, match="video tokens"):
        frame_shares(cache, model.config, fewer)


def test_calibration_reads_what_the_model_sees(name, model, inputs):
    """The embeddings of a video; those of a text alone give what the decoder alone gives."""
    rule = H2O(Budget(0.5, scope="global"), n_up=16)
    question = [5, 6, 7]
    table = model.get_input_embeddings()
    done = calibrate_on_videos(rule, model, [inputs, _inputs(name, seed=3)], [[question]] * 2)
    assert model.get_input_embeddings() is table
    assert done.calibration is not None
    assert rule.calibration is None
    cache, _ = _read(model, inputs, done)
    assert cache.report().kept_fraction < 0.6
    other = calibrate_on_videos(rule, model, [inputs])
    assert not torch.equal(other.calibration.offsets, done.calibration.offsets)
    text, decoder = tokens(1, 48).clamp(max=IMAGE - 1), model.get_decoder()
    alone = calibrate(rule, decoder, [Text(tuple(text[0].tolist()), (Later(tuple(question)),))])
    same = calibrate_on_videos(rule, model, [{"input_ids": text}], [[question]])
    assert torch.equal(same.calibration.offsets, alone.calibration.offsets)
    with pytest.raises(ValueError, match="questions must be of 1 videos, got 2"):
        calibrate_on_videos(rule, model, [inputs], [[question]] * 2)
    with pytest.raises(ValueError, match="of one row each, got 2 rows"):
        calibrate_on_videos(rule, model, [_inputs(name, rows=2)])
    with pytest.raises(ValueError, match="at least one text"):
        calibrate_on_videos(rule, model, [])


def test_fitted_to_videos(name, model, inputs):
    question = (5, 6, 7)
    table = model.get_input_embeddings()
    namm = NAMMConfig(n_up=16, scorer="none")
    config = FitConfig(namm=namm, budget=Budget(0.5, scope="global"))
    videos = [inputs, _inputs(name, seed=3)]
    found = fit_on_videos(model, videos, config).policy
    assert model.get_input_embeddings() is table
    cache, _ = _read(model, inputs, found)
    assert cache.report().kept_fraction == pytest.approx(0.5, abs=0.1)
    asked = fit_on_videos(model, videos, config, [[question]] * 2).policy
    assert not torch.equal(asked.gate.weight, found.gate.weight)
    rows, decoder = tokens(2, 48).clamp(max=IMAGE - 1), model.get_decoder()
    texts = [Text(tuple(row), (Later(question),)) for row in rows.tolist()]
    alone = fit(decoder, texts, config).policy
    words = [{"input_ids": row[None]} for row in rows]
    same = fit_on_videos(model, words, config, [[question]] * 2).policy
    assert same.fingerprint() == alone.fingerprint()
    assert same.made_for == shape_of(model.config.get_text_config())
    with pytest.raises(ValueError, match="questions must be of 2 videos, got 1"):
        fit_on_videos(model, videos, config, [[question]])
