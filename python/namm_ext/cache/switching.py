"""Switching a model's decoder to the "namm" attention and back."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .attention import NAME
from .families import check_model, decoder_config


class Undo:
    def __init__(self, attn_implementation: str) -> None:
        self.attn_implementation = attn_implementation
        self.memory: Any = None
        self.had_generate: Any = None


UNDO: weakref.WeakKeyDictionary[nn.Module, Undo] = weakref.WeakKeyDictionary()


def use_namm_attention(model: PreTrainedModel) -> Undo:
    """Switch a model's decoder to the "namm" attention, once; what ``remove`` needs to undo it.

    Raises:
        ValueError: if the model's attention cannot be reached or has parts we do not compute.
    """
    undo = UNDO.get(model)
    if undo is not None:
        if decoder_config(model.config)._attn_implementation != NAME:
            set_attention(model, NAME)
        return undo
    check_model(model)
    implementation = decoder_config(model.config)._attn_implementation
    set_attention(model, NAME)
    undo = UNDO[model] = Undo(implementation)
    return undo


def set_attention(model: PreTrainedModel, implementation: str) -> None:
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
