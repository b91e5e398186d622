"""A fresh memory, evolved before your eyes on a model small enough for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..baselines import Full
from ..budget import Budget
from ..config import NAMMConfig
from ..corpus import load_documents
from ..evolution import EvolveConfig, EvolveResult, RecordProblem, evolve
from ..measure import FULL, baseline_methods, fixed_budget
from ..measure.progress import progress
from ..policy import NAMM, Policy

OTHERS = ("StreamingLLM", "SnapKV", "KeyDiff", "Random")
"""Baselines whose level the chart shows."""


@dataclass(frozen=True)
class EvolutionConfig:
    """How long the live evolution goes on, and on what.

    Attributes:
        seconds: of it.
        length: tokens of its contexts, in which records are hidden.
        keep: budget as a share of them.
        n_up: tokens between two updates.
        popsize: candidates per generation.
        num_examples: contexts per candidate.
        num_validation: contexts it is validated on.
    """

    seconds: float = 30.0
    length: int = 256
    keep: float = 0.25
    n_up: int = 16
    popsize: int = 16
    num_examples: int = 8
    num_validation: int = 24


class LiveEvolution:
    """A fresh memory, evolved for a while; whatever is there when it ends can be shown.

    A linear scorer of 25 parameters that starts at zero, every layer with an equal part.
    """

    def __init__(
        self, model: Any, tokenizer: Any, name: str, config: EvolutionConfig, output_dir: Path
    ) -> None:
        self.model, self.name, self.config = model, name, config
        self.output_dir = output_dir
        self.search = EvolveConfig(
            namm=NAMMConfig(n_up=config.n_up, scorer="mlp", feature_transform="log"),
            budget=Budget(config.keep, scope="per_layer", sink_tokens=4),
            generations=100_000,
            popsize=config.popsize,
            sigma0=0.3,
            validate_every=2,
        )
        self.problem = RecordProblem(
            tokenizer,
            load_documents("train"),
            load_documents("validation"),
            lengths=(config.length,),
            num_examples=config.num_examples,
            validation_lengths=(config.length,),
            num_validation=config.num_validation,
            text_weight=1.0,
        )
        self.levels: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = []
        self.generations = 0
        self.seconds = 0.0
        self.result: EvolveResult | None = None

    def run(self, console: Console) -> None:
        """Measure where the others stand, then evolve until the time is over."""
        console.print(
            f"\n[bold]Evolving a fresh NAMM[/] ({self.search.namm.num_params} parameters) on the "
            f"model {self.name}, for "
            f"{self.config.seconds:.0f} seconds on contexts of {self.config.length} "
            f"tokens, {self.search.popsize} candidates per generation"
        )
        with progress(console, self.config.seconds) as show:
            show(0, "how good the others are")
            self._measure_levels()
            began = time.perf_counter()

            def elapsed() -> float:
                return time.perf_counter() - began

            def on_generation(record: dict[str, Any]) -> None:
                self.generations, self.seconds = record["generation"], elapsed()
                if "validation_exact_match" in record:
                    self.curve.append((self.generations, record["validation_exact_match"]))
                show(
                    min(elapsed(), self.config.seconds),
                    f"generation {self.generations}, exact match of the best "
                    f"{record['exact_match_best']:.0%}, on validation {self.curve[-1][1]:.0%}",
                )

            self.result = evolve(
                self.model,
                self.problem,
                self.search,
                self.output_dir,
                on_generation=on_generation,
                should_stop=lambda: self.generations >= 2 and elapsed() > self.config.seconds,
            )

    def _measure_levels(self) -> None:
        (batch,) = self.problem.validation_batches()
        policies: dict[str, Policy] = {FULL: Full()}
        start = NAMM(self.search.namm, budget=self.search.budget)
        methods = baseline_methods(self.name, start, OTHERS)
        others = {method.name: method.policy for method in methods}
        others["start"] = start  # all scores equal: the newest tokens stay
        for name, policy in others.items():
            assert policy is not None
            policies[name] = fixed_budget(policy, self.config.keep, self.config.length)
        for name, policy in policies.items():
            result = self.problem.fitness(self.model, policy, batch)
            self.levels[name] = float(result.exact_match.mean())
        self.curve.append((0, self.levels.pop("start")))

    def show(self, console: Console) -> None:
        """Chart, result and where it is; nothing if there was no generation."""
        if not self.generations:
            return
        console.print()
        console.print(chart(self.curve, self.levels, width=max(20, min(56, console.width - 44))))
        console.print(
            f"{self.generations} generations in {self.seconds:.0f} s: validation exact match "
            f"{self.curve[0][1]:.0%} -> [bold green]{max(v for _, v in self.curve):.0%}[/]"
        )
        where = self.output_dir if self.result is None else self.output_dir / "policy"
        console.print(
            f"Saved in [bold]{where}[/]; go on with [bold]namm evolve[/] (longer contexts), try "
            "it with [bold]namm compare --policy[/]."
        )

    def to_dict(self) -> dict[str, Any]:
        """Config, levels and curve, for JSON."""
        return {
            "config": self.search.to_dict(),
            "problem": self.problem.settings(),
            "levels": self.levels,
            "curve": [{"generation": g, "exact_match": value} for g, value in self.curve],
            "generations": self.generations,
            "seconds": self.seconds,
            "saved": str(self.output_dir) if self.generations else None,
        }


def chart(
    curve: Sequence[tuple[int, float]], levels: dict[str, float], width: int = 60, height: int = 12
) -> Text:
    """Exact match over generations, with the level of every other memory as a dashed line.

    Args:
        curve: ``(generation, value in [0, 1])``, increasing in the generation.
        levels: values by name.
        width, height: of the plot in characters.
    """
    top = max([value for _, value in curve] + list(levels.values()) + [0.1])
    last = max(curve[-1][0], 1)

    def line_of(value: float) -> int:
        return round((1 - value / top) * (height - 1))

    named: dict[int, list[str]] = {}
    for name, value in sorted(levels.items(), key=lambda item: -item[1]):
        named.setdefault(line_of(value), []).append(f"{name} {value:.0%}")
    dots = {round(g / last * (width - 1)): line_of(value) for g, value in curve}
    text = Text(no_wrap=True)
    for line in range(height):
        percent = f"{top * (1 - line / (height - 1)):>6.0%} " if line % 3 == 0 else " " * 7
        text.append(percent + "│", style="dim")
        names = named.get(line, [])
        style = "cyan" if any(name.startswith(FULL) for name in names) else "yellow"
        for column in range(width):
            if dots.get(column) == line:
                text.append("●", style="bold green")
            else:
                text.append("╌" if names else " ", style=f"dim {style}")
        text.append(f" {_some(names)}\n", style=style)
    text.append(" " * 7 + "└" + "─" * width + "\n", style="dim")
    text.append(" " * 8 + f"0{f'generation {last}':>{width - 1}}", style="dim")
    return text


def _some(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more there are."""
    more = f" +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more
