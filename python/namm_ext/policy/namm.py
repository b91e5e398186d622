"""NAMM: the policy whose scorer is evolved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..config import NAMMConfig, layer_cache_size
from . import files
from .base import Policy, UpdateContext, checked, fingerprint_of, layer_share, select_rows
from .original import read_reference_checkpoint
from .statistics import StatisticsCalibrator, StatisticsCollector, spectrogram


class NAMM(Policy):
    """Neural attention memory: a small evolved network that scores each cached token.

    Args:
        config: what it computes.
        params: ``[n]`` flat vector, or ``[P, n]`` bank of candidates, n = ``config.num_params``;
            zeros by default, which scores every token 0 and keeps everything.
        mean, var: ``[17]`` statistics of the (transformed) features; 0 and 1 by default.
        count: tokens the statistics were taken from; information only.

    Raises:
        ValueError: if a tensor has another size, a NaN or infinite value, or a negative variance.

    Example:
        >>> policy = NAMM(NAMMConfig(n_up=64))
        >>> policy.named_parameters()["W1"].shape
        torch.Size([25, 96])
    """

    num_state = reference.NUM_BINS

    def __init__(
        self,
        config: NAMMConfig,
        params: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        count: int = 0,
        *,
        source: str = "NAMM",
    ) -> None:
        n = config.num_params
        if params is None:
            params = torch.zeros(n)
        if isinstance(params, Tensor) and (params.dim() not in (1, 2) or params.shape[-1] != n):
            raise ValueError(
                f"{source}: params must be [{n}] or [P, {n}], got {list(params.shape)}"
            )
        bins = (config.num_bins,)
        self.config = config
        self.n_up = config.n_up
        self.params = checked("params", params, None, source)
        self.mean = checked("mean", torch.zeros(bins) if mean is None else mean, bins, source)
        self.var = checked("var", torch.ones(bins) if var is None else var, bins, source)
        if bool((self.var < 0).any()):
            raise ValueError(f"{source}: var must not be negative, got {float(self.var.min())}")
        if self.params.numel() == 0:
            raise ValueError(f"{source}: params must hold at least one vector, got none")
        self.count = int(count)

    def __repr__(self) -> str:
        kind = f"{self.num_candidates} candidates" if self.params.dim() == 2 else "one vector"
        return f"NAMM({self.config}, params: {kind} of {self.config.num_params})"

    @property
    def num_candidates(self) -> int:
        """P, or 1 for a single vector."""
        return self.params.shape[0] if self.params.dim() == 2 else 1

    # Deciding ----------------------------------------------------------------------------------

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Fold the period into the spectral state and score every live token.

        Row b of the batch is scored by vector ``ctx.param_index[b]``.

        Returns:
            ``scores [C]`` and the new ``state [C, 17]``.
        """
        state = spectrogram(ctx, self.config)
        device = state.device
        bank = self.params if self.params.dim() == 2 else self.params[None]
        tensors = (
            state,
            ctx.pos,
            ctx.cu_seqlens_k,
            ctx.seqused_k,
            bank.to(device),
            ctx.param_index,
            self.mean.to(device),
            self.var.to(device),
            ctx.active,
        )
        log_transform = self.config.feature_transform == "log"
        if self.config.scorer == "bam":
            scores = ops.bam_scores(
                *tensors, log_transform=log_transform, log_eps=self.config.log_eps
            )
        else:
            scores = ops.mlp_scores(
                *tensors,
                log_transform=log_transform,
                log_eps=self.config.log_eps,
                hidden=self.config.mlp_hidden,
                depth=self.config.mlp_depth,
                bias=self.config.mlp_bias,
                residual_first=self.config.mlp_residual_first,
            )
        return scores, state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Apply the configured threshold, budget and floors.

        Returns:
            ``keep [C]`` uint8 and ``num_kept [S]`` int32, -1 where a score is NaN
            (:func:`check_num_kept`).
        """
        c = self.config
        size, sinks, recent = c.cache_size, c.sink_tokens, c.recent_tokens
        if size is not None:
            size = layer_cache_size(size, layer_share(c.layer_shares, ctx))
            sinks = min(sinks, size)  # a layer with a small share may have no room for the floors
            recent = min(recent, size - sinks)
        return select_rows(
            scores,
            ctx,
            threshold=c.threshold,
            cache_size=size,
            # The global budget is its calibrated threshold; cache_size caps each head.
            budget="per_layer" if c.budget == "per_layer" else "per_head",
            fill=c.selection == "reference",
            protect_newest=c.protect_newest,
            sink_tokens=sinks,
            recent_tokens=recent,
        )

    # Deriving one NAMM from another -------------------------------------------------------------

    def to(self, device: torch.device | str) -> NAMM:
        """This NAMM with its tensors on ``device``; itself if they are there already."""
        if self.params.device == torch.empty(0, device=device).device:
            return self
        moved = copy.copy(self)  # not __init__: its checks would wait for the device
        moved.params, moved.mean, moved.var = (
            t.to(device) for t in (self.params, self.mean, self.var)
        )
        return moved

    def with_params(self, params: Tensor) -> NAMM:
        """Same config and statistics with other parameters, e.g. a bank ``[P, n]``.

        A bank makes a population policy: each row of a batch is judged by its own candidate.
        """
        return NAMM(self.config, params, self.mean, self.var, self.count)

    def with_config(self, **changes: Any) -> NAMM:
        """Same parameters and statistics with fields of the config changed.

        Example:
            >>> NAMM(NAMMConfig()).with_config(cache_size=256, threshold=None).config.cache_size
            256
        """
        config = self.config.replace(**changes)
        return NAMM(config, self.params, self.mean, self.var, self.count)

    def with_statistics(self, statistics: StatisticsCollector | StatisticsCalibrator) -> NAMM:
        """Same parameters and config with collected statistics."""
        return NAMM(self.config, self.params, statistics.mean, statistics.var, statistics.count)

    def named_parameters(self) -> dict[str, Tensor]:
        """Views of the flat vector by name (W1, b1, ...), weights as ``[in][out]``.

        Writing to a view writes to the policy. A bank keeps its first dimension.
        """
        return reference.split_params(self.params, _layout(self.config))

    @classmethod
    def from_named(
        cls,
        config: NAMMConfig,
        named: Mapping[str, Tensor],
        mean: Tensor | None = None,
        var: Tensor | None = None,
    ) -> NAMM:
        """The inverse of :meth:`named_parameters` for a single vector.

        Raises:
            ValueError: for a missing, unknown or wrongly shaped parameter.

        Example:
            >>> config = NAMMConfig(scorer="mlp")
            >>> NAMM.from_named(config, {"W1": torch.ones(25, 1)}).params.sum()
            tensor(25.)
        """
        layout = _layout(config)
        expected = [name for name, _ in layout]
        if sorted(named) != sorted(expected):
            raise ValueError(
                f"NAMM: parameters must be {', '.join(expected)}, got {', '.join(named)}"
            )
        parts = [checked(name, named[name], shape, "NAMM").flatten() for name, shape in layout]
        return cls(config, torch.cat(parts), mean, var)

    def fingerprint(self) -> str:
        """Hash of config, parameters and statistics."""
        return fingerprint_of(self, self.config.to_dict(), [self.params, self.mean, self.var])

    # Files ---------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``namm.safetensors`` into ``directory``."""
        tensors = {
            "params": self.params,
            "mean": self.mean,
            "var": self.var,
            "count": torch.tensor(self.count, dtype=torch.int64),
        }
        files.write_policy(directory, self.config, tensors)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, revision: str | None = None) -> NAMM:
        """Read a NAMM from a folder, ``"bundled:<name>"`` or a Hugging Face Hub id.

        Args:
            name_or_path: an existing local folder wins over a Hub id of the same name.
            revision: of the Hub repository.

        Raises:
            FileNotFoundError: if there is no such policy or one of its two files is missing.
            ValueError: if a file is damaged or not a NAMM; names the file and the field.
        """
        config, tensors, source = files.read_policy(str(name_or_path), revision)
        return cls(
            config,
            tensors["params"],
            tensors["mean"],
            tensors["var"],
            int(tensors["count"]),
            source=source,
        )

    @classmethod
    def load_reference_checkpoint(
        cls, path: str | Path, which: str = "mean", config: NAMMConfig | None = None
    ) -> NAMM:
        """Read a checkpoint of SakanaAI/evo-memory (``ckpt.pt``, ``latest.pt``, ``iter_*.pt``).

        No pickled code is executed. See :func:`read_reference_checkpoint`.

        Args:
            path: the ``.pt`` file.
            which: "mean" (what the original evaluates) or "best" (the best sampled member).
            config: defaults to the original's: NAMM-BAM with ``selection="reference"``.

        Raises:
            ValueError: if the file is damaged, foreign, or of another parameter count.
        """
        values = read_reference_checkpoint(path, which)
        if config is None:
            config = NAMMConfig(selection="reference")
        return cls(config, values.params, values.mean, values.var, values.count, source=str(path))


def _layout(config: NAMMConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if config.scorer == "bam":
        return reference.BAM_LAYOUT
    return reference.mlp_layout(config.mlp_hidden, config.mlp_depth, config.mlp_bias)
