"""Which models can have a memory."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel


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


def layer_types(config: PreTrainedConfig) -> list[str]:
    """``"full_attention"`` or ``"sliding_attention"`` for every layer.

    Raises:
        ValueError: for a kind of layer or attention that a memory cannot serve; names it.
    """
    name = config.model_type
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"NAMMCache: multi-head latent attention is not supported, got {name!r}")
    for field in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(config, field, None) is not None:
            raise ValueError(
                f"NAMMCache: softcapped attention logits are not supported, got {name!r}"
            )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(
            f"NAMMCache: keys and values shared between layers are not supported, got {name!r}"
        )
    if getattr(config, "is_causal", True) is False:
        raise ValueError(f"NAMMCache: attention must be causal, got {name!r}")
    num_layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * num_layers
    types = list(types)[:num_layers]
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                "NAMMCache: layers must have full or sliding attention, layer "
                f"{i} of {name!r} has {kind!r}"
            )
    if "full_attention" not in types:
        raise ValueError(
            f"NAMMCache: at least one layer must have full attention, in {name!r} all are sliding"
        )
    return types


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
    layer_types(config)
    if any(getattr(module, "_is_stateful", False) for module in decoders):
        raise ValueError(f"apply: {name} keeps a recurrent state, not only keys and values")
    if any(getattr(module, "sinks", None) is not None for module in model.modules()):
        raise ValueError(f"apply: {name} has attention sinks (learned), which are not supported")
