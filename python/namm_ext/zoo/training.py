"""What the recipes share: optimisers, a step down a gradient, runs that are resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._files import write_file


def make_optimizers(
    model: Any, matrices: Iterable[Tensor], config: Any
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for some matrices of a model, AdamW for everything else.

    Args:
        model: what is trained.
        matrices: 2-dimensional parameters of it.
        config: with ``matrix_lr`` and ``other_lr``, the peak learning rates.
    """
    chosen = list(matrices)
    in_chosen = {id(p) for p in chosen}
    others = [p for p in model.parameters() if id(p) not in in_chosen]
    return (
        torch.optim.Muon([{"params": chosen, "peak_lr": config.matrix_lr}], weight_decay=0.01),
        torch.optim.AdamW(
            [{"params": others, "peak_lr": config.other_lr}], betas=(0.9, 0.95), weight_decay=0.0
        ),
    )


def descend(
    loss: Tensor, model: Any, optimizers: Iterable[torch.optim.Optimizer], rate: float
) -> None:
    """One step down the gradient of a loss, at a part of the peak learning rates.

    Args:
        loss: a number.
        model: what is trained; the norm of its gradient is cut off at 1.
        optimizers: of :func:`make_optimizers`.
        rate: factor on the peak learning rates.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Run:
    """A training run in a folder: all that a checkpoint has to hold, and the log.

    A recipe sets ``model`` and ``optimizers``, and counts ``step`` up.

    Attributes:
        folder: has ``checkpoint.pt`` and ``training.jsonl``; made if missing.
        seed: of the initial weights and of all data.
        stages: dataclasses with ``steps``, trained one after the other.
        config: a dataclass, size of the model and constants of its training.
        on_log: called with every log entry and ``total_steps``; None for nothing.
        step: gradient steps done.
        cpu_seconds: of them.
    """

    folder: Path
    seed: int
    stages: tuple[Any, ...]
    config: Any
    on_log: Callable[[dict[str, Any]], None] | None
    step: int = 0
    cpu_seconds: float = 0.0

    #: Fields that a resumed run goes on from.
    counters: ClassVar[tuple[str, ...]] = ("step", "cpu_seconds")

    model: Any = field(init=False)
    optimizers: tuple[torch.optim.Optimizer, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.folder / "checkpoint.pt"
        self.log = self.folder / "training.jsonl"
        self.total_steps = sum(stage.steps for stage in self.stages)

    def place(self) -> tuple[Any, int]:
        """The stage, and steps since it began."""
        remaining = self.step
        for stage in self.stages:
            if remaining < stage.steps:
                return stage, remaining
            remaining -= stage.steps
        raise IndexError(f"step {self.step} is past the last stage")

    def write_log(self, line: dict[str, Any]) -> None:
        """Append an entry to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.on_log is not None:
            self.on_log({**line, "total_steps": self.total_steps})

    def arguments(self) -> dict[str, Any]:
        """What a run is made from, in plain lists and numbers."""
        stages = [asdict(stage) for stage in self.stages]
        arguments = {"seed": self.seed, "stages": stages, "config": asdict(self.config)}
        return json.loads(json.dumps(arguments))

    def save_checkpoint(self) -> None:
        """Write everything that a later run goes on from."""
        state = {
            "arguments": self.arguments(),
            **{name: getattr(self, name) for name in self.counters},
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_file(self.checkpoint, lambda file: torch.save(state, file))

    def resume(self) -> None:
        """Continue from a checkpoint in the folder, or begin a new log.

        Raises:
            ValueError: if the checkpoint is of a run with other arguments.
        """
        if not self.checkpoint.exists():
            self.log.write_text("")
            return
        state = torch.load(self.checkpoint, weights_only=True)
        found = state.get("arguments")
        if found != self.arguments():
            raise ValueError(
                f"output_dir {self.folder} holds a checkpoint of a run with other arguments: "
                f"expected {self.arguments()}, got {found}"
            )
        for name in self.counters:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        lines = self.log.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        self.log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
