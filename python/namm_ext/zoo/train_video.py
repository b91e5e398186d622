"""The recipe of the bundled video language model: a small LLaVA-NeXT-Video that watches clips.

First the vision tower learns which words each part of a frame stands for, and the decoder answers
questions about such words, one place per frame, where looking them up forms quickly. Then both
watch clips together, short and long ones. Only answers are learned, several after each clip.

    python -m namm_ext.zoo.train_video OUT
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import lock_folder
from .clips import (
    BOS,
    EOS,
    IMAGE,
    KINDS,
    PAD,
    SIZE,
    TOKENS_PER_FRAME,
    VIDEO,
    WORDS,
    Clip,
    ClipQuestion,
    context_ids,
    draw_clip,
    encode,
    make_tokenizer,
)
from .training import Run, descend, make_optimizers


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        kind: "look" (the vision tower alone learns which words each part of a frame stands for),
            "read" (the decoder alone reads those words, one place per frame) or "watch" (both).
        frames: of a clip; each step draws one of them.
        step_frames: frames per step, over all clips.
        questions: after each clip.
        steps: of the stage.
        decay: whether the learning rates fall to zero at its end.
    """

    kind: str
    frames: tuple[int, ...]
    step_frames: int
    questions: int
    steps: int
    decay: bool = True


STAGES = (
    Stage("look", frames=(8,), step_frames=96, questions=0, steps=500),
    Stage("read", frames=(4, 6, 8), step_frames=240, questions=8, steps=500, decay=False),
    Stage("watch", frames=(8, 24, 40), step_frames=120, questions=16, steps=1200),
)

QUICK_STAGES = tuple(
    Stage(kind, frames=(4,), step_frames=8, questions=4, steps=1)
    for kind in ("look", "read", "watch")
)
"""Three steps: shows that the recipe runs, and nothing else."""


@dataclass(frozen=True)
class VideoConfig:
    """Size of the model and the constants of its training.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size: of the decoder.
        vision_size, vision_layers: of the vision tower.
        matrix_lr: peak learning rate of Muon, for the weight matrices of the layers.
        other_lr: peak learning rate of AdamW, for everything else.
        warmup_steps: steps of linear warm-up of every stage.
        decay_fraction: last part of every stage, in which the rates fall linearly to zero.
    """

    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 192
    vision_size: int = 48
    vision_layers: int = 2
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    warmup_steps: int = 20
    decay_fraction: float = 0.3


def new_model(config: VideoConfig) -> Any:
    """A ``LlavaNextVideoForConditionalGeneration`` with random weights; a frame has 16 tokens."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextVideoConfig,
        LlavaNextVideoForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        pad_token_id=WORDS.index(PAD),
        bos_token_id=WORDS.index(BOS),
        eos_token_id=WORDS.index(EOS),
    )
    vision = CLIPVisionConfig(
        hidden_size=config.vision_size,
        intermediate_size=2 * config.vision_size,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=config.vision_size,
    )
    model: Any = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            text_config=text,
            vision_config=vision,
            video_token_index=WORDS.index(VIDEO),
            image_token_index=WORDS.index(IMAGE),
            vision_feature_layer=-1,
            spatial_pool_stride=1,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        # Words stay as they are until vision and reading meet.
        model.get_input_embeddings().weight.normal_(std=0.1)
        for layer in model.model.language_model.layers:
            _attend_to_alike(layer.self_attn, config)
    return model


def _attend_to_alike(attention: Any, config: VideoConfig) -> None:
    """Let queries and keys start alike: a word looks for places that say the same."""
    groups = config.num_heads // config.num_kv_heads
    weight = attention.k_proj.weight
    weight.normal_(std=config.hidden_size**-0.5)
    heads = weight.unflatten(0, (config.num_kv_heads, config.head_dim))
    attention.q_proj.weight.copy_(heads.repeat_interleave(groups, 0).flatten(0, 1))


@dataclass(frozen=True)
class Batch:
    """Clips of one length with N questions and answers.

    Attributes:
        input_ids: ``[B, T]``, padded at the end.
        pixels: ``[B, F, 3, SIZE, SIZE]``.
        is_answer: ``[B, T]`` bool.
        kinds: ``[N]`` indices into ``KINDS``, row by row.
        words: ``[B, F * 16, len(WORDS)]``, which words each part of a frame stands for; ``[B, F,
            len(WORDS)]`` if nothing is painted.
    """

    input_ids: Tensor
    pixels: Tensor
    is_answer: Tensor
    kinds: Tensor
    words: Tensor


def make_batch(
    rng: np.random.Generator, *, frames: int, count: int, questions: int, painted: bool = True
) -> Batch:
    """Draw clips, each with some of its questions in random order."""
    most = min(4, frames // 2)
    clips = [
        draw_clip(rng, frames, int(rng.integers(2, most + 1)), painted=painted)
        for _ in range(count)
    ]
    places = TOKENS_PER_FRAME * frames if painted else frames
    rows = [_row(rng, clip, places, questions) for clip in clips]
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((count, width), WORDS.index(PAD))
    is_answer = torch.zeros(count, width, dtype=torch.bool)
    for i, (ids, answers) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        is_answer[i, list(answers)] = True
    pixels = torch.from_numpy(np.stack([clip.pixels for clip in clips]))
    kinds = [KINDS.index(kind) for _, answers in rows for kind in answers.values()]
    words = torch.stack([_words_of(clip, frames) for clip in clips])
    return Batch(input_ids, pixels, is_answer, torch.tensor(kinds), words)


def _words_of(clip: Clip, frames: int) -> Tensor:
    """``[places, len(WORDS)]``: the scene's words where its shape is, those of the flash, or
    nothing."""
    touched = torch.from_numpy(clip.touched)
    if not len(touched):
        touched = torch.ones(frames, 1, dtype=torch.bool)
    words = torch.zeros(*touched.shape, len(WORDS))
    for scene in clip.scenes:
        part = slice(scene.start, scene.start + scene.frames)
        ids = encode(f"{scene.shape} {scene.color} {scene.direction}")
        words[part, :, ids] = touched[part, :, None].float()
    part = slice(clip.flash, clip.flash + 2)
    words[part, :, WORDS.index("flash")] = 1.0
    words[part, :, WORDS.index(clip.flash_color)] += 1.0
    words[..., WORDS.index(PAD)] = (words.sum(-1) == 0).float()
    return words.flatten(0, 1)


def _row(
    rng: np.random.Generator, clip: Clip, places: int, count: int
) -> tuple[list[int], dict[int, str]]:
    """Token ids, and the kinds of the answers by their places; all kinds are as frequent."""
    ids, answers = [*context_ids(0), *[WORDS.index(VIDEO)] * places], dict[int, str]()
    by_kind: dict[str, list[ClipQuestion]] = {}
    for question in clip.questions():
        by_kind.setdefault(question.kind, []).append(question)
    kinds = list(by_kind)
    for i in rng.integers(len(kinds), size=count):
        options = by_kind[kinds[i]]
        question = options[rng.integers(len(options))]
        ids += [*encode(question.text), *encode(question.answer)]
        answers[len(ids) - 1] = question.kind
    return ids, answers


def train_video(
    output_dir: str | Path,
    *,
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    config: VideoConfig | None = None,
    quick: bool = False,
    checkpoint_every: int = 50,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train a video language model, and save it with its tokenizer in one folder.

    The folder is read by ``LlavaNextVideoForConditionalGeneration.from_pretrained``. It gets
    ``model.safetensors`` (bfloat16), the tokenizer's files and ``training.jsonl`` with one line per
    log entry. An interrupted run continues from its last checkpoint when called again with the
    same arguments.

    Args:
        output_dir: folder to write to; made if missing.
        seed: of the initial weights and of all clips.
        stages: lengths of clips and steps, one after the other.
        config: model size and constants; the bundled model's by default.
        quick: train for two steps, to see that everything works.
        checkpoint_every: steps between checkpoints.
        on_log: called with every log entry.

    Returns:
        ``output_dir`` as a path.
    """
    folder = Path(output_dir)
    with lock_folder(folder):
        run = _Run(folder, seed, QUICK_STAGES if quick else stages, config or VideoConfig(), on_log)
        run.resume()
        while run.step < run.total_steps:
            run.train_step()
            if run.step % checkpoint_every == 0:
                run.save_checkpoint()
        copy.deepcopy(run.model).to(torch.bfloat16).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        run.checkpoint.unlink(missing_ok=True)
    return folder


@dataclass
class _Run(Run):
    """A training run, and one step."""

    _recent: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        torch.manual_seed(self.seed)
        self.model = new_model(self.config).train()
        # Frames are short: without the fused attention their gradients cost half.
        self.model.set_attn_implementation({"vision_config": "eager"})
        named = self.model.named_parameters()
        layers = [p for name, p in named if ".layers." in name and p.ndim == 2]
        self.optimizers = make_optimizers(self.model, layers, self.config)

    def train_step(self) -> None:
        began = time.process_time()
        stage, _ = self.place()
        # Clips depend on (seed, step) alone, so a resumed run sees what an unbroken one would.
        rng = np.random.default_rng([self.seed, self.step])
        frames = int(rng.choice(stage.frames))
        batch = make_batch(
            rng, frames=frames, count=stage.step_frames // frames, questions=stage.questions,
            painted=stage.kind != "read",
        )  # fmt: skip
        if stage.kind == "look":
            self._recent.append(self._look(batch))
        else:
            self._recent.append(self._answer(batch, stage.kind == "watch"))
        self.step += 1
        self.cpu_seconds += time.process_time() - began
        self._log()

    def _look(self, batch: Batch) -> tuple[float, Tensor, Tensor]:
        """One step for what the decoder gets to see; relative error, and no answers."""
        table = self.model.get_input_embeddings().weight.detach()
        wanted = batch.words @ table
        features = self.model.model.get_video_features(batch.pixels).pooler_output
        # Before transformers 5.24 one by one, and frames by themselves.
        seen = torch.stack(list(features)).flatten(1, -2)
        loss = F.mse_loss(seen, wanted) / wanted.square().mean()
        self._follow(loss)
        return loss.item(), torch.zeros(0), torch.zeros(0)

    def _answer(self, batch: Batch, watching: bool) -> tuple[float, Tensor, Tensor]:
        """One step for answers; loss, and kinds and correctness of the N answers."""
        inputs: dict[str, Tensor]
        if watching:
            inputs = {"input_ids": batch.input_ids, "pixel_values_videos": batch.pixels}
            decoder = self.model.model
        else:
            table = self.model.get_input_embeddings().weight.detach()
            embeddings = table[batch.input_ids]
            embeddings[:, 1 : 1 + batch.words.shape[1]] = batch.words @ table
            inputs = {"inputs_embeds": embeddings}
            decoder = self.model.model.language_model
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
        hidden = hidden[:, :-1][batch.is_answer[:, 1:]]
        weight = self.model.get_output_embeddings().weight
        logits = hidden @ (weight if watching else weight.detach()).T
        targets = batch.input_ids[batch.is_answer]
        loss = F.cross_entropy(logits, targets)
        self._follow(loss)
        return loss.item(), batch.kinds, logits.argmax(-1) == targets

    def _follow(self, loss: Tensor) -> None:
        descend(loss, self.model, self.optimizers, self._rate())

    def _rate(self) -> float:
        """Factor on the peak learning rates: warm-up, plateau, linear decay in every stage."""
        stage, since = self.place()
        warmup = (since + 1) / self.config.warmup_steps
        if not stage.decay:
            return min(1.0, warmup)
        left = (1 - since / stage.steps) / self.config.decay_fraction
        return min(1.0, warmup, left)

    def _log(self, every: int = 25) -> None:
        """Append means over the last ``every`` steps to ``training.jsonl``."""
        if self.step % every and self.step != self.total_steps:
            return
        losses, kinds, right = zip(*self._recent, strict=True)
        self._recent.clear()
        kind, correct = torch.cat(kinds), torch.cat(right).float()
        line = {
            "step": self.step,
            "loss": round(sum(losses) / len(losses), 4),
            "accuracy": {
                name: round(float(correct[kind == i].mean()), 3)
                for i, name in enumerate(KINDS)
                if bool((kind == i).any())
            },
            "cpu_seconds": round(self.cpu_seconds, 1),
        }
        self.write_log(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    train_video(given.output_dir, seed=given.seed, quick=given.quick, on_log=print)
