"""A memory belongs to a call, never to the model object: copies, threads, order, configurations."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from hf_models import FAMILIES, build, evicting_policy, tokens
from namm_ext import NAMMCache, apply, patch, remove
from namm_ext.baselines import H2O, NeverEvict, StreamingLLM
from namm_ext.cache import borrow, cache_keyword

POLICIES = [
    evicting_policy(budget=10),
    StreamingLLM(8, 16),
    H2O(12, 16),
    NeverEvict(n_up=16),
]


@pytest.fixture
def model():
    return build(FAMILIES["llama"](), torch.float64)


def greedy(model, ids, **kwargs):
    return model.generate(ids, do_sample=False, **{"max_new_tokens": 20, **kwargs})


def is_clean(model):
    return model.config._attn_implementation == "sdpa" and not {
        name for name in vars(model) if name == "generate" or "namm" in name
    }


# Copies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_a_copy_is_independent(model, how):
    ids, policy = tokens(1, 40), POLICIES[0]
    memory = apply(model, policy)
    want = greedy(model, ids)
    other = how(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(greedy(other, ids), want)  # its own weights
    assert memory.report().layers[0].num_updates > 0
    assert not torch.equal(greedy(model, ids), want)
    remove(other)
    assert is_clean(other)
    assert not is_clean(model)
    assert not torch.equal(greedy(other, ids), want)  # the stock cache
    remove(model)
    assert is_clean(model)


def test_a_copy_outlives_the_block_and_the_original(model):
    ids = tokens(1, 40)
    with patch(model, POLICIES[1]) as memory:
        want = greedy(model, ids)
        other = copy.deepcopy(model)
    assert is_clean(model)
    assert memory.cache is not None
    del model, memory
    assert torch.equal(greedy(other, ids), want)
    remove(other)
    assert is_clean(other)


def test_a_copy_of_a_model_with_a_cache_of_its_own(model):
    NAMMCache(model, POLICIES[0])
    other = copy.deepcopy(model)
    remove(model)
    remove(other)
    assert is_clean(model)
    assert is_clean(other)


# Order --------------------------------------------------------------------------------------------


def test_blocks_left_in_another_order(model):
    ids = tokens(1, 40)
    stock = greedy(model, ids)
    want = []
    for policy in POLICIES[:2]:
        with patch(model, policy):
            want.append(greedy(model, ids))
    assert not torch.equal(*want)
    first, second = (patch(model, policy) for policy in POLICIES[:2])
    first.__enter__()
    second.__enter__()
    assert torch.equal(greedy(model, ids), want[1])
    first.__exit__(None, None, None)
    assert torch.equal(greedy(model, ids), want[1])
    second.__exit__(None, None, None)
    assert is_clean(model)
    assert torch.equal(greedy(model, ids), stock)


def test_remove_leaves_blocks_alone(model):
    ids = tokens(1, 40)
    with patch(model, POLICIES[1]):
        want = greedy(model, ids)
    apply(model, POLICIES[0])
    with patch(model, POLICIES[1]):
        remove(model)
        assert torch.equal(greedy(model, ids), want)
    assert is_clean(model)


def test_an_instance_that_had_a_generate_gets_it_back(model):
    ids, calls = tokens(1, 40), []

    def generate(*args, **kwargs):
        calls.append(kwargs)
        return type(model).generate(model, *args, **kwargs)

    model.generate = generate
    with patch(model, POLICIES[0]):
        greedy(model, ids)
    assert model.generate is generate
    assert isinstance(calls[0][cache_keyword(model)], NAMMCache)


def test_a_generate_put_over_ours_stays(model):
    ids, policy = tokens(1, 40), POLICIES[0]
    stock = greedy(model, ids)
    with patch(model, policy):
        inner = model.generate
        model.generate = lambda *args, **kwargs: inner(*args, **kwargs)
        want = greedy(model, ids)
    assert not torch.equal(want, stock)
    assert torch.equal(greedy(model, ids), stock)  # what lies below passes calls through
    with patch(model, policy):
        assert torch.equal(greedy(model, ids), want)


# Threads ------------------------------------------------------------------------------------------


def test_threads_with_memories_of_their_own(model):
    """Four threads, fifty calls each, blocks and caches mixed: every answer right, model clean."""
    ids = [tokens(1, 20 + n, seed=n) for n in range(4)]
    kwargs = {"max_new_tokens": 2}
    want = []
    for i, policy in zip(ids, POLICIES, strict=True):
        with patch(model, policy):
            want.append(greedy(model, i, **kwargs))
    assert is_clean(model)

    def work(n):
        wrong = 0
        for _ in range(50):
            with patch(model, POLICIES[n]) as memory:
                wrong += not torch.equal(greedy(model, ids[n], **kwargs), want[n])
                wrong += memory.report().policy != type(POLICIES[n]).__name__
                wrong += memory.report().layers[0].seen != (ids[n].shape[1] + 1,)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [0] * 4
    assert is_clean(model)


def test_threads_that_share_a_memory(model):
    """Each reports the cache of its own last call; one that made none the newest."""
    ids = [tokens(1, 20 + n, seed=n) for n in range(4)]
    barrier = threading.Barrier(4)

    def work(n):
        greedy(model, ids[n], max_new_tokens=2)
        barrier.wait()
        return memory.report().layers[0].seen

    with patch(model, POLICIES[1]) as memory, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [(21 + n,) for n in range(4)]
        assert memory.report().layers[0].seen[0] in range(21, 25)
    assert is_clean(model)


def test_a_call_outlives_its_block(model):
    """A thread that began to generate inside the block ends as it began."""
    ids = tokens(1, 40)
    started, left = threading.Event(), threading.Event()

    class Wait(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            started.set()
            left.wait()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with patch(model, POLICIES[0]):
        want = greedy(model, ids)
        pool = ThreadPoolExecutor(1)
        got = pool.submit(greedy, model, ids, stopping_criteria=[Wait()])
        assert started.wait(60)
    left.set()
    assert torch.equal(got.result(), want)
    pool.shutdown()
    assert is_clean(model)


def test_layers_made_by_threads_have_handles_of_their_own(model):
    def work(_):
        return [layer.handle.item() for _ in range(50) for layer in
                NAMMCache(model.config, POLICIES[0]).layers]  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        handles = [handle for part in pool.map(work, range(4)) for handle in part]
    assert len(set(handles)) == len(handles) == 400


# Borrowing ----------------------------------------------------------------------------------------


def test_borrowing_gives_back_what_was_there(model):
    ids = tokens(1, 40)
    with borrow(model), torch.no_grad():
        model(ids, past_key_values=NAMMCache(model, POLICIES[0]))
    assert is_clean(model)
    with borrow(model, "eager"):
        assert model.config._attn_implementation == "eager"
    with pytest.raises(KeyError), borrow(model, "eager"):
        raise KeyError
    assert is_clean(model)
    memory = apply(model, POLICIES[0])
    want = greedy(model, ids)
    with borrow(model, None):
        assert model.config._attn_implementation == "sdpa"
        with borrow(model):
            assert model.config._attn_implementation == "namm"
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "namm"
    with borrow(model):
        NAMMCache(model, POLICIES[1])
    assert torch.equal(greedy(model, ids), want)
    assert memory.report().policy == "NAMM"
    remove(model)
    assert is_clean(model)


# What a call asks for -----------------------------------------------------------------------------


def test_the_effective_configuration_decides(model):
    """Checkpoints ship with use_cache=False; without a cache every step would feed all again."""
    ids = tokens(1, 40)
    off = transformers.GenerationConfig(use_cache=False, max_new_tokens=3, do_sample=False)
    refused = pytest.raises(ValueError, match=r"patch: use_cache must be True .* pass use_cache=T")
    with patch(model, POLICIES[1]) as memory:
        for call in (
            lambda: model.generate(ids, off),
            lambda: model.generate(ids, generation_config=off),
            lambda: model.generate(ids, use_cache=None, max_new_tokens=3),
            lambda: model.generate(ids, off, cache=NAMMCache(model, POLICIES[1])),
        ):
            with refused:
                call()
        model.generation_config.use_cache = False
        with refused:
            greedy(model, ids)
        assert memory.cache is None
        greedy(model, ids, use_cache=True)
        assert memory.report().layers[0].seen == (59,)
        model.generate(ids, transformers.GenerationConfig(use_cache=True, max_new_tokens=3))
        assert memory.report().layers[0].seen == (42,)
        embeds = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=embeds, max_new_tokens=3)  # generate turns the cache on
        assert memory.report().layers[0].seen == (42,)


@pytest.mark.parametrize("place", ["call", "config", "model"])
def test_cache_implementations_are_refused(model, place):
    config = transformers.GenerationConfig(cache_implementation="static", max_new_tokens=2)
    kwargs = {"call": {"cache_implementation": "static"}, "config": {"generation_config": config}}
    if place == "model":
        model.generation_config = config
    with patch(model, POLICIES[1]), pytest.raises(
        ValueError, match=r"patch: cache_implementation must be None .* got 'static'"
    ):  # fmt: skip
        model.generate(tokens(1, 5), **kwargs.get(place, {}))


def test_attention_weights_are_warned_about(model):
    with patch(model, POLICIES[1]), pytest.warns(UserWarning, match="output_attentions has no eff"):
        greedy(model, tokens(1, 5), output_attentions=True, return_dict_in_generate=True)


def test_a_cache_given_to_generate_without_caching_is_refused(model):
    cache = NAMMCache(model, POLICIES[1])
    with pytest.raises(ValueError, match="namm: use_cache must not be False with a NAMMCache"):
        greedy(model, tokens(1, 5), past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 0


# Drafts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_drafted", [3, 20])
def test_a_drafter_with_a_memory(model, tokens_drafted):
    """Its tokens are taken back between its calls, behind updates too."""
    ids = tokens(1, 40)
    assistant = build(FAMILIES["llama"](), torch.float64, seed=1)
    assistant.generation_config.num_assistant_tokens = tokens_drafted
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    with patch(model, POLICIES[0]) as memory, patch(assistant, POLICIES[1]) as drafts:
        want = greedy(model, ids, max_new_tokens=50)
        got = greedy(model, ids, max_new_tokens=50, assistant_model=assistant)
        assert torch.equal(got, want)
        assert drafts.cache.is_recording
        assert drafts.report().layers[0].num_updates > 3
        assert not memory.cache.is_recording  # over with the call


def test_a_model_that_drafts_for_itself_reports_the_text(model):
    ids = tokens(1, 40)
    with patch(model, POLICIES[0]) as memory:
        want = greedy(model, ids)
        got = greedy(model, ids, assistant_model=model)
        assert torch.equal(got, want)
        assert memory.report().layers[0].seen == (59,)
