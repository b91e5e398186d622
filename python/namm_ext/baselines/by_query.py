"""The rule that foresees the attention of queries to come."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budget import Budget
from ..policy import UpdateContext
from ..reference import soft_cap
from ..rotation import Rotation, rotation_of
from ._base import Baseline


class ExpectedAttention(Baseline):
    """Attention to expect from the next queries, which are taken to be distributed like the last.

    Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from
    Future Queries Distribution" (arXiv:2510.00636): queries before RoPE are Gaussian, their mean
    and covariance are turned by the mean rotation of the next ``future`` positions, so the expected
    weight of a key is in closed form; it counts times the norm of the value. Deviations: mean and
    covariance are those of the queries since the last update and 16 before, as the paper has it in
    decoding, not of the whole prompt; scores are logarithms, which rank alike.

    The rule needs the rotation of its model: ``for_model`` and ``for_context`` add it.

    Args:
        budget, n_up: as in ``Baseline``. Sinks give no query and take no attention.
        future: positions to look ahead.
        epsilon: added to the expected weight before it is multiplied.
        rotation: of the model; None until it is known.

    Example:
        >>> from namm_ext.rotation import Rotation
        >>> ExpectedAttention(256, rotation=Rotation((1.0, 0.1))).budget
        Budget(256, sink_tokens=4)
    """

    published: ClassVar[dict[str, Any]] = {"sink_tokens": 4}

    def __init__(
        self,
        budget: Budget | int | float,
        n_up: int = 64,
        *,
        future: int = 512,
        epsilon: float = 0.0,
        rotation: Rotation | None = None,
    ) -> None:
        super().__init__(budget, n_up)
        if future < 1:
            raise ValueError(f"ExpectedAttention: future must be at least 1, got {future}")
        if not epsilon >= 0:
            raise ValueError(f"ExpectedAttention: epsilon must be at least 0, got {epsilon}")
        self.future, self.epsilon, self.rotation = future, epsilon, rotation

    def for_model(self, model: Any) -> ExpectedAttention:
        """The same rule with the rotation of a model of transformers."""
        return self.replace(rotation=rotation_of(model))

    def for_context(self, model: Any, tokenizer: Any, ids: Any) -> ExpectedAttention:
        """As :meth:`for_model`."""
        del tokenizer, ids
        return self.for_model(model)

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        rotation = self.rotation and asdict(self.rotation)
        return {**super().to_dict(), "rotation": rotation}

    def score(self, ctx: UpdateContext) -> Tensor:
        """Log of expected weight times norm of the value; sinks have the best score of their head.

        Raises:
            ValueError: if the rotation is not known.
        """
        if self.rotation is None:
            raise ValueError(
                "ExpectedAttention: rotation must be that of the model, got None; use "
                "policy.for_model(model)"
            )
        store, window = ctx.segments, ctx.window
        scores = store.state.new_zeros(store.capacity)
        groups = window.q.shape[1] // ctx.num_kv_heads
        for s, rows in enumerate(store.slices()):
            b, h = divmod(s, ctx.num_kv_heads)
            rank = store.pos[rows] >= self.budget.sink_tokens
            if not ctx.due[b] or not rank.any():
                continue
            position = window.pos_q[b] + torch.arange(window.q.shape[2], device=rank.device)
            valid = position >= min(self.budget.sink_tokens, ctx.seen[b] - 1)
            q = window.q[b, h * groups : (h + 1) * groups, valid].to(scores.dtype)
            q = self.rotation.turn(q, ctx.seen[b] - position[valid], self.future)
            k, v = (t[rows][rank].to(scores.dtype) for t in (store.k, store.v))
            # For a Gaussian logit, log E exp is mean + variance / 2: those of the turned queries.
            logits = soft_cap(q @ k.T * ctx.softmax_scale, ctx.softcap)
            expected = logits.mean(1) + logits.var(1, correction=0) / 2
            weight = expected.softmax(1).mean(0) + self.epsilon
            score = (weight * v.norm(dim=1)).clamp(min=torch.finfo(v.dtype).tiny).log()
            scores[rows] = score.max()
            scores[rows][rank] = score
        return scores
