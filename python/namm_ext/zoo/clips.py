"""Clips: short videos of shapes that move, drawn from a seed, and questions about them.

A clip is a few scenes behind one another. In each, one shape of one colour moves from one edge to
the opposite one, with a trail behind it, so that all its frames say nearly the same; within a clip
no shape and no colour comes twice. For two frames somewhere in the clip the background flashes in a
colour. A question has one word as its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 32
"""Pixels along an edge of a frame."""

TOKENS_PER_FRAME = 16
"""What the bundled model makes of a frame."""

SHAPES = ("disc", "square", "triangle", "cross", "ring")
COLORS = {
    "red": (0.95, 0.15, 0.15),
    "green": (0.15, 0.85, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.9, 0.15),
    "pink": (0.95, 0.3, 0.9),
    "white": (0.95, 0.95, 0.95),
}
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
KINDS = ("color", "shape", "motion", "first", "last", "flash", "beside")
"""Kinds of questions."""

PAD, BOS, EOS, VIDEO, IMAGE = "<pad>", "<bos>", "<eos>", "<video>", "<image>"
_QUESTION_WORDS = (
    "what", "color", "shape", "is", "the", "where", "goes", "comes", "first", "last", "flashes",
    "in", "flash",
)  # fmt: skip
WORDS: tuple[str, ...] = (
    PAD,
    BOS,
    EOS,
    VIDEO,
    IMAGE,
    *_QUESTION_WORDS,
    *SHAPES,
    *COLORS,
    *DIRECTIONS,
)
"""The vocabulary, in the order of its token ids."""

_EXTENT = 11  # pixels of a shape
_FLASH_FRAMES = 2
_LEAST_SCENE = 2
_LEAST_PIXELS = 4  # of a shape that is in a part of a frame
_TRAIL = ((10, 0.2), (5, 0.4), (0, 1.0))  # pixels behind, and how much of it covers what is there


@dataclass(frozen=True)
class Scene:
    """One shape on its way.

    Attributes:
        shape, color, direction: words of ``SHAPES``, ``COLORS`` and ``DIRECTIONS``.
        start: its first frame.
        frames: how many it has.
    """

    shape: str
    color: str
    direction: str
    start: int
    frames: int


@dataclass(frozen=True)
class ClipQuestion:
    """A question about a clip.

    Attributes:
        kind: one of ``KINDS``.
        text: words with spaces between.
        answer: one word.
    """

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Clip:
    """A video and what is in it.

    Attributes:
        pixels: ``[F, 3, SIZE, SIZE]`` float32 around 0, as the vision tower takes them.
        scenes: in their order.
        flash: first frame of the flash.
        flash_color: of the background there.
        touched: ``[F, 16]`` bool, the parts of a frame (4 x 4, row by row) that the shape is in.
    """

    pixels: NDArray[np.float32]
    scenes: tuple[Scene, ...]
    flash: int
    flash_color: str
    touched: NDArray[np.bool_]

    @property
    def flash_scene(self) -> Scene:
        """The scene that the flash is in."""
        return next(s for s in reversed(self.scenes) if s.start <= self.flash)

    def questions(self) -> list[ClipQuestion]:
        """All questions about the clip, kind by kind."""
        asked = [
            *(("color", f"what color is the {s.shape}", s.color) for s in self.scenes),
            *(("shape", f"what shape is {s.color}", s.shape) for s in self.scenes),
            *(("motion", f"where goes the {s.shape}", s.direction) for s in self.scenes),
            ("first", "what shape comes first", self.scenes[0].shape),
            ("last", "what shape comes last", self.scenes[-1].shape),
            ("flash", "what color flashes", self.flash_color),
            ("beside", "what shape is in the flash", self.flash_scene.shape),
        ]
        return [ClipQuestion(*fields) for fields in asked]


def draw_clip(rng: np.random.Generator, frames: int, scenes: int, *, painted: bool = True) -> Clip:
    """Draw a clip.

    Args:
        rng: what to draw from; the same state gives the same clip.
        frames: of the clip, at least two for each scene.
        scenes: up to five.
        painted: whether it has pixels; without, ``pixels`` and ``touched`` are empty.

    Raises:
        ValueError: if the scenes do not fit.

    Example:
        >>> clip = draw_clip(np.random.default_rng(0), frames=12, scenes=3)
        >>> clip.pixels.shape, len(clip.questions())
        ((12, 3, 32, 32), 13)
    """
    if not 1 <= scenes <= len(SHAPES) or frames < _LEAST_SCENE * scenes:
        raise ValueError(
            f"draw_clip: scenes must be 1 to {len(SHAPES)}, with {_LEAST_SCENE} frames each, got "
            f"{scenes} scenes in {frames} frames"
        )
    shapes = rng.permutation(SHAPES)[:scenes].tolist()
    colors = rng.permutation(list(COLORS))[:scenes].tolist()
    directions = rng.choice(list(DIRECTIONS), scenes).tolist()
    starts = _starts(rng, frames, scenes)
    lengths = np.diff([*starts, frames]).tolist()
    found = tuple(
        Scene(*fields) for fields in zip(shapes, colors, directions, starts, lengths, strict=True)
    )
    flash = int(rng.integers(frames - _FLASH_FRAMES + 1))
    # A flash lies within one scene.
    flash = next(
        (s.start - _FLASH_FRAMES for s in found if flash < s.start < flash + _FLASH_FRAMES), flash
    )
    flash_color = str(rng.choice(list(COLORS)))
    if not painted:
        empty = np.zeros((0, 3, SIZE, SIZE), np.float32)
        return Clip(empty, found, flash, flash_color, np.zeros((0, TOKENS_PER_FRAME), bool))
    pixels, touched = _pixels(rng, found, frames, flash, flash_color)
    return Clip(pixels, found, flash, flash_color, touched)


def _starts(rng: np.random.Generator, frames: int, scenes: int) -> list[int]:
    """First frames of scenes, the lengths of which are random and at least half of the mean."""
    least = max(_LEAST_SCENE, frames // (2 * scenes))
    cuts = np.sort(rng.integers(frames - scenes * least + 1, size=scenes - 1))
    return [0, *(int(cut) + least * (i + 1) for i, cut in enumerate(cuts))]


def _pixels(
    rng: np.random.Generator, scenes: Sequence[Scene], frames: int, flash: int, flash_color: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """``[F, 3, SIZE, SIZE]``: a still background, a little noise in every frame, the shapes; and
    ``[F, 16]``: where the shapes are."""
    still = 0.15 + 0.05 * rng.standard_normal((1, 3, SIZE, SIZE))
    video = still + 0.02 * rng.standard_normal((frames, 3, SIZE, SIZE))
    tint = np.array(COLORS[flash_color])[:, None, None]
    shown = slice(flash, flash + _FLASH_FRAMES)
    video[shown] = 0.5 * video[shown] + 0.5 * tint
    room = SIZE - _EXTENT
    covered = np.zeros((frames, 4, 8, 4, 8), bool)
    for scene in scenes:
        mask = _MASKS[scene.shape]
        paint = np.array(COLORS[scene.color])[:, None, None]
        across = int(rng.integers(room + 1))
        way = np.rint(np.linspace(0, room, scene.frames)).astype(int)
        down, right = DIRECTIONS[scene.direction]
        way = way if down + right > 0 else way[::-1]
        for i, along in enumerate(way.tolist()):
            frame = video[scene.start + i]
            y, x = (along, across) if down else (across, along)
            for back, strength in _TRAIL:
                _draw(frame, mask, paint, y - back * down, x - back * right, strength)
            place = covered[scene.start + i].reshape(SIZE, SIZE)
            place[y : y + _EXTENT, x : x + _EXTENT] = mask
    touched = (covered.sum((2, 4)) >= _LEAST_PIXELS).reshape(frames, TOKENS_PER_FRAME)
    return ((video - 0.3) / 0.3).astype(np.float32), touched


def _draw(
    frame: NDArray[np.float64], mask: NDArray[np.bool_], paint: NDArray[np.float64],
    y: int, x: int, strength: float,
) -> None:  # fmt: skip
    """Paint over the part of a shape that lies within the frame."""
    top, left = max(0, -y), max(0, -x)
    part = mask[top : SIZE - y, left : SIZE - x]
    if part.size:
        y, x = y + top, x + left
        spot = frame[:, y : y + part.shape[0], x : x + part.shape[1]]
        spot[:] = np.where(part, strength * paint + (1 - strength) * spot, spot)


def _mask_of(shape: str) -> NDArray[np.bool_]:
    """``[_EXTENT, _EXTENT]``: the pixels of a shape."""
    y, x = np.mgrid[:_EXTENT, :_EXTENT] - (_EXTENT // 2)
    radius = np.hypot(y, x)
    inside: NDArray[np.bool_] = {
        "disc": radius <= 4.2,
        "square": np.maximum(abs(y), abs(x)) <= 5,
        "triangle": 2 * abs(x) <= y + 5,
        "cross": np.minimum(abs(y), abs(x)) <= 1,
        "ring": (radius <= 5.3) & (radius >= 3.2),
    }[shape]
    return inside


_MASKS = {shape: _mask_of(shape) for shape in SHAPES}


def make_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` of ``WORDS``; spaces stand between words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[VIDEO, IMAGE],
        clean_up_tokenization_spaces=False,
    )


def encode(text: str) -> list[int]:
    """Token ids of words with spaces between, as the tokenizer gives them."""
    return [WORDS.index(word) for word in text.split()]


def context_ids(frames: int) -> list[int]:
    """Token ids of a clip: a beginning, and 16 places for every frame."""
    return [WORDS.index(BOS), *[WORDS.index(VIDEO)] * (TOKENS_PER_FRAME * frames)]


def inputs_of(clips: Sequence[Clip], text: str = "") -> dict[str, Tensor]:
    """What a model reads: clips of one length, each with the same text behind it.

    Returns:
        ``input_ids`` ``[B, T]`` int64 and ``pixel_values_videos`` ``[B, F, 3, SIZE, SIZE]``.
    """
    pixels = torch.from_numpy(np.stack([clip.pixels for clip in clips]))
    ids = torch.tensor([*context_ids(pixels.shape[1]), *encode(text)])
    return {"input_ids": ids.repeat(len(clips), 1), "pixel_values_videos": pixels}
