"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): a memory of latents.

A token's keys of all heads are ``W_k c`` beside one rotated part r, its values ``W_v c``, of one
latent c. transformers caches c and r and expands them behind the cache. Here the weights are moved
to the other side (*absorbed*): queries (q_r, ``W_k^T q``) meet one head of keys (r, c), which are
values too, and ``W_v`` makes heads of what comes out of c. The same numbers but for rounding, and
a memory that holds latents once, as many numbers as the stock cache.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_waiting = threading.local()


def caches_latents(config: PreTrainedConfig) -> bool:
    """Whether this transformers caches a decoder's latents; before 5.17 it expanded them first."""
    if getattr(config, "kv_lora_rank", None) is None:
        return False
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    return hasattr(DeepseekV3Attention, "expand_kv")


def num_memory_heads(config: PreTrainedConfig) -> int | None:
    """KV heads of a memory, all of them on one process; None if the configuration says nothing."""
    return 1 if caches_latents(config) else getattr(config, "num_key_value_heads", None)


def wait_for_attention(layer: Any) -> None:
    """The keys that attention will get are made of what this memory of a layer has handed out."""
    _waiting.layer = weakref.ref(layer)


def waiting_layer(module: nn.Module) -> Any:
    """The memory whose latents the attention of ``module`` has expanded; None if there is none."""
    reference = getattr(_waiting, "layer", None)
    layer = None if reference is None else reference()
    if layer is None or layer.latents is None or not layer.pending:
        return None
    config = getattr(module, "config", None)
    ours = config is layer.session.config and getattr(module, "layer_idx", -1) == layer.layer_idx
    return layer if ours else None


def check_module(module: nn.Module) -> None:
    """Refuse an attention whose weights cannot be absorbed.

    Raises:
        ValueError: says what is missing.
    """
    projection: Any = getattr(module, "kv_b_proj", None)
    weight = getattr(projection, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.element_size() < 2
        or getattr(projection, "bias", None) is not None
    ):
        raise ValueError(
            f"NAMMCache: latent attention needs kv_b_proj with plain weights and no bias, "
            f"{type(module).__name__} has {type(projection).__name__}"
        )


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """``W_k [Hq, D, rank]`` and ``W_v [Hq, Dv, rank]``."""
    rank, nope, dim_v = module.kv_lora_rank, module.qk_nope_head_dim, module.v_head_dim
    both = module.kv_b_proj.weight.view(-1, nope + dim_v, rank)
    return both[:, :nope], both[:, nope:]


def absorbed(module: nn.Module, query: Tensor) -> Tensor:
    """Queries ``[B, Hq, L, nope + rope]`` as they meet latents, ``[B, Hq, L, rope + rank]``."""
    keys, _ = _weights(module)
    nope = keys.shape[1]
    part = torch.einsum("bhld,hdr->bhlr", query[..., :nope], keys.to(query.dtype))
    return torch.cat([query[..., nope:], part], dim=-1)


def headed(module: nn.Module, out: Tensor) -> Tensor:
    """Attention over keys ``[B, L, Hq, rope + rank]`` as the model's heads ``[B, L, Hq, Dv]``."""
    _, values = _weights(module)
    return torch.einsum("blhr,hvr->blhv", out[..., -values.shape[2] :], values.to(out.dtype))
