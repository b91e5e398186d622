#!/usr/bin/env python3
"""What memories that never saw control are worth to a Decision Transformer, zero-shot.

    python bench/control.py --json bench/results/control.json
    python bench/control.py --markdown bench/results/control.json

The bundled model acts in corridors of the test split (``namm_ext.tasks.corridor``): 200 steps, 600
tokens. Memories of language models and published rules keep a share of them; what they know of the
model is a calibration on eight recorded episodes. One memory is not zero-shot: its gate is fitted
to the same episodes. Returns are normalised: 0 is an agent at random, 100 one that forgets nothing
and never errs. With ``--noise`` so many of the actions are random, so that there are worse ones to
forget.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from namm_ext import NAMM, NAMMConfig, zoo
from namm_ext.answers import interval
from namm_ext.baselines import H2O, TOVA, KeyDiff, KNorm, Random, SnapKV, StreamingLLM
from namm_ext.budget import Budget
from namm_ext.fitting import FitConfig, calibrate, calibrate_statistics, fit, targets_of
from namm_ext.integrations.control import KINDS, Rollout, one_hot, roll_out
from namm_ext.integrations.episodes import as_texts
from namm_ext.measure.methods import at_pace, fixed_budget, tuned_rules
from namm_ext.policy import Policy
from namm_ext.tasks.corridor import DOOR, SIGN, Corridor, CorridorConfig, record

FULL = "full cache"
CORRIDOR = CorridorConfig()
TOKENS = len(KINDS) * CORRIDOR.steps
#: Memories of language models, without what belongs to their model alone.
MEMORIES = {"NAMM of SmolLM2": "smollm2-135m-attention", "NAMM of stdlib-1m": "stdlib-1m"}
#: What a memory is that sees no attention, only keys and values.
GATE = NAMMConfig(scorer="none")
#: Rules that need no calibration with equal parts of every head.
RULES = (H2O, TOVA, SnapKV, KeyDiff, KNorm)
#: Episodes that memories are calibrated on, tokens of each that are looked back at.
CALIBRATION, TEXT = 8, 384
#: Probability of a random action in these, in turn.
NOISE = (0.0, 0.3)

Choose = Callable[[torch.Tensor], torch.Tensor]


class Watched:
    """A corridor that writes down what was seen and how good the actions were."""

    def __init__(self, corridor: Corridor) -> None:
        self.corridor = corridor

    def reset(self) -> np.ndarray:
        self.kinds: list[np.ndarray] = []
        self.in_use: list[np.ndarray] = []
        self.best: list[np.ndarray] = []
        c = self.corridor
        doors = [set(row[kind == DOOR]) for row, kind in zip(c.colour, c.kind, strict=True)]
        self.asked = np.array(
            [[x in colours for x in row] for row, colours in zip(c.colour, doors, strict=True)]
        )
        return c.reset()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        c = self.corridor
        here = (np.arange(len(c)), c.cell)
        self.kinds.append(c.kind[here])
        self.in_use.append(self.asked[here])
        result = c.step(actions)
        self.best.append(c.was_best)
        return result

    def groups(self) -> dict[str, tuple[str, torch.Tensor]]:
        """What tokens are told apart: their kind, and the steps ``[B, T]``."""
        kinds, used, best = (
            torch.from_numpy(np.stack(part, axis=1))
            for part in (self.kinds, self.in_use, self.best)
        )
        every = torch.ones_like(best)
        return {
            **{kind: (kind, every) for kind in KINDS},
            "signs in use": ("state", (kinds == SIGN) & used),
            "idle signs": ("state", (kinds == SIGN) & ~used),
            "doors": ("state", kinds == DOOR),
            "best actions": ("action", best),
            "other actions": ("action", ~best),
        }


def policies(model: Any, n_up: int, names: Sequence[str] | None = None) -> dict[str, Policy]:
    """What is compared, by name, without a size; calibrated where layers share a budget.

    Raises:
        ValueError: if there is nothing of a name.
    """
    noise = np.resize(NOISE, CALIBRATION)
    seen = record(Corridor(range(CALIBRATION), "train", CORRIDOR), noise, seed=0)
    reader, texts = as_texts(
        model,
        torch.from_numpy(seen.states),
        one_hot_of(seen.actions),
        torch.from_numpy(seen.returns_to_go / CORRIDOR.doors),
        length=TEXT,
    )
    targets = targets_of(reader, texts)
    tuned = tuned_rules("smollm2-135m")
    shared = Budget(0.25, scope="global", sink_tokens=4, recent_tokens=32)

    def as_it_is(bundled: str) -> NAMM:
        memory = NAMM.from_pretrained(f"bundled:{bundled}").with_calibration(None).with_gate(None)
        # Its own statistics, equal parts for the layers.
        budget = Budget(0.25, scope="per_layer", sink_tokens=4)
        return memory.with_config(n_up=n_up).with_budget(budget)

    def calibrated(bundled: str) -> Policy:
        memory = calibrate_statistics(as_it_is(bundled).with_budget(shared), reader, texts)
        return calibrate(memory, reader, texts, targets=targets)

    def as_tuned(name: str) -> Policy:
        rule = at_pace(tuned[name], n_up)
        return calibrate(rule, reader, texts, targets=targets) if rule.needs_calibration else rule

    def fitted() -> Policy:
        config = FitConfig(namm=GATE.replace(n_up=n_up), budget=shared)
        return fit(reader, texts, config).policy

    recipes: dict[str, Callable[[], Policy]] = {"NAMM, a gate fitted here": fitted}
    for name, bundled in MEMORIES.items():
        recipes[name] = partial(calibrated, bundled)
        recipes[f"{name}, as it is"] = partial(as_it_is, bundled)
    for rule in RULES:
        recipes[rule.__name__] = partial(as_tuned, rule.__name__)
        recipes[f"{rule.__name__}, per head"] = partial(rule, 0.25, n_up)
    recipes["StreamingLLM"] = partial(StreamingLLM, 0.25, n_up)
    recipes["Random"] = partial(Random, Budget(0.25, sink_tokens=4, recent_tokens=0.25), n_up)
    for name in names or ():
        if name not in recipes:
            raise ValueError(f"--method must be one of {'; '.join(recipes)}, got {name!r}")
    return {name: recipe() for name, recipe in recipes.items() if names is None or name in names}


def one_hot_of(actions: np.ndarray) -> torch.Tensor:
    """``[..., act_dim]`` float32."""
    return torch.nn.functional.one_hot(torch.from_numpy(actions), CORRIDOR.act_dim).float()


def noisy(noise: float, seed: int) -> Choose:
    """The best of the predicted actions; so often any."""
    generator = torch.Generator().manual_seed(seed)

    def choose(predicted: torch.Tensor) -> torch.Tensor:
        at_random = torch.rand(len(predicted), 1, generator=generator) < noise
        anything = torch.rand(predicted.shape, generator=generator)
        return one_hot(torch.where(at_random, anything, predicted))

    return choose


def act(
    model: Any, policy: Policy | None, seed: int, episodes: int, noise: float
) -> tuple[Rollout, Watched]:
    """One set of corridors; the random actions are the same for every memory."""
    first = 1000 * seed
    watched = Watched(Corridor(range(first, first + episodes), "test", CORRIDOR))
    found = roll_out(
        model, policy, watched, [1.0] * episodes,
        max_steps=CORRIDOR.steps, reward_scale=CORRIDOR.doors, choose=noisy(noise, seed),
    )  # fmt: skip
    return found, watched


def measure(
    model: Any, policy: Policy | None, seeds: Sequence[int], episodes: int, noise: float
) -> dict[str, Any]:
    """Returns of all episodes, and the shares of tokens that are dropped by group."""
    returns: list[float] = []
    shares: dict[str, list[float]] = {}
    kept = []
    began = time.perf_counter()
    for seed in seeds:
        found, watched = act(model, policy, seed, episodes, noise)
        returns += found.returns.tolist()
        held = found.report  # against the whole episode, as the budget is
        kept.append(1.0 if held is None else held.tokens_kept / held.tokens_seen)
        for name, (kind, where) in watched.groups().items():
            shares.setdefault(name, []).extend(found.dropped(kind, where).tolist())
    row: dict[str, Any] = {
        "returns": returns,
        "kept": sum(kept) / len(kept),
        "seconds": round(time.perf_counter() - began, 1),
        "dropped": {name: float(np.nanmean(values)) for name, values in shares.items()
                    if not np.isnan(values).all()},
    }  # fmt: skip
    for name, (a, b) in {
        "other - best actions": ("other actions", "best actions"),
        "idle signs - signs in use": ("idle signs", "signs in use"),
    }.items():
        pairs = np.array([shares[a], shares[b]])
        pairs = pairs[:, ~np.isnan(pairs).any(0)]
        if pairs.shape[1] > 1:
            row[name] = interval(
                list(pairs), np.arange(pairs.shape[1]), statistic=lambda x, y: x - y
            )
    return row


def normalised(row: dict[str, Any], full: dict[str, Any], random: np.ndarray, seeds: int) -> None:
    """Adds the return from 0 to 100 with its interval, for each seed too, and against the full
    cache's on the same corridors."""
    own, all_ = np.array(row["returns"]), np.array(full["returns"])
    floor = float(random.mean())
    scale = 100 / (CORRIDOR.doors - floor)
    index = np.arange(len(own))
    sets = index // (len(own) // seeds)
    row["return"] = interval([own], index, tasks=sets, statistic=lambda x: scale * (x - floor))
    row["of_full"] = interval(
        [own, all_], index, tasks=sets,
        statistic=lambda x, y: 100 * (x - floor) / (y - floor),
    )  # fmt: skip
    row["by_seed"] = [float(scale * (part.mean() - floor)) for part in np.split(own, seeds)]


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table, the full cache first at each noise."""
    seeds = list(range(args.seeds))
    random = np.concatenate([
        record(Corridor(range(1000 * s, 1000 * s + args.episodes), "test", CORRIDOR), 1.0, s)
        .rewards.sum(1) for s in seeds
    ])  # fmt: skip
    for folder in args.model or [None]:
        model = zoo.load_controller() if folder is None else zoo.load_controller(folder)
        name = zoo.DEFAULT_CONTROLLER if folder is None else Path(folder).name
        chosen = policies(model, args.n_up, args.method)
        for noise in args.noise:
            full = measure(model, None, seeds, args.episodes, noise)
            for keep in (1.0, *args.keep):
                for method, policy in ({FULL: None} if keep == 1 else chosen).items():
                    row = full
                    if policy is not None:
                        sized = fixed_budget(policy, keep, TOKENS)
                        row = measure(model, sized, seeds, args.episodes, noise)
                    normalised(row, full, random, args.seeds)
                    yield {"model": name, "method": method, "keep": keep, "noise": noise, **row}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    value, low, high = row["return"]
    dropped = " ".join(f"{k}:{v:.2f}" for k, v in row["dropped"].items())
    return (
        f"{row['model']} noise {row['noise']} keep {row['keep']:5.3f} {row['method']:28s} "
        f"{value:5.1f} ({low:.1f}-{high:.1f}) kept {row['kept']:.3f} {dropped} {row['seconds']} s"
    )


def markdown(content: dict[str, Any], noise: float, model: str) -> str:
    """The returns of every method at every budget, best first at the smallest."""
    rows = [r for r in content["rows"] if r["noise"] == noise and r["model"] == model]
    keeps = sorted({row["keep"] for row in rows} - {1.0}, reverse=True)
    by = {(row["method"], row["keep"]): row for row in rows}
    names = sorted(
        {row["method"] for row in rows} - {FULL},
        key=lambda name: -by[name, keeps[-1]]["return"][0],
    )
    heads = " | ".join(f"{100 * keep:g} % kept" for keep in keeps)
    lines = [f"| return | {heads} |", "|---|" + "---:|" * len(keeps)]

    def cell(row: dict[str, Any]) -> str:
        value, low, high = row["return"]
        return f"{value:.1f} ({low:.1f}-{high:.1f})"

    full = cell(by[FULL, 1.0])
    lines.append(f"| {FULL} |" + f" {full} |" * len(keeps))
    for name in names:
        bold = f"**{name}**" if name.startswith("NAMM") else name
        lines.append(f"| {bold} | " + " | ".join(cell(by[name, k]) for k in keeps) + " |")
    return "\n".join(lines)


#: Columns of the table of what is forgotten.
GROUPS = (*KINDS, "signs in use", "idle signs", "doors", "best actions", "other actions")


def forgotten(content: dict[str, Any], noise: float, keep: float, model: str) -> str:
    """Shares of tokens that are dropped in the end, and how much more of the worse actions."""
    lines = [
        f"| dropped, % | {' | '.join(GROUPS)} | other - best actions |",
        "|---|" + "---:|" * (len(GROUPS) + 1),
    ]
    for row in content["rows"]:
        if (row["noise"], row["keep"], row["model"]) != (noise, keep, model):
            continue
        value, low, high = (100 * x for x in row["other - best actions"])
        cells = " | ".join(f"{100 * row['dropped'][name]:.0f}" for name in GROUPS)
        lines.append(f"| {row['method']} | {cells} | {value:+.1f} ({low:+.1f} to {high:+.1f}) |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="folder of a model; the bundled one")
    parser.add_argument("--method", action="append", help="names; all by default")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25, 0.5, 0.125])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--seeds", type=int, default=3, help="sets of corridors")
    parser.add_argument("--episodes", type=int, default=32, help="corridors of a set")
    parser.add_argument("--n-up", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="only print the tables of this file")
    args = parser.parse_args()
    if args.markdown:
        content = json.loads(args.markdown.read_text(encoding="utf-8"))
        for model, noise in dict.fromkeys((r["model"], r["noise"]) for r in content["rows"]):
            print(f"\n{model}, noise {noise}\n\n{markdown(content, noise, model)}")
            if noise:
                print(f"\n{forgotten(content, noise, args.keep[0], model)}")
        return 0
    names = ("keep", "noise", "seeds", "episodes", "n_up")
    settings = {name: getattr(args, name) for name in names}
    rows: list[dict[str, Any]] = []
    for row in compare(args):
        rows.append(row)
        print(line(row), flush=True)
        if args.json:  # after each row: what is measured is not lost
            content = {"settings": {**settings, "torch": torch.__version__}, "rows": rows}
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
