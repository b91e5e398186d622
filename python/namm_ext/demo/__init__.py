"""``namm demo``: an example, a table, and a new memory evolved, all before your eyes.

Nothing is prepared but the weights: contexts are drawn, read and measured while you watch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import zoo
from ..measure import (
    FULL,
    Method,
    ReadingWorkload,
    RecordWorkload,
    Results,
    Timing,
    Workload,
    baseline_methods,
    compare,
    full_method,
    made_ready,
    plan,
    write_json,
)
from ..measure.progress import progress
from ..measure.tables import answers_table, costs_table, legend, verdict
from ..policy import NAMM
from ..tasks import IN_USE, RecordMix
from .example import Example, show_example
from .live import EvolutionConfig, LiveEvolution

RIVALS = ("KeyDiff", "H2O", "Random")
"""Baselines of the table."""

_ORDER = (
    *("multi_key", "paraphrase", "variable_tracking", "table", "multi_query", "code"),
    *("overwritten", "unseen_family", "multi_value", "many_shot", "multi_turn", "single"),
)
# Reading a context and asking, against the full cache reading it and asking one question.
_SLOWER = 1.3


@dataclass(frozen=True)
class DemoConfig:
    """How much the demo reads, and for how long it evolves.

    Attributes:
        length: tokens of the contexts.
        keep: budget per head as a share of them.
        rivals: baselines of the table.
        seconds: for a model that chats, how long the questions take; there are as many as fit.
        examples: for another model, contexts per task.
        mix: for another model, records hidden in a context.
        num_windows: windows of each kind of text.
        timing: of prompt and generated tokens.
        evolution: of a fresh memory.
    """

    length: int = 1024
    keep: float = 0.25
    rivals: tuple[str, ...] = RIVALS
    seconds: float = 120.0
    examples: int = 4
    mix: RecordMix = IN_USE
    num_windows: int = 1
    timing: Timing = field(default_factory=lambda: Timing(repeats=1))
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)


QUICK = DemoConfig(
    rivals=RIVALS[:1],
    seconds=25.0,
    examples=2,
    evolution=EvolutionConfig(seconds=10.0, popsize=8, num_examples=4, num_validation=8),
)


@dataclass(frozen=True)
class Subject:
    """What the demo is about: a language model and its memory, with their names."""

    model: Any
    tokenizer: Any
    name: str
    policy: NAMM
    policy_name: str

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)


def run_demo(
    subject: Subject,
    config: DemoConfig,
    *,
    console: Console,
    output_dir: Path,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """All of it: example, table, live evolution, files.

    ``KeyboardInterrupt`` ends it early with what is there; the result then says so.

    Args:
        output_dir: where the evolved memory goes.
        json_path: where the figures go.

    Returns:
        What is in the JSON file.
    """
    began = time.perf_counter()
    results = Results({"model": subject.name, "policy": subject.policy_name, **asdict(config)})
    live = _live(subject, config, output_dir)
    example: Example | None = None
    interrupted = False
    try:
        if subject.chats:
            example = show_example(
                *(subject.model, subject.tokenizer, subject.policy, console),
                length=config.length,
                keep=config.keep,
            )
        _side_by_side(subject, config, console, results)
        live.run(console)
    except KeyboardInterrupt:
        interrupted = True
        console.print("[yellow]Stopped; this is what there is so far.[/]")
    live.show(console)
    seconds = time.perf_counter() - began
    content = {
        **results.to_dict(),
        "example": example and asdict(example),
        "evolution": live.to_dict(),
        "interrupted": interrupted,
        "seconds": seconds,
    }
    if json_path is not None:
        write_json(json_path, content)
        console.print(f"All figures, settings and versions are in [bold]{json_path}[/].")
    console.print(f"[dim]{seconds:.0f} seconds in all.[/]")
    return content


def _live(subject: Subject, config: DemoConfig, output_dir: Path) -> LiveEvolution:
    """On the bundled model where the other one is too large to evolve for while one waits."""
    if not subject.chats:
        model, tokenizer, name = subject.model, subject.tokenizer, subject.name
    else:
        name = zoo.DEFAULT_MODEL
        model, tokenizer = zoo.load_model(name), zoo.load_tokenizer(name)
    return LiveEvolution(model, tokenizer, name, config.evolution, output_dir)


def _side_by_side(subject: Subject, config: DemoConfig, console: Console, results: Results) -> None:
    methods = [
        full_method(),
        Method("NAMM", subject.policy),
        *baseline_methods(subject.name, subject.policy, list(config.rivals)),
    ]
    methods = made_ready(methods, subject.model, subject.tokenizer, config.length)
    workload = _workload(subject, config, methods)
    steps = plan(
        *(subject.model, subject.tokenizer, methods, [workload], [config.keep], results),
        timing=config.timing,
    )
    try:
        with progress(console, len(steps)) as show:
            compare(steps, results, show)
    finally:
        if any(row.tasks for row in results.rows if row.method != FULL):
            mix = None if subject.chats else config.mix
            console.print(answers_table(results))
            console.print(costs_table(results))
            console.print(legend(subject.policy.n_up, mix))
            console.print()
            console.print(verdict(results))


def _workload(subject: Subject, config: DemoConfig, methods: Sequence[Method]) -> Workload:
    if not subject.chats:
        return RecordWorkload.make(
            subject.tokenizer,
            "test",
            length=config.length,
            examples_per_task=config.examples,
            mix=config.mix,
            num_windows=config.num_windows,
        )
    probe = ReadingWorkload.make(
        subject.tokenizer, "test", length=config.length, names=_ORDER[:1], questions=1,
        num_windows=0,
    )  # fmt: skip
    began = time.perf_counter()
    probe.ask(subject.model, None, _ORDER[0])
    seconds = (time.perf_counter() - began) * _SLOWER * len(methods)
    contexts = max(2, int(config.seconds / seconds))
    return ReadingWorkload.make(
        subject.tokenizer,
        "test",
        length=config.length,
        names=_ORDER[:contexts],
        questions=max(1, 5 * (contexts // len(_ORDER))),
        num_windows=config.num_windows,
    )
