"""Which models can have a memory."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .recurrent import has_memory, recurrent_part
from .versions import VERSION, recording

# Layers without attention, which store nothing; only newer versions of transformers have them.
_Dummy: Any = getattr(cache_utils, "DummyLayer", None)
# What configurations call full attention.
_FULL = ("full_attention", "attention")
# Models with a state and attention in one layer, in this order.
_STATE_FIRST = ("falcon_h1",)
# Models whose layers do what neither their cache nor their configuration tells.
_PARTICULAR = {
    "diffllama": "it uses the keys of a layer twice",
    "doge": "it makes masks of its own from the values",
    "jetmoe": "it changes keys between cache and attention",
    "minimax": "it needs a cache class of its own",
}
_MISSING = ""
if not hasattr(cache_utils, "LinearAttentionLayer"):
    _MISSING = f"; transformers {transformers.__version__} has no cache for a state, 5.14 has"
if VERSION < (5, 17):
    _PARTICULAR["olmo_hybrid"] = "it needs a cache class of its own before transformers 5.17"


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration object that a model's decoder attention modules hold.

    Raises:
        ValueError: for encoder-decoders.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"NAMMCache: encoder-decoder models are not supported, got {config.model_type!r}"
        )
    decoder: PreTrainedConfig = config.get_text_config(decoder=True)
    return decoder


def readers_of(config: PreTrainedConfig) -> dict[int, tuple[int, ...]]:
    """Layers without keys of their own, by the layer whose keys they read (Gemma 3n, Gemma 4)."""
    modes = getattr(config, "kv_sharing_modes", None) or ()
    if "reuse" not in modes:
        return {}
    kinds: list[str] = config.layer_types
    owners = {kinds[i]: i for i, mode in enumerate(modes) if mode == "store"}
    return {
        owner: tuple(i for i, mode in enumerate(modes) if mode == "reuse" and kinds[i] == kind)
        for kind, owner in owners.items()
    }


def stock_layers(config: PreTrainedConfig) -> list[Any]:
    """The layers of transformers' own cache for a decoder; a memory goes where one keeps all keys
    and values.

    Raises:
        ValueError: for a kind of layer or attention that a memory cannot serve; names it.
    """
    name = config.model_type
    if name in _PARTICULAR:
        raise ValueError(f"NAMMCache: {name!r} is not supported, {_PARTICULAR[name]}")
    if getattr(config, "index_topk", None) is not None:
        raise ValueError(
            f"NAMMCache: attention to what an indexer selects is not supported, got {name!r}"
        )
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared and not readers_of(config):
        raise ValueError(
            f"NAMMCache: the last {shared} layers of {name!r} read keys of others, and "
            f"transformers {transformers.__version__} does not say of which"
        )
    if getattr(config, "is_causal", True) is False:
        raise ValueError(f"NAMMCache: attention must be causal, got {name!r}")
    layers = list(DynamicCache(config=config).layers)
    kinds = list(getattr(config, "layer_types", None) or [])
    for i, layer in enumerate(layers):
        # Versions that do not know a kind take it for full attention.
        kind = kinds[i] if i < len(kinds) else None
        known = type(layer) is not DynamicLayer or kind in (None, *_FULL)
        served = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, _Dummy)
        # Before 5.24 what has no attention had a state that nobody wrote.
        recurrent = recurrent_part(layer) is not None and kind not in ("moe", "mlp")
        if has_memory(layer):  # the state must be read before the attention
            recurrent = recurrent and name in _STATE_FIRST
        if not known or not (served or recurrent):
            raise ValueError(
                "NAMMCache: layers must have full, sliding or linear attention or a recurrent "
                f"state, layer {i} of {name!r} has {kind or type(layer).__name__!r}{_MISSING}"
            )
    if not any(map(has_memory, layers)):
        raise ValueError(
            f"NAMMCache: at least one layer must have full attention, in {name!r} none has"
        )
    return [recording(layer) for layer in layers]


def passes_use_cache(model: PreTrainedModel) -> bool:
    """Whether a model tells its layers ``use_cache``; some leave it at its default, False."""
    try:
        source = inspect.getsource(type(model.base_model).forward)
    except (OSError, TypeError):  # made in a notebook, or compiled
        return False
    return "use_cache=use_cache" in source


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose attention cannot be reached or has parts that are not computed.

    Raises:
        ValueError: names the part.
        TypeError: if it is not a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"apply: model must be a transformers model, got {type(model).__name__}")
    name = type(model).__name__
    config = decoder_config(model.config)
    decoders = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and module.config is config
    ]
    if not all(module._can_set_attn_implementation() for module in decoders):
        raise ValueError(
            f"apply: {name} does not use transformers' attention interface, so its attention "
            "cannot be reached"
        )
    layers = stock_layers(config)
    found = {getattr(module, "layer_idx", None) for module in model.modules()}
    missing = [i for i, x in enumerate(layers) if has_memory(x) and i not in found]
    if missing:
        raise ValueError(
            f"apply: the configuration of {name} tells of {len(layers)} layers, of which the model "
            f"has none with layer_idx {missing[0]}"
        )
    own = [m for m in model.modules() if getattr(m, "config", None) is config]
    causal = {bool(m.is_causal) for m in own if hasattr(m, "layer_idx") and hasattr(m, "is_causal")}
    if causal == {False}:  # cross-attention of a decoder is not either
        raise ValueError(f"apply: attention must be causal, that of {name} is not")
    # Where a configuration does not list its layers, a cache cannot know them all.
    stateful = any(getattr(module, "_is_stateful", False) for module in decoders)
    if stateful and getattr(config, "layer_types", None) is None:
        raise ValueError(f"apply: {name} keeps a recurrent state in layers that it does not list")
