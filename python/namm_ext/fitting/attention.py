"""Fit the scorer of the attention a token receives to what the gate leaves unexplained.

The memory reads under its own evictions (Ross et al. 2011, arXiv:1011.0686), first with the gate
alone, then also with what it has learnt; the importance that counts is that of the full cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cache import NAMMCache, borrow, cache_keyword
from ..config import NAMMConfig
from ..policy import NAMM, Policy, StatisticsCollector, UpdateContext
from .importance import Text, read_twice


@dataclass(frozen=True)
class AttentionFitConfig:
    """How the scorer is fitted.

    Attributes:
        rounds: how often the texts are read; in each the memory evicts as it has learnt so far.
        steps: gradient steps per round.
        batch_size: heads per step, each with all of its tokens at one update.
        learning_rate: of Adam at the start; it decays to zero (cosine).
        size: share of a text that is kept while it is read.
        seed: of the start and all draws.
    """

    rounds: int = 2
    steps: int = 400
    batch_size: int = 48
    learning_rate: float = 5e-3
    size: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"AttentionFitConfig: {name} must be positive, got {getattr(self, name)}"
                )
        if not 0 < self.size <= 1:
            raise ValueError(f"AttentionFitConfig: size must be in (0, 1], got {self.size}")


@dataclass(frozen=True)
class _Head:
    """What a head held at one update."""

    head: int  # of all heads of all layers
    spectrum: Tensor  # [K, 17]
    age: Tensor  # [K]
    rest: Tensor  # [K] log importance less the gate


class _Recorder(Policy):
    """Does what a memory does, and remembers every ``every``-th update."""

    every = 4

    def __init__(self, inner: NAMM, targets: dict[int, Tensor]) -> None:
        self.inner, self.targets = inner, targets
        self.n_up, self.num_state = inner.n_up, inner.num_state
        self.heads: list[_Head] = []
        self.number = {layer: i for i, layer in enumerate(targets)}  # of layers with a memory
        self.updates = dict.fromkeys(targets, 0)

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The memory's scores and state."""
        scores, state = self.inner.update(ctx)
        layer = ctx.layer_idx
        self.updates[layer] += 1
        if self.updates[layer] % self.every == 0:
            for h, rows in enumerate(ctx.segments.slices()):
                pos = ctx.segments.pos[rows].long().cpu()
                kept = state[rows].cpu()
                rest = self.targets[layer][h, pos]
                if self.inner.gate is not None:
                    rest = rest - kept[:, -1]
                head = self.number[layer] * ctx.num_kv_heads + h
                spectrum = kept[:, : reference.NUM_BINS].clone()
                self.heads.append(_Head(head, spectrum, pos[-1] - pos, rest))
        return scores, state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """The memory's choice."""
        return self.inner.select(scores, ctx)

    def to_dict(self) -> dict[str, Any]:
        """The memory's settings."""
        return self.inner.to_dict()


@torch.inference_mode()
def _read(
    model: Any, policy: NAMM, text: Text, target: dict[int, Tensor], size: float
) -> list[_Head]:
    recorder = _Recorder(policy.with_budget(size=max(1, int(size * len(text.ids)))), target)
    with borrow(model):
        given = {cache_keyword(model.base_model): NAMMCache(model, recorder)}
        ids = torch.tensor([text.ids], device=model.device)
        model.base_model(ids, **given, use_cache=True)
    return recorder.heads


def fit_attention(
    policy: NAMM,
    model: Any,
    texts: Sequence[Text],
    config: AttentionFitConfig,
    *,
    on_text: Callable[[int, int], None] = lambda *_: None,
    on_step: Callable[[int, int, float], None] = lambda *_: None,
) -> NAMM:
    """Fit the parameters of a memory's scorer; its gate stays as it is.

    Args:
        policy: its config says what is fitted, its gate what is known already, its budget and
            calibration what is kept while it reads.
        model: a causal language model of transformers.
        texts: what to read.
        config: how.
        on_text: called with round and number of texts read in it.
        on_step: called with round, step and mean loss every 50 steps.

    Returns:
        The policy with new parameters and statistics; calibrate it anew.
    """
    generator = torch.Generator().manual_seed(config.seed)
    targets = []
    for number, text in enumerate(texts, start=1):
        targets.append({r.layer_idx: r.target.float().cpu() for r in read_twice(model, text)})
        on_text(0, number)
    params = _start(policy, generator).requires_grad_()
    offsets = torch.zeros(sum(target.shape[0] for target in targets[0].values()))
    heads: list[_Head] = []
    for round_ in range(1, config.rounds + 1):
        for number, (text, target) in enumerate(zip(texts, targets, strict=True), start=1):
            heads += _read(model, policy, text, target, config.size)
            on_text(round_, number)
        if round_ == 1:
            policy = policy.with_statistics(_statistics(policy.config, heads))
            offsets = _mean_rest(heads, len(offsets)).requires_grad_()
        _descend(
            policy, heads, params, offsets, config, generator,
            partial(on_step, round_),
        )  # fmt: skip
        policy = policy.with_params(params.detach().clone())
    return policy


def _start(policy: NAMM, generator: torch.Generator) -> Tensor:
    """Small weights, zero biases."""
    start = policy.with_params(torch.zeros(policy.config.num_params))
    for name, tensor in start.named_parameters().items():
        if name.startswith("W"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return start.params.clone()


def _statistics(config: NAMMConfig, heads: Sequence[_Head]) -> StatisticsCollector:
    collector = StatisticsCollector()
    spectra = torch.cat([head.spectrum for head in heads])
    if config.feature_transform == "log":
        spectra = reference.log_features(spectra, config.log_eps)
    collector.add(spectra)
    return collector


def _mean_rest(heads: Sequence[_Head], num_heads: int) -> Tensor:
    index = torch.cat([torch.full(head.rest.shape, head.head) for head in heads])
    rest = torch.cat([head.rest for head in heads])
    total = torch.zeros(num_heads).index_add_(0, index, rest)
    return total / torch.bincount(index, minlength=num_heads).clamp(min=1)


def _descend(
    policy: NAMM,
    heads: Sequence[_Head],
    params: Tensor,
    offsets: Tensor,
    config: AttentionFitConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> None:
    """Least squares by Adam; every head has an offset of its own, which is thrown away."""
    optimiser = torch.optim.Adam([params, offsets], lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    by_size = sorted(heads, key=lambda head: len(head.age))
    total = 0.0
    for step in range(1, config.steps + 1):
        # Neighbours are of like sizes, so padding costs little.
        first = int(
            torch.randint(max(1, len(by_size) - config.batch_size), (), generator=generator)
        )
        batch = by_size[first : first + config.batch_size]
        loss = _loss(policy, batch, params, offsets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += float(loss.detach())
        if step % 50 == 0:
            on_step(step, total / 50)
            total = 0.0


def _loss(policy: NAMM, batch: Sequence[_Head], params: Tensor, offsets: Tensor) -> Tensor:
    """Padding stands before the tokens: backward attention never sees it."""
    config = policy.config
    size = max(len(head.age) for head in batch)
    rows, rests, real = [], [], []
    for head in batch:
        z = reference.normalise(
            head.spectrum, policy.mean, policy.var,
            config.feature_transform == "log", config.log_eps,
        )  # fmt: skip
        x = torch.cat([reference.recency_embedding(head.age), z], dim=1)
        missing = size - len(x)
        rows.append(F.pad(x, (0, 0, missing, 0)))
        rests.append(F.pad(head.rest, (missing, 0)))
        real.append(F.pad(torch.ones_like(head.rest), (missing, 0)))
    x = torch.stack(rows)
    if config.scorer == "bam":
        scores = reference.bam(x, params)
    else:
        scores = reference.mlp(
            x, params, config.mlp_hidden, config.mlp_depth, config.mlp_bias,
            config.mlp_residual_first,
        )  # fmt: skip
    index = torch.tensor([head.head for head in batch])
    error = scores + offsets[index, None] - torch.stack(rests)
    weight = torch.stack(real)
    return (weight * error.square()).sum() / weight.sum()
