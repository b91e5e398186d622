"""Tiny random hybrids: memories beside layers that slide, recur, convolve or do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hf_models import COMMON
from namm_ext.cache.families import readers_of
from namm_ext.cache.versions import VERSION

_SIZES: dict[str, Any] = {**COMMON, "num_hidden_layers": 4}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING: dict[str, Any] = {
    "sliding_window": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
#: The last three layers read the keys of the third and fourth.
_SHARED: dict[str, Any] = {
    "num_hidden_layers": 7, "num_kv_shared_layers": 3, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + [
        "sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip

HYBRIDS: dict[str, Callable[[], Any]] = {
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_SIZES, **_LINEAR, **_MOE, head_dim=8, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**_SIZES, **_LINEAR, head_dim=8),
    "olmo_hybrid": lambda: transformers.OlmoHybridConfig(
        **{**_SIZES, **_LINEAR, "linear_num_value_heads": 2},
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    ),
    "lfm2": lambda: transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **_SIZES, **_MOE, layer_types=["conv", "full_attention"] * 2, num_experts=4,
        num_dense_layers=1,
    ),
    "granite_4_h": lambda: transformers.GraniteMoeHybridConfig(
        **_SIZES, **_MAMBA, layer_types=["mamba", "attention"] * 2, num_local_experts=0,
        shared_intermediate_size=32,
    ),
    "granite_4": lambda: transformers.GraniteMoeHybridConfig(
        **_SIZES, **_MAMBA, layer_types=["attention"] * 4, num_local_experts=0,
        shared_intermediate_size=32,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{k: v for k, v in _SIZES.items() if k != "num_hidden_layers"}, **_MOE,
        layers_block_type=["mamba", "attention", "moe", "attention"], head_dim=8,
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, n_routed_experts=4,
        moe_shared_expert_intermediate_size=16,
    ),
    "jamba": lambda: transformers.JambaConfig(
        **_SIZES, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, num_experts=4,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: transformers.BambaConfig(**_SIZES, **_MAMBA, attn_layer_indices=[1, 3]),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **_SIZES, **_MAMBA, mamba_d_ssm=64, mamba_chunk_size=16
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_SIZES, head_dim=8, attention_chunk_size=16, intermediate_size_mlp=48,
        num_local_experts=2, interleave_moe_layer_step=2, no_rope_layers=[1, 1, 1, 0],
        layer_types=["chunked_attention"] * 3 + ["full_attention"],
    ),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **{**_SIZES, "intermediate_size": [48] * 4}, **_SLIDING, head_dim=8,
        num_kv_shared_layers=0, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **_SIZES, **_SLIDING, head_dim=8, global_head_dim=8, num_kv_shared_layers=0,
        vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **{**_SIZES, **_SLIDING}, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.5,
    ),
    "vaultgemma": lambda: transformers.VaultGemmaConfig(
        **{**_SIZES, **_SLIDING}, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=1.5,
    ),
    "gemma3n_shared": lambda: transformers.Gemma3nTextConfig(
        **{**_SIZES, **_SHARED, "intermediate_size": [48] * 7}, head_dim=8,
        vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 7,
    ),
    "gemma4_shared": lambda: transformers.Gemma4TextConfig(
        **{**_SIZES, **_SHARED}, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**_SIZES, **_LATENT, "num_hidden_layers": 2}, **_MOE, n_routed_experts=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **{**_SIZES, **_LATENT, "num_hidden_layers": 2}, **_MOE, n_routed_experts=4, n_group=1,
        topk_group=1, first_k_dense_replace=1, n_shared_experts=1,
    ),
    "minicpm3": lambda: transformers.MiniCPM3Config(
        **{**_SIZES, **_LATENT, "num_hidden_layers": 2}
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
}  # fmt: skip


def from_config(config: Any) -> Any:
    """A model that float64 can run: grouped products of experts have none, and SDPA has no bound
    of logits."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    exact = {"attn_implementation": "exact"} if capped else {}
    return transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="eager", **exact
    )


def build_hybrid(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model; the test is skipped where this transformers has none of the kind."""
    if not hasattr(transformers.cache_utils, "LinearAttentionLayer"):
        pytest.skip(f"transformers {transformers.__version__} has no layers for hybrids")
    if name == "nemotron_h" and not hasattr(transformers.cache_utils, "DummyLayer"):
        pytest.skip(f"transformers {transformers.__version__} has no layers without attention")
    if name == "olmo_hybrid" and VERSION < (5, 17):
        pytest.skip(f"transformers {transformers.__version__}: it has a cache class of its own")
    try:
        config = HYBRIDS[name]()
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")
    if name.endswith("_shared") and not readers_of(config):
        pytest.skip(f"transformers {transformers.__version__} does not say whose keys are read")
    torch.manual_seed(0)
    model = from_config(config)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "sinks", None) is not None:
                module.sinks.normal_(1.0)
    model = model.to(dtype).eval()
    if name == "granite_4" and VERSION < (5, 17):
        try:
            model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)
        except ValueError as error:
            pytest.skip(f"transformers {transformers.__version__} fails without a memory: {error}")
    return model
