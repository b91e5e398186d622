"""What decides which tokens stay: the interface of every eviction policy, and NAMM itself.

A layer calls :meth:`Policy.update` every ``n_up`` tokens, then :meth:`Policy.select`, and
compacts its store to the rows that were kept. Policies hold no per-sequence data: that lives in
the store's ``state``, so one policy serves any number of caches.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .config import NAMMConfig, layer_cache_size
from .reference import Statistics

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "namm.safetensors"
FORMAT = "namm_ext.NAMM"
FORMAT_VERSION = 1
BUNDLED_PREFIX = "bundled:"


@dataclass(frozen=True)
class UpdateContext:
    """What one layer shows a policy at an update. Shapes as in ``params.h``.

    Attributes:
        q_window: ``[B, Hq, 16 + n_up, D]`` queries after RoPE, the first 16 of the last period.
        lse_window: ``[B, Hq, 16 + n_up]`` log-sum-exp of each of those rows.
        k, v, pos, state: the store, ``[C, D]``, ``[C, Dv]``, ``[C]`` int32, ``[C, F]``.
        cu_seqlens_k, seqused_k: slots ``[S + 1]`` and live rows ``[S]``, int32.
        pos_q: ``[B]`` int32 position of window row 0.
        active: ``[B]`` bool, rows of the batch that are due; the others stay as they are.
        softmax_scale: of the attention.
        layer_idx: of the layer.
        num_kv_heads: H.
        param_index: ``[B]`` int32, candidate of each row in a bank of parameters.
        seen: ``[B]`` int32 real tokens of each row so far.
    """

    q_window: Tensor
    lse_window: Tensor
    k: Tensor
    v: Tensor
    pos: Tensor
    state: Tensor
    cu_seqlens_k: Tensor
    seqused_k: Tensor
    pos_q: Tensor
    active: Tensor
    softmax_scale: float
    layer_idx: int
    num_kv_heads: int
    param_index: Tensor
    seen: Tensor


class Policy:
    """Base of NAMM and of every baseline.

    Attributes:
        n_up: real tokens between two updates.
        num_state: float32 numbers a token carries (F); 0 for none.
        needs_window: whether :meth:`update` reads ``q_window`` and ``lse_window``; without it the
            store keeps no queries and both have no rows.
    """

    n_up: int
    num_state: int = 0
    needs_window: bool = True

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Score every live token: ``scores [C]`` and the new ``state [C, F]``, out of place."""
        raise NotImplementedError

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Turn scores into ``keep [C]`` uint8 and ``num_kept [S]`` int32 (-1: NaN score)."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Policy:
        """This policy with its tensors on ``device``."""
        del device
        return self

    def fingerprint(self) -> str:
        """Hash of everything that decides what is kept; saved caches refer to it."""
        raise NotImplementedError


def select_rows(
    scores: Tensor,
    ctx: UpdateContext,
    *,
    threshold: float | None = None,
    cache_size: int | None = None,
    budget: str = "per_head",
    fill: bool = False,
    protect_newest: bool = True,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`namm_ext.ops.select` on the segments of an update; None means no limit.

    Returns:
        ``keep [C]`` uint8 and ``num_kept [S]`` int32.
    """
    return ops.select(
        scores,
        ctx.pos,
        ctx.cu_seqlens_k,
        ctx.seqused_k,
        ctx.active,
        threshold=-math.inf if threshold is None else float(threshold),
        cache_size=-1 if cache_size is None else cache_size,
        budget=budget,
        fill=fill,
        protect_newest=protect_newest,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )


def layer_share(layer_shares: tuple[float, ...] | None, ctx: UpdateContext) -> float:
    """The share of the mean budget that the layer of an update has; 1 without ``layer_shares``.

    Raises:
        ValueError: if there is no entry for the layer.
    """
    if layer_shares is None:
        return 1.0
    if not 0 <= ctx.layer_idx < len(layer_shares):
        raise ValueError(
            f"layer_shares must have an entry for every layer, got {len(layer_shares)} entries "
            f"and layer {ctx.layer_idx}"
        )
    return layer_shares[ctx.layer_idx]


def check_num_kept(num_kept: Tensor, ctx: UpdateContext) -> list[int]:
    """Rows kept in each segment as ints, after making sure that no score was NaN.

    Args:
        num_kept: ``[S]`` from :meth:`Policy.select`.
        ctx: the update it belongs to, for the message.

    Returns:
        S ints. One device synchronisation.

    Raises:
        ValueError: names the layer, batch row and KV head of the first NaN score.
    """
    counts = [int(n) for n in num_kept.tolist()]
    for s, n in enumerate(counts):
        if n < 0:
            row, head = divmod(s, ctx.num_kv_heads)
            raise ValueError(
                f"select: scores must not be NaN, got NaN in layer {ctx.layer_idx}, "
                f"batch row {row}, KV head {head}"
            )
    return counts


def calibrate_threshold(
    scores: Sequence[Tensor],
    keep_fraction: float | None = None,
    target_tokens: float | None = None,
) -> float:
    """Threshold that keeps a wanted share of the given scores, for ``budget="global"``.

    The k-th largest of all scores together, so at least k of them reach it (ties all do).

    Args:
        scores: scores of live tokens, one tensor per layer and update or per segment.
        keep_fraction: share of all tokens to keep, in (0, 1]; give this or target_tokens.
        target_tokens: tokens to keep per tensor of ``scores``, on average.

    Returns:
        The threshold; store it with ``policy.with_config(budget="global", threshold=...)``.

    Raises:
        ValueError: if there is no score, a NaN, or not exactly one goal in its range.

    Example:
        >>> calibrate_threshold([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], 0.5)
        3.0
    """
    pooled = torch.cat([s.detach().flatten().float().cpu() for s in scores] or [torch.empty(0)])
    total = pooled.numel()
    if total == 0:
        raise ValueError("calibrate_threshold: scores must hold at least one score, got none")
    if bool(pooled.isnan().any()):
        raise ValueError("calibrate_threshold: scores must not be NaN, got NaN")
    if (keep_fraction is None) == (target_tokens is None):
        raise ValueError(
            "calibrate_threshold: exactly one of keep_fraction and target_tokens must be given, "
            f"got {keep_fraction} and {target_tokens}"
        )
    if keep_fraction is not None:
        if not 0.0 < keep_fraction <= 1.0:
            raise ValueError(
                f"calibrate_threshold: keep_fraction must be in (0, 1], got {keep_fraction}"
            )
        wanted = keep_fraction * total
    else:
        assert target_tokens is not None
        if not target_tokens > 0:
            raise ValueError(
                f"calibrate_threshold: target_tokens must be positive, got {target_tokens}"
            )
        wanted = target_tokens * len(scores)
    k = min(max(round(wanted), 1), total)
    return float(pooled.sort(descending=True).values[k - 1])


class StatisticsCollector:
    """Running mean and variance of spectral features over any number of updates (spec 4).

    Batches are merged in float64 on the CPU. The order of batches matters only to rounding.

    Example:
        >>> collector = StatisticsCollector()
        >>> collector.add(torch.zeros(3, 17))
        >>> collector.add(torch.ones(1, 17))
        >>> float(collector.mean[0]), float(collector.var[0]), collector.count
        (0.25, 0.1875, 4)
    """

    def __init__(self) -> None:
        zeros = torch.zeros(reference.NUM_BINS, dtype=torch.float64)
        self._stats = Statistics(zeros, zeros.clone(), torch.tensor(0))

    def add(self, features: Tensor) -> None:
        """Merge the statistics of ``features [..., 17]``, all rows valid."""
        self._stats = reference.merge_statistics(
            self._stats, reference.batch_statistics(features.detach().cpu().double())
        )

    @property
    def count(self) -> int:
        """Tokens merged so far; a token counts again at every update and in every head."""
        return int(self._stats.num)

    @property
    def mean(self) -> Tensor:
        """``[17]`` float32. Raises ValueError if nothing was collected."""
        return self._collected().mean.float()

    @property
    def var(self) -> Tensor:
        """``[17]`` float32, biased. Raises ValueError if nothing was collected."""
        return self._collected().var.float()

    def _collected(self) -> Statistics:
        if self.count == 0:
            raise ValueError(
                "statistics: at least one update must have run, got none "
                "(are the sequences shorter than n_up?)"
            )
        return self._stats


class StatisticsCalibrator(Policy):
    """Policy that evicts nothing and collects the statistics a NAMM normalises with.

    Run a model with it over representative text, then pass ``mean`` and ``var`` to the NAMM
    (:meth:`NAMM.with_statistics`). Only this policy holds data of its run: use it once.

    Args:
        config: n_up, ema_coeff and the feature transform are used.
    """

    num_state = reference.NUM_BINS

    def __init__(self, config: NAMMConfig) -> None:
        self.config = config
        self.n_up = config.n_up
        self.collector = StatisticsCollector()

    @property
    def mean(self) -> Tensor:
        """``[17]`` float32."""
        return self.collector.mean

    @property
    def var(self) -> Tensor:
        """``[17]`` float32, biased."""
        return self.collector.var

    @property
    def count(self) -> int:
        """Tokens collected, over layers, heads and updates."""
        return self.collector.count

    def update(self, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Fold the period into the state and collect it; all scores are zero."""
        state = _spectrogram(ctx, self.config)
        starts = ctx.cu_seqlens_k.tolist()
        used = ctx.seqused_k.tolist()
        active = ctx.active.tolist()
        live = [
            state[starts[s] : starts[s] + n]
            for s, n in enumerate(used)
            if active[s // ctx.num_kv_heads]
        ]
        if live:
            features = torch.cat(live)
            if self.config.feature_transform == "log":
                features = reference.log_features(features, self.config.log_eps)
            self.collector.add(features)
        return state.new_zeros(state.shape[0]), state

    def select(self, scores: Tensor, ctx: UpdateContext) -> tuple[Tensor, Tensor]:
        """Keep everything."""
        return select_rows(scores, ctx)

    def fingerprint(self) -> str:
        """Hash of the configuration."""
        return _fingerprint(self, self.config.to_dict(), [])


def _spectrogram(ctx: UpdateContext, config: NAMMConfig) -> Tensor:
    return ops.spectrogram(
        ctx.q_window,
        ctx.lse_window,
        ctx.k,
        ctx.pos,
        ctx.state,
        ctx.cu_seqlens_k,
        ctx.seqused_k,
        ctx.pos_q,
        ctx.active,
        softmax_scale=ctx.softmax_scale,
        ema_coeff=config.ema_coeff,
    )


def _fingerprint(policy: Policy, settings: Mapping[str, Any], tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(type(policy).__name__.encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked(name: str, value: Tensor, shape: tuple[int, ...] | None, source: str) -> Tensor:
    """A float32 contiguous copy of ``value``; ValueError unless shaped as asked and finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{source}: {name} must be a floating tensor, got {kind}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{source}: {name} must be {list(shape)}, got {list(value.shape)}")
    copy = value.detach().to(torch.float32, copy=True).contiguous()
    num_bad = int((~copy.isfinite()).sum())
    if num_bad:
        raise ValueError(f"{source}: {name} must be finite, got {num_bad} NaN or infinite values")
    return copy


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
        self.params = _checked("params", params, None, source)
        self.mean = _checked("mean", torch.zeros(bins) if mean is None else mean, bins, source)
        self.var = _checked("var", torch.ones(bins) if var is None else var, bins, source)
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
        state = _spectrogram(ctx, self.config)
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
        parts = [_checked(name, named[name], shape, "NAMM").flatten() for name, shape in layout]
        return cls(config, torch.cat(parts), mean, var)

    def fingerprint(self) -> str:
        """Hash of config, parameters and statistics."""
        return _fingerprint(self, self.config.to_dict(), [self.params, self.mean, self.var])

    # Files ---------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``namm.safetensors`` into ``directory``."""
        safetensors_torch = _safetensors()
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "params": self.params,
            "mean": self.mean,
            "var": self.var,
            "count": torch.tensor(self.count, dtype=torch.int64),
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        safetensors_torch.save_file(tensors, str(folder / WEIGHTS_FILE))
        text = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
        }
        (folder / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")

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
        folder = _find_policy(str(name_or_path), revision)
        config = _read_config(folder / CONFIG_FILE)
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"NAMM: {path} is missing")
        safetensors_torch = _safetensors()
        from safetensors import SafetensorError

        try:
            tensors = safetensors_torch.load_file(str(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: must be a safetensors file, got {error}") from error
        expected = {"params", "mean", "var", "count"}
        if set(tensors) != expected:
            raise ValueError(
                f"{path}: tensors must be {', '.join(sorted(expected))}, "
                f"got {', '.join(sorted(tensors)) or 'none'}"
            )
        if tensors["count"].numel() != 1:
            raise ValueError(
                f"{path}: count must be one number, got {list(tensors['count'].shape)}"
            )
        return cls(
            config,
            tensors["params"],
            tensors["mean"],
            tensors["var"],
            int(tensors["count"]),
            source=str(path),
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


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "reading and writing policies needs safetensors: pip install 'namm_ext[hf]'"
        ) from error
    return safetensors.torch


def bundled_policies() -> list[str]:
    """Names of the policies that come with the package."""
    root = Path(str(resources.files("namm_ext") / "zoo" / "policies"))
    return sorted(p.parent.name for p in root.glob(f"*/{CONFIG_FILE}"))


def _find_policy(name: str, revision: str | None) -> Path:
    if name.startswith(BUNDLED_PREFIX):
        short = name.removeprefix(BUNDLED_PREFIX)
        if short not in bundled_policies():
            raise FileNotFoundError(
                f"NAMM: bundled policy must be one of {', '.join(bundled_policies()) or '(none)'}, "
                f"got {short!r}"
            )
        return Path(str(resources.files("namm_ext") / "zoo" / "policies" / short))
    folder = Path(name)
    if folder.is_dir():
        return folder
    # A Hub id is "name" or "owner/name"; anything else can only be a path.
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or folder.exists():
        raise FileNotFoundError(f"NAMM: name_or_path must be a folder, got {name!r}")
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"NAMM: {name!r} is not a folder, and reading it from the Hugging Face Hub needs "
            "huggingface_hub: pip install 'namm_ext[hf]'"
        ) from error
    return Path(
        huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
        )
    )


def _read_config(path: Path) -> NAMMConfig:
    if not path.is_file():
        raise FileNotFoundError(f"NAMM: {path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON, got {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT!r}; this is not a saved NAMM")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version must be {FORMAT_VERSION}, "
            f"got {content.get('format_version')!r}"
        )
    try:
        return NAMMConfig.from_dict(content.get("config", {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a NAMM needs from a checkpoint of the original."""

    params: Tensor
    mean: Tensor
    var: Tensor
    count: int


_STORED = "stored_buffers_to_save.token_embedding_0_output_"


def read_reference_checkpoint(path: str | Path, which: str = "mean") -> ReferenceCheckpoint:
    """Parameters of any size and statistics from a checkpoint of the original (spec 9.5).

    The file is mapped, not read: of its 210 MB, three n x n matrices are never touched.

    Args:
        path: the ``.pt`` file.
        which: "mean" or "best".

    Returns:
        ``params [n]``, ``mean [17]``, ``var [17]`` float32 and the count. Statistics never
        collected (count 0) come back as mean 0 and var 1 with a warning, which is what the
        original does with them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, would execute code, or lacks a key.
    """
    keys = {"mean": "mean", "best": "best_member"}
    if which not in keys:
        raise ValueError(
            f"read_reference_checkpoint: which must be 'mean' or 'best', got {which!r}"
        )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_reference_checkpoint: no such file: {path}")
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # damaged files make torch.load raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: must be a torch checkpoint that loads without executing code, got {reason}"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("evolution_state"), dict):
        raise ValueError(
            f"{path}: must hold an 'evolution_state' dict; not an evo-memory checkpoint"
        )
    state = {
        str(key).removeprefix("_orig_mod."): value
        for key, value in content["evolution_state"].items()
    }
    wanted = [keys[which], f"{_STORED}mean", f"{_STORED}var", f"{_STORED}num"]
    for key in wanted:
        if not isinstance(state.get(key), Tensor):
            raise ValueError(f"{path}: evolution_state must hold the tensor {key!r}, got none")
    params = _checked(keys[which], state[keys[which]], None, str(path)).flatten()
    count = int(state[f"{_STORED}num"].max())
    bins = (reference.NUM_BINS,)
    if count == 0:
        warnings.warn(
            f"{path}: no normalisation statistics were collected; features pass unchanged",
            stacklevel=2,
        )
        return ReferenceCheckpoint(params, torch.zeros(bins), torch.ones(bins), 0)
    mean, var = (_checked(key, state[key].flatten(), bins, str(path)) for key in wanted[1:3])
    return ReferenceCheckpoint(params, mean, var, count)
