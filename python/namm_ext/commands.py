"""The commands of ``namm``."""

from __future__ import annotations

import importlib.util
import json
import pprint
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .config import NAMMConfig
from .tasks import IN_USE, STATED_ONCE, RecordMix

if TYPE_CHECKING:
    from .policy import NAMM

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Evolved KV-cache memory (NAMM) for transformers.",
)

Model = Annotated[
    str | None,
    typer.Option(
        help="Bundled language model, or a folder of transformers.", show_default="bundled"
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(help="bundled:NAME, a folder, or a hub id.", show_default="the bundled one"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]
Keep = Annotated[float, typer.Option(help="Budget per head, as a share of the context.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]


def _console() -> Console:
    """Of the terminal's width; of a table's where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def _need(*modules: str) -> None:
    """Complain at once about what would be missing minutes later."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _load_model(name: str | None) -> tuple[Any, Any, str]:
    """Model, tokenizer and name; a folder wins over a name of the zoo."""
    _need("transformers", "tokenizers", "safetensors")
    import transformers

    from . import zoo

    transformers.utils.logging.disable_progress_bar()
    chosen = zoo.DEFAULT_MODEL if name is None else name
    if Path(chosen).is_dir():
        if not (Path(chosen) / "config.json").is_file():
            raise FileNotFoundError(f"--model: {chosen} holds no config.json")
        chosen = str(Path(chosen).absolute())
    elif not chosen.endswith(".gguf"):
        known = [*zoo.bundled_models(), *zoo.PACKAGED_MODELS]
        if chosen not in known:
            raise ValueError(
                f"--model must be a folder, a GGUF file or one of {', '.join(known)}, "
                f"got {chosen!r}"
            )
    return zoo.load_model(chosen), zoo.load_tokenizer(chosen), name or chosen


def _load_policy(name: str | None) -> tuple[NAMM, str]:
    from .policy import NAMM, bundled_policies

    if name is None:
        names = bundled_policies()
        if not names:
            raise FileNotFoundError("--policy: no policy is bundled, name a folder")
        name = f"bundled:{names[0]}"
    return NAMM.from_pretrained(name), name


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Less of everything: 1 minute.")] = False,
    json_file: Json = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the evolved memory.", show_default="runs/demo-TIME"),
    ] = None,
    model: Model = None,
    policy: Policy = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long to evolve.", show_default="60, quick 10")
    ] = None,
    threads: Threads = None,
) -> None:
    """Held-out tasks and source code through every memory, then a live evolution."""
    _need("cma")
    _set_threads(threads)
    loaded, tokenizer, model_name = _load_model(model)
    memory, policy_name = _load_policy(policy)
    from .demo import QUICK, DemoConfig, run_demo

    config = QUICK if quick else DemoConfig()
    if seconds is not None:
        config = replace(config, evolve_seconds=seconds)
    if output is None:
        output = Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console = _console()
    parameters = sum(p.numel() for p in loaded.parameters())
    console.print(
        f"[bold]namm_ext {__version__}[/]  model [bold]{model_name}[/] ({parameters / 1e6:.1f} M "
        f"parameters)  memory [bold]{policy_name}[/] ({memory.config.num_params} parameters)\n"
    )
    result = run_demo(
        loaded,
        tokenizer,
        memory,
        config,
        console=console,
        output_dir=output,
        json_path=json_file,
        names=(model_name, policy_name),
    )
    if result["interrupted"]:
        raise typer.Exit(130)


@app.command()
def compare(
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A memory; may be repeated.", show_default="the bundled one"),
    ] = None,
    baseline: Annotated[
        list[str] | None, typer.Option(help="A baseline; may be repeated.", show_default="all")
    ] = None,
    model: Model = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens; may be repeated.")] = None,
    family: Annotated[
        list[str] | None, typer.Option(help="A task family; may be repeated.", show_default="all")
    ] = None,
    examples: Annotated[int, typer.Option(help="Contexts per family.", min=1)] = 6,
    records: Annotated[int, typer.Option(help="Records asked for.", min=1)] = IN_USE.num_records,
    mentions: Annotated[int, typer.Option(help="Lines with each.", min=1)] = IN_USE.mentions,
    idle: Annotated[
        int, typer.Option(help="Records never asked for, per 1,024 tokens.", min=0)
    ] = IN_USE.idle_per_1024,
    windows: Annotated[int, typer.Option(help="Windows of source code.", min=1)] = 8,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    keep: Keep = 0.25,
    layer_share: Annotated[
        list[float] | None,
        typer.Option(
            help="Part of the budget that a layer gets, mean 1; once per layer, for all memories.",
            show_default="the memory's",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds of timing; 0 for none.", min=0)] = 3,
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune the baselines on validation data, print that.")
    ] = False,
    json_file: Json = None,
    threads: Threads = None,
) -> None:
    """Any memories and baselines over any tasks, in one table."""
    _set_threads(threads)
    loaded, tokenizer, model_name = _load_model(model)
    from . import compare as side_by_side
    from .demo import DemoConfig, machine, run_comparison
    from .tables import comparison_table, legend

    mix = RecordMix(records, mentions, idle)
    console = _console()
    memories = [_load_policy(name) for name in policy] if policy else [_load_policy(None)]
    if layer_share:
        shares = tuple(layer_share)
        memories = [(m.with_config(layer_shares=shares), name) for m, name in memories]
    if tune:
        _tune(
            loaded,
            tokenizer,
            memories[0][0].config,
            keep,
            (length or [1024])[0],
            examples,
            mix,
            console,
        )
        return
    names = ["NAMM"] if len(memories) == 1 else [Path(name).name[-12:] for _, name in memories]
    if len(set(names)) < len(names):
        names = [f"NAMM {i + 1}" for i in range(len(memories))]
    methods = [
        side_by_side.full_method(),
        *(side_by_side.namm_method(m, n) for (m, _), n in zip(memories, names, strict=True)),
        *(
            side_by_side.baseline_method(name, memories[0][0].config)
            for name in (side_by_side.TUNED if baseline is None else baseline)
        ),
    ]
    workloads = [
        side_by_side.Workload.make(
            tokenizer,
            split,
            length=tokens,
            families=family or side_by_side.FAMILIES,
            examples_per_family=examples,
            mix=mix,
            num_windows=windows,
        )
        for tokens in length or [1024]
    ]
    config = DemoConfig(keep_fraction=keep, repeats=repeats)
    rows: list[side_by_side.Row] = []
    try:
        run_comparison(loaded, methods, workloads, config, console, rows)
    finally:
        if any(row.exact_match for row in rows):
            console.print(comparison_table(rows, keep, console.width))
            console.print()
            console.print(legend(memories[0][0].config.n_up, mix))
    if json_file is not None:
        values = {
            "namm_ext": __version__,
            "model": model_name,
            "policies": dict(zip(names, (name for _, name in memories), strict=True)),
            "settings": {
                "split": split,
                "keep_fraction": keep,
                "examples_per_family": examples,
                "mix": asdict(mix),
                "num_windows": windows,
            },
            "rows": [row.to_dict() for row in rows],
            "machine": machine(),
        }
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _tune(
    model: Any,
    tokenizer: Any,
    memory: NAMMConfig,
    keep: float,
    length: int,
    examples: int,
    mix: RecordMix,
    console: Console,
) -> None:
    from .compare import Workload, tune_baselines
    from .tasks import EVOLUTION_FAMILIES

    workload = Workload.make(
        tokenizer,
        "validation",
        length=length,
        families=EVOLUTION_FAMILIES,
        examples_per_family=examples,
        mix=mix,
        num_windows=1,
    )
    found = tune_baselines(
        model,
        workload.examples,
        n_up=memory.n_up,
        keep_fraction=keep,
        layer_shares=memory.layer_shares,
        on_trial=lambda name, settings, value: console.print(
            f"{name:13}{value:6.1%}  {settings}", style="dim", highlight=False
        ),
    )
    console.print(f"TUNED = {pprint.pformat(found, sort_dicts=False, width=96)}", highlight=False)


@app.command("evolve")
def evolve_command(
    output: Annotated[Path, typer.Argument(help="Folder; a run that is there is resumed.")],
    model: Model = None,
    generations: Annotated[int, typer.Option(help="How many, in all.", min=1)] = 100,
    popsize: Annotated[int, typer.Option(help="Candidates per generation.", min=4)] = 16,
    sigma: Annotated[float, typer.Option(help="Initial step size.")] = 0.065,
    seed: Annotated[int, typer.Option(help="Of search and batches.")] = 0,
    length: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a context; may be repeated.", show_default="256 512 1024"),
    ] = None,
    n_up: Annotated[int, typer.Option(help="Tokens between two updates.")] = 64,
    keep: Keep = 0.25,
    budget: Annotated[str, typer.Option(help="per_head or per_layer.")] = "per_layer",
    features: Annotated[str, typer.Option(help="Transform of the features: none or log.")] = "log",
    imitate: Annotated[
        bool, typer.Option(help="Start from a fit, by gradient, to the attention tokens will get.")
    ] = True,
    in_use: Annotated[
        bool,
        typer.Option(
            "--in-use",
            help="In half of the contexts, records in use among idle ones; from 1,024 tokens on.",
        ),
    ] = False,
    threads: Threads = None,
) -> None:
    """Evolve a memory for a model. Ctrl-C stops after the generation, the same command resumes."""
    _need("cma")
    _set_threads(threads)
    from .evolution import EvolveConfig, ImitateConfig, evolve

    lengths = tuple(length) if length else EvolveConfig().lengths
    longest = max(lengths)
    config = EvolveConfig(
        namm=EvolveConfig().namm.replace(
            n_up=n_up,
            budget=budget,
            feature_transform=features,
            cache_size=max(1, int(keep * longest)),
        ),
        generations=generations,
        popsize=popsize,
        sigma0=sigma,
        seed=seed,
        lengths=lengths,
        keep_fraction=keep,
        validation_lengths=(longest,),
        mixes=(IN_USE, STATED_ONCE) if in_use else (STATED_ONCE,),
        imitation=ImitateConfig(lengths=lengths) if imitate else None,
    )
    loaded, tokenizer, _ = _load_model(model)
    console = _console()
    validation = "none yet"
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        _stop_on_ctrl_c(console) as stopped,
        Progress(*columns, TextColumn("{task.description}"), console=console) as progress,
    ):
        task = progress.add_task("", total=generations)

        def on_generation(record: dict[str, Any]) -> None:
            nonlocal validation
            if "validation_exact_match" in record:
                validation = f"{record['validation_exact_match']:.1%}"
            progress.update(
                task,
                completed=record["generation"],
                description=(
                    f"{record['length']} tokens: {record['exact_match_mean']:.0%}, best "
                    f"{record['exact_match_best']:.0%}; validation {validation}"
                ),
            )

        def on_imitation(record: dict[str, Any]) -> None:
            if stopped[0]:  # there is no generation to finish yet
                raise KeyboardInterrupt
            at = f"round {record['round']}, step {record['step']}"
            loss = f", loss {record['loss']:.3f}" if record["step"] else ": reading"
            progress.update(task, description=f"fitting a start: {at}{loss}")

        result = evolve(
            loaded,
            tokenizer,
            config,
            output,
            on_imitation=on_imitation,
            on_generation=on_generation,
            should_stop=lambda: stopped[0],
        )
    console.print(
        f"Best on validation: generation {result.generation}, saved in [bold]{output / 'policy'}[/]"
    )
    if stopped[0]:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130)


@contextmanager
def _stop_on_ctrl_c(console: Console) -> Iterator[list[bool]]:
    """A flag that the first Ctrl-C sets; the second one interrupts as usual."""
    stopped = [False]

    def stop(*_: Any) -> None:
        if stopped[0]:
            raise KeyboardInterrupt
        stopped[0] = True
        console.print("[yellow]Stopping after this generation; Ctrl-C again stops at once.[/]")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@app.command("train-lm")
def train_lm_command(
    output: Annotated[Path, typer.Argument(help="Folder; a run that is there is resumed.")],
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Two steps, to see that it runs.")] = False,
    threads: Threads = None,
) -> None:
    """Train a bundled language model again: half an hour on two cores."""
    _need("transformers", "tokenizers", "safetensors")
    _set_threads(threads)
    from .zoo.train_lm import train_lm

    console = _console()
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
            task = progress.add_task("first steps", total=None)

            def on_log(entry: dict[str, Any]) -> None:
                progress.update(
                    task,
                    total=entry["total_steps"],
                    completed=entry["step"],
                    description=(
                        f"text loss {entry['text_loss']:.3f}, answers "
                        f"{entry['answer_token_accuracy']:.0%}"
                    ),
                )

            folder = train_lm(output, seed=seed, quick=quick, on_log=on_log)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
    console.print(f"Saved in [bold]{folder}[/], figures in metrics.json")


@app.command()
def info() -> None:
    """Version, binaries, instruction set, torch, CUDA, what is bundled."""
    from ._library import libraries
    from .policy import bundled_policies
    from .zoo import bundled_models

    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("namm_ext", __version__),
        ("binaries", str(libraries.folder)),
        ("build", ", ".join(f"{k} {v}" for k, v in libraries.build_info.items() if k != "version")),
        ("instruction sets", ", ".join(libraries.supported_isas)),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("CUDA kernels", libraries.cuda_status),
        ("models", ", ".join(bundled_models()) or "none"),
        ("policies", ", ".join(f"bundled:{name}" for name in bundled_policies()) or "none"),
        *(("extra missing", text) for text in _missing_extras()),
    ):
        table.add_row(f"[bold]{name}[/]", escape(value))
    _console().print(table)


def _missing_extras() -> list[str]:
    wanted = {
        "hf": ("transformers", "safetensors"),
        "evolve": ("cma", "rich", "typer"),
    }
    return [
        f"{extra} ({', '.join(missing)}): pip install 'namm_ext[{extra}]'"
        for extra, modules in wanted.items()
        if (missing := [name for name in modules if importlib.util.find_spec(name) is None])
    ]
