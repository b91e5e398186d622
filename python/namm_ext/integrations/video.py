"""Videos in a memory: what is kept of each frame, calibrating and fitting a memory on videos.

For models of transformers that put a video's tokens among those of the text: LLaVA-NeXT-Video and
its kin, Qwen2-VL, Qwen2.5-VL, Qwen3-VL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..cache import NAMMCache
from ..fitting import Fit, FitConfig, Later, Text, calibrate, calibrate_statistics, fit
from ..policy import NAMM
from ..policy.base import PolicyT

_BAR = 40  # characters of a whole frame


@dataclass(frozen=True, eq=False)
class FrameShares:
    """What a memory holds of each frame of a row's videos.

    Attributes:
        layers: indices of the M layers with a memory.
        held: ``[M, H, F]`` int64, tokens of each frame that a head holds now.
        sizes: ``[F]`` int64, tokens that each frame has.
        text_held: ``[M, H]`` int64, tokens held that belong to no video, generated ones included.
        text_size: so many of them have been seen.
    """

    layers: tuple[int, ...]
    held: Tensor
    sizes: Tensor
    text_held: Tensor
    text_size: int

    @property
    def per_head(self) -> Tensor:
        """``[M, H, F]`` float64, the share of each frame's tokens that a head holds."""
        return self.held.double() / self.sizes

    @property
    def per_layer(self) -> Tensor:
        """``[M, F]``, the mean over heads."""
        return self.per_head.mean(1)

    @property
    def overall(self) -> Tensor:
        """``[F]``, the mean over layers and heads."""
        return self.per_head.mean((0, 1))

    @property
    def video(self) -> float:
        """Share of all video tokens that is held, over layers and heads."""
        return float(self.held.sum() / (self.held[..., 0].numel() * self.sizes.sum()))

    @property
    def text(self) -> float:
        """Share of all other tokens that is held; 1 where there are none."""
        if not self.text_size:
            return 1.0
        return float(self.text_held.sum() / (self.text_held.numel() * self.text_size))

    def __str__(self) -> str:
        """A bar for each frame."""
        lines = [
            f"frame {i:4d}  {share:6.1%}  {'#' * round(_BAR * share)}".rstrip()
            for i, share in enumerate(self.overall.tolist())
        ]
        return "\n".join([*lines, f"video {self.video:.1%}, text {self.text:.1%}"])


def frame_shares(
    cache: NAMMCache, config: PreTrainedConfig, inputs: Mapping[str, Any], *, row: int = 0
) -> FrameShares:
    """What a memory holds of each frame of a video that a model has read.

    Args:
        cache: the memory, after the model has read ``inputs``; it may have generated since.
        config: of the model.
        inputs: what the processor gave: ``input_ids`` and ``attention_mask`` ``[B, T]`` if there is
            one, with ``pixel_values_videos`` ``[V, F, 3, height, width]`` (LLaVA) or
            ``video_grid_thw`` ``[V, 3]`` (Qwen-VL, where a frame is a step of the grid).
        row: of the batch.

    Raises:
        ValueError: if the row has no video, the memory has not read the row, or the number of
            video tokens is not what the frames need.

    Example:
        >>> import transformers
        >>> from namm_ext.baselines import StreamingLLM
        >>> text = transformers.LlamaConfig(
        ...     vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
        >>> vision = transformers.CLIPVisionConfig(
        ...     hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     image_size=16, patch_size=4, projection_dim=16)
        >>> config = transformers.LlavaNextVideoConfig(
        ...     text_config=text, vision_config=vision, video_token_index=10, image_token_index=11)
        >>> model = transformers.LlavaNextVideoForConditionalGeneration(config).eval()
        >>> ids = torch.tensor([[1, *[10] * 32, 2]])  # 8 frames of 4 tokens
        >>> inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 8, 3, 16, 16)}
        >>> cache = NAMMCache(model, StreamingLLM(8, n_up=17))
        >>> ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
        >>> frame_shares(cache, model.config, inputs).overall.tolist()
        [0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75]
    """
    ids = _row_ids(inputs, row)
    is_video = ids == config.video_token_id
    sizes = torch.tensor(_frame_sizes(config, inputs)[row], dtype=torch.int64)
    if int(sizes.sum()) != int(is_video.sum()):
        raise ValueError(
            f"frame_shares: inputs must have {int(sizes.sum())} video tokens in row {row} for its "
            f"{len(sizes)} frames, got {int(is_video.sum())}"
        )
    if not len(sizes):
        raise ValueError(f"frame_shares: row must be one with a video, got {row}, which has none")
    layers = [layer for layer in cache.memory_layers if layer.kv is not None]
    seen = layers[0].kv.seen if layers and layers[0].kv is not None else ()
    if not row < len(seen) or seen[row] < len(ids):
        raise ValueError(
            f"frame_shares: cache must have seen the {len(ids)} tokens of row {row}, its rows "
            f"have seen {list(seen)}"
        )
    frame_of = torch.full((seen[row],), len(sizes))  # what is no video counts as one frame more
    frame_of[: len(ids)][is_video] = torch.arange(len(sizes)).repeat_interleave(sizes)
    held = torch.stack(
        [
            torch.stack([torch.bincount(frame_of[p], minlength=len(sizes) + 1) for p in heads])
            for heads in (_positions(layer, row) for layer in layers)
        ]
    )
    return FrameShares(
        layers=tuple(layer.layer_idx for layer in layers),
        held=held[..., :-1],
        sizes=sizes,
        text_held=held[..., -1],
        text_size=seen[row] - int(sizes.sum()),
    )


def _row_ids(inputs: Mapping[str, Any], row: int) -> Tensor:
    """Token ids of a row without padding; positions in a memory do not count it."""
    all_ids: Tensor = inputs["input_ids"].cpu()
    if not 0 <= row < len(all_ids):
        raise ValueError(f"frame_shares: row must be below {len(all_ids)}, got {row}")
    mask = inputs.get("attention_mask")
    return all_ids[row] if mask is None else all_ids[row][mask[row].cpu().bool()]


def _positions(layer: Any, row: int) -> list[Tensor]:
    """Positions that each head of a row holds."""
    h, store = layer.kv.num_kv_heads, layer.kv.store.segments
    pos = store.pos.cpu().long()
    return [pos[live] for live in store.slices()[row * h : (row + 1) * h]]


def _frame_sizes(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[list[int]]:
    """Tokens of every frame of the videos, row by row of the batch."""
    counts = (inputs["input_ids"] == config.video_token_id).sum(1).tolist()
    videos = _videos(config, inputs, sum(counts))
    rows: list[list[int]] = []
    for count in counts:
        frames: list[int] = []
        while videos and sum(frames) < count:
            frames += videos.pop(0)
        rows.append(frames)
    return rows


def _videos(
    config: PreTrainedConfig, inputs: Mapping[str, Any], num_tokens: int
) -> list[list[int]]:
    """Tokens of every frame, video by video."""
    grid = inputs.get("video_grid_thw")
    if grid is not None:
        merged = config.vision_config.spatial_merge_size**2
        return [[h * w // merged] * t for t, h, w in grid.tolist()]
    pixels = inputs.get("pixel_values_videos")
    if pixels is None:
        raise ValueError(
            "frame_shares: inputs must have video_grid_thw or pixel_values_videos, got "
            f"{', '.join(inputs)}"
        )
    videos, frames = pixels.shape[:2]
    size, rest = divmod(num_tokens, videos * frames)
    if rest or not size:
        raise ValueError(
            f"frame_shares: video tokens must divide among {videos} videos of {frames} frames, "
            f"got {num_tokens}"
        )
    return [[size] * frames] * videos


def calibrate_on_videos(
    policy: PolicyT,
    model: PreTrainedModel,
    videos: Sequence[Mapping[str, Any]],
    questions: Sequence[Sequence[Sequence[int]]] | None = None,
) -> PolicyT:
    """The same policy, ready for the scope "global" on a model that watches videos.

    Nothing is trained. A NAMM without a gate takes the statistics of its features from the videos
    as well. Positions are counted one by one, as LLaVA does; those of Qwen-VL are approximated.

    Args:
        policy: as in :func:`namm_ext.fitting.calibrate`.
        model: that will use it.
        videos: what the processor gave for each, of one row, with at least ``n_up`` tokens.
        questions: token ids of some that follow each video, from which the importance of its
            tokens is learned; by default the video is watched a second time.

    Returns:
        The policy with its calibration.

    Raises:
        ValueError: if there is no video, one is too short, or there are not as many lists of
            questions as videos.
    """
    with _as_texts(model, videos, questions) as (decoder, texts):
        ready: Any = policy
        if isinstance(policy, NAMM) and policy.needs_window and policy.gate is None:
            ready = calibrate_statistics(policy, decoder, texts)
        done: PolicyT = calibrate(ready, decoder, texts)
        return done


def fit_on_videos(
    model: PreTrainedModel,
    videos: Sequence[Mapping[str, Any]],
    config: FitConfig | None = None,
    questions: Sequence[Sequence[Sequence[int]]] | None = None,
) -> Fit:
    """A memory fitted to a model that watches videos, by :func:`namm_ext.fitting.fit`.

    Args:
        model: that will use it.
        videos: what the processor gave for each, of one row; at least two, one judges the fit.
        config: of the fit; with ``NAMMConfig(scorer="none")`` a gate alone, which takes seconds.
        questions: as in :func:`calibrate_on_videos`; worth having, if there are any.

    Returns:
        The fit; ``.policy`` is the memory.

    Raises:
        ValueError: as :func:`calibrate_on_videos`.

    Example:
        ``clips`` are some of ``namm_ext.zoo.clips``::

            asked = [[encode(question.text) for question in clip.questions()] for clip in clips]
            found = fit_on_videos(model, [inputs_of([clip]) for clip in clips], config, asked)
            cache = NAMMCache(model, found.policy)
    """
    with _as_texts(model, videos, questions) as (decoder, texts):
        return fit(decoder, texts, config)


@contextmanager
def _as_texts(
    model: PreTrainedModel,
    videos: Sequence[Mapping[str, Any]],
    questions: Sequence[Sequence[Sequence[int]]] | None,
) -> Iterator[tuple[PreTrainedModel, list[Text]]]:
    """Within the block each token of a video is a word that the decoder knows."""
    if questions is not None and len(questions) != len(videos):
        raise ValueError(f"questions must be of {len(videos)} videos, got {len(questions)}")
    decoder = model.get_decoder()
    table = decoder.get_input_embeddings()
    rows, texts, total = [table.weight.detach()], [], table.weight.shape[0]
    for i, inputs in enumerate(videos):
        read = _embeddings(model, decoder, inputs)
        ids = tuple(range(total, total + len(read)))
        later = [ids] if questions is None else questions[i]
        texts.append(Text(ids, tuple(Later(tuple(x)) for x in later)))
        rows.append(read)
        total += len(read)
    decoder.set_input_embeddings(nn.Embedding.from_pretrained(torch.cat(rows)))
    try:
        yield decoder, texts
    finally:
        decoder.set_input_embeddings(table)


@torch.inference_mode()
def _embeddings(
    model: PreTrainedModel, decoder: PreTrainedModel, inputs: Mapping[str, Any]
) -> Tensor:
    """``[T, hidden]``: what the decoder gets to read."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(kwargs["inputs_embeds"])

    hook = decoder.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model.base_model(**inputs, use_cache=False)
    finally:
        hook.remove()
    if found[0].shape[0] != 1:
        raise ValueError(f"videos must be of one row each, got {found[0].shape[0]} rows")
    return found[0][0]
