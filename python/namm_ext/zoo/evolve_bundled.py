"""The recipe of the bundled memory: first a linear one, then a BAM that starts as it.

    python -m namm_ext.zoo.evolve_bundled OUTPUT_DIR

A linear memory has 25 parameters, which evolution finds in few generations; a BAM with everything
but its last layer zero is that linear memory, and goes on from there with all 4,172 parameters.
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

from ..config import NAMMConfig
from ..evolution import EvolveConfig, EvolveResult, evaluate_policy, evolve, validation_batch
from ..evolution.train import linear_start

POLICY_NAME = "stdlib-1m"

# Nearly all that recall needs is in the bundled model's last layer, where its induction heads are:
# on validation examples, keeping most of it and little elsewhere is almost as good as the full
# cache, while more room in any other layer changes nothing.
MEMORY = NAMMConfig(
    n_up=64,
    feature_transform="log",
    threshold=None,
    cache_size=256,
    budget="per_layer",
    layer_shares=(0.12, 0.12, 0.12, 3.64),
    sink_tokens=4,
)
LINEAR = EvolveConfig(
    namm=MEMORY.replace(scorer="mlp"),
    generations=15,
    popsize=12,
    sigma0=0.3,
    lengths=(512, 1024),
    num_examples=6,
    text_weight=1.0,
    validate_every=5,
    num_validation=32,
)
BAM = EvolveConfig(
    namm=MEMORY,
    generations=30,
    popsize=16,
    sigma0=0.03,
    lengths=(512, 1024),
    num_examples=6,
    text_weight=1.0,
    validate_every=5,
    num_validation=32,
)


def evolve_bundled(
    model: Any,
    tokenizer: Any,
    output_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    linear: EvolveConfig = LINEAR,
    bam: EvolveConfig = BAM,
    on_generation: Callable[[dict[str, Any]], None] | None = None,
) -> EvolveResult:
    """Evolve a memory as the bundled one was.

    Args:
        model: a causal language model of transformers; the bundled one for the bundled memory.
        tokenizer: of that model.
        output_dir: ``linear`` and ``bam`` hold the two runs, ``policy`` what is shipped: the
            memory, ``evolution.json`` (both configurations), ``log.jsonl`` and ``metrics.json``.
        seed: of both runs.
        linear, bam: the two stages.
        on_generation: called with the log record of each generation.

    Returns:
        EvolveResult: of the second stage.
    """
    folder = Path(output_dir)
    linear, bam = replace(linear, seed=seed), replace(bam, seed=seed)
    first = evolve(model, tokenizer, linear, folder / "linear", on_generation=on_generation)
    start = linear_start(bam.namm, first.policy.params)
    second = evolve(model, tokenizer, bam, folder / "bam", x0=start, on_generation=on_generation)

    target = folder / "policy"
    second.policy.save_pretrained(target)
    _write_json(target / "evolution.json", {"linear": linear.to_dict(), "bam": bam.to_dict()})
    log = [{"stage": "linear", **record} for record in first.log]
    log += [{"stage": "bam", **record} for record in second.log]
    (target / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    result = evaluate_policy(model, second.policy, validation_batch(tokenizer, bam))
    _write_json(
        target / "metrics.json",
        {
            "split": "validation",
            "length": bam.validation_length,
            "examples": bam.num_validation,
            "generation": second.generation,
            "exact_match": float(result.exact_match.mean()),
            "answer_ll": float(result.answer_ll.mean()),
            "text_ll": float(result.text_ll.mean()),
            "kept": float(result.kept.mean()),
        },
    )
    return second


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
        load_tokenizer(),
        arguments.output_dir,
        seed=arguments.seed,
        on_generation=lambda record: print(json.dumps(record), flush=True),
    )


if __name__ == "__main__":
    main()
