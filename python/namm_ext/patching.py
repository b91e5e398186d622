"""Give a model a memory, and take it away again without a trace.

``generate`` of the model object is replaced by one that brings a fresh ``NAMMCache``; a model that
has none, and reads a whole sequence in every call, gets one in each call. Whose memory that is
depends on who calls: threads and tasks with a ``patch`` of their own get theirs.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .cache import NAMMCache, cache_keyword
from .cache.attention import NAME
from .cache.families import decoder_config
from .cache.switching import LOCK, borrow, keep, opened, release
from .policy import Policy
from .report import Report


class Memory:
    """The caches that a patched model makes: one per call of ``generate``, or of a model without.

    Attributes:
        policy: decides what they keep.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._newest: NAMMCache | None = None
        self._own = threading.local()

    @property
    def cache(self) -> NAMMCache | None:
        """The cache of this thread's last call; of the last call of all if it made none; None
        before the first."""
        own: NAMMCache | None = getattr(self._own, "cache", None)
        return self._newest if own is None else own

    @cache.setter
    def cache(self, cache: NAMMCache) -> None:
        self._newest = self._own.cache = cache

    def report(self) -> Report:
        """``report()`` of ``cache``.

        Raises:
            ValueError: if nothing was generated yet.
        """
        if self.cache is None:
            raise ValueError("patch: no cache yet, call model.generate first")
        return self.cache.report()

    def __getstate__(self) -> dict[str, Any]:
        return {"policy": self.policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Memory.__init__(self, **state)


class _Memories:
    """The memories of one model object. Refers to nothing that a copy would share."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.memories: list[Memory] = []
        self.applied: Memory | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is in no block; it keeps the newest memory until ``remove``.
        applied = Memory(self._all()[-1].policy) if self._all() else None
        return {**vars(self), "memories": [], "applied": applied}

    def _all(self) -> list[Memory]:
        return [*([] if self.applied is None else [self.applied]), *self.memories]

    def _memory(self) -> Memory | None:
        """Of the innermost block the caller is in; otherwise the newest there is."""
        with LOCK:
            mine = [user for user in opened(self.model) if isinstance(user, Memory)]
            return next(reversed([*self._all(), *mine]), None)


class _Generate(_Memories):
    """``generate`` of a model with a memory."""

    def __init__(self, model: PreTrainedModel, own: Any) -> None:
        super().__init__(model)
        self.own = own  # what was in its place in the object's __dict__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.model
        memory = self._memory()
        own = self.own
        if own is None:
            own = partial(type(model).generate, model)
        if memory is None:
            return own(*args, **kwargs)
        call = _Call(model, args, kwargs)
        with borrow(model, user=memory):
            given = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
            cache = next((cache for cache in given if cache is not None), None)
            if cache is None or isinstance(cache, NAMMCache):
                call.check()
            if cache is None:
                cache = NAMMCache(model, memory.policy)
            kwargs[cache_keyword(model)] = cache
            if not isinstance(cache, NAMMCache):
                return own(*args, **kwargs)
            recording = cache.is_recording
            if call.drafts or call.is_draft:
                cache.activate_past_recording()
            memory.cache = cache
            try:
                return own(*args, **kwargs)
            finally:
                # The model may have drafted for itself.
                memory.cache = cache
                # Who asked for a draft takes tokens back after the call.
                if not recording and not call.is_draft:
                    cache.end_past_recording()


class _Trunk(_Memories):
    """Hands the decoder within a model that hands it no cache a fresh one in every call."""

    def __call__(
        self, trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        memory, keyword = self._memory(), cache_keyword(trunk)
        # Whoever has borrowed the model for another attention has no use for a memory.
        switched = trunk.config._attn_implementation == NAME
        if memory is None or not switched or kwargs.get(keyword) is not None:
            return None
        with borrow(self.model, user=memory):
            memory.cache = cache = NAMMCache(self.model, memory.policy)
        return args, {**kwargs, keyword: cache, "use_cache": True}


class _Call:
    """What a call of ``generate`` asks for, resolved as ``generate`` does."""

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(type(model).generate).parameters][1:]
        self.given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.configs = (self.given.get("generation_config"), model.generation_config)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument of the call, else of its configuration, else of the model's."""
        if name in self.given:
            return self.given[name]
        values = (getattr(config, name, None) for config in self.configs)
        return next((value for value in values if value is not None), default)

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted and some of them taken back."""
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        return any(self.get(name) for name in names)

    @property
    def is_draft(self) -> bool:
        """Whether the call itself drafts for another model, which will take tokens back."""
        return bool(self.get("is_assistant"))

    def check(self) -> None:
        """Refuse what would go on without the memory.

        Raises:
            ValueError: names the argument.
        """
        use_cache = self.get("use_cache", True)
        if self.given.get("inputs_embeds") is None and not use_cache:
            raise ValueError(
                "patch: use_cache must be True for a model with a memory, got "
                f"{use_cache} from the call, its generation_config or model.generation_config; "
                "pass use_cache=True"
            )
        config: Any = self.given.get("generation_config")
        if self.is_draft and getattr(config, "cache_implementation", None) == "dynamic_full":
            # Before 5.17 drafters ask for no sliding layers, so that they can be cropped.
            config.cache_implementation = None
        implementation = self.get("cache_implementation")
        # "hybrid" was the default of checkpoints once; generate drops it.
        if implementation not in (None, "hybrid"):
            raise ValueError(
                "patch: cache_implementation must be None for a model with a memory, which is its "
                f"cache, got {implementation!r}"
            )
        if self.get("output_attentions"):
            warnings.warn(
                "patch: output_attentions has no effect, a memory has no attention weights to show",
                stacklevel=3,
            )


def apply(model: PreTrainedModel, policy: Policy) -> Memory:
    """Let ``model.generate`` use a fresh ``NAMMCache`` in every call that brings no cache.

    Changes this one model object: the attention implementation of its decoder and ``generate``.
    ``remove`` undoes both; a copy of the model has a memory of its own. A model that has a memory
    already gets the new policy.

    A model without ``generate`` around a decoder that takes a cache, such as
    ``DecisionTransformerModel``, reads each sequence that it is called with under a fresh memory.

    Args:
        model: a decoder of transformers on the attention interface, or a model around one; in
            evaluation mode when it is used.
        policy: a ``NAMM`` or one of ``namm_ext.baselines``.

    Returns:
        The memory, whose ``report()`` describes the last cache.

    Raises:
        ValueError: if a part of the model cannot have a memory; names it.
        TypeError: if ``policy`` is no policy.
    """
    memory = Memory(_checked(model, policy))
    with LOCK:
        keep(model)
        _memories_of(model).applied = memory
    return memory


def remove(model: PreTrainedModel) -> None:
    """Undo ``apply`` (and what ``NAMMCache(model, ...)`` set); a model without memory is fine.

    A ``patch`` under way goes on.
    """
    with LOCK:
        release(model)
        memories = _found(model)
        if memories is not None:
            memories.applied = None
            _drop_unused(model, memories)


@contextmanager
def patch(model: PreTrainedModel, policy: Policy) -> Iterator[Memory]:
    """``apply`` for the length of a ``with`` block; afterwards the model is as it was before.

    Several threads may patch one model: each generates with its own memory. A thread without a
    ``patch`` uses the newest. Blocks may end in any order.

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
    memory = Memory(_checked(model, policy))
    with borrow(model, user=memory):
        with LOCK:
            memories = _memories_of(model)
            memories.memories.append(memory)
        try:
            yield memory
        finally:
            with LOCK:
                memories.memories.remove(memory)
                _drop_unused(model, memories)


def _checked(model: PreTrainedModel, policy: Policy) -> Policy:
    if not isinstance(policy, Policy):
        raise TypeError(f"apply: policy must be a Policy, got {type(policy).__name__}")
    if isinstance(model, PreTrainedModel) and not _generates(model) and _trunk(model) is None:
        raise ValueError(
            f"apply: model must have generate, which {type(model).__name__} has not; pass "
            "cache=NAMMCache(model, policy) to its calls"
        )
    return policy


def _generates(model: PreTrainedModel) -> bool:
    return hasattr(type(model), "generate")


def _takes_cache(model: nn.Module) -> bool:
    return cache_keyword(model) in inspect.signature(type(model).forward).parameters


def _trunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """The decoder that takes a cache within a model that takes none; None if there is no such."""
    if _takes_cache(model):
        return None
    config = decoder_config(model.config)
    decoders = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    return next((m for m in decoders if m.config is config and _takes_cache(m)), None)


def _say_so(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call of a patched model without a cache reads and forgets nothing of any memory."""
    del args
    if torch.compiler.is_compiling() or kwargs.get("use_cache") is False:
        return
    if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
        return
    warnings.warn(
        f"patch: {type(model).__name__} was called without a cache, so its memory is not used; "
        "call model.generate, or pass cache=NAMMCache(model, policy)",
        stacklevel=3,
    )


def _found(model: PreTrainedModel) -> _Memories | None:
    """What ``_memories_of`` made, if it is still there."""
    generate = vars(model).get("generate")
    if isinstance(generate, _Generate):
        return generate
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return next((h for h in hooks if isinstance(h, _Trunk) and h.model is model), None)


def _memories_of(model: PreTrainedModel) -> _Memories:
    memories = _found(model)
    if memories is not None:
        return memories
    if _generates(model):
        generate = vars(model)["generate"] = _Generate(model, vars(model).get("generate"))
        model.register_forward_pre_hook(_say_so, with_kwargs=True)
        return generate
    trunk, hook = _trunk(model), _Trunk(model)
    assert trunk is not None  # checked before
    trunk.register_forward_pre_hook(hook, with_kwargs=True)
    return hook


def _drop_unused(model: PreTrainedModel, memories: _Memories) -> None:
    if memories._all():
        return
    if isinstance(memories, _Trunk):
        for module in model.modules():
            _drop_hook(module, memories)
        return
    assert isinstance(memories, _Generate)
    # Somebody else may have wrapped it since; it then passes calls through.
    if vars(model).get("generate") is memories:
        _drop_hook(model, _say_so)
        if memories.own is None:
            del vars(model)["generate"]
        else:
            vars(model)["generate"] = memories.own


def _drop_hook(module: nn.Module, hook: Any) -> None:
    hooks = module._forward_pre_hooks
    for number in [number for number, other in hooks.items() if other is hook]:
        del hooks[number]
        module._forward_pre_hooks_with_kwargs.pop(number, None)
