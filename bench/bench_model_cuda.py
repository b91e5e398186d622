"""A real model on the GPU: are the answers those of the CPU, and how fast is it?

``python bench/bench_model_cuda.py MODEL [--policy P] [--out FILE.json] [--smoke]`` lets a model of
the zoo, a folder or a GGUF file read a few contexts of each task and answer their questions, with
everything kept and with each memory: share of right answers, share of tokens kept, seconds. On a
GPU in float32 and bfloat16; each float32 case is compared with the CPU's answers. An answer may
differ where two words are nearly as likely; more than one, or one in twenty, is a failure.
``--smoke`` reads one short context on any device.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cuda_report import Report
from namm_ext import baselines, zoo
from namm_ext.answers import Answers, answer_readings
from namm_ext.policy import NAMM, Policy
from namm_ext.tasks import suite
from namm_ext.tasks.readings import Reading

TASKS = ("single", "table")


@dataclass
class Row:
    """One memory in one dtype."""

    memory: str
    dtype: str
    accuracy: float
    kept: float
    seconds: float
    changed: int | None = None


def make_memories(policies: list[str], length: int) -> dict[str, Policy | None]:
    """Memories by name; a baseline and no memory at all are always among them."""
    named: dict[str, Policy | None] = {"full": None, "h2o": baselines.H2O(length // 2)}
    return named | {name: NAMM.from_pretrained(name) for name in policies}


def ask(model: Any, memory: Policy | None, readings: list[Reading]) -> tuple[Answers, float]:
    """Answers, and the seconds they took."""
    start = time.perf_counter()
    answers = answer_readings(model, memory, readings)
    return answers, time.perf_counter() - start


def measure(
    name: str, memory: Policy | None, dtype: torch.dtype, readings: list[Reading], model: Any
) -> Row:
    """Ask on the model's device; in float32 on the CPU too, if that is another.

    Raises:
        ArithmeticError: if more answers than one, or one in twenty, are not those of the CPU.
    """
    device = model.device
    model.to(dtype=dtype)
    answers, seconds = ask(model, memory, readings)
    changed = None
    if device.type == "cuda" and dtype == torch.float32:
        try:
            want, _ = ask(model.to("cpu"), memory, readings)
        finally:
            model.to(device)
        changed, total = int((want.correct != answers.correct).sum()), want.correct.size
        if changed > max(1, total // 20):
            raise ArithmeticError(f"{changed} of {total} answers are not those of the CPU")
    kind = str(dtype).removeprefix("torch.")
    return Row(name, kind, answers.accuracy(), float(answers.kept.mean()), seconds, changed)


def show(row: Row) -> str:
    changed = "" if row.changed is None else f"  {row.changed} unlike the CPU"
    return (
        f"{row.memory:24} {row.dtype:9} right {row.accuracy:6.1%}  kept {row.kept:6.1%}  "
        f"{row.seconds:7.2f} s{changed}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="name in the zoo, folder or GGUF file")
    parser.add_argument("--policy", action="append", default=[], help="memory made for the model")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--smoke", action="store_true", help="one short context, any device")
    parser.add_argument("--skip", type=int, default=0, help="cases done before, see cuda_report")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no GPU: only --smoke can run")
    length, count = (512, 1) if args.smoke else (2048, 2)
    tokenizer = zoo.load_tokenizer(args.model)
    readings = [
        reading
        for task in (TASKS[:1] if args.smoke else TASKS)
        for reading in suite.make_readings(task, tokenizer, count, split="test", length=length)
    ]
    model = zoo.load_model(args.model).to(device)
    report = Report(args.out, device, args.skip, model=args.model, length=length)
    dtypes = (torch.float32,) if args.smoke else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        for name, memory in make_memories(args.policy, length).items():
            case = partial(measure, name, memory, dtype, readings, model)
            report.run(f"{name} {dtype}", case, show)
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
