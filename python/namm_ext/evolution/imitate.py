"""A start for evolution: a scorer fitted, by gradient, to the attention that tokens will get.

Evolution optimises what counts, but from zero it needs hundreds of generations to find a useful
direction among 4,172. How much attention later queries pay to a cached token is a target that
costs two forward passes, and the scorer is differentiable in its parameters. What is kept decides
which features are seen, so after a first round without evictions the memory reads under its own
(Ross et al. 2011, arXiv:1011.0686); the targets are always those of the full cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cache import NAMMCache, cache_keyword
from ..config import NAMMConfig
from ..patching import patch
from ..policy import NAMM, Policy, UpdateContext
from ..tasks import TRAIN_SEED, Example, make_batch
from ..zoo import load_documents

if TYPE_CHECKING:
    from .train import EvolveConfig


@dataclass(frozen=True)
class ImitateConfig:
    """How the start is fitted; memory, task families and seed are those of the `EvolveConfig`.

    Attributes:
        rounds: how often the memory reads. In the first it evicts nothing, then as the round before
            taught it.
        steps: gradient steps per round.
        lengths: tokens of the contexts; a length that stands there twice counts twice.
        num_tokens: tokens read per round and length.
        batch_size: segments per layer and step.
        learning_rate: of Adam in the first round, in round n divided by n; it decays to zero
            (cosine) in each.
        answer_weight: what attention from where an answer is predicted counts, relative to
            attention from anywhere else.
    """

    rounds: int = 3
    steps: int = 200
    lengths: tuple[int, ...] = (1024, 2048, 2048)
    num_tokens: int = 32768
    batch_size: int = 8
    learning_rate: float = 5e-3
    answer_weight: float = 50.0

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "num_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"ImitateConfig: {name} must be at least 1, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "answer_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"ImitateConfig: {name} must be positive, got {getattr(self, name)}"
                )
        if not self.lengths:
            raise ValueError(f"ImitateConfig: lengths must not be empty, got {self.lengths}")


@dataclass(frozen=True)
class _Segment:
    """The live tokens of one head at one update."""

    layer: int
    features: Tensor  # [K, 25], the scorer's input
    target: Tensor  # [K], future attention


def imitate(
    model: Any,
    tokenizer: Any,
    config: EvolveConfig,
    imitation: ImitateConfig,
    mean: Tensor,
    var: Tensor,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Fit the scorer of ``config.namm`` to predict which tokens later queries attend to.

    The loss of a token with score s and target y is ``y softplus(-s) + softplus(s)``, least at
    ``s = log E[y]``; a target of 1 is what an average live token of the layer gets, so a score
    above zero promises more than that. Layers count as much as their share of the budget.

    Args:
        model: a causal language model of transformers with the "eager" attention.
        tokenizer: of that model.
        config: memory, families, number of records, budget and seed.
        imitation: how to fit.
        mean, var: ``[17]`` statistics of the features (:func:`calibrate_statistics`).
        on_step: called with ``round``, ``step`` and mean ``loss``, at step 0 of every round and
            then every 50 steps.

    Returns:
        ``[num_params]`` float32: ``x0`` for :func:`evolve`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    params = _random_start(config.namm, generator).requires_grad_()
    shares = config.namm.layer_shares
    policy = NAMM(config.namm, params.detach().clone(), mean, var)
    for round_ in range(imitation.rounds):
        if on_step:
            on_step({"round": round_ + 1, "step": 0, "loss": None})
        layers: dict[int, list[_Segment]] = {}
        for number, length in enumerate(imitation.lengths):
            reader = policy.with_config(cache_size=config.cache_size(length))
            if round_ == 0:
                reader = policy.with_config(
                    cache_size=None, threshold=None, budget="per_head", layer_shares=None
                )
            examples = make_batch(
                config.families,
                tokenizer,
                load_documents("train"),
                length=length,
                num_records=config.num_records,
                seed=(TRAIN_SEED, config.seed, 1, round_, number),
                batch_size=max(1, imitation.num_tokens // length),
            )
            for segment in _read(model, reader, examples, imitation.answer_weight):
                layers.setdefault(segment.layer, []).append(segment)
        for segments in layers.values():
            segments.sort(key=lambda segment: len(segment.target))
        means = {
            layer: float(torch.cat([segment.target for segment in segments]).mean())
            for layer, segments in layers.items()
        }
        weights = {layer: shares[layer] if shares else 1.0 for layer in layers}
        optimiser = torch.optim.Adam([params], lr=imitation.learning_rate / (round_ + 1))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, imitation.steps)
        total = 0.0
        for step in range(1, imitation.steps + 1):
            loss = torch.zeros(())
            place = float(torch.rand((), generator=generator))
            for layer, segments in layers.items():
                some = _draw(segments, place, imitation.batch_size, generator)
                loss = loss + weights[layer] * _loss(config.namm, params, some, means[layer])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) / len(layers)
            if on_step and step % 50 == 0:
                on_step({"round": round_ + 1, "step": step, "loss": total / 50})
                total = 0.0
        policy = NAMM(config.namm, params.detach().clone(), mean, var)
    return params.detach().clone()


def _random_start(config: NAMMConfig, generator: torch.Generator) -> Tensor:
    """Small weights, zero biases."""
    policy = NAMM(config)
    for name, tensor in policy.named_parameters().items():
        if name.startswith("W"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return policy.params


def _draw(
    segments: Sequence[_Segment], place: float, count: int, generator: torch.Generator
) -> list[_Segment]:
    """Random ones among an eighth of the sorted ones: of like sizes, so padding costs little."""
    span = max(count, len(segments) // 8)
    first = int(place * max(1, len(segments) - span))
    near = segments[first : first + span]
    return [near[i] for i in torch.randperm(len(near), generator=generator)[:count].tolist()]


def _loss(
    config: NAMMConfig, params: Tensor, segments: Sequence[_Segment], mean_target: float
) -> Tensor:
    """Mean over tokens. Padding stands before them: backward attention never sees it."""
    size = max(len(segment.target) for segment in segments)
    padding = [size - len(segment.target) for segment in segments]
    padded = torch.stack(
        [F.pad(s.features, (0, 0, n, 0)) for s, n in zip(segments, padding, strict=True)]
    )
    if config.scorer == "bam":
        rows = reference.bam(padded, params)
    else:
        rows = reference.mlp(
            padded,
            params,
            hidden=config.mlp_hidden,
            depth=config.mlp_depth,
            bias=config.mlp_bias,
            residual_first=config.mlp_residual_first,
        )
    scores = torch.cat([row[n:] for row, n in zip(rows, padding, strict=True)])
    target = torch.cat([segment.target for segment in segments]) / mean_target
    return (target * F.softplus(-scores) + F.softplus(scores)).mean()


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a policy saw of one row of a layer at one update."""

    layer: int
    row: int
    num_tokens: int  # of the row so far
    state: tuple[Tensor, ...]  # per head [K, 17]
    pos: tuple[Tensor, ...]  # per head [K]


class _Recorder(Policy):
    """Does what another policy does and remembers some of what it saw."""

    every = 4  # updates; neighbouring ones are much alike

    def __init__(self, inner: Policy) -> None:
        self.inner, self.n_up, self.num_state = inner, inner.n_up, inner.num_state
        self.seen: list[_Seen] = []

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        scores, state = self.inner.update(ctx)
        starts, used = ctx.cu_seqlens_k.tolist(), ctx.seqused_k.tolist()
        live = [slice(start, start + n) for start, n in zip(starts, used, strict=False)]
        for row, num_tokens in enumerate(ctx.seen.tolist()):
            if (num_tokens // self.n_up + ctx.layer_idx) % self.every == 0:
                heads = live[row * ctx.num_kv_heads : (row + 1) * ctx.num_kv_heads]
                now = [tuple(t[h].cpu().clone() for h in heads) for t in (state, ctx.pos)]
                self.seen.append(_Seen(ctx.layer_idx, row, num_tokens, *now))
        return scores, state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        return self.inner.select(scores, ctx)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def _read(
    model: Any, policy: NAMM, examples: Sequence[Example], answer_weight: float
) -> list[_Segment]:
    """Segments of a part of the updates; few rows at a time bound the memory."""
    length, n_up = len(examples[0].input_ids), policy.n_up
    rows = max(1, 4096 // length)
    parts = [examples[i : i + rows] for i in range(0, len(examples), rows)]
    seen: list[list[_Seen]] = []
    recorder = _Recorder(policy)
    with patch(model, recorder), torch.inference_mode():
        for part in parts:
            recorder.seen = []
            ids = torch.tensor([example.input_ids for example in part], device=model.device)
            cache = NAMMCache(model, recorder)
            given = {cache_keyword(model.base_model): cache}
            model.base_model(ids, **given, use_cache=True)
            seen.append(recorder.seen)
    segments: list[_Segment] = []
    futures = _future_attention(model, parts, n_up, answer_weight)
    for some, future in zip(seen, futures, strict=True):
        for s in some:
            if s.num_tokens >= length:
                continue  # nobody asks after the end
            wanted = future[s.layer, s.row, :, s.num_tokens // n_up]
            for state, pos, later in zip(s.state, s.pos, wanted, strict=True):
                features = reference.token_features(
                    *(state, pos, policy.mean, policy.var),
                    policy.config.feature_transform == "log",
                    policy.config.log_eps,
                )
                segments.append(_Segment(s.layer, features, later[pos.long()].clone()))
    return segments


def _future_attention(
    model: Any, parts: Sequence[Sequence[Example]], n_up: int, answer_weight: float
) -> Iterator[Tensor]:
    """``[L, B, H, U, T]``: attention each token gets from the queries ``u n_up`` and later."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for part in parts:
            ids = torch.tensor([example.input_ids for example in part], device=model.device)
            with torch.inference_mode():
                attentions = model.base_model(ids, output_attentions=True, use_cache=False)
            yield torch.stack(
                [
                    _credit(attn.float().cpu(), part, model.config, n_up, answer_weight)
                    for attn in attentions.attentions
                ]
            )
            del attentions
    finally:
        model.set_attn_implementation(before)


def _credit(
    attn: Tensor, examples: Sequence[Example], config: Any, n_up: int, answer_weight: float
) -> Tensor:
    """``[B, Hq, T, T]`` attention -> ``[B, H, U, T]`` sums over later queries."""
    attn = reference.group_mean(attn, attn.shape[1] // config.num_key_value_heads)
    for row, example in zip(attn, examples, strict=True):
        for start, stop in example.answer_spans:
            row[:, start - 1 : stop - 1] *= answer_weight
    padded = F.pad(attn, (0, 0, 0, -attn.shape[2] % n_up))
    blocks = padded.unflatten(2, (-1, n_up)).sum(3)
    return blocks.flip(2).cumsum(2).flip(2)
