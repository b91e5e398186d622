"""Fit a gate to a model: ridge regression of log importance, in closed form (spec 12.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cache.families import decoder_config
from ..policy import Gate
from ..rotation import rotation_of
from .checkpoint import EVERY, Checkpoint
from .importance import LayerReading, Text, read_twice
from .ridge import Ridge

#: On the squared weights of standardised inputs, relative to their variance.
PENALTY = 1e-2


@dataclass(frozen=True)
class GateFit:
    """A gate, and how well it does on texts that it was not fitted to.

    Attributes:
        gate: the fit.
        r2: share of the variance of log importance that it explains, over all layers and heads.
        r2_within: the same after taking each head's mean away.
        recall: of the most important quarter of all tokens, the share among its best quarter.
        num_tokens: tokens it was fitted to.
        num_held_out: texts that it was judged on.
    """

    gate: Gate
    r2: float
    r2_within: float
    recall: float
    num_tokens: int
    num_held_out: int


def fit_gate(
    model: Any,
    texts: Sequence[Text],
    *,
    held_out: int | None = None,
    penalty: float = PENALTY,
    checkpoint: Checkpoint | None = None,
    on_text: Callable[[int], None] = lambda _: None,
) -> GateFit:
    """Fit a linear gate: minutes on two cores for a hundred million parameters.

    Each text is read twice, and then only sums of products are kept, so any number of them takes
    the memory of one.

    Args:
        model: a causal language model of transformers.
        texts: what to read; the kinds of text matter more than their number.
        held_out: how many of them, the last ones, judge the fit; None: a tenth, at least one.
        penalty: of the ridge regression.
        checkpoint: where the fit goes on if it was interrupted; of the same model and texts.
        on_text: called with the number of texts read so far.

    Raises:
        ValueError: if fewer than two texts are given, or not fewer are held out.
    """
    held_out = max(1, len(texts) // 10) if held_out is None else held_out
    if not 0 < held_out < len(texts):
        raise ValueError(
            f"fit_gate: held_out must be at least 1 and below the number of texts, {len(texts)}, "
            f"got {held_out}"
        )
    rotation = rotation_of(model)
    rotary_dim, interleaved = 2 * len(rotation.frequencies), rotation.interleaved

    def inputs(layer: LayerReading) -> Tensor:
        k, v = layer.k.transpose(0, 1).float(), layer.v.transpose(0, 1).float()
        return reference.gate_inputs(k, v, rotary_dim=rotary_dim, interleaved=interleaved)

    done, sums = (0, []) if checkpoint is None else checkpoint.load()
    for text in texts[done : len(texts) - held_out]:
        layers = read_twice(model, text)
        pairs = [(inputs(layer), layer.target.T) for layer in layers]
        sums = sums or [Ridge(x.shape[1], y.shape[1]) for x, y in pairs]
        for ridge, (x, y) in zip(sums, pairs, strict=True):
            ridge.add(x, y)
        done += 1
        if checkpoint is not None and (done % EVERY == 0 or done == len(texts) - held_out):
            checkpoint.save(done, sums)
        on_text(done)
    solved = [ridge.solve(penalty) for ridge in sums]
    weight, bias = (torch.stack(parts) for parts in zip(*solved, strict=True))

    targets, guesses = [], []
    for number, text in enumerate(texts[-held_out:], start=len(texts) - held_out + 1):
        layers = read_twice(model, text)
        targets.append(torch.stack([layer.target for layer in layers]).cpu())
        scores = [
            inputs(layer).cpu() @ w.T + b for layer, w, b in zip(layers, weight, bias, strict=True)
        ]
        guesses.append(torch.stack(scores).transpose(1, 2))
        on_text(number)
    # Layers without a memory have rows too; nobody asks for them.
    index = [layer.layer_idx for layer in layers]
    num_layers = decoder_config(model.config).num_hidden_layers
    all_weight, all_bias = (x.new_zeros(num_layers, *x.shape[1:]) for x in (weight, bias))
    all_weight[index], all_bias[index] = weight, bias
    gate = Gate(all_weight, all_bias, rotary_dim, interleaved)
    return GateFit(
        gate, *fit_quality(guesses, targets), num_tokens=sums[0].count, num_held_out=held_out
    )


def fit_quality(guesses: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[float, float, float]:
    """R², R² within a head and recall of the most important quarter.

    Args:
        guesses, targets: ``[L, H, T]`` of each text.
    """
    guess, target = torch.cat(list(guesses), dim=2), torch.cat(list(targets), dim=2)
    r2 = 1 - float((guess - target).square().mean() / target.var(correction=0))
    residual = (guess - guess.mean(2, keepdim=True)) - (target - target.mean(2, keepdim=True))
    within = 1 - float(residual.square().mean() / target.var(2, correction=0).mean())
    found = []
    for g, t in zip(guesses, targets, strict=True):
        count = max(1, t.numel() // 4)
        best = torch.zeros(t.numel(), dtype=torch.bool)
        best[t.flatten().topk(count).indices] = True
        found.append(float(best[g.flatten().topk(count).indices].float().mean()))
    return r2, within, sum(found) / len(found)
