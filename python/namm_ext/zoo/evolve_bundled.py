"""The recipe of the bundled memory: a scorer that predicts future attention, then evolution.

    python -m namm_ext.zoo.evolve_bundled OUTPUT_DIR

Gradient finds in minutes a start that evolution would need hundreds of generations for; evolution
then optimises what counts, the likelihood of answers and text under the memory's own evictions.
Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..budget import Budget
from ..config import NAMMConfig
from ..corpus import load_documents
from ..evolution import (
    EvolveConfig,
    EvolveResult,
    ImitateConfig,
    Problem,
    RecordProblem,
    evolve,
    length_of,
)
from ..tasks import IN_USE, STATED_ONCE

POLICY_NAME = "stdlib-1m"

# Spectral features are averaged over thousands of tokens instead of hundreds: records are read long
# before anybody asks for them.
MEMORY = NAMMConfig(
    n_up=64,
    ema_coeff=0.9995,
    feature_transform="log",
)
EVOLUTION = EvolveConfig(
    namm=MEMORY,
    budget=Budget(0.25, scope="per_layer", sink_tokens=4),
    generations=60,
    popsize=16,
    sigma0=0.01,
    validate_every=5,
    # The model recalls in its last layer, where its induction heads are.
    imitation=ImitateConfig(rounds=6, steps=300, layer_weights=(1.0, 1.0, 1.0, 3.0)),
)


def records(tokenizer: Any) -> RecordProblem:
    """What the bundled memory was evolved on: both kinds of contexts, in equal parts."""
    return RecordProblem(
        tokenizer,
        load_documents("train"),
        load_documents("validation"),
        lengths=(1024, 2048),
        num_examples=16,
        validation_lengths=(1024, 2048),
        num_validation=32,
        mixes=(IN_USE, STATED_ONCE),
        text_weight=1.0,
    )


def evolve_bundled(
    model: Any,
    problem: Problem,
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    config: EvolveConfig = EVOLUTION,
    on_record: Callable[[dict[str, Any]], None] = lambda _: None,
) -> EvolveResult:
    """Make a memory as the bundled one was made.

    Args:
        model: a causal language model of transformers; the bundled one for the bundled memory.
        problem: what to read; :func:`records` for the bundled memory.
        output_dir: ``run`` holds the evolution and ``policy`` what is shipped: the memory,
            ``evolution.json`` (all settings), ``log.jsonl`` and ``metrics.json``.
        seed: of everything.
        config: of both stages.
        on_record: called with each log record.

    Returns:
        EvolveResult: the memory that was best on validation.
    """
    folder = Path(output_dir)
    config = replace(config, seed=seed)
    result = evolve(
        *(model, problem, config, folder / "run"),
        on_imitation=on_record,
        on_generation=on_record,
    )

    target = folder / "policy"
    result.policy.save_pretrained(target)
    _write_json(target / "evolution.json", settings(problem, config))
    (target / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in result.log))
    batches = problem.validation_batches()
    metrics: dict[str, Any] = {
        "split": "validation",
        "examples": len(batches[0]),
        "generation": result.generation,
    }
    for batch in batches:
        length = length_of(batch)
        policy = result.policy.with_budget(config.budget.of_context(length))
        scores = problem.fitness(model, policy, batch)
        values = {**scores.metrics, "kept": scores.kept}
        metrics[str(length)] = {name: float(value.mean()) for name, value in values.items()}
    _write_json(target / "metrics.json", metrics)
    return result


def settings(problem: Problem, config: EvolveConfig) -> dict[str, Any]:
    """What the run depends on besides model, tokenizer and data."""
    return {**config.to_dict(), "problem": problem.settings()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    from . import load_model, load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    evolve_bundled(
        load_model(),
        records(load_tokenizer()),
        arguments.output_dir,
        seed=arguments.seed,
        on_record=lambda record: print(json.dumps(record), flush=True),
    )


if __name__ == "__main__":
    main()
