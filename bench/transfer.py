#!/usr/bin/env python3
"""What carries over: the scorer of attention of one model, read by another after calibration only.

    python bench/transfer.py stdlib-1m       # SmolLM2's scorer on the 1 M model, a minute
    python bench/transfer.py smollm2-135m    # the other way round, ten minutes on one core

Writes ``bench/results/transfer-MODEL.json``, test split, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from namm_ext import NAMM, measure, zoo
from namm_ext.fitting import calibrate, calibrate_statistics, training_texts
from side_by_side import KEEP, LENGTH, side_by_side

RESULTS = Path(__file__).resolve().parent / "results"
SOURCES = {"stdlib-1m": "smollm2-135m-attention", "smollm2-135m": "stdlib-1m"}
DTYPES = {"stdlib-1m": torch.float32, "smollm2-135m": torch.bfloat16}
RULES = ("KeyDiff", "Random")


def carried_over(source: str, model: Any, tokenizer: Any, count: int = 4) -> NAMM:
    """A memory without its gate, calibrated for another model as `namm calibrate` does."""
    memory = NAMM.from_pretrained(source).with_gate(None).with_budget(
        size=KEEP, scope="global", layer_shares=None, threshold=None, sink_tokens=4,
        recent_tokens=32,
    )  # fmt: skip
    texts = training_texts(tokenizer, length=LENGTH, count=count)
    return calibrate(calibrate_statistics(memory, model, texts), model, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SOURCES)
    parser.add_argument("--policy", help="another memory than the bundled one of the other model")
    parser.add_argument("--json", type=Path, help="by default bench/results/transfer-MODEL.json")
    parser.add_argument("--questions", type=int, default=17, help="per task, on a model that chats")
    args = parser.parse_args()
    torch.set_num_threads(1)  # roundings of bfloat16 depend on it
    model = zoo.load_model(args.model, dtype=DTYPES[args.model])
    tokenizer = zoo.load_tokenizer(args.model)
    source = args.policy or f"bundled:{SOURCES[args.model]}"
    began = time.perf_counter()
    memory = carried_over(source, model, tokenizer)
    print(f"{source} calibrated for {args.model} in {time.perf_counter() - began:.0f} s")
    own = NAMM.from_pretrained(f"bundled:{args.model}")
    methods = [
        measure.full_method(),
        measure.Method(Path(source).name.removeprefix("bundled:"), memory),
        measure.Method("own", own),
        *measure.baseline_methods(args.model, own, RULES),
    ]
    settings: dict[str, Any] = {"model": args.model, "split": "test"}
    workload: measure.Workload
    if tokenizer.chat_template:
        methods = measure.made_ready(methods, model, tokenizer, LENGTH)
        settings["questions"] = args.questions
        workload = measure.ReadingWorkload.make(
            tokenizer, "test", length=LENGTH, questions=args.questions, num_windows=4
        )
    else:
        workload = measure.RecordWorkload.make(tokenizer, "test", length=LENGTH)
    path = args.json or RESULTS / f"transfer-{args.model}.json"
    side_by_side(model, tokenizer, methods, workload, settings, path)


if __name__ == "__main__":
    main()
