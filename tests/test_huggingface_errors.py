"""Whatever would be silently wrong is a clear error."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import transformers
from hf_models import COMMON, FAMILIES, build, evicting_policy, gemma3_config, tokens
from namm_ext import Budget, NAMMCache, apply, patch, remove
from namm_ext.baselines import H2O, TOVA, NeverEvict
from namm_ext.cache.attention import namm_attention_forward
from namm_ext.cache.versions import VERSION, check_version

POLICY = NeverEvict(n_up=16)


@pytest.fixture
def model():
    return build(FAMILIES["llama"]())


def error(text):
    return pytest.raises(ValueError, match=re.escape(text))


# Models -------------------------------------------------------------------------------------------

MODELS = {
    "bloom": (
        lambda: transformers.BloomConfig(
            vocab_size=97, hidden_size=32, n_layer=2, n_head=4
        ),
        "apply: BloomForCausalLM does not use transformers' attention interface, so its attention "
        "cannot be reached",
    ),
    "mamba": (
        lambda: transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
        "NAMMCache: at least one layer must have full attention, in 'mamba' none has",
    ),
    "all_sliding": (
        lambda: transformers.MistralConfig(**COMMON, sliding_window=8),
        "NAMMCache: at least one layer must have full attention, in 'mistral' none has",
    ),
    "indexer": (
        lambda: transformers.DeepseekV32Config(
            **{**COMMON, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8,
            qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4,
            num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
            first_k_dense_replace=2,
        ),
        "NAMMCache: attention to what an indexer selects is not supported, got 'deepseek_v32'",
    ),
    "both_in_one": (
        lambda: transformers.ZambaConfig(
            **{**COMMON, "num_hidden_layers": 4}, layer_types=["linear_attention", "hybrid"] * 2,
            n_mamba_heads=2, mamba_dt_rank=4,
        ),
        "NAMMCache: layers must have full, sliding or linear attention or a recurrent state, layer "
        "1 of 'zamba' has 'hybrid'",
    ),
    "minimax": (
        lambda: transformers.MiniMaxConfig(**COMMON, num_local_experts=2),
        "NAMMCache: 'minimax' is not supported, it needs a cache class of its own",
    ),
    "jetmoe": (
        lambda: transformers.JetMoeConfig(**COMMON, kv_channels=8, num_local_experts=2),
        "NAMMCache: 'jetmoe' is not supported, it changes keys between cache and attention",
    ),
    "doge": (
        lambda: transformers.DogeConfig(**COMMON),
        "NAMMCache: 'doge' is not supported, it makes masks of its own from the values",
    ),
    "diffllama": (
        lambda: transformers.DiffLlamaConfig(**COMMON),
        "NAMMCache: 'diffllama' is not supported, it uses the keys of a layer twice",
    ),
    "other_layers": (
        lambda: transformers.BartConfig(
            vocab_size=97, d_model=16, encoder_layers=3, decoder_layers=2,
            decoder_attention_heads=2, decoder_ffn_dim=16, is_encoder_decoder=False,
        ),
        "apply: the configuration of BartForCausalLM tells of 3 layers, of which the model has "
        "none with layer_idx 2",
    ),
    "bidirectional": (
        lambda: transformers.BertConfig(
            **{k: v for k, v in COMMON.items() if "token_id" not in k}, is_decoder=False
        ),
        "apply: attention must be causal, that of BertLMHeadModel is not",
    ),
}  # fmt: skip


# What the oldest version knows less of.
BEFORE_5_14 = {
    "mamba": "apply: MambaForCausalLM keeps a recurrent state in layers that it does not list",
    "diffllama": "apply: DiffLlamaForCausalLM does not use transformers' attention interface, so "
    "its attention cannot be reached",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_without_a_memory_are_refused(name):
    make, message = MODELS[name]
    if VERSION < (5, 14):
        message = BEFORE_5_14.get(name, message)
        if name in ("both_in_one", "indexer"):
            pytest.skip(f"transformers {transformers.__version__} has no such layers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).eval()
    implementation = model.config._attn_implementation
    with error(message):
        apply(model, POLICY)
    with error(message):
        NAMMCache(model, POLICY)
    assert model.config._attn_implementation == implementation
    assert "generate" not in vars(model)


def test_recurrent_states_are_refused(model, monkeypatch):
    """For hybrids whose configuration does not list its layers."""
    monkeypatch.setattr(model.model, "_is_stateful", True, raising=False)
    with error("apply: LlamaForCausalLM keeps a recurrent state in layers that it does not list"):
        apply(model, POLICY)


def test_a_model_without_generate_is_refused_whole(model):
    before = dict(vars(model.model))
    message = (
        "apply: model must have generate, which LlamaModel has not; pass "
        "cache=NAMMCache(model, policy) to its calls"
    )
    with error(message):
        apply(model.model, POLICY)
    with error(message), patch(model.model, POLICY):
        pass
    assert vars(model.model).keys() == before.keys()
    cache = NAMMCache(model.model, POLICY)
    model.model(torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
    assert cache.get_seq_length() == 40


def test_a_call_that_uses_no_memory_says_so(model):
    ids = torch.ones(1, 40, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids)
        with patch(model, POLICY):
            model.generate(ids, max_new_tokens=2)
            model(ids, past_key_values=NAMMCache(model, POLICY))
            model(ids, use_cache=False)
            twin = copy.deepcopy(model)
            with pytest.raises(UserWarning, match="called without a cache, so its memory is not"):
                model(ids)
        model(ids)
        assert not model._forward_pre_hooks
        remove(twin)
        twin(ids)


def test_encoder_decoders_are_refused():
    config = transformers.BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    with error("NAMMCache: encoder-decoder models are not supported, got 'bart'"):
        apply(model, POLICY)


def test_not_a_model_or_not_a_policy(model):
    with pytest.raises(TypeError, match="apply: model must be a transformers model, got Linear"):
        apply(torch.nn.Linear(1, 1), POLICY)
    with pytest.raises(TypeError, match="apply: policy must be a Policy, got str"):
        apply(model, "namm")
    with pytest.raises(TypeError, match="NAMMCache: policy must be a Policy, got int"):
        NAMMCache(model, 3)


# Calls --------------------------------------------------------------------------------------------


def test_wrong_attention_implementation(model):
    cache = NAMMCache(model, POLICY)
    remove(model)
    with (
        torch.no_grad(),
        error(
            "NAMMCache: the model's attn_implementation must be 'namm', got 'sdpa'; use "
            "namm_ext.apply(model, policy)"
        ),
    ):
        model(tokens(1, 5), past_key_values=cache)


def test_cache_of_another_model(model):
    other = build(FAMILIES["llama"]())
    cache = NAMMCache(model, POLICY)
    NAMMCache(other, POLICY)
    with torch.no_grad(), error("NAMMCache: the cache was made for another model"):
        other(tokens(1, 5), past_key_values=cache)


def test_tokens_not_consumed(model):
    cache = NAMMCache(model, POLICY)
    k = torch.zeros(1, 2, 3, 8)
    cache.update(k, k.clone(), 0)
    with error("NAMMCache: layer 0 did not consume the tokens of the last call"):
        cache.update(k, k.clone(), 0)


def test_key_used_twice_or_by_another_layer(model):
    cache = NAMMCache(model, POLICY)
    attention = model.model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    key, value = cache.update(k, k.clone(), 0)
    with error("NAMMCache: the keys of layer 0 are used more than once"):
        namm_attention_forward(model.model.layers[1].self_attn, q, key, value, None)
    namm_attention_forward(attention, q, key, value, None)
    with error("NAMMCache: the keys of layer 0 are used more than once"):
        namm_attention_forward(attention, q, key, value, None)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "namm: a position bias (position_bias) is not"),
        ({"sliding_window": 8}, "namm: a sliding window on a full-attention layer"),
        ({"dropout": 0.1}, "namm: the model must be in evaluation mode without dropout"),
        ({"is_causal": False}, "namm: attention must be causal, got is_causal=False"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_attention_arguments(model, kwargs, message):
    cache = NAMMCache(model, POLICY)
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    key, value = cache.update(k, k.clone(), 0)
    with error(message):
        namm_attention_forward(model.model.layers[0].self_attn, q, key, value, None, **kwargs)


def test_training_and_gradients(model):
    cache = NAMMCache(model, POLICY)
    model.requires_grad_(True)
    with error("namm: attention over a memory is not differentiable; run the model under "
               "torch.no_grad()"):  # fmt: skip
        model(tokens(1, 5), past_key_values=cache)
    model.train()
    with (
        torch.no_grad(),
        error(
            "namm: the model must be in evaluation mode without dropout (model.eval()), got "
            "training=True, dropout=0.0"
        ),
    ):
        model(tokens(1, 5), past_key_values=NAMMCache(model, POLICY))


def test_4d_and_bidirectional_masks(model):
    ids = tokens(1, 5)
    mask = torch.zeros(1, 1, 5, 5)
    with (
        torch.no_grad(),
        error(
            "namm: attention_mask must be a 2-D padding mask; 4-D and bidirectional masks are not "
            "supported, got shape [1, 1, 5, 5]"
        ),
    ):
        model(ids, attention_mask=mask, past_key_values=NAMMCache(model, POLICY))


@torch.no_grad()
def test_masks_of_the_wrong_kind(model):
    ids = tokens(2, 6)

    def call(cache, mask, ids=ids):
        model(ids, attention_mask=torch.tensor(mask), past_key_values=cache)

    cache = NAMMCache(model, POLICY)
    call(cache, [[1] * 6, [0, 0, 1, 1, 1, 1]])
    changed = "namm: attention_mask must not change for tokens already in the cache"
    with error(changed):
        call(cache, [[1] * 7, [1] * 7], ids[:, :1])
    cache = NAMMCache(model, POLICY)
    call(cache, [[1] * 6, [0, 0, 1, 1, 1, 1]])
    with error(changed):
        call(cache, [[1] * 7, [0] + [1] * 6], ids[:, :1])
    cache = NAMMCache(model, POLICY)
    call(cache, [[1] * 6, [1] * 6])
    for row in ([0] + [1] * 6, [1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1]):
        with error(changed + ", except that the last ones of a row become padding"):
            call(cache, [[1] * 7, row], ids[:, :1])
    cache = NAMMCache(model, POLICY)
    call(cache, [[1] * 6, [0, 0, 1, 1, 1, 1]])
    with error(changed + "; they were padded, now there is no mask"):
        model(ids[:, :1], past_key_values=cache)
    with error(
        "namm: attention_mask must be [batch, tokens seen + new tokens] = [2, 6], got [2, 9]"
    ):
        call(NAMMCache(model, POLICY), [[1] * 9, [1] * 9])


@torch.no_grad()
def test_batches_that_change(model):
    cache = NAMMCache(model, POLICY)
    model(tokens(2, 6), past_key_values=cache)
    with error("NAMMCache: batch must have 2 rows as before, got 3"):
        model(tokens(3, 1), past_key_values=cache)
    policy = evicting_policy()
    with error("NAMMCache: param_index must have one entry per batch row, 2 (beams and returned "
               "sequences included), got 3"):  # fmt: skip
        model(tokens(2, 6), past_key_values=NAMMCache(model, policy, param_index=[0, 0, 0]))
    with error("NAMMCache: param_index must be 1-D, got shape [1, 1]"):
        NAMMCache(model, policy, param_index=torch.zeros(1, 1))


def test_generate_without_a_cache_is_refused(model):
    with patch(model, POLICY):
        config = transformers.GenerationConfig(use_cache=False)
        for kwargs in ({"use_cache": False}, {"generation_config": config}):
            with error("patch: use_cache must be True for a model with a memory"):
                model.generate(tokens(1, 5), max_new_tokens=2, **kwargs)
        with pytest.raises(ValueError, match="cache_implementation"):
            model.generate(tokens(1, 5), max_new_tokens=2, cache_implementation="static")


def test_hybrid_crop_follows_the_sliding_layers():
    """Stock sliding layers cannot be rolled back without recording; nothing else is then."""
    model = build(gemma3_config())
    cache = NAMMCache(model, NeverEvict(n_up=64))
    model(tokens(1, 40), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"crop: sliding layers have dropped tokens"):
        cache.crop(-3)
    assert cache.layers[2].kv.seen == (40,)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize(
    ("policy", "fits"),
    [
        (evicting_policy(), True),
        (evicting_policy(budget=Budget(8, scope="per_layer", threshold=0.0)), False),
        (evicting_policy(budget=Budget(threshold=0.0, selection="original")), False),
        (TOVA(8, 16), False),
        (TOVA(8, 16, heads="head"), True),
        (H2O(Budget(8, scope="per_layer"), 16), False),
    ],
    ids=["threshold", "per_layer", "original", "TOVA", "TOVA_head", "H2O_layer"],
)
def test_heads_split_over_processes(model, policy, fits):
    """Tensor parallelism: a process has some of the heads, so they cannot compete."""
    cache = NAMMCache(model, policy)
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8)
    key, value = cache.update(k, k.clone(), 0)
    attention = model.model.layers[0].self_attn
    if fits:
        assert namm_attention_forward(attention, q, key, value, None)[0].shape == (1, 3, 2, 8)
    else:
        with error("NAMMCache: a process holds 1 of 2 KV heads, so the policy must decide for each "
                   "head by itself"):  # fmt: skip
            namm_attention_forward(attention, q, key, value, None)


def test_old_transformers_are_refused():
    check_version("5.4.0")
    check_version("6.0.0.dev0")
    with pytest.raises(
        ImportError, match=r"namm_ext: transformers must be at least 5.4, got 5.3.1"
    ):
        check_version("5.3.1")
