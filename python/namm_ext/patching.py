"""Give a model a memory, and take it away again without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .cache import NAMMCache, cache_keyword
from .cache.switching import UNDO, Undo, set_attention, use_namm_attention
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
    undo = UNDO.pop(model, None)
    if undo is None:
        return
    if undo.memory is not None:
        _unwrap(model, undo)
    set_attention(model, undo.attn_implementation)


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
        >>> policy = baselines.StreamingLLM(8, n_up=16)
        >>> with patch(model, policy) as memory:
        ...     _ = model.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=4)
        >>> memory.report().layers[0].kept
        ((8, 8),)
    """
    before = UNDO.get(model)
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


def _unwrap(model: PreTrainedModel, undo: Undo) -> None:
    undo.memory = None
    if undo.had_generate is None:
        del vars(model)["generate"]
    else:
        vars(model)["generate"] = undo.had_generate
