"""The recipe of the bundled Decision Transformer, which acts in the corridor of signs and doors.

    python -m namm_ext.zoo.train_control OUTPUT_DIR

It learns offline, from agents of mixed quality: experts, noisy ones, and some that know nothing.
Looking a sign up is learned in short corridors first, where it forms within minutes, and is then
carried to long ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from ..integrations.control import one_hot, roll_out
from ..tasks.corridor import Corridor, CorridorConfig, Episodes, record
from .training import descend, make_optimizers

#: What the bundled model acts in.
CORRIDOR = CorridorConfig()
#: Probability of a random action of the agents it learns from: experts, noisy and random ones.
NOISE = (0.0, 0.3, 1.0)
#: How many of each there are, of ten.
MIX = (4, 4, 2)


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        corridor: sizes of its corridors.
        batch_size: episodes per step.
        steps: gradient steps.
    """

    corridor: CorridorConfig
    batch_size: int
    steps: int


STAGES = (
    Stage(CorridorConfig(steps=40, sign_cells=12, signs=6, used=4), 48, 400),
    Stage(CorridorConfig(steps=100, sign_cells=30, signs=12, used=6), 20, 250),
    Stage(CORRIDOR, 12, 400),
)
QUICK_STAGES = (Stage(CorridorConfig(steps=20, sign_cells=6, signs=3, used=2), 2, 2),)
"""Two steps: shows that the recipe runs, and nothing else."""


@dataclass(frozen=True)
class ControlConfig:
    """Size of the model and the constants of its training.

    Attributes:
        hidden_size, num_layers, num_heads: of the trunk.
        matrix_lr: peak learning rate of Muon, for the weight matrices of the layers.
        other_lr: peak learning rate of AdamW, for everything else.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the training, in which the rates fall linearly to zero.
        door_weight: weight of an action at a door in the loss, against 1 elsewhere.
    """

    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 4
    matrix_lr: float = 0.01
    other_lr: float = 3e-3
    warmup_steps: int = 50
    decay_fraction: float = 0.4
    door_weight: float = 4.0


def train_control(
    output_dir: str | Path,
    *,
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    config: ControlConfig | None = None,
    quick: bool = False,
    on_log: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Path:
    """Train a Decision Transformer, measure it, and save it in a folder.

    ``DecisionTransformerModel.from_pretrained`` reads the folder. It gets ``training.jsonl`` with
    one line per log entry, and ``metrics.json``.

    Args:
        output_dir: folder to write to; made if missing.
        seed: of the initial weights and of all data.
        stages: trained one after the other.
        config: model size and constants; the bundled model's by default.
        quick: train for two steps, to see that everything works.
        on_log: called with every log entry.

    Returns:
        ``output_dir`` as a path.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(seed, QUICK_STAGES if quick else stages, config or ControlConfig())
    with (folder / "training.jsonl").open("w", encoding="utf-8") as log:
        for entry in run.train():
            log.write(json.dumps(entry) + "\n")
            log.flush()
            on_log(entry)
    run.model.save_pretrained(folder)
    metrics = {
        "full_cache": evaluate(run.model, range(4 if quick else 64)),
        "training": run.facts(),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return folder


def evaluate(model: Any, seeds: Any, split: str = "validation") -> dict[str, float]:
    """Share of the best return that a model with a full cache earns, and of an agent at random."""
    corridor = Corridor(list(seeds), split, CORRIDOR)
    random = record(corridor, 1.0, seed=0).rewards.sum(1).mean()
    found = roll_out(
        model, None, corridor, [1.0] * len(corridor),
        max_steps=CORRIDOR.steps, reward_scale=CORRIDOR.doors, choose=one_hot,
    )  # fmt: skip
    return {
        "episodes": len(corridor),
        "return": float(found.returns.mean()) / CORRIDOR.doors,
        "random": float(random) / CORRIDOR.doors,
    }


def new_model(config: ControlConfig) -> Any:
    """The model with random weights."""
    return DecisionTransformerModel(
        DecisionTransformerConfig(
            state_dim=CORRIDOR.state_dim,
            act_dim=CORRIDOR.act_dim,
            hidden_size=config.hidden_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            max_ep_len=CORRIDOR.steps,
            action_tanh=False,  # its actions are logits
            n_positions=1,  # the trunk is told position 0 throughout
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def episodes(corridor: CorridorConfig, count: int, seed: tuple[int, int]) -> Episodes:
    """Training episodes of mixed quality.

    Args:
        corridor: sizes.
        count: of episodes.
        seed: run and step; the corridors of no two are the same.
    """
    rng = np.random.default_rng(seed)
    seeds = rng.integers(1 << 40, size=count).tolist()
    noise = rng.choice(NOISE, size=count, p=np.array(MIX) / sum(MIX))
    return record(Corridor(seeds, "train", corridor), noise, seed=int(rng.integers(1 << 40)))


@dataclass
class _Run:
    """A training run."""

    seed: int
    stages: tuple[Stage, ...]
    config: ControlConfig
    step: int = 0
    seconds: float = 0.0
    _recent: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = new_model(self.config)
        layers = [p for p in self.model.encoder.h.parameters() if p.ndim == 2]
        self.optimizers = make_optimizers(self.model, layers, self.config)
        self.total = sum(stage.steps for stage in self.stages)

    def train(self, every: int = 20) -> Any:
        """Yields means over ``every`` steps."""
        self.model.train()
        for stage in self.stages:
            for _ in range(stage.steps):
                began = time.perf_counter()
                # Data depend on seed and step alone.
                rng = np.random.default_rng([self.seed, self.step, 1])
                seen = episodes(stage.corridor, stage.batch_size, (self.seed, self.step))
                self._recent.append(self._optimize(seen, rng))
                self.step += 1
                self.seconds += time.perf_counter() - began
                if self.step % every == 0 or self.step == self.total:
                    yield self._entry()
        self.model.eval()

    def _entry(self) -> dict[str, float]:
        line: dict[str, float] = {"step": self.step}
        for key in self._recent[0]:
            line[key] = round(sum(item[key] for item in self._recent) / len(self._recent), 4)
        line["seconds"] = round(self.seconds, 1)
        self._recent.clear()
        return line

    def _optimize(self, seen: Episodes, rng: np.random.Generator) -> dict[str, float]:
        actions = torch.from_numpy(seen.actions)
        # Every time step is trained in short corridors too.
        batch, length = actions.shape
        start = torch.from_numpy(rng.integers(CORRIDOR.steps - length + 1, size=(batch, 1)))
        predicted = self.model(
            states=torch.from_numpy(seen.states),
            actions=F.one_hot(actions, CORRIDOR.act_dim).float(),
            returns_to_go=torch.from_numpy(seen.returns_to_go / CORRIDOR.doors).float()[..., None],
            timesteps=start + torch.arange(length),
        ).action_preds
        losses = F.cross_entropy(predicted.flatten(0, 1), actions.flatten(), reduction="none")
        losses = losses.view(batch, length)
        is_door = torch.from_numpy(seen.states[..., 2] > 0)
        weights = torch.where(is_door, self.config.door_weight, 1.0)
        loss = (losses * weights).sum() / weights.sum()
        descend(loss, self.model, self.optimizers, self._rate())
        right = predicted.detach().argmax(-1) == actions
        return {"loss": losses.mean().item(), **_accuracies(right, seen, is_door)}

    def _rate(self) -> float:
        """Factor on the peak learning rates: warm-up, plateau, linear decay."""
        warmup = (self.step + 1) / self.config.warmup_steps
        left = 1 - self.step / self.total
        return min(1.0, warmup, left / self.config.decay_fraction)

    def facts(self) -> dict[str, Any]:
        """How the model came about."""
        import transformers

        return {
            "seed": self.seed,
            "stages": [asdict(stage) for stage in self.stages],
            "config": asdict(self.config),
            "noise": NOISE,
            "mix": MIX,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": round(self.seconds),
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def _accuracies(right: Tensor, seen: Episodes, is_door: Tensor) -> dict[str, float]:
    """At doors and elsewhere, of those who never err: what they do can be known."""
    expert = torch.from_numpy(seen.best.all(1))[:, None]
    doors, cells = expert & is_door, expert & ~is_door
    return {
        "door_accuracy": (right & doors).sum().item() / max(1, doors.sum().item()),
        "cell_accuracy": (right & cells).sum().item() / max(1, cells.sum().item()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two steps only")
    arguments = parser.parse_args()
    train_control(
        arguments.output_dir,
        seed=arguments.seed,
        quick=arguments.quick,
        on_log=lambda entry: print(json.dumps(entry), flush=True),
    )


if __name__ == "__main__":
    main()
