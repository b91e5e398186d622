"""NAMM: the policy whose scorer is evolved."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..budget import Budget
from ..config import NAMMConfig
from . import files, version1
from .base import Policy, UpdateContext, as_budget, checked, hash_of
from .calibration import Calibration
from .gate import Gate
from .original import read_original_checkpoint
from .statistics import StatisticsCalibrator, StatisticsCollector, spectrogram


class NAMM(Policy):
    """Neural attention memory: a small evolved network that scores each cached token.

    A score is a sum of up to three parts. The *scorer* looks at the attention a token receives and
    carries over from model to model. The *gate* looks at the token's own keys and values and was
    fitted to one model. The *calibration* makes the heads of one model comparable.

    Args:
        config: how it scores.
        params: ``[n]`` flat vector, or ``[P, n]`` bank of candidates, n = ``config.num_params``;
            zeros by default, which scores every token 0 and keeps everything.
        mean, var: ``[17]`` statistics of the (transformed) features; 0 and 1 by default.
        count: tokens the statistics were taken from; information only.
        budget: how much stays, or a size alone; by default the paper's rule, all tokens with
            ``score >= 0``.
        calibration: what makes the scores of a model's layers and heads comparable.
        gate: what a token's own keys and values add to its score, for one model.
        made_for: shape of the model that it was made for; another one is warned about.
        source: what error messages name.

    Raises:
        ValueError: if a tensor has another size, a NaN or infinite value, or a negative variance.

    Example:
        >>> policy = NAMM(NAMMConfig(n_up=64), budget=256)
        >>> policy.named_parameters()["W1"].shape
        torch.Size([25, 96])
    """

    predicts_importance = True

    def __init__(
        self,
        config: NAMMConfig,
        params: Tensor | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
        count: int = 0,
        *,
        budget: Budget | int | float | None = None,
        calibration: Calibration | None = None,
        gate: Gate | None = None,
        made_for: Mapping[str, Any] | None = None,
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
        if self.num_candidates == 0:
            raise ValueError(f"{source}: params must hold at least one vector, got none")
        if config.scorer == "none" and gate is None:
            raise ValueError(f"{source}: gate must be given with scorer 'none', got None")
        self.count = int(count)
        self.budget = Budget(threshold=0.0) if budget is None else as_budget(budget)
        self.calibration = calibration
        self.gate = gate
        self.made_for = made_for
        self.needs_window = config.scorer != "none"
        self.num_state = reference.NUM_BINS * self.needs_window + (gate is not None)

    def __repr__(self) -> str:
        kind = f"{self.num_candidates} candidates" if self.params.dim() == 2 else "one vector"
        gate = "" if self.gate is None else ", with a gate"
        return (
            f"NAMM({self.config}, {self.budget}, params: {kind} of {self.config.num_params}{gate})"
        )

    @property
    def num_candidates(self) -> int:
        """P, or 1 for a single vector."""
        return self.params.shape[0] if self.params.dim() == 2 else 1

    @property
    def num_numbers(self) -> int:
        """Numbers that were evolved or fitted: those of one scorer and of the gate."""
        gate = 0 if self.gate is None else self.gate.weight.numel() + self.gate.bias.numel()
        return self.config.num_params + gate

    # Deciding ----------------------------------------------------------------------------------

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Score every live token; fold the period into the spectral state first.

        Row b of the batch is scored by vector ``ctx.param_index[b]``.

        Returns:
            ``scores [C]`` and the new ``state [C, F]``: 17 spectral features if there is a scorer,
            then the gate's score if there is a gate.

        Raises:
            ValueError: if the gate was fitted to a model of another shape.
        """
        if self.gate is None:
            spectrum = spectrogram(ctx, self.config)
            return self._attention_scores(ctx, spectrum), spectrum
        self.gate.write(ctx, self.n_up)
        state = ctx.segments.state
        gate = state[:, -1]
        if self.config.scorer == "none":
            return gate.contiguous(), state
        bins = state[:, : reference.NUM_BINS].contiguous()
        spectrum = spectrogram(
            dataclasses.replace(ctx, segments=ctx.segments._replace(state=bins)), self.config
        )
        scores = self._attention_scores(ctx, spectrum) + gate
        return scores, torch.cat([spectrum, gate[:, None]], dim=1)

    def _attention_scores(self, ctx: UpdateContext, spectrum: Tensor) -> Tensor:
        device = spectrum.device
        bank = self.params if self.params.dim() == 2 else self.params[None]
        values = (
            ctx.segments._replace(state=spectrum),
            bank.to(device),
            ctx.param_index,
            self.mean.to(device),
            self.var.to(device),
            ctx.window.active,
        )
        log_transform = self.config.feature_transform == "log"
        if self.config.scorer == "bam":
            return ops.bam_scores(*values, log_transform=log_transform, log_eps=self.config.log_eps)
        return ops.mlp_scores(
            *values,
            log_transform=log_transform,
            log_eps=self.config.log_eps,
            hidden=self.config.mlp_hidden,
            depth=self.config.mlp_depth,
            bias=self.config.mlp_bias,
            residual_first=self.config.mlp_residual_first,
        )

    # Deriving one NAMM from another -------------------------------------------------------------

    def to(self, device: torch.device | str) -> NAMM:
        """This NAMM with its tensors on ``device``; itself if they are there already."""
        moved = super().to(device)
        if self.params.device == torch.empty(0, device=device).device:
            return moved
        moved = copy.copy(moved)  # not __init__: its checks would wait for the device
        moved.params, moved.mean, moved.var = (
            t.to(device) for t in (self.params, self.mean, self.var)
        )
        moved.gate = None if self.gate is None else self.gate.to(device)
        return moved

    def with_params(self, params: Tensor) -> NAMM:
        """The same with other parameters, e.g. a bank ``[P, n]``.

        A bank makes a population policy: each row of a batch is judged by its own candidate.
        """
        return self._with(params=params)

    def with_config(self, **changes: Any) -> NAMM:
        """The same with fields of the config changed.

        Example:
            >>> NAMM(NAMMConfig()).with_config(n_up=64).config.n_up
            64
        """
        return self._with(config=self.config.replace(**changes))

    def with_gate(self, gate: Gate | None) -> NAMM:
        """The same with a gate, or without."""
        return self._with(gate=gate)

    def with_statistics(self, statistics: StatisticsCollector | StatisticsCalibrator) -> NAMM:
        """The same with collected statistics."""
        return self._with(mean=statistics.mean, var=statistics.var, count=statistics.count)

    def _with(self, **changes: Any) -> NAMM:
        names = ("config", "params", "mean", "var", "count", "budget", "calibration", "gate")
        own = {name: getattr(self, name) for name in (*names, "made_for")}
        return NAMM(**{**own, **changes})

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

    def to_dict(self) -> dict[str, Any]:
        """Config, budget, and what is no tensor of the gate."""
        settings = {"config": self.config.to_dict(), "budget": self.budget.to_dict()}
        return settings if self.gate is None else {**settings, "gate": self.gate.settings()}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and statistics; calibration and gate, if there are any."""
        own = {"params": self.params, "mean": self.mean, "var": self.var}
        gate = {} if self.gate is None else self.gate.tensors()
        return {**own, **super().tensors(), **{f"gate.{name}": t for name, t in gate.items()}}

    def earlier_fingerprints(self) -> tuple[str, ...]:
        """In version 1 a threshold had two names."""
        if self.calibration is not None or self.gate is not None:
            return ()
        flat = {**self.config.to_dict(), **version1.flat_budget(self.budget)}
        tensors = [self.params, self.mean, self.var]
        scopes = (flat["budget"], "global")
        return tuple(hash_of(self, {**flat, "budget": scope}, tensors) for scope in scopes)

    # Files ---------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``namm.safetensors`` into ``directory``."""
        count = torch.tensor(self.count, dtype=torch.int64)
        origin = {} if self.made_for is None else {"made_for": dict(self.made_for)}
        settings = {**self.to_dict(), **origin}
        files.write_policy(directory, settings, {**self.tensors(), "count": count})

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
        stored = files.read_policy(str(name_or_path), revision)
        return cls(**stored.arguments, source=stored.source)

    @classmethod
    def load_original_checkpoint(
        cls,
        path: str | Path,
        which: str = "mean",
        config: NAMMConfig | None = None,
        budget: Budget | int | float | None = None,
    ) -> NAMM:
        """Read a checkpoint of SakanaAI/evo-memory (``ckpt.pt``, ``latest.pt``, ``iter_*.pt``).

        No pickled code is executed. See :func:`read_original_checkpoint`.

        Args:
            path: the ``.pt`` file.
            which: "mean" (what the original evaluates) or "best" (the best sampled member).
            config: defaults to the original's, NAMM-BAM.
            budget: defaults to the original's, ``score >= 0`` with ``selection="original"``.

        Raises:
            ValueError: if the file is damaged, foreign, or of another parameter count.
        """
        values = read_original_checkpoint(path, which)
        if budget is None:
            budget = Budget(threshold=0.0, selection="original")
        return cls(
            NAMMConfig() if config is None else config,
            values.params,
            values.mean,
            values.var,
            values.count,
            budget=budget,
            source=str(path),
        )


def _layout(config: NAMMConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if config.scorer == "none":
        return ()
    if config.scorer == "bam":
        return reference.BAM_LAYOUT
    return reference.mlp_layout(config.mlp_hidden, config.mlp_depth, config.mlp_bias)
