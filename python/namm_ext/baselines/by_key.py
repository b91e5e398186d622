"""Rules that look at the keys only: no attention is recomputed, no window is kept."""

from __future__ import annotations

from torch import Tensor

from ..policy import UpdateContext
from ._base import Baseline


class KNorm(Baseline):
    """Keeps the keys of small L2 norm.

    Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression"
    (arXiv:2406.11430). RoPE does not change norms, so cached keys are as good as the paper's.
    Deviation: the paper leaves its first two layers whole; here every layer has the same budget.
    """

    needs_window = False

    def score(self, ctx: UpdateContext) -> Tensor:
        """Minus the norm."""
        return -ctx.segments.k.to(ctx.segments.state.dtype).norm(dim=-1)


class KeyDiff(Baseline):
    """Keeps the keys that differ most from the average direction of their head's keys.

    Park et al. 2025, "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
    Inference in Resource-Constrained Environments" (arXiv:2504.15364): the anchor is the mean of
    the normalised keys, the score minus the cosine to it. Keys are compared after RoPE, as cached.
    """

    needs_window = False

    def score(self, ctx: UpdateContext) -> Tensor:
        """Minus the cosine similarity to the anchor."""
        store = ctx.segments
        rows, segment = store.live_rows()
        keys = store.k[rows].to(store.state.dtype)
        unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        anchor = unit.new_zeros(store.seqused_k.numel(), unit.shape[1])
        anchor.index_add_(0, segment, unit)  # the sum: its length does not change the cosine
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scores = unit.new_zeros(store.pos.shape)
        scores[rows] = -(unit * anchor[segment]).sum(dim=-1)
        return scores
