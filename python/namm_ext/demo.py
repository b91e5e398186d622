"""``namm demo``: a model reads held-out text through every memory, then a new one is evolved.

Nothing is prepared but the weights: inputs are drawn, read and measured while you watch.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from . import __version__
from .baselines import Full
from .compare import (
    FULL,
    TUNED,
    Method,
    Row,
    Workload,
    baseline_methods,
    compare,
    for_context,
    full_method,
    num_steps,
    tuned_baseline,
)
from .corpus import load_documents
from .evolution import EvolveConfig, EvolveResult, RecordProblem, evolve
from .policy import NAMM, Policy
from .tables import chart, comparison_table, legend, verdict
from .tasks import (
    HELD_OUT_FAMILIES,
    IN_USE,
    TEST_SEED,
    UNSEEN_FAMILIES,
    VALIDATION_SEED,
    RecordMix,
)


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo reads, and for how long it evolves.

    Attributes:
        lengths: tokens of the contexts, one part of the table each.
        examples_per_family: contexts per family, by length.
        num_windows: windows of source code, by length.
        mix: records hidden in a context.
        keep_fraction: budget per head as a share of the context.
        new_tokens: generated tokens when time is measured.
        repeats: rounds of timing.
        evolve_seconds: how long the live evolution goes on.
        evolve_length: tokens of its contexts.
        evolve_n_up: tokens between two updates in them.
        popsize: its candidates per generation.
        num_examples: its contexts per candidate.
        num_validation: contexts it is validated on.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    examples_per_family: tuple[int, ...] = (6, 3)
    num_windows: tuple[int, ...] = (8, 4)
    mix: RecordMix = IN_USE
    keep_fraction: float = 0.25
    new_tokens: int = 64
    repeats: int = 3
    evolve_seconds: float = 60.0
    evolve_length: int = 256
    evolve_n_up: int = 16
    popsize: int = 16
    num_examples: int = 8
    num_validation: int = 24


QUICK = DemoConfig(
    lengths=(1024,),
    examples_per_family=(2,),
    num_windows=(2,),
    repeats=2,
    evolve_seconds=10.0,
    popsize=8,
    num_examples=4,
    num_validation=8,
)


def run_demo(
    model: Any,
    tokenizer: Any,
    policy: NAMM,
    config: DemoConfig,
    *,
    console: Console,
    output_dir: Path,
    json_path: Path | None = None,
    names: tuple[str, str] = ("", ""),
) -> dict[str, Any]:
    """All of it: table, live evolution, chart, files.

    ``KeyboardInterrupt`` ends it early with what is there; the result then says so.

    Args:
        output_dir: where the evolved memory goes.
        json_path: where the measured rows go.
        names: of model and policy, for the record.

    Returns:
        What is in the JSON file.
    """
    began = time.perf_counter()
    rows: list[Row] = []
    live = _Live(model, tokenizer, policy, config, output_dir)
    interrupted = False
    try:
        _read_held_out(model, tokenizer, policy, config, console, rows)
        live.run(console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[yellow]Stopped; this is what there is so far.[/]")
        if not live.generations and any(row.exact_match for row in rows):
            console.print(comparison_table(rows, config.keep_fraction, console.width))
    live.show(console)
    seconds = time.perf_counter() - began
    result = {
        "namm_ext": __version__,
        "model": names[0],
        "policy": names[1],
        "settings": {**asdict(config), "n_up": policy.config.n_up},
        "seeds": {"test": TEST_SEED, "validation": VALIDATION_SEED, "evolution": 0},
        "families": {"held_out": HELD_OUT_FAMILIES, "unseen": UNSEEN_FAMILIES},
        "rows": [row.to_dict() for row in rows],
        "evolution": live.to_dict(),
        "interrupted": interrupted,
        "seconds": seconds,
        "machine": machine(),
    }
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.print(f"All figures, settings and versions are in [bold]{json_path}[/].")
    console.print(f"[dim]{seconds:.0f} seconds in all.[/]")
    return result


def _read_held_out(
    model: Any,
    tokenizer: Any,
    policy: NAMM,
    config: DemoConfig,
    console: Console,
    rows: list[Row],
) -> None:
    methods = [full_method(), Method("NAMM", policy), *baseline_methods(policy)]
    workloads = [
        Workload.make(
            tokenizer,
            "test",
            length=length,
            examples_per_family=examples,
            mix=config.mix,
            num_windows=windows,
        )
        for length, examples, windows in zip(
            config.lengths, config.examples_per_family, config.num_windows, strict=True
        )
    ]
    run_comparison(model, methods, workloads, config, console, rows)
    console.print(comparison_table(rows, config.keep_fraction, console.width))
    console.print()
    console.print(legend(policy.config.n_up, config.mix))
    console.print()
    console.print(verdict(rows))


def run_comparison(
    model: Any,
    methods: Sequence[Method],
    workloads: Sequence[Workload],
    config: DemoConfig,
    console: Console,
    rows: list[Row],
) -> list[Row]:
    """`compare` under a progress bar."""
    with _progress(console) as progress:
        task = progress.add_task("", total=num_steps(methods, workloads, config.repeats))
        progress.update(task, completed=-1)  # a step is announced before it is done

        def on_step(text: str) -> None:
            progress.update(task, advance=1, description=text)

        return compare(
            model,
            methods,
            workloads,
            keep_fraction=config.keep_fraction,
            new_tokens=config.new_tokens,
            repeats=config.repeats,
            rows=rows,
            on_step=on_step,
        )


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(bar_width=36),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


# The live evolution ------------------------------------------------------------------------------


class _Live:
    """A fresh memory, evolved for a while; whatever is there when it ends can be shown.

    A linear scorer of 25 parameters that starts at zero, every layer with an equal part.
    """

    def __init__(
        self, model: Any, tokenizer: Any, policy: NAMM, config: DemoConfig, output_dir: Path
    ) -> None:
        self.model, self.demo = model, config
        self.output_dir = output_dir
        self.config = EvolveConfig(
            namm=policy.config.replace(n_up=config.evolve_n_up, scorer="mlp"),
            budget=replace(policy.budget, size=config.keep_fraction, layer_shares=None),
            generations=100_000,
            popsize=config.popsize,
            sigma0=0.3,
            validate_every=2,
        )
        self.problem = RecordProblem(
            tokenizer,
            load_documents("train"),
            load_documents("validation"),
            lengths=(config.evolve_length,),
            num_examples=config.num_examples,
            validation_lengths=(config.evolve_length,),
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
            f"\n[bold]Evolving a fresh NAMM[/] ({self.config.namm.num_params} parameters) for "
            f"{self.demo.evolve_seconds:.0f} seconds on contexts of {self.demo.evolve_length} "
            f"tokens, {self.config.popsize} candidates per generation"
        )
        with _progress(console) as progress:
            task = progress.add_task("the others' level", total=self.demo.evolve_seconds)
            self._measure_levels()
            began = time.perf_counter()

            def elapsed() -> float:
                return time.perf_counter() - began

            def on_generation(record: dict[str, Any]) -> None:
                self.generations, self.seconds = record["generation"], elapsed()
                if "validation_exact_match" in record:
                    self.curve.append((self.generations, record["validation_exact_match"]))
                progress.update(
                    task,
                    completed=elapsed(),
                    description=(
                        f"generation {self.generations}, exact match of the best "
                        f"{record['exact_match_best']:.0%}, on validation {self.curve[-1][1]:.0%}"
                    ),
                )

            self.result = evolve(
                self.model,
                self.problem,
                self.config,
                self.output_dir,
                on_generation=on_generation,
                should_stop=lambda: self.generations >= 2 and elapsed() > self.demo.evolve_seconds,
            )

    def _measure_levels(self) -> None:
        (batch,) = self.problem.validation_batches()
        policies: dict[str, Policy] = {FULL: Full()}
        start = NAMM(self.config.namm, budget=self.config.budget)
        share = self.demo.keep_fraction, self.demo.evolve_length
        policies |= {name: for_context(tuned_baseline(name, start), *share) for name in TUNED}
        policies["start"] = for_context(start, *share)  # all scores equal: the newest tokens stay
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
            "config": self.config.to_dict(),
            "problem": self.problem.settings(),
            "levels": self.levels,
            "curve": [{"generation": g, "exact_match": value} for g, value in self.curve],
            "generations": self.generations,
            "seconds": self.seconds,
            "saved": str(self.output_dir) if self.generations else None,
        }


def machine() -> dict[str, Any]:
    """Versions and hardware, for the record."""
    import transformers

    from ._library import libraries

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "instruction_set": libraries.supported_isas[-1],
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
