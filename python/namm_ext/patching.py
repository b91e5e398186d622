"""Give a model a memory, and take it away again without a trace."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import NAME
from .cache import NAMMCache, cache_keyword, decoder_config, layer_types
from .policy import Policy
from .report import Report


class Memory:
    """The caches that a patched model makes: one per call of ``generate``.

    Attributes:
        policy: decides what they keep.
        cache: the last one, None before the first call.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.cache: NAMMCache | None = None

    def report(self) -> Report:
        """``report()`` of the last cache.

        Raises:
            ValueError: if nothing was generated yet.
        """
        if self.cache is None:
            raise ValueError("patch: no cache yet, call model.generate first")
        return self.cache.report()


#: Arguments of ``generate`` with which it drafts tokens and takes some of them back.
_DRAFTING = ("assistant_model", "prompt_lookup_num_tokens")


class _Undo:
    def __init__(self, attn_implementation: str) -> None:
        self.attn_implementation = attn_implementation
        self.memory: Memory | None = None
        self.had_generate: Any = None


_UNDO: weakref.WeakKeyDictionary[nn.Module, _Undo] = weakref.WeakKeyDictionary()


def apply(model: PreTrainedModel, policy: Policy) -> Memory:
    """Let ``model.generate`` use a fresh ``NAMMCache`` in every call that brings no cache.

    Changes this one model object: the attention implementation of its decoder and ``generate``.
    ``remove`` undoes both. A model that has a memory already gets the new policy.

    Args:
        model: a decoder of transformers on the attention interface, or a multimodal model around
            one; in evaluation mode when it is used.
        policy: a ``NAMM`` or one of ``namm_ext.baselines``.

    Returns:
        The memory, whose ``report()`` describes the last cache.

    Raises:
        ValueError: if a part of the model cannot have a memory; names it.
        TypeError: if ``policy`` is no policy.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"apply: policy must be a Policy, got {type(policy).__name__}")
    undo = use_namm_attention(model)
    if undo.memory is not None:
        _unwrap(model, undo)
    memory = undo.memory = Memory(policy)
    undo.had_generate = vars(model).get("generate")
    generate: Any = model.generate

    def generate_with_memory(*args: Any, **kwargs: Any) -> Any:
        given = [kwargs.get(name) for name in ("cache", "past_key_values")]
        brought = next((cache for cache in given if cache is not None), None)
        if brought is None:
            config = kwargs.get("generation_config")
            if not kwargs.get("use_cache", getattr(config, "use_cache", True) is not False):
                raise ValueError("patch: use_cache must be True for a model with a memory")
            for name in ("cache", "past_key_values"):
                kwargs.pop(name, None)
            memory.cache = kwargs[cache_keyword(model)] = NAMMCache(model, policy)
        elif isinstance(brought, NAMMCache):
            memory.cache = brought
        if memory.cache is not None and any(kwargs.get(name) for name in _DRAFTING):
            memory.cache.activate_past_recording()  # transformers before 5.16 does not ask
        return generate(*args, **kwargs)

    vars(model)["generate"] = generate_with_memory
    return memory


def remove(model: PreTrainedModel) -> None:
    """Undo ``apply`` (and what ``NAMMCache(model, ...)`` set); a model without memory is fine."""
    undo = _UNDO.pop(model, None)
    if undo is None:
        return
    if undo.memory is not None:
        _unwrap(model, undo)
    _set_attention(model, undo.attn_implementation)


@contextmanager
def patch(model: PreTrainedModel, policy: Policy) -> Iterator[Memory]:
    """``apply`` for the length of a ``with`` block; afterwards the model is as it was before.

    Example:
        >>> import torch, transformers
        >>> from namm_ext import baselines
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> policy = baselines.StreamingLLM(cache_size=8, n_up=16)
        >>> with patch(model, policy) as memory:
        ...     _ = model.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=4)
        >>> memory.report().layers[0].kept
        ((8, 8),)
    """
    before = _UNDO.get(model)
    previous = before.memory.policy if before is not None and before.memory is not None else None
    memory = apply(model, policy)
    try:
        yield memory
    finally:
        if before is None:
            remove(model)
        elif previous is not None:
            apply(model, previous)
        else:
            _unwrap(model, before)


def use_namm_attention(model: PreTrainedModel) -> _Undo:
    """Switch a model's decoder to the "namm" attention, once; what ``remove`` needs to undo it.

    Raises:
        ValueError: if the model's attention cannot be reached or has parts we do not compute.
    """
    undo = _UNDO.get(model)
    if undo is not None:
        if decoder_config(model.config)._attn_implementation != NAME:
            _set_attention(model, NAME)
        return undo
    _check_model(model)
    implementation = decoder_config(model.config)._attn_implementation
    _set_attention(model, NAME)
    undo = _UNDO[model] = _Undo(implementation)
    return undo


def _unwrap(model: PreTrainedModel, undo: _Undo) -> None:
    undo.memory = None
    if undo.had_generate is None:
        del vars(model)["generate"]
    else:
        vars(model)["generate"] = undo.had_generate


def _check_model(model: PreTrainedModel) -> None:
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


def _set_attention(model: PreTrainedModel, implementation: str) -> None:
    config = decoder_config(model.config)
    if config is model.config:
        model.set_attn_implementation({"": implementation})
    else:
        # A vision tower keeps its own attention.
        keys = [key for key in model.config.sub_configs if getattr(model.config, key) is config]
        model.set_attn_implementation(dict.fromkeys(keys, implementation))
    if config._attn_implementation != implementation:
        raise ValueError(
            f"apply: the attention implementation of {type(model).__name__} could not be set to "
            f"{implementation!r}"
        )
