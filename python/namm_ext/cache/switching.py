"""Lending a model's attention: who uses it now, and what it is when nobody does.

A model object may serve several threads, each with a memory of its own or with none. What is kept
on the object is therefore only what all of them share: its own attention and who needs another
one. It lies in the object's ``__dict__``, so that a copy takes its own along.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from .attention import NAME
from .families import check_model, decoder_config

#: Guards what is kept on models; held for moments.
LOCK = threading.RLock()
_ATTRIBUTE = "_namm_switch"
# Blocks that this thread or task is in; those of a model are also in its ``Switch.users``.
_OPEN: ContextVar[tuple[Any, ...]] = ContextVar("namm_ext_open_blocks", default=())


class Switch:
    """A model whose attention is not its own at the moment.

    Attributes:
        own: its own attention implementation.
        blocks: user and wanted implementation of every block and call under way, newest last; the
            newest decides.
        kept: whether it stays switched when nobody uses it, until ``release``.
    """

    def __init__(self, own: str) -> None:
        self.own = own
        self.blocks: list[tuple[Any, str]] = []
        self.kept = False

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model is in no block; it stays as it is until ``release``.
        return {"own": self.own, "blocks": [], "kept": True}


@contextmanager
def borrow(
    model: PreTrainedModel, attention: str | None = NAME, *, user: Any = None
) -> Iterator[None]:
    """Have a model's decoder use ``attention`` within the block, and then what it used before.

    Blocks may end in any order and in any thread.

    Args:
        model: a decoder of transformers on the attention interface, or a model around one.
        attention: "namm" for caches made in the block; another implementation of transformers;
            None for the model's own, whatever memory it has.
        user: what ``opened`` shall find.

    Raises:
        ValueError: if the model's attention cannot be reached or has parts we do not compute.
    """
    user = object() if user is None else user
    with LOCK:
        switch = _switch(model)
        block = (user, switch.own if attention is None else attention)
        switch.blocks.append(block)
        _set(model, switch)
    _OPEN.set((*_OPEN.get(), user))
    try:
        yield
    finally:
        _OPEN.set(_without(_OPEN.get(), user))
        with LOCK:
            switch.blocks.remove(block)
            _set(model, switch)


def _without(blocks: tuple[Any, ...], user: Any) -> tuple[Any, ...]:
    """The blocks without the innermost one of ``user``."""
    left = next((i for i in reversed(range(len(blocks))) if blocks[i] is user), len(blocks))
    return blocks[:left] + blocks[left + 1 :]


def keep(model: PreTrainedModel) -> None:
    """Switch a model to the "namm" attention until ``release``, or until the end of the block
    that this thread or task has borrowed it for."""
    with LOCK:
        switch = _switch(model)
        switch.kept = switch.kept or not opened(model)
        _set(model, switch)


def release(model: PreTrainedModel) -> None:
    """Undo ``keep``; blocks under way go on."""
    with LOCK:
        switch = vars(model).get(_ATTRIBUTE)
        if switch is not None:
            switch.kept = False
            _set(model, switch)


def opened(model: PreTrainedModel) -> list[Any]:
    """Users of the "namm" blocks that this thread or task is in, outermost first."""
    switch = vars(model).get(_ATTRIBUTE)
    users = [] if switch is None else [user for user, name in switch.blocks if name == NAME]
    return [user for user in _OPEN.get() if any(user is other for other in users)]


def _switch(model: PreTrainedModel) -> Switch:
    switch: Switch | None = getattr(model, "__dict__", {}).get(_ATTRIBUTE)
    if switch is None:
        check_model(model)
        switch = Switch(decoder_config(model.config)._attn_implementation)
    return switch


def _set(model: PreTrainedModel, switch: Switch) -> None:
    wanted = switch.own if not switch.kept else NAME
    if switch.blocks:
        wanted = switch.blocks[-1][1]
    if decoder_config(model.config)._attn_implementation != wanted:
        _set_attention(model, wanted)
    if switch.blocks or switch.kept:
        vars(model)[_ATTRIBUTE] = switch
    else:
        vars(model).pop(_ATTRIBUTE, None)


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
