"""The two functions that transformers calls: attention over a memory, and its mask.

``NAMMLayer.update`` hands the *new* keys back and ties itself to them; the attention function
finds the layer there. A key without a layer (no ``NAMMCache``, a vision tower, a sliding layer of
a hybrid) goes to PyTorch's SDPA as if nothing had been registered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..reference import soft_cap
from .families import readers_of
from .latent import absorbed, check_module, headed, waiting_layer
from .layer import NAME, TAG, NAMMLayer

# Arguments of attention functions that change the result and that the kernels do not know.
_UNSUPPORTED = {
    "position_bias": "a position bias",
    "sliding_window": "a sliding window on a full-attention layer",
}
#: Queries whose logits are held together where attention is written out.
_QUERIES = 512


def namm_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Mask for a layer that returns exactly its new tokens: the 2-D padding mask, or None.

    Anything but plain causality over the new tokens (sliding windows, stock caches, overlays) is
    what ``sdpa_mask`` makes of it.
    """
    sizes: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        **kwargs,
    }
    # A mask left out means causality, which queries that are cut off would not know.
    shared = bool(readers_of(kwargs["config"])) if kwargs.get("config") is not None else False
    if q_length == kv_length and q_offset == kv_offset:
        # A single token sees itself whatever is laid over: no look at the device while decoding.
        plain = q_length == 1 or (mask_function is causal_mask_function and allow_is_causal_skip)
        if not plain and not allow_is_causal_skip and not torch.compiler.is_compiling():
            # An overlay for images says nothing more where there are none.
            whole = sdpa_mask(**sizes, attention_mask=None, allow_is_causal_skip=False)
            plain = whole is not None and torch.equal(whole, whole.new_ones(whole.shape).tril())
        if plain:
            if shared and attention_mask is not None:
                # For the last logits alone such models cut the queries' dimension of four.
                return attention_mask[:, None, None]
            return attention_mask
    return sdpa_mask(
        **sizes,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not shared,
    )


def namm_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens over everything their layer remembers, themselves included.

    Args:
        module: the attention module; its ``layer_idx`` and ``config`` must be the cache's.
        query: ``[B, Hq, L, D]`` after RoPE. key, value: ``[B, H, L, D]``, as ``update`` returned.
        attention_mask: None or ``[B, seen + L]`` bool.
        scaling: softmax scale, default ``D ** -0.5``.
        dropout: must be 0.
        s_aux: ``[Hq]`` logits of attention sinks.
        softcap: bound of the logits x, which become ``softcap * tanh(x / softcap)``.

    Returns:
        ``[B, L, Hq, Dv]`` and None: there are no attention weights to show.

    Raises:
        ValueError: for whatever would make the result silently wrong; says what.
    """
    layer: NAMMLayer | None = getattr(key, TAG, None) or waiting_layer(module)
    if layer is None:
        return _stock_attention(
            module, query, key, value, attention_mask, scaling, dropout, s_aux, softcap, **kwargs
        )
    # First: whatever is refused below, the keys have arrived.
    reader = layer.claim(module)
    if kwargs.get("use_cache") is False and layer.session.hears_use_cache:
        raise ValueError(
            "namm: use_cache must not be False with a NAMMCache, got False; generate would feed "
            "the whole text again at every step"
        )
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"namm: {meaning} ({name}) is not supported")
    if dropout or module.training:
        raise ValueError(
            "namm: the model must be in evaluation mode without dropout (model.eval()), got "
            f"training={module.training}, dropout={dropout}"
        )
    if torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    ):
        raise ValueError(
            "namm: attention over a memory is not differentiable; run the model under "
            "torch.no_grad()"
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("namm: attention must be causal, got is_causal=False")
    if (
        attention_mask is not None
        and layer.session.has_readers
        and attention_mask.shape[1:3] == (1, 1)
    ):
        attention_mask = attention_mask[:, 0, 0]  # as `namm_mask` made it
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "namm: attention_mask must be a 2-D padding mask; 4-D and bidirectional masks are not "
            f"supported, got shape {list(attention_mask.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        device_type = query.device.type
        if not torch.is_autocast_enabled(device_type):
            raise ValueError(
                "namm: query, key and value must have one dtype, got "
                f"{query.dtype}, {key.dtype}, {value.dtype}"
            )
        # SDPA is on autocast's list, our ops are not.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    latents, layer.latents = layer.latents, None
    if latents is not None:
        check_module(module)
        query, key = absorbed(module, query), torch.cat([*latents[::-1]], dim=-1).to(query.dtype)
        value = key[..., :0]  # the latents are there already
    if torch.compiler.is_compiling():
        out = torch.ops.namm_ext.layer_forward(
            query, key, value, attention_mask, layer.handle, scale, s_aux, softcap or 0.0,
            -1 if reader is None else reader,
        )  # fmt: skip
    elif reader is not None:
        out = layer.read(reader, query, key, value, scale, s_aux, softcap or 0.0)
    else:
        out = layer.forward(query, key, value, attention_mask, scale, s_aux, softcap or 0.0)
    return out if latents is None else headed(module, out), None


def _stock_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    s_aux: Tensor | None,
    softcap: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=query.shape[2],
            kv_length=key.shape[2],
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=query.device,
        )
    if s_aux is not None:
        return _sdpa_with_sink(query, key, value, attention_mask, scaling, s_aux), None
    if softcap is not None:
        return _soft_capped(query, key, value, attention_mask, scaling, softcap), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result: tuple[Tensor, None] = sdpa(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _sdpa_with_sink(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    s_aux: Tensor,
) -> Tensor:
    """PyTorch's SDPA leaves sinks out: here they are one more key, of zeros, with a bias."""
    length, size = query.shape[2], key.shape[2]
    if mask is None:
        mask = query.new_ones(length, size, dtype=torch.bool).tril(size - length)
    bias = query.new_zeros(query.shape[0], query.shape[1], length, size + 1)
    bias[..., :size].masked_fill_(~mask, -torch.inf)
    bias[..., size] = s_aux.to(query.dtype)[:, None]
    key, value = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous()


def _soft_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """PyTorch's SDPA knows no bound of logits: written out, some queries at a time."""
    length, size, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    if mask is None:
        mask = query.new_ones(length, size, dtype=torch.bool).tril(size - length)
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = []
    for q, seen in zip(query.split(_QUERIES, 2), mask.split(_QUERIES, -2), strict=True):
        logits = soft_cap(q @ key.mT * scale, softcap)
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        out.append(weights.to(value.dtype) @ value)
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, namm_attention_forward)
AttentionMaskInterface.register(NAME, namm_mask)
