"""Memories side by side: the same held-out inputs, the same budget, measured quality, bytes, time.

Every method is a policy on the same ragged store; the full cache is the stock one of transformers.
Quality comes from one teacher-forced pass per batch *through* the evicting cache (the tokens are
read as a prompt is, with an update every ``n_up`` tokens). Bytes are those of live tensors. Time is
that of a real prompt and really generated tokens, all methods taking turns.
"""

from __future__ import annotations

import ast
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import tasks
from .baselines import H2O, TOVA, Baseline, Full, KeyDiff, KNorm, Random, SnapKV, StreamingLLM
from .budget import Budget
from .cache import NAMMCache, borrow, cache_keyword
from .corpus import load_documents
from .evolution import evaluate_policy
from .policy import Policy
from .policy.base import PolicyT

FULL = "full cache"
FAMILIES = (*tasks.EVOLUTION_FAMILIES, *tasks.HELD_OUT_FAMILIES, *tasks.UNSEEN_FAMILIES)

# Each rule as validation data likes it best, found with
#     namm compare --tune --examples 5
# `TRIED` says what is tried. Where the memory divides its budget unequally among the layers,
# `tuned_baseline` gives the baselines the same division.
TUNED: dict[str, Baseline] = {
    "StreamingLLM": StreamingLLM(Budget(0.25, sink_tokens=16)),
    "H2O": H2O(Budget(0.25, recent_tokens=0.75)),
    "SnapKV": SnapKV(Budget(0.25, scope="per_layer"), window=64, kernel_size=33),
    "TOVA": TOVA(Budget(0.25, sink_tokens=4, recent_tokens=0.75)),
    "KNorm": KNorm(Budget(0.25, scope="per_layer", sink_tokens=4, recent_tokens=0.75)),
    "KeyDiff": KeyDiff(Budget(0.25, scope="per_layer", recent_tokens=0.5)),
    "Random": Random(Budget(0.25, recent_tokens=0.75)),
}


@dataclass(frozen=True)
class Cost:
    """What a memory costs on one prompt.

    Attributes:
        prompt_tokens: length of the prompt.
        kept: tokens kept after the last update / tokens seen, at the end of the prompt.
        kv_bytes: k and v as allocated at the end of the prompt, room for new tokens included.
        memory_bytes: the memory's own state then: features, positions, windows, indices.
        peak_bytes: the most that both ever were together, the rebuilding included.
        full_bytes: k and v of the stock cache, measured on the same prompt.
        prefill_seconds: to read the prompt and choose the first token.
        decode_seconds: per generated token, updates included.
        decode_tokens: how many were generated.
    """

    prompt_tokens: int
    kept: float
    kv_bytes: int
    memory_bytes: int
    peak_bytes: int
    full_bytes: int
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int

    @property
    def kv_fraction(self) -> float:
        """k and v against the full cache."""
        return self.kv_bytes / self.full_bytes

    @property
    def own_fraction(self) -> float:
        """The memory's own state against the full cache."""
        return self.memory_bytes / self.full_bytes

    @property
    def total_fraction(self) -> float:
        """k, v and the memory's own state against the full cache."""
        return (self.kv_bytes + self.memory_bytes) / self.full_bytes


@dataclass
class Row:
    """One method at one context length.

    Attributes:
        method: its name.
        settings: what defines it.
        length: tokens of a context.
        exact_match: per family, the share of questions answered right in every token.
        queries: questions per family.
        bits_per_byte: cross-entropy of held-out source code.
        kept: tokens kept after the last update / tokens seen, over all task contexts.
        cost: bytes and times, on one prompt of ``length`` tokens.
    """

    method: str
    settings: dict[str, Any]
    length: int
    exact_match: dict[str, float] = field(default_factory=dict)
    queries: dict[str, int] = field(default_factory=dict)
    bits_per_byte: float | None = None
    kept: float | None = None
    cost: Cost | None = None

    @property
    def accuracy(self) -> float | None:
        """Mean of ``exact_match`` over the families."""
        if not self.exact_match:
            return None
        return sum(self.exact_match.values()) / len(self.exact_match)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {**asdict(self), "accuracy": self.accuracy}
        if self.cost is not None:
            values["cost"] |= {
                "kv_fraction": self.cost.kv_fraction,
                "own_fraction": self.cost.own_fraction,
                "total_fraction": self.cost.total_fraction,
            }
        return values


@dataclass(frozen=True)
class Workload:
    """What is read, at one context length.

    Attributes:
        length: tokens per context and per text window.
        examples: task examples, some of each family.
        windows: ``[W, length]`` token ids of source code.
        num_bytes: UTF-8 bytes that the windows' predicted tokens stand for.
    """

    length: int
    examples: list[tasks.Example]
    windows: Tensor
    num_bytes: int

    @classmethod
    def make(
        cls,
        tokenizer: Any,
        split: str,
        *,
        length: int,
        families: Sequence[str] = FAMILIES,
        examples_per_family: int = 6,
        mix: tasks.RecordMix = tasks.IN_USE,
        num_windows: int = 8,
    ) -> Workload:
        """Draw a workload with the fixed seed of ``split`` ("test" or "validation").

        Args:
            tokenizer: of the model that will read it.
            split: whose documents and seed.
            length: tokens per context and per window.
            families: task families, which take turns.
            examples_per_family: contexts of each.
            mix: records hidden in a context.
            num_windows: windows of source code.

        Raises:
            ValueError: if ``split`` is neither or the documents are shorter than ``length``.
        """
        seeds = {"test": tasks.TEST_SEED, "validation": tasks.VALIDATION_SEED}
        if split not in seeds:
            raise ValueError(f"split must be 'test' or 'validation', got {split!r}")
        documents = load_documents(split)
        examples = tasks.make_mixed_batch(
            (mix,),
            families,
            tokenizer,
            documents,
            length=length,
            seed=seeds[split],
            batch_size=examples_per_family * len(families),
        )
        windows, num_bytes = _source_windows(tokenizer, documents, length, num_windows)
        return cls(length, examples, windows, num_bytes)


def _source_windows(
    tokenizer: Any, documents: Sequence[str], length: int, count: int
) -> tuple[Tensor, int]:
    """``count`` windows that begin with a line, spread evenly over the Python source."""
    source = "\n\n".join(text for text in documents if _is_source(text))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    reach = 8 * length  # characters; a token of source code has about three
    if len(source) <= reach:
        raise ValueError(f"length must be below {len(source) // 8} tokens, got {length}")
    windows, num_bytes = [], 0
    for place in np.linspace(0, len(source) - reach, count).astype(int).tolist():
        begin = source.index("\n", place) + 1
        ids = tokenizer.encode(source[begin : begin + reach], add_special_tokens=False)[:size]
        if len(ids) < size:
            raise ValueError(f"length must fit into {reach} characters of source, got {length}")
        windows.append(bos + ids)
        num_bytes += len(tokenizer.decode((bos + ids)[1:]).encode())
    return torch.tensor(windows), num_bytes


def _is_source(text: str) -> bool:
    try:
        return bool(ast.parse(text).body) and "import " in text
    except (SyntaxError, ValueError):
        return False


# Methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A memory by name; None is the stock cache, which keeps everything."""

    name: str
    policy: Policy | None

    @property
    def settings(self) -> dict[str, Any]:
        """What defines it, as plain values."""
        if self.policy is None:
            return {}
        return {"fingerprint": self.policy.fingerprint(), **self.policy.to_dict()}


def for_context(policy: PolicyT, keep_fraction: float, length: int) -> PolicyT:
    """The same policy with a fixed budget: a share of a context of ``length`` tokens, per head."""
    budget = replace(policy.budget, size=float(keep_fraction))
    return policy.with_budget(budget.of_context(length))


def full_method() -> Method:
    """The stock cache."""
    return Method(FULL, None)


def tuned_baseline(name: str, memory: Policy) -> Baseline:
    """A tuned rule that updates and divides its budget among the layers as ``memory`` does.

    Raises:
        ValueError: if there is no baseline of that name.
    """
    if name not in TUNED:
        raise ValueError(f"baseline must be one of {', '.join(TUNED)}, got {name!r}")
    policy = at_pace(TUNED[name], memory.n_up)
    return policy.with_budget(layer_shares=memory.budget.layer_shares)


def at_pace(policy: Baseline, n_up: int) -> Baseline:
    """The same rule with another ``n_up``; SnapKV observes no more than one period."""
    if isinstance(policy, SnapKV):
        return policy.replace(n_up=n_up, window=min(policy.window, n_up))
    return policy.replace(n_up=n_up)


def baseline_methods(memory: Policy) -> list[Method]:
    """All tuned rules beside a memory."""
    return [Method(name, tuned_baseline(name, memory)) for name in TUNED]


# Measuring ---------------------------------------------------------------------------------------


def measure_tasks(model: Any, policy: Policy, workload: Workload, row: Row) -> None:
    """Fill ``row`` with exact match per family and the share of tokens kept."""
    result = evaluate_policy(model, policy, workload.examples)
    names = np.array([example.family for example in workload.examples])
    matches, kept = result.exact_match[0], result.kept[0]
    for name in dict.fromkeys(names.tolist()):
        chosen = torch.from_numpy(names == name)
        row.exact_match[name] = float(matches[chosen].mean())
        row.queries[name] = sum(len(e.answer_spans) for e in workload.examples if e.family == name)
    row.kept = float(kept.mean())


@torch.inference_mode()
def measure_text(model: Any, policy: Policy, workload: Workload, row: Row, rows: int = 8) -> None:
    """Fill ``row.bits_per_byte``; ``rows`` windows are read at a time."""
    total = 0.0
    for ids in workload.windows.split(rows):
        with borrow(model):
            given = {cache_keyword(model.base_model): NAMMCache(model, policy)}
            hidden = model.base_model(ids, **given, use_cache=True).last_hidden_state
        for window, target in zip(hidden[:, :-1], ids[:, 1:], strict=True):
            logits = model.get_output_embeddings()(window).float()
            total -= float(F.cross_entropy(logits, target, reduction="sum"))
    row.bits_per_byte = tasks.bits_per_byte(total, workload.num_bytes)


def measure_costs(
    model: Any,
    policies: Mapping[str, Policy | None],
    prompt: Tensor,
    *,
    new_tokens: int,
    repeats: int,
) -> Iterator[dict[str, Cost]]:
    """Bytes and times of every policy on one prompt.

    The policies take turns, so that a slow moment of the machine hits all of them; times are
    minima.

    Args:
        policies: by name; None is the stock cache.
        prompt: ``[1, T]`` token ids.
        new_tokens: tokens to generate; ``n_up`` of them contain exactly one update.
        repeats: rounds.

    Yields:
        The costs so far, after each round.
    """
    full_bytes = 0
    best: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        costs = {}
        for name, policy in {FULL: None, **policies}.items():
            with borrow(model, None if policy is None else "namm"):
                kept, kv, own, peak, prefill, decode = _run_once(model, policy, prompt, new_tokens)
            if policy is None:
                full_bytes = kv
            old = best.get(name, (math.inf, math.inf))
            best[name] = (min(old[0], prefill), min(old[1], decode))
            costs[name] = Cost(
                prompt.shape[1], kept, kv, own, peak, full_bytes, *best[name], new_tokens
            )
        yield costs


@torch.inference_mode()
def _run_once(
    model: Any, policy: Policy | None, prompt: Tensor, new_tokens: int
) -> tuple[float, int, int, int, float, float]:
    from transformers import DynamicCache

    if policy is None:
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = NAMMCache(model, policy)

    given = {cache_keyword(model): cache}

    def step(ids: Tensor) -> Tensor:
        output = model(ids, **given, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    began = time.perf_counter()
    token = step(prompt)
    prefill = time.perf_counter() - began
    if policy is None:
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        kept, kv, own = 1.0, sum(t.untyped_storage().nbytes() for t in tensors), 0
    else:
        report = cache.report()
        kept, kv, own = report.kept_fraction, report.kv_bytes, report.memory_bytes
    began = time.perf_counter()
    for _ in range(new_tokens):
        token = step(token)
    decode = (time.perf_counter() - began) / new_tokens
    peak = kv if policy is None else cache.report().peak_bytes
    return kept, kv, own, peak, prefill, decode


def compare(
    model: Any,
    methods: Sequence[Method],
    workloads: Sequence[Workload],
    *,
    keep_fraction: float = 0.25,
    new_tokens: int = 64,
    repeats: int = 3,
    rows: list[Row] | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure every method on every workload.

    Args:
        model: a causal language model of transformers.
        methods: what to compare.
        workloads: what to read, one per context length.
        keep_fraction: the budget of a context is this share of its tokens, per head.
        new_tokens: tokens to generate when time is measured.
        repeats: rounds of timing; 0 leaves the cost out.
        rows: list to fill, so that nothing is lost when this is interrupted.
        on_step: called before each measurement with what it is about to do; there are
            ``num_steps(...)`` of them.

    Returns:
        list[Row]: workload by workload, in the order of the methods.

    Raises:
        ValueError: if ``keep_fraction`` is not a share.
    """
    rows = [] if rows is None else rows
    for workload in workloads:
        policies: dict[str, Policy | None] = {}
        here = {}
        for method in methods:
            row = here[method.name] = Row(method.name, method.settings, workload.length)
            rows.append(row)
            policy = None
            if method.policy is not None:
                policy = for_context(method.policy, keep_fraction, workload.length)
            policies[method.name] = policy
            # Keeping all on the ragged store is the stock cache, number for number.
            reader = Full() if policy is None else policy
            on_step(f"{method.name}: tasks of {workload.length:,} tokens")
            measure_tasks(model, reader, workload, row)
            on_step(f"{method.name}: source code")
            measure_text(model, reader, workload, row)
        prompt = torch.tensor([workload.examples[0].input_ids])
        measuring = measure_costs(model, policies, prompt, new_tokens=new_tokens, repeats=repeats)
        for _ in range(repeats):
            on_step(f"time and bytes at {workload.length:,} tokens")
            for name, cost in next(measuring).items():
                if name in here:
                    here[name].cost = cost
    return rows


def num_steps(methods: Sequence[Method], workloads: Sequence[Workload], repeats: int) -> int:
    """How often `compare` calls ``on_step``."""
    return len(workloads) * (2 * len(methods) + repeats)


# Tuning the baselines ----------------------------------------------------------------------------

_SHARING = ("per_head", "per_layer")
_FLOORS = {"sink_tokens": (0, 4), "recent_tokens": (0.0, 0.25, 0.5, 0.75)}

# Fields of the budget and arguments of the rule.
TRIED: dict[type[Baseline], dict[str, tuple[Any, ...]]] = {
    StreamingLLM: {"sink_tokens": (1, 4, 16)},  # both ways of sharing are the same rule
    H2O: {"scope": _SHARING, "recent_tokens": (0.25, 0.5, 0.75, 0.9), "sink_tokens": (0, 4)},
    SnapKV: {"scope": _SHARING, "window": (16, 32, 64), "kernel_size": (1, 5, 9, 17, 33)},
    TOVA: {"scope": _SHARING, **_FLOORS},
    KNorm: {"scope": _SHARING, **_FLOORS},
    KeyDiff: {"scope": _SHARING, **_FLOORS},
    Random: {"scope": ("per_head",), **_FLOORS},
}


def candidates(
    rule: type[Baseline], keep_fraction: float, layer_shares: tuple[float, ...] | None = None
) -> Iterator[Baseline]:
    """A rule with every combination of settings in ``TRIED``, and of ``layer_shares`` or none."""
    options = TRIED[rule] | ({"layer_shares": (None, layer_shares)} if layer_shares else {})
    of_budget = {field.name for field in fields(Budget)}
    for values in itertools.product(*options.values()):
        settings = dict(zip(options, values, strict=True))
        budget = {key: settings.pop(key) for key in options if key in of_budget}
        yield rule(Budget(float(keep_fraction), **budget), **settings)


def tune_baselines(
    model: Any,
    examples: Sequence[tasks.Example],
    *,
    n_up: int = 64,
    keep_fraction: float = 0.25,
    layer_shares: tuple[float, ...] | None = None,
    on_trial: Callable[[Baseline, float], None] = lambda *_: None,
) -> dict[str, Baseline]:
    """The settings of each baseline that answer most validation questions exactly.

    Every combination in ``TRIED`` is tried. Equal scores are told apart by the answers'
    log-likelihood.

    Args:
        examples: validation examples of one length.
        layer_shares: how the memory they are compared with divides its budget among the layers;
            each baseline may do the same or give every layer an equal part.
        on_trial: called with the rule and the exact match of each trial.

    Returns:
        What belongs into ``TUNED``.
    """
    length = len(examples[0].input_ids)
    found = {}
    for rule in TRIED:
        best = (-math.inf, -math.inf)
        for policy in candidates(rule, keep_fraction, layer_shares):
            paced = at_pace(policy, n_up)
            fixed = paced.with_budget(paced.budget.of_context(length))
            result = evaluate_policy(model, fixed, examples)
            score = (float(result.exact_match.mean()), float(result.answer_ll.mean()))
            on_trial(policy, score[0])
            if score > best:
                best, found[rule.__name__] = score, policy
    return found
