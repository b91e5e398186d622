#!/usr/bin/env python3
"""Memories of language models on a model that watches videos, which none of them has seen.

    python bench/video.py --json FILE
    python bench/video.py --json FILE --page docs/video.md --picture docs/video.svg

Clips of 40 frames (641 tokens) are read, and only then come the questions, each behind its own copy
of the cache. Memories and rules have the settings that were found on SmolLM2-135M-Instruct; all
that they learn of the model is a calibration on four clips. Two are not zero-shot: gates fitted to
eight clips that are watched twice, or asked about. A result is in the file as soon as it
is measured, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from namm_ext import NAMM, NAMMCache, NAMMConfig, zoo
from namm_ext.answers import interval
from namm_ext.budget import Budget
from namm_ext.cache import borrow, cache_keyword
from namm_ext.fitting import FitConfig
from namm_ext.integrations.video import calibrate_on_videos, fit_on_videos, frame_shares
from namm_ext.measure import FULL, fixed_budget, tuned_rules
from namm_ext.measure.methods import at_pace
from namm_ext.policy import Policy
from namm_ext.zoo.clips import KINDS, WORDS, Clip, draw_clip, encode, inputs_of
from torch import Tensor
from transformers import DynamicCache

FRAMES, SCENES = 40, 4
TEST, CALIBRATION = 77, 78  # streams of clips; training draws from others
MEMORIES = {
    "NAMM attention (SmolLM2)": "bundled:smollm2-135m-attention",
    "NAMM (stdlib-1m)": "bundled:stdlib-1m",
}
RULES = (
    "KeyDiff", "H2O", "SnapKV", "TOVA", "ExpectedAttention", "KNorm", "StreamingLLM", "Random",
)  # fmt: skip
N_UP = 64


@dataclass(frozen=True)
class Measured:
    """What became of the questions about some clips.

    Attributes:
        correct: ``[Q]`` bool.
        kinds: ``[Q]`` kinds of the questions.
        clips: ``[Q]`` which clip a question is about.
        kept: mean share of the tokens that is held when the question comes.
        shares: ``[B, F]`` share of each frame that is held, mean over layers and heads.
    """

    correct: list[bool]
    kinds: list[str]
    clips: list[int]
    kept: float
    shares: list[list[float]]


def clips_of(stream: int, seed: int, count: int) -> list[Clip]:
    """Clips that depend on stream, seed and place alone."""
    return [
        draw_clip(np.random.default_rng([stream, seed, i]), FRAMES, SCENES) for i in range(count)
    ]


@torch.inference_mode()
def measure(model: Any, policy: Policy | None, clips: Sequence[Clip]) -> Measured:
    """Let a model read the clips as one batch, then ask all questions about them."""
    inputs = inputs_of(clips)
    rows = [(i, question) for i, clip in enumerate(clips) for question in clip.questions()]
    with borrow(model, None if policy is None else "namm"):
        config = model.config.get_text_config()
        cache = DynamicCache(config=config) if policy is None else NAMMCache(model, policy)
        given = {cache_keyword(model.base_model): cache, "use_cache": True}
        model.base_model(**inputs, **given)
        shares, kept = np.ones((len(clips), FRAMES)), 1.0
        if isinstance(cache, NAMMCache):
            found = [frame_shares(cache, model.config, inputs, row=i) for i in range(len(clips))]
            shares = np.stack([share.overall.numpy() for share in found])
            kept = cache.report().live_fraction
        cache.batch_select_indices(torch.tensor([i for i, _ in rows]))
        ids, last = _questions([question.text for _, question in rows])
        hidden = model.base_model(input_ids=ids, **given).last_hidden_state
        logits = model.lm_head(hidden[torch.arange(len(rows)), last])
    answers = torch.tensor([WORDS.index(question.answer) for _, question in rows])
    return Measured(
        correct=(logits.argmax(-1) == answers).tolist(),
        kinds=[question.kind for _, question in rows],
        clips=[i for i, _ in rows],
        kept=kept,
        shares=shares.tolist(),
    )


def _questions(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids, filled up behind their ends, where causal attention does not see it; the ends."""
    encoded = [encode(text) for text in texts]
    ids = torch.zeros(len(texts), max(map(len, encoded)), dtype=torch.int64)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, torch.tensor([len(tokens) - 1 for tokens in encoded])


def methods(model: Any, questions: bool = False) -> dict[str, Policy | None]:
    """What is compared, calibrated on four clips that are asked about or watched twice."""
    clips = clips_of(CALIBRATION, 0, 4)
    videos = [inputs_of([clip]) for clip in clips]
    asked = [[encode(q.text) for q in clip.questions()] for clip in clips] if questions else None
    found: dict[str, Policy | None] = {FULL: None}
    for name, source in MEMORIES.items():
        memory = NAMM.from_pretrained(source).with_gate(None).with_calibration(None)
        memory = memory.with_budget(
            scope="global", size=0.25, layer_shares=None, sink_tokens=4, recent_tokens=32
        )
        found[name] = calibrate_on_videos(memory, model, videos, asked)
    found |= fitted(model)
    rules = tuned_rules("smollm2-135m")
    for name in RULES:
        rule: Any = at_pace(rules[name], N_UP)
        if name == "ExpectedAttention":
            rule = rule.for_model(model.get_decoder())
        if rule.needs_calibration:
            rule = calibrate_on_videos(rule, model, videos, asked)
        found[name] = rule
    return found


def fitted(model: Any) -> dict[str, Policy | None]:
    """Gates that were fitted to eight clips, watched twice or asked about."""
    clips = clips_of(CALIBRATION, 1, 8)
    videos = [inputs_of([clip]) for clip in clips]
    asked = [[encode(q.text) for q in clip.questions()] for clip in clips]
    config = FitConfig(
        namm=NAMMConfig(n_up=N_UP, scorer="none"),
        budget=Budget(0.25, scope="global", sink_tokens=4, recent_tokens=32),
    )
    return {
        "NAMM, a gate fitted here": fit_on_videos(model, videos, config).policy,
        "NAMM, a gate fitted to questions": fit_on_videos(model, videos, config, asked).policy,
    }


def summary(results: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Accuracies with intervals: clips are drawn again, each kind of question counts the same."""
    kinds, clips = np.array(full["kinds"]), np.array(full["clips"])
    own, others = np.array(results["correct"]), np.array(full["correct"])
    mean, low, high = interval([own], clips, tasks=kinds)
    share, share_low, share_high = interval(
        [own, others], clips, tasks=kinds, statistic=lambda a, b: a / b
    )
    return {
        "accuracy": mean,
        "interval": [low, high],
        "of_full": [share, share_low, share_high],
        "by_kind": {kind: float(own[kinds == kind].mean()) for kind in KINDS},
    }


def frames_kept(shares: Sequence[Sequence[float]], clips: Sequence[Clip]) -> dict[str, float]:
    """Mean share that is held of kinds of frames."""
    parts: dict[str, list[float]] = {"flash": [], "scene_begins": [], "other": []}
    for row, clip in zip(shares, clips, strict=True):
        begins = {scene.start for scene in clip.scenes}
        for i, share in enumerate(row):
            kind = "scene_begins" if i in begins else "other"
            parts["flash" if i in (clip.flash, clip.flash + 1) else kind].append(share)
    return {name: float(np.mean(values)) for name, values in parts.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what is missing in the file."""
    model = zoo.load_video_model(args.model)
    content: dict[str, Any] = {"rows": []}
    if args.json.exists():
        content = json.loads(args.json.read_text(encoding="utf-8"))
    content["settings"] = {
        "frames": FRAMES, "tokens": 1 + 16 * FRAMES, "clips": args.clips, "seeds": args.seeds,
        "calibration": "questions" if args.questions else "second reading", "n_up": N_UP,
        "torch": torch.__version__,
    }  # fmt: skip
    done = {(row["method"], row["keep"]) for row in content["rows"]}
    by_seed = [clips_of(args.stream, seed, args.clips) for seed in range(args.seeds)]
    for name, policy in methods(model, args.questions).items():
        for keep in args.keep if policy is not None else [1.0]:
            if (name, keep) in done:
                continue
            began = time.process_time()
            budgeted = policy and fixed_budget(policy, keep, 1 + 16 * FRAMES)
            parts = [measure(model, budgeted, clips) for clips in by_seed]
            row = {
                "method": name,
                "keep": keep,
                "held": float(np.mean([part.kept for part in parts])),
                "correct": [int(x) for part in parts for x in part.correct],
                "by_seed": [float(np.mean(part.correct)) for part in parts],
                "frames": frames_kept(
                    [row for part in parts for row in part.shares],
                    [clip for clips in by_seed for clip in clips],
                ),
                "example": [round(share, 3) for share in parts[0].shares[0]],
            }
            if policy is None:  # the same for all
                row["kinds"] = [x for part in parts for x in part.kinds]
                row["clips"] = [s * args.clips + i for s, p in enumerate(parts) for i in p.clips]
            content["rows"].append(row | summary(row, ([*content["rows"], row])[0]))
            args.json.write_text(json.dumps(content) + "\n", encoding="utf-8")
            print(
                f"{name:26s} {keep:5.3f}  {content['rows'][-1]['accuracy']:.3f}  "
                f"held {row['held']:.3f}  {time.process_time() - began:.1f} s", flush=True
            )  # fmt: skip
    return content


def table(content: dict[str, Any]) -> str:
    """A Markdown table: exact match at each budget, memories first."""
    rows = content["rows"]
    full, keeps = rows[0], sorted({row["keep"] for row in rows[1:]}, reverse=True)
    by_name = {(row["method"], row["keep"]): row for row in rows}
    names = list(dict.fromkeys(row["method"] for row in rows[1:]))
    names.sort(key=lambda n: (not n.startswith("NAMM"), -by_name[n, keeps[1]]["accuracy"]))
    head = "".join(f" {100 * keep:g} % kept |" for keep in keeps)
    low, high = full["interval"]
    lines = [
        f"| {len(full['correct']):,} questions |{head} of full at {100 * keeps[1]:g} % |",
        "|---|" + "---:|" * (len(keeps) + 1),
        f"| full cache: {_percent(full['accuracy'], low, high)} |" + " |" * (len(keeps) + 1),
    ]
    for name in names:
        cells = [
            _percent(by_name[name, keep]["accuracy"], *by_name[name, keep]["interval"])
            for keep in keeps
        ]
        cells.append(_percent(*by_name[name, keeps[1]]["of_full"], digits=0))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kinds_table(content: dict[str, Any], keep: float = 0.25) -> str:
    """A Markdown table: exact match by kind of question, and what is held of kinds of frames."""
    full, *rest = content["rows"]
    rows = [full, *(row for row in rest if row["keep"] == keep)]
    frames = ("flash", "scene_begins", "other")
    heads = [*KINDS, *("flash frames", "first of a scene", "other frames")]
    lines = [
        f"| {100 * keep:g} % kept | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for row in rows:
        cells = [f"{100 * row['by_kind'][kind]:.0f}" for kind in KINDS]
        cells += [f"{100 * row['frames'][name]:.0f} %" for name in frames]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float, low: float, high: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} ({100 * low:.0f}-{100 * high:.0f})"


def filled(page: str, content: dict[str, Any]) -> str:
    """A page with its tables written again between their marks."""
    for mark, text in (("video", table(content)), ("kinds", kinds_table(content))):
        begin, _, rest = page.partition(f"<!-- {mark} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{begin}<!-- {mark} -->\n{text}{end}{after}"
    return page


def picture(content: dict[str, Any], keep: float = 0.25) -> str:
    """An SVG: what each memory holds of each frame of the first clip, as bars."""
    clip = clips_of(TEST, 0, 1)[0]
    rows = [row for row in content["rows"] if row["keep"] == keep]
    wide, tall, left, top = 14, 34, 190, 44
    width, height = left + wide * FRAMES + 8, top + tall * len(rows) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for scene in clip.scenes:
        x = left + wide * scene.start
        label = f"{scene.color} {scene.shape}, {scene.direction}"
        parts.append(f'<text x="{x + 3}" y="16">{label}</text>')
        parts.append(f'<path d="M{x} 4V{height - 8}" stroke="#999"/>')
    x = left + wide * clip.flash
    parts.append(f'<rect x="{x}" y="22" width="{2 * wide}" height="{height - 30}" fill="#fde68a"/>')
    parts.append(f'<text x="{x}" y="34">flash</text>')
    for i, row in enumerate(rows):
        bottom = top + tall * (i + 1)
        parts.append(f'<text x="4" y="{bottom - 8}">{row["method"]}</text>')
        parts.append(f'<path d="M{left} {bottom}H{width - 8}" stroke="#ccc"/>')
        bars = "".join(
            f"M{left + wide * j + 2} {bottom}v{-share * (tall - 6):.1f}h{wide - 4}V{bottom}z"
            for j, share in enumerate(row["example"])
        )
        parts.append(
            f'<path d="{bars}" fill="{"#2563eb" if "NAMM" in row["method"] else "#666"}"/>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=zoo.VIDEO_MODEL)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--clips", type=int, default=12, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stream", type=int, default=TEST)
    parser.add_argument("--questions", action="store_true", help="calibrate on questions as well")
    parser.add_argument("--page", type=Path, help="write tables and picture only")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.page is None:
        run(args)
        return
    content = json.loads(args.json.read_text(encoding="utf-8"))
    page = args.page.read_text(encoding="utf-8")
    args.page.write_text(filled(page, content), encoding="utf-8")
    if args.picture is not None:
        args.picture.write_text(picture(content), encoding="utf-8")


if __name__ == "__main__":
    main()
