#!/usr/bin/env python3
"""Which part of a memory does what, on SmolLM2-135M-Instruct and the test split.

    make real-model
    python bench/ablation.py --json bench/results/ablation.json    # an hour on one core; goes on

The parts of ``bundled:smollm2-135m-attention``, which has all of them: head offsets alone (in a
head the newest tokens stay), the scorer of attention, the gate, both; each calibrated anew, with
its budget shared by all heads of the model, by the heads of a layer, or not at all.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from namm_ext import NAMM, measure, zoo
from namm_ext.fitting import calibrate, training_texts
from namm_ext.fitting.calibrate import targets_of
from side_by_side import LENGTH, side_by_side

MODEL = "smollm2-135m"
ALL = ("global", "per_layer", "per_head")
SCOPES = {
    "offsets alone": ALL[:1],
    "attention alone": (ALL[0], ALL[2]),
    "gate alone": ALL,
    "attention and gate": ALL[:1],
}


def parts(memory: NAMM) -> dict[str, NAMM]:
    """The memory and what is left of it without one part or the other."""
    attention = memory.with_gate(None)
    return {
        "offsets alone": attention.with_params(torch.zeros_like(memory.params)),
        "attention alone": attention,
        "gate alone": NAMM(
            memory.config.replace(scorer="none"), budget=memory.budget, gate=memory.gate
        ),
        "attention and gate": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=17)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)  # roundings of bfloat16 depend on it
    model = zoo.load_model(MODEL, dtype=torch.bfloat16)
    tokenizer = zoo.load_tokenizer(MODEL)
    texts = training_texts(tokenizer, length=LENGTH, count=4)
    targets = targets_of(model, texts)
    methods = [measure.full_method()]
    for name, memory in parts(NAMM.from_pretrained(f"bundled:{MODEL}-attention")).items():
        ready = calibrate(memory, model, texts, targets=targets)
        for scope in SCOPES[name]:
            remark = "" if scope == "global" else f", {scope.replace('_', ' ')}"
            methods.append(measure.Method(name + remark, ready.with_budget(scope=scope)))
    workload = measure.ReadingWorkload.make(
        tokenizer, "test", length=LENGTH, questions=args.questions, num_windows=args.windows
    )
    settings = {
        "model": MODEL, "dtype": "bfloat16", "split": "test", "tasks": "all",
        "num_windows": args.windows, "questions": args.questions, "question_visible": False,
    }  # fmt: skip
    side_by_side(model, tokenizer, methods, workload, settings, args.json)


if __name__ == "__main__":
    main()
