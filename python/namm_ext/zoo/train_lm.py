"""The recipe of the bundled language models: a small Llama that recalls, from text at hand.

Recall is learned on short, dense sequences first, where it forms within a million tokens, and is
then carried to longer ones. Every sequence is real text with records in it (see ``tasks``), so
language and recall are learned together. Training takes about half an hour on two CPU cores.
"""

from __future__ import annotations

import copy
import json
import platform
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
from ..corpus import load_documents
from ..tasks import (
    EVOLUTION_FAMILIES,
    HELD_OUT_FAMILIES,
    VARIED_FAMILIES,
    Example,
    make_batch,
    stack,
)
from .tokenizer import train_tokenizer
from .training import Run, descend, make_optimizers

LM_FAMILIES = EVOLUTION_FAMILIES + HELD_OUT_FAMILIES


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        lengths: tokens per sequence; each step draws one of them. A model that sees a single
            length for long forgets how to answer at the end of any other.
        step_tokens: tokens per step, a multiple of every length.
        tokens: tokens of the whole stage, rounded up to whole steps.
    """

    lengths: tuple[int, ...]
    step_tokens: int
    tokens: int

    def __post_init__(self) -> None:
        if any(self.step_tokens % length for length in self.lengths):
            raise ValueError(
                f"step_tokens must be a multiple of every length in {self.lengths}, "
                f"got {self.step_tokens}"
            )

    @property
    def steps(self) -> int:
        return -(-self.tokens // self.step_tokens)


STAGES = (
    Stage(lengths=(128,), step_tokens=3072, tokens=3_600_000),
    Stage(lengths=(128, 256), step_tokens=4096, tokens=2_000_000),
    Stage(lengths=(256, 512, 1024), step_tokens=4096, tokens=5_000_000),
    Stage(lengths=(256, 512, 1024, 2048), step_tokens=4096, tokens=5_500_000),
)

QUICK_STAGES = (Stage(lengths=(128,), step_tokens=512, tokens=1024),)
"""Two steps: shows that the recipe runs, and nothing else."""


@dataclass(frozen=True)
class LMConfig:
    """Size of the model and the constants of its training.

    Attributes:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: as in Llama.
        vocab_size: of the tokenizer that is trained along.
        max_length: longest position the model may be asked for.
        matrix_lr: peak learning rate of Muon, for the weight matrices.
        other_lr: peak learning rate of AdamW, for embeddings and norms.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training, in which the rates fall linearly to zero.
        answer_weight: weight of an answer token in the loss, against 1 for text.
        value_weight: weight of the random values in the records, which nobody can predict.
        varied_fraction: part of the examples whose surface is one of ``VARIED_FAMILIES``.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    vocab_size: int = 2048
    max_length: int = 4096
    matrix_lr: float = 0.01
    other_lr: float = 3e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.4
    answer_weight: float = 4.0
    value_weight: float = 0.05
    varied_fraction: float = 0.33


def train_lm(
    output_dir: str | Path,
    *,
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    config: LMConfig | None = None,
    quick: bool = False,
    checkpoint_every: int = 200,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Train a tokenizer and a language model, measure it, and save all of it in one folder.

    The folder can be read by ``AutoModelForCausalLM.from_pretrained``. It gets
    ``model.safetensors`` (bfloat16), the tokenizer's and the configuration files,
    ``training.jsonl`` with one line per log entry, and ``metrics.json`` from
    :func:`~namm_ext.zoo.evaluate_lm.evaluate_lm`. An interrupted run continues from its last
    checkpoint when called again with the same arguments.

    Args:
        output_dir: folder to write to; made if missing.
        seed: of the initial weights and of all data.
        stages: lengths and token counts, trained one after the other.
        config: model size and constants; the bundled model's by default.
        quick: train for two steps and measure on little, to see that everything works.
        checkpoint_every: steps between checkpoints.
        on_log: called with every log entry, for a progress display.

    Returns:
        ``output_dir`` as a path.
    """
    from .evaluate_lm import evaluate_lm

    folder = Path(output_dir)
    with lock_folder(folder):
        run = _Run(folder, seed, QUICK_STAGES if quick else stages, config or LMConfig(), on_log)
        run.resume()
        while run.step < run.total_steps:
            run.train_step()
            if run.step % checkpoint_every == 0:
                run.save_checkpoint()
        run.save_checkpoint()  # measuring may be interrupted as well
        run.save_model(folder)

        lengths = (256,) if quick else (256, 512, 1024, 2048)
        metrics = evaluate_lm(
            run.model.to(torch.bfloat16).float(),  # the weights as they are stored
            run.tokenizer,
            lengths=lengths,
            examples_per_family=2 if quick else 24,
            text_windows=2 if quick else 96,
        )
        metrics["training"] = run.facts()
        _write_json(folder / "metrics.json", metrics)
        run.checkpoint.unlink(missing_ok=True)
    return folder


@dataclass
class _Run(Run):
    """A training run, and one step."""

    counters = ("step", "tokens", "cpu_seconds", "wall_seconds")

    tokens: int = 0
    wall_seconds: float = 0.0
    _recent: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.documents = load_documents("train")
        self.tokenizer = train_tokenizer(self.documents, self.config.vocab_size)
        torch.manual_seed(self.seed)
        self.model = _new_model(self.config, self.tokenizer)
        layers = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        self.optimizers = make_optimizers(self.model, layers, self.config)

    def train_step(self) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        stage, _ = self.place()
        # Data depend on (seed, step) alone, so a resumed run sees what an unbroken one would.
        rng = np.random.default_rng([self.seed, self.step])
        length = int(rng.choice(stage.lengths))
        batch_size = stage.step_tokens // length
        most_records = min(8, length // 42)  # leaves a third of the tokens to the text, at least
        examples = make_batch(
            self._draw_families(batch_size, rng),
            self.tokenizer,
            self.documents,
            length=length,
            num_records=int(rng.integers(min(4, most_records - 1), most_records + 1)),
            seed=(self.seed, self.step),
            batch_size=batch_size,
        )
        entry = self._optimize(examples)
        self.step += 1
        self.tokens += stage.step_tokens
        self.wall_seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started
        self._log(entry)

    def _draw_families(self, count: int, rng: np.random.Generator) -> list[str]:
        varied = rng.random(count) < self.config.varied_fraction
        return [
            str(rng.choice(list(VARIED_FAMILIES) if is_varied else LM_FAMILIES))
            for is_varied in varied
        ]

    def _optimize(self, examples: list[Example]) -> dict[str, float]:
        input_ids = stack(examples)
        targets = input_ids[:, 1:]
        is_answer = _mask([e.answer_spans for e in examples], input_ids)[:, 1:]
        is_value = _mask([e.value_spans for e in examples], input_ids)[:, 1:]
        weights = torch.ones(targets.shape)
        weights[is_answer] = self.config.answer_weight
        weights[is_value] = self.config.value_weight

        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.model(input_ids=input_ids[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.float().view_as(targets)
        loss = (losses * weights).sum() / weights.sum()
        descend(loss, self.model, self.optimizers, self._rate())
        correct = logits.detach().argmax(-1) == targets
        return {
            "text_loss": losses[~is_answer & ~is_value].mean().item(),
            "answer_loss": losses[is_answer].mean().item(),
            "answer_token_accuracy": correct[is_answer].float().mean().item(),
        }

    def _rate(self) -> float:
        """Factor on the peak learning rates: warm-up, plateau, linear decay."""
        warmup = (self.step + 1) / self.config.warmup_steps
        left = 1 - self.step / self.total_steps
        return min(1.0, warmup, left / self.config.decay_fraction)

    def _log(self, entry: dict[str, float], every: int = 20) -> None:
        """Append means over the last ``every`` steps to ``training.jsonl``."""
        self._recent.append(entry)
        if self.step % every and self.step != self.total_steps:
            return
        line: dict[str, float] = {"step": self.step, "tokens": self.tokens}
        for key in entry:
            line[key] = round(sum(item[key] for item in self._recent) / len(self._recent), 4)
        line["cpu_seconds"] = round(self.cpu_seconds, 1)
        line["wall_seconds"] = round(self.wall_seconds, 1)
        self._recent.clear()
        self.write_log(line)

    def save_model(self, folder: Path) -> None:
        """Write the model in bfloat16, with its tokenizer, as ``from_pretrained`` reads them."""
        copy.deepcopy(self.model).to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def facts(self) -> dict[str, Any]:
        """How the model came about, for ``metrics.json``."""
        import transformers

        return {
            **self.arguments(),
            "families": list(LM_FAMILIES),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "tokens": self.tokens,
            "cpu_seconds": round(self.cpu_seconds),
            "wall_seconds": round(self.wall_seconds),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def _new_model(config: LMConfig, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _mask(spans: list[tuple[tuple[int, int], ...]], like: Tensor) -> Tensor:
    """True inside the spans of each row; shape of ``like``."""
    mask = torch.zeros(like.shape, dtype=torch.bool)
    for row, row_spans in enumerate(spans):
        for start, stop in row_spans:
            mask[row, start:stop] = True
    return mask


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
