#!/usr/bin/env python3
"""kvpress on the contexts of ``namm compare``: what its own presses answer.

kvpress needs an older transformers than the drop-in, so there are two steps in two environments:

    python bench/kvpress_check.py write contexts.json --questions 17        # with namm_ext
    python bench/kvpress_check.py ask contexts.json --keep 0.25 --json FILE  # with kvpress

A press compresses once, after the whole context, with the budgets it was published with. That is
easier than forgetting on the way, which is what ``namm compare`` measures; and no bytes are freed
where heads keep different tokens. Exact match is teacher-forced, as there. A run that was stopped
goes on with its ``--json`` file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write(args: argparse.Namespace) -> None:
    """Contexts and questions as token ids, and the folder of the model."""
    from namm_ext import measure, zoo

    tokenizer = zoo.load_tokenizer(args.model)
    workload = measure.ReadingWorkload.make(
        tokenizer, args.split, length=args.length, questions=args.questions, num_windows=0
    )
    readings = [
        {
            "task": reading.task,
            "context": reading.context_ids,
            "questions": [(question.ids, question.answer_ids) for question in reading.questions],
            "turns": reading.turns,
        }
        for task in workload.tasks
        for reading in workload.readings[task]
    ]
    content = {"model": str(zoo.model_path(args.model)), "readings": readings}
    args.contexts.write_text(json.dumps(content), encoding="utf-8")
    print(f"{len(readings)} contexts of {args.length} tokens in {args.contexts}")


def presses(ratio: float) -> dict[str, Callable[[], Any]]:
    """What is compared; kvpress' defaults but for the ratio."""
    import kvpress

    rules = {
        "StreamingLLM": kvpress.StreamingLLMPress,
        "SnapKV": kvpress.SnapKVPress,
        "TOVA": kvpress.TOVAPress,
        "KNorm": kvpress.KnormPress,
        "KeyDiff": kvpress.KeyDiffPress,
        "LagKV": kvpress.LagKVPress,
        "ExpectedAttention": kvpress.ExpectedAttentionPress,
        "KVzip (2x)": kvpress.KVzipPress,
    }

    def adaptive(rule: Any, **arguments: float) -> Any:
        return kvpress.AdaKVPress(rule(compression_ratio=ratio, **arguments))

    return {
        "full cache": lambda: None,
        **{name: partial(rule, compression_ratio=ratio) for name, rule in rules.items()},
        "AdaKV(SnapKV)": partial(adaptive, kvpress.SnapKVPress),
        "AdaKV(ExpectedAttention)": partial(adaptive, kvpress.ExpectedAttentionPress, epsilon=1e-2),
    }


@torch.inference_mode()
def answers(model: Any, press: Any, reading: dict[str, Any]) -> list[bool]:
    """Whether each question of a context is answered exactly."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with contextlib.nullcontext() if press is None else press(model):
        ids = torch.tensor([reading["context"]])
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    right, seen, before = [], len(reading["context"]), []
    for ids, answer in reading["questions"]:
        given = [*before, *ids, *answer[:-1]]
        own = cache if reading["turns"] else copy.deepcopy(cache)
        positions = torch.arange(seen, seen + len(given))[None]
        hidden = model.model(
            torch.tensor([given]), past_key_values=own, position_ids=positions, use_cache=True
        ).last_hidden_state
        guess = model.lm_head(hidden[0, -len(answer) :]).argmax(-1).tolist()
        right.append(guess == list(answer))
        if reading["turns"]:
            seen, before = seen + len(given), [answer[-1]]
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None  # left behind by presses that only mask
    return right


def answered(path: Path | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What a file has of a run that was stopped; the run ends if that had other settings."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = content.pop("presses")
    differ = [
        f"{name} {content.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*content, *settings})
        if content.get(name) != settings.get(name)
    ]
    if differ:
        sys.exit(
            f"--json: {path} has answers of other settings ({'; '.join(differ)}); name another "
            "file or delete it"
        )
    return found


def save(path: Path, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps({**settings, "presses": found}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def ask(args: argparse.Namespace) -> None:
    """Every press on every context; a line and a JSON entry for each, written at once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    text = args.contexts.read_bytes()
    content = json.loads(text)
    settings = {
        **{name: version(name) for name in ("kvpress", "transformers")},
        "keep": args.keep,
        "dtype": args.dtype,
        "contexts": len(content["readings"]),
        "contexts_sha256": hashlib.sha256(text).hexdigest()[:16],
    }
    found = answered(args.json, settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        content["model"], dtype=getattr(torch, args.dtype)
    )
    for name, make in presses(1 - args.keep).items():
        if name in found or (args.press and name not in args.press):
            continue
        press = make()
        began = time.perf_counter()
        tasks: dict[str, list[bool]] = {}
        for reading in content["readings"]:
            tasks.setdefault(reading["task"], []).extend(answers(model, press, reading))
        means = {task: sum(right) / len(right) for task, right in tasks.items()}
        mean = sum(means.values()) / len(means)
        found[name] = {"exact_match": mean, "tasks": means}
        groups = " ".join(f"{task}:{value:.2f}" for task, value in means.items())
        seconds = time.perf_counter() - began
        print(f"{name:26s} {100 * mean:5.1f}  {seconds:4.0f} s  {groups}", flush=True)
        if args.json:
            save(args.json, settings, found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    writing = commands.add_parser("write", help="contexts and questions, with namm_ext")
    writing.add_argument("contexts", type=Path)
    writing.add_argument("--model", default="smollm2-135m")
    writing.add_argument("--split", default="test")
    writing.add_argument("--length", type=int, default=1024)
    writing.add_argument("--questions", type=int, default=17, help="per task, at least")
    writing.set_defaults(run=write)
    asking = commands.add_parser("ask", help="presses on them, with kvpress")
    asking.add_argument("contexts", type=Path)
    asking.add_argument("--keep", type=float, default=0.25)
    asking.add_argument("--dtype", default="bfloat16")
    asking.add_argument("--press", action="append", help="one of those it prints; all by default")
    asking.add_argument("--json", type=Path)
    asking.set_defaults(run=ask)
    args = parser.parse_args()
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
