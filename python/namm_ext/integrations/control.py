"""A memory for Decision Transformers: an agent that goes on from step to step, and its episodes.

transformers' ``DecisionTransformerModel`` (Chen et al. 2021, arXiv:2106.01345) reads the whole
episode anew for every action. Here each step feeds three tokens, the last action, the return still
wanted and the state, on top of a cache, which a policy may forget from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DecisionTransformerModel, DynamicCache

from ..cache import NAMMCache, borrow, cache_keyword
from ..policy import Policy
from ..report import Report

#: Tokens of a step, in their order.
KINDS = ("return", "state", "action")


class Stepper:
    """A Decision Transformer that takes one step at a time.

    Its actions are those of the model's own ``forward`` over the whole episode, with what the
    policy has forgotten left out. The model is switched to the "namm" attention as by
    :class:`~namm_ext.NAMMCache`.

    Args:
        model: a ``DecisionTransformerModel`` in evaluation mode.
        policy: decides what stays; None for transformers' own cache, which keeps everything.

    Attributes:
        cache: what is remembered.
        time: steps taken.

    Raises:
        TypeError: if the model is another one.

    Example:
        >>> from transformers import DecisionTransformerConfig
        >>> from namm_ext import baselines
        >>> config = DecisionTransformerConfig(state_dim=3, act_dim=2, hidden_size=16, n_layer=1)
        >>> model = DecisionTransformerModel(config).eval()
        >>> stepper = Stepper(model, baselines.StreamingLLM(8, n_up=16))
        >>> actions = None
        >>> for _ in range(20):
        ...     actions = stepper.step(torch.ones(4, 3), torch.ones(4), actions)
        >>> actions.shape, stepper.cache.report().layers[0].live[0]
        (torch.Size([4, 2]), (19,))
    """

    def __init__(self, model: Any, policy: Policy | None) -> None:
        if not isinstance(model, DecisionTransformerModel):
            raise TypeError(
                "Stepper: model must be a DecisionTransformerModel of transformers, got "
                f"{type(model).__name__}"
            )
        self.model: Any = model
        self.cache: Any = (
            DynamicCache(config=model.config) if policy is None else NAMMCache(model, policy)
        )
        self.time = 0
        self._mask: Tensor | None = None

    @torch.no_grad()
    def step(
        self,
        states: Tensor,
        returns_to_go: Tensor,
        actions: Tensor | None = None,
        running: Tensor | None = None,
    ) -> Tensor:
        """Take in the last action, the return that is wanted from here on, and the state.

        Args:
            states: ``[B, state_dim]``.
            returns_to_go: ``[B]``.
            actions: ``[B, act_dim]`` as they were done after the last call; None in the first.
            running: ``[B]`` bool, rows whose episode goes on; the others remember nothing of the
                step. None for all.

        Returns:
            ``[B, act_dim]`` predicted actions.

        Raises:
            ValueError: if a shape is another one, an action is missing or too much, or the episode
                is longer than the model's ``max_ep_len``.
        """
        tokens = self._embed(states, returns_to_go, actions)
        self._extend_mask(running, *tokens.shape[:2])
        given = {cache_keyword(self.model.encoder): self.cache}
        hidden = self.model.encoder(
            inputs_embeds=tokens,
            attention_mask=self._mask,
            # Time is in the embeddings: the trunk's own positions are 0 throughout.
            position_ids=torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device),
            use_cache=True,
            **given,
        ).last_hidden_state
        self.time += 1
        predicted: Tensor = self.model.predict_action(hidden[:, -1])
        return predicted

    def _embed(self, states: Tensor, returns_to_go: Tensor, actions: Tensor | None) -> Tensor:
        """``[B, 2 or 3, hidden_size]``."""
        config, batch = self.model.config, states.shape[0]
        if self.time >= config.max_ep_len:
            raise ValueError(
                f"Stepper: an episode must have at most max_ep_len = {config.max_ep_len} steps, "
                f"got step {self.time + 1}"
            )
        if (actions is None) != (self.time == 0):
            expected, got = ("None", "some") if self.time == 0 else ("those of the last step", None)
            raise ValueError(
                f"Stepper: actions must be {expected} in step {self.time + 1}, got {got}"
            )
        for name, value, shape in (
            ("states", states, (batch, config.state_dim)),
            ("returns_to_go", returns_to_go, (batch,)),
            ("actions", actions, (batch, config.act_dim)),
        ):
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"Stepper: {name} must be {list(shape)}, got {list(value.shape)}")
        model = self.model
        device, dtype = model.device, model.dtype
        now, before = (model.embed_timestep.weight[max(self.time - i, 0)] for i in (0, 1))
        parts = [
            model.embed_return(returns_to_go.to(device, dtype)[:, None]) + now,
            model.embed_state(states.to(device, dtype)) + now,
        ]
        if actions is not None:
            parts.insert(0, model.embed_action(actions.to(device, dtype)) + before)
        tokens: Tensor = model.embed_ln(torch.stack(parts, dim=1))
        return tokens

    def _extend_mask(self, running: Tensor | None, batch: int, width: int) -> None:
        """Nothing is masked until the first row has ended."""
        device = self.model.device
        if self._mask is None and (running is None or bool(running.all())):
            return
        seen = self.cache.get_seq_length()
        if self._mask is None:
            self._mask = torch.ones(batch, seen, dtype=torch.bool, device=device)
        now = torch.ones(batch, dtype=torch.bool) if running is None else running
        self._mask = torch.cat([self._mask, now.to(device)[:, None].expand(-1, width)], dim=1)


class Environment(Protocol):
    """What an agent acts in: B episodes side by side."""

    def reset(self) -> Any:
        """``[B, state_dim]`` states at the start."""

    def step(self, actions: Any) -> tuple[Any, Any, Any]:
        """States, rewards ``[B]`` and done ``[B]`` after ``[B, act_dim]`` actions (numpy)."""


@dataclass(frozen=True)
class Rollout:
    """B episodes of up to T steps, and what the memory holds in the end.

    Attributes:
        returns: ``[B]`` float64, the rewards of each.
        steps: ``[B]`` int64, steps of each.
        rewards: ``[B, T]`` float64, 0 after the end.
        actions: ``[B, T, act_dim]`` that were done.
        kept: ``[L, B, H, T, 3]`` bool, which tokens the memory holds, in the order of `KINDS`;
            None without a policy.
        report: of the memory; None without a policy.
    """

    returns: Tensor
    steps: Tensor
    rewards: Tensor
    actions: Tensor
    kept: Tensor | None
    report: Report | None

    @property
    def kept_fraction(self) -> float:
        """Tokens kept by the last update / tokens seen up to it."""
        return 1.0 if self.report is None else self.report.kept_fraction

    def dropped(self, kind: str, where: Tensor | None = None) -> Tensor:
        """``[B]`` share of the tokens of a kind that are forgotten, mean over layers and heads.

        Args:
            kind: one of `KINDS`.
            where: ``[B, T]`` bool, steps that count; all by default. NaN where there are none.

        Raises:
            ValueError: for another kind.
        """
        if kind not in KINDS:
            raise ValueError(f"dropped: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        batch, length = self.rewards.shape
        # The last action is never fed.
        fed = torch.arange(length) < (self.steps - int(kind == "action"))[:, None]
        counts = fed if where is None else fed & where
        if self.kept is None:
            gone = torch.zeros(batch, length, dtype=torch.float64)
        else:
            gone = 1 - self.kept[..., KINDS.index(kind)].double().mean((0, 2))
        return (gone * counts).sum(1) / counts.sum(1)


def kept_tokens(cache: NAMMCache, length: int) -> Tensor:
    """``[L, B, H, length, 3]`` bool, which tokens of each step a memory holds, by `KINDS`.

    Args:
        cache: of a :class:`Stepper`, or of ``forward`` over whole episodes.
        length: steps of an episode, at least those that were fed.
    """
    layers = []
    for layer in cache.memory_layers:
        assert layer.kv is not None
        segments = layer.kv.store.segments
        held = torch.zeros(len(segments.slices()), length * len(KINDS), dtype=torch.bool)
        for row, live in zip(held, segments.slices(), strict=True):
            row[segments.pos[live].long().cpu()] = True
        layers.append(held.view(layer.kv.batch_size, layer.kv.num_kv_heads, length, len(KINDS)))
    return torch.stack(layers)


def roll_out(
    model: Any,
    policy: Policy | None,
    environment: Environment,
    target: Tensor | Sequence[float],
    *,
    max_steps: int,
    reward_scale: float = 1.0,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Let a Decision Transformer act until all episodes have ended.

    Args:
        model: a ``DecisionTransformerModel`` in evaluation mode.
        policy: what its memory keeps; None for transformers' own cache.
        environment: where it acts. Afterwards rows that have ended are stepped on with their last
            action, and what they earn does not count.
        target: ``[B]`` returns that are asked for, in the model's units.
        max_steps: steps after which episodes end at the latest.
        reward_scale: rewards are divided by this to be in the model's units.
        choose: makes actions ``[B, act_dim]`` of predicted ones; as they are by default.

    Raises:
        ValueError: if ``max_steps`` is not positive.
    """
    if max_steps < 1:
        raise ValueError(f"roll_out: max_steps must be at least 1, got {max_steps}")
    wanted = torch.as_tensor(target, dtype=torch.float64).clone()
    running = torch.ones(len(wanted), dtype=torch.bool)
    steps = torch.zeros(len(wanted), dtype=torch.int64)
    done_actions: list[Tensor] = []
    rewards: list[Tensor] = []
    actions: Tensor | None = None
    with borrow(model, None if policy is None else "namm"):
        stepper = Stepper(model, policy)
        states = torch.as_tensor(environment.reset())
        while bool(running.any()) and len(rewards) < max_steps:
            predicted = stepper.step(states, wanted, actions, running)
            actions = predicted.cpu() if choose is None else choose(predicted.cpu())
            after, earned, done = environment.step(actions.numpy())
            states = torch.as_tensor(after)
            reward = torch.as_tensor(earned, dtype=torch.float64) * running
            wanted = wanted - reward / reward_scale
            steps += running
            rewards.append(reward)
            done_actions.append(actions)
            running = running & ~torch.as_tensor(done)
    memory = isinstance(stepper.cache, NAMMCache)
    earned_in_all = torch.stack(rewards, dim=1)
    return Rollout(
        returns=earned_in_all.sum(1),
        steps=steps,
        rewards=earned_in_all,
        actions=torch.stack(done_actions, dim=1),
        kept=kept_tokens(stepper.cache, len(rewards)) if memory else None,
        report=stepper.cache.report() if memory else None,
    )


def one_hot(predicted: Tensor) -> Tensor:
    """The largest of each row becomes 1, the others 0: actions of a discrete environment.

    Example:
        >>> one_hot(torch.tensor([[0.5, 2.0, -1.0]]))
        tensor([[0., 1., 0.]])
    """
    best = torch.zeros_like(predicted)
    return best.scatter_(-1, predicted.argmax(-1, keepdim=True), 1.0)
