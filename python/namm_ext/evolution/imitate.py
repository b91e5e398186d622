"""A start for evolution: a scorer fitted, by gradient, to the attention that tokens will get.

Evolution optimises what counts, but from zero it needs hundreds of generations to find a useful
direction among 4,172. How much attention later queries pay to a cached token is known after two
forward passes, and the scorer is differentiable in its parameters: so it is taught to predict it.
What is kept decides which features are seen, so the memory always reads under its own evictions, in
the first round those of random weights (Ross et al. 2011, arXiv:1011.0686); the attention that
counts is always that of the full cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..budget import Budget
from ..cache import borrow
from ..config import NAMMConfig
from ..policy import NAMM, Policy, UpdateContext
from .evaluate import Context, by_length, read
from .problem import Problem, length_of


@dataclass(frozen=True)
class ImitateConfig:
    """How the start is fitted.

    Attributes:
        rounds: how often the memory reads, evicting as the round before taught it; what was read
            before stays among the examples.
        steps: gradient steps per round.
        num_tokens: tokens read per round and length of the contexts.
        batch_size: evictions per layer and step.
        learning_rate: of Adam at the start; it decays to zero (cosine).
        answer_weight: what attention from where an answer is predicted counts, relative to
            attention from anywhere else.
        layer_weights: what each layer counts in the loss; None: its share of the budget.
    """

    rounds: int = 4
    steps: int = 250
    num_tokens: int = 49152
    batch_size: int = 8
    learning_rate: float = 5e-3
    answer_weight: float = 50.0
    layer_weights: tuple[float, ...] | None = None

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
        if not all(0 <= weight < math.inf for weight in self.layer_weights or ()):
            raise ValueError(
                "ImitateConfig: layer_weights must not be negative, one per layer, "
                f"got {self.layer_weights}"
            )


@dataclass(frozen=True)
class _Choice:
    """Tokens that compete for one budget: those of a head, or of all heads of a layer."""

    layer: int
    features: tuple[Tensor, ...]  # per head [K, 25], the scorer's input
    target: tuple[Tensor, ...]  # per head [K], future attention

    @property
    def size(self) -> int:
        return sum(len(target) for target in self.target)


def imitate(
    model: Any,
    problem: Problem,
    namm: NAMMConfig,
    imitation: ImitateConfig,
    mean: Tensor,
    var: Tensor,
    *,
    budget: Budget,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
    on_state: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Tensor:
    """Fit a scorer to keep the tokens that later queries attend to.

    With y the attention a token will get, relative to the mean of those it competes with, its loss
    is ``y softplus(-score) + softplus(score)``: least at score = log y. So a score predicts the
    logarithm of future attention, whatever the budget and whatever was evicted before.

    Args:
        model: a causal language model of transformers with the "eager" attention.
        problem: whose contexts are read (``fit_batches``).
        namm: how the memory scores.
        imitation: how to fit.
        mean, var: ``[17]`` statistics of the features (:func:`calibrate_statistics`).
        budget: how much it keeps; a share is one of the length of a batch's longest context.
        seed: of the start and of all draws.
        state: what ``on_state`` was given last; the fit goes on from there, bit for bit. What the
            rounds so far have read is read again.
        on_step: called with ``round``, ``step`` and mean ``loss``, at step 0 of every round and
            then every 50 steps.
        on_state: called with a state, arrays by name, every 50 steps and when the fit is
            interrupted by any exception.

    Returns:
        ``[num_params]`` float32: ``x0`` for :func:`evolve`.

    Raises:
        ValueError: if the contexts fit into the budget, so that nothing is ever evicted, or
            ``layer_weights`` are not one per layer.
    """
    fit = _Fit(model, problem, namm, imitation, mean, var, budget, seed)
    if state is not None:
        fit.load(state)
    try:
        fit.run(on_step, on_state)
    except BaseException:
        if fit.saved is not None:
            on_state(fit.saved)
        raise
    return fit.params.detach().clone()


class _Fit:
    """A fit under way. ``saved`` is the state after the last whole step."""

    def __init__(
        self,
        model: Any,
        problem: Problem,
        namm: NAMMConfig,
        imitation: ImitateConfig,
        mean: Tensor,
        var: Tensor,
        budget: Budget,
        seed: int,
    ) -> None:
        self.model, self.problem, self.namm, self.imitation = model, problem, namm, imitation
        self.mean, self.var, self.budget, self.seed = mean, var, budget, seed
        num_layers = model.config.num_hidden_layers
        self.counts = imitation.layer_weights or budget.layer_shares or (1.0,) * num_layers
        if len(self.counts) != num_layers:
            raise ValueError(
                f"imitate: layer_weights must have {num_layers} entries, one per layer, "
                f"got {self.counts}"
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.params = _random_start(namm, self.generator).requires_grad_()
        self.optimiser = torch.optim.Adam([self.params], lr=imitation.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimiser, imitation.rounds * imitation.steps
        )
        self.starts: list[Tensor] = []  # of the rounds so far: what the memory read with
        self.step, self.total = 0, 0.0  # of this round; the sum of losses since the last report
        self.saved: dict[str, Any] | None = None

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None],
        on_state: Callable[[dict[str, Any]], None],
    ) -> None:
        layers: dict[int, list[_Choice]] = {}
        for round_ in range(self.imitation.rounds):
            if round_ == len(self.starts):
                self.starts.append(self.params.detach().clone())
                self.step, self.total = 0, 0.0
            on_step({"round": round_ + 1, "step": 0, "loss": None})
            self._read_round(round_, layers)
            if round_ + 1 < len(self.starts):  # fitted before the interruption
                continue
            for step in range(self.step + 1, self.imitation.steps + 1):
                self._step(layers)
                self.step = step
                mean_loss = self.total / 50
                if step % 50 == 0:
                    self.total = 0.0
                self.saved = self._state()
                if step % 50 == 0:
                    on_state(self.saved)
                    on_step({"round": round_ + 1, "step": step, "loss": mean_loss})

    def _read_round(self, round_: int, layers: dict[int, list[_Choice]]) -> None:
        """Add what there was to choose in the contexts of a round."""
        policy = NAMM(self.namm, self.starts[round_], self.mean, self.var)
        batches = self.problem.fit_batches(self.seed, round_, self.imitation.num_tokens)
        for batch in batches:
            reader = policy.with_budget(self.budget.of_context(length_of(batch)))
            for choice in _read(self.model, reader, batch, self.imitation.answer_weight):
                layers.setdefault(choice.layer, []).append(choice)
        if not layers:
            lengths = sorted({length_of(batch) for batch in batches})
            raise ValueError(
                "imitate: contexts must be long enough for evictions, got lengths "
                f"{lengths} with {self.budget}"
            )
        for choices in layers.values():
            choices.sort(key=lambda choice: choice.size)

    def _step(self, layers: Mapping[int, Sequence[_Choice]]) -> None:
        """One gradient step."""
        loss = torch.zeros(())
        place = float(torch.rand((), generator=self.generator))
        for layer, choices in layers.items():
            some = _draw(choices, place, self.imitation.batch_size, self.generator)
            loss = loss + self.counts[layer] * _loss(self.namm, self.params, some)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.schedule.step()
        self.total += float(loss.detach()) / len(layers)

    def _state(self) -> dict[str, Any]:
        adam = self.optimiser.state[self.params]
        return {
            "starts": torch.stack(self.starts).numpy(),
            "params": self.params.detach().clone().numpy(),
            "exp_avg": adam["exp_avg"].clone().numpy(),
            "exp_avg_sq": adam["exp_avg_sq"].clone().numpy(),
            "rate": np.array(self.schedule.get_last_lr()[0]),
            "step": np.array(self.step),
            "total": np.array(self.total),
            "generator": self.generator.get_state().numpy(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `_state` gave."""
        self.starts = list(torch.from_numpy(state["starts"]))
        self.step, self.total = int(state["step"]), float(state["total"])
        steps = (len(self.starts) - 1) * self.imitation.steps + self.step
        self.params.data.copy_(torch.from_numpy(state["params"]))
        self.optimiser.state[self.params] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.from_numpy(state["exp_avg"]).clone(),
            "exp_avg_sq": torch.from_numpy(state["exp_avg_sq"]).clone(),
        }
        rate = float(state["rate"])
        self.schedule.load_state_dict(
            {"last_epoch": steps, "_step_count": steps + 1, "_last_lr": [rate]}
        )
        self.optimiser.param_groups[0]["lr"] = rate
        self.generator.set_state(torch.from_numpy(state["generator"]))
        self.saved = dict(state)


def _random_start(config: NAMMConfig, generator: torch.Generator) -> Tensor:
    """Small weights, zero biases."""
    policy = NAMM(config)
    for name, tensor in policy.named_parameters().items():
        if name.startswith("W"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return policy.params


def _draw(
    choices: Sequence[_Choice], place: float, count: int, generator: torch.Generator
) -> list[_Choice]:
    """Random ones among an eighth of the sorted ones: of like sizes, so padding costs little."""
    span = max(count, len(choices) // 8)
    first = int(place * max(1, len(choices) - span))
    near = choices[first : first + span]
    return [near[i] for i in torch.randperm(len(near), generator=generator)[:count].tolist()]


def _loss(config: NAMMConfig, params: Tensor, choices: Sequence[_Choice]) -> Tensor:
    """Mean over the choices. Padding stands before the tokens: backward attention never sees it."""
    features = [x for choice in choices for x in choice.features]
    size = max(len(x) for x in features)
    padded = torch.stack([F.pad(x, (0, 0, size - len(x), 0)) for x in features])
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
    heads = iter(rows)
    losses = []
    for choice in choices:
        target = torch.cat(choice.target)
        scores = torch.cat([next(heads)[size - len(y) :] for y in choice.target])
        relative = target / target.mean()
        losses.append((relative * F.softplus(-scores) + F.softplus(scores)).mean())
    return torch.stack(losses).mean()


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
        live = ctx.segments.slices()
        for row, num_tokens in enumerate(ctx.seen):
            if (num_tokens // self.n_up + ctx.layer_idx) % self.every == 0:
                heads = live[row * ctx.num_kv_heads : (row + 1) * ctx.num_kv_heads]
                now = [tuple(t[h].cpu().clone() for h in heads) for t in (state, ctx.segments.pos)]
                self.seen.append(_Seen(ctx.layer_idx, row, num_tokens, *now))
        return scores, state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        return self.inner.select(scores, ctx)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()


def _read(
    model: Any, policy: NAMM, examples: Sequence[Context], answer_weight: float
) -> list[_Choice]:
    """What there was to choose in a part of the updates; few rows at a time bound the memory."""
    parts = []
    for length, members in by_length(examples).items():
        rows = max(1, 4096 // length)
        same = [examples[i] for i in members]
        parts += [same[i : i + rows] for i in range(0, len(same), rows)]
    seen: list[list[_Seen]] = []
    recorder = _Recorder(policy)
    with borrow(model):
        for part in parts:
            recorder.seen = []
            ids = torch.tensor([example.input_ids for example in part], device=model.device)
            read(model, recorder, ids)
            seen.append(recorder.seen)
    choices: list[_Choice] = []
    futures = _future_attention(model, parts, policy.n_up, answer_weight)
    for part, some, future in zip(parts, seen, futures, strict=True):
        for s in some:
            if s.num_tokens < len(part[s.row].input_ids):  # nobody asks after the end
                wanted = future[s.layer, s.row, :, s.num_tokens // policy.n_up]
                choices += _choices(policy, s, wanted)
    return choices


def _choices(policy: NAMM, seen: _Seen, wanted: Tensor) -> Iterator[_Choice]:
    """One per layer or one per head, as the budget is shared; none where all tokens may stay."""
    config = policy.config
    size = policy.room(seen.layer, seen.num_tokens).size
    if size is None:
        return
    num_heads = len(seen.pos)
    together = 1 if policy.budget.scope == "per_head" else num_heads
    for first in range(0, num_heads, together):
        heads = range(first, first + together)
        choice = _Choice(
            seen.layer,
            tuple(
                reference.token_features(
                    *(seen.state[h], seen.pos[h], policy.mean, policy.var),
                    config.feature_transform == "log",
                    config.log_eps,
                )
                for h in heads
            ),
            tuple(wanted[h, seen.pos[h].long()].clone() for h in heads),
        )
        if choice.size > size * together:
            yield choice


def _future_attention(
    model: Any, parts: Sequence[Sequence[Context]], n_up: int, answer_weight: float
) -> Iterator[Tensor]:
    """``[L, B, H, U, T]``: attention each token gets from the queries ``u n_up`` and later."""
    with borrow(model, "eager"):
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


def _credit(
    attn: Tensor, examples: Sequence[Context], config: Any, n_up: int, answer_weight: float
) -> Tensor:
    """``[B, Hq, T, T]`` attention -> ``[B, H, U, T]`` sums over later queries."""
    attn = reference.group_mean(attn, attn.shape[1] // config.num_key_value_heads)
    for row, example in zip(attn, examples, strict=True):
        for start, stop in example.answer_spans:
            row[:, start - 1 : stop - 1] *= answer_weight
    padded = F.pad(attn, (0, 0, 0, -attn.shape[2] % n_up))
    blocks = padded.unflatten(2, (-1, n_up)).sum(3)
    return blocks.flip(2).cumsum(2).flip(2)
