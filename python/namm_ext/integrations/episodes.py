"""Episodes as texts, so that memories are calibrated and fitted to Decision Transformers too.

What fits memories (:mod:`namm_ext.fitting`) reads token ids. Here an id is the number of a token
of some recorded episodes. The first part of an episode is the text, the rest of it looks back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DecisionTransformerPreTrainedModel

from ..cache import cache_keyword
from ..fitting.importance import Later, Text


class EpisodeReader(DecisionTransformerPreTrainedModel):
    """The trunk of a Decision Transformer as a model that reads token ids.

    It shares the weights and the configuration of the model, and goes where
    :mod:`namm_ext.fitting` asks for a language model.

    Args:
        model: a ``DecisionTransformerModel`` in evaluation mode.
        table: ``[N, hidden_size]`` embeddings, token n in row n (:func:`embed_episodes`).
    """

    table: Tensor

    def __init__(self, model: Any, table: Tensor) -> None:
        super().__init__(model.config)
        self.encoder = model.encoder
        self.register_buffer("table", table, persistent=False)
        self.eval()

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        """What the trunk makes of tokens ``[B, n]`` behind those in the cache."""
        given = {cache_keyword(self.encoder): past_key_values}
        return self.encoder(
            inputs_embeds=self.table[input_ids],
            position_ids=torch.zeros_like(input_ids),
            **given,
            **kwargs,
        )


@torch.no_grad()
def embed_episodes(model: Any, states: Tensor, actions: Tensor, returns_to_go: Tensor) -> Tensor:
    """The tokens that a Decision Transformer makes of episodes, as its ``forward`` does.

    Args:
        model: a ``DecisionTransformerModel``.
        states: ``[B, T, state_dim]``.
        actions: ``[B, T, act_dim]``.
        returns_to_go: ``[B, T]`` in the model's units.

    Returns:
        ``[B, 3 T, hidden_size]``: return, state and action of each step in turn.
    """
    device, dtype = model.device, model.dtype
    parts = (
        model.embed_return(returns_to_go.to(device, dtype)[..., None]),
        model.embed_state(states.to(device, dtype)),
        model.embed_action(actions.to(device, dtype)),
    )
    times = model.embed_timestep.weight[: states.shape[1], None]
    tokens: Tensor = model.embed_ln(torch.stack(parts, dim=2) + times)
    return tokens.flatten(1, 2)


def as_texts(
    model: Any, states: Tensor, actions: Tensor, returns_to_go: Tensor, *, length: int
) -> tuple[EpisodeReader, list[Text]]:
    """Recorded episodes as what memories are calibrated on and fitted to.

    Args:
        model, states, actions, returns_to_go: as in :func:`embed_episodes`.
        length: tokens of a text; the rest of the episode looks back at them.

    Returns:
        The model that reads them, and one text for each episode.

    Raises:
        ValueError: if nothing is left to look back.

    Example:
        A memory made ready for a Decision Transformer::

            reader, texts = as_texts(model, states, actions, returns_to_go, length=384)
            policy = calibrate(policy, reader, texts)
    """
    tokens = embed_episodes(model, states, actions, returns_to_go)
    batch, total, _ = tokens.shape
    if not 0 < length < total:
        raise ValueError(
            f"as_texts: length must be positive and below the {total} tokens of an episode, got "
            f"{length}"
        )
    texts = []
    for first in range(0, batch * total, total):
        ids = tuple(range(first, first + total))
        texts.append(Text(ids[:length], (Later(ids[length:]),)))
    return EpisodeReader(model, tokens.flatten(0, 1)), texts
