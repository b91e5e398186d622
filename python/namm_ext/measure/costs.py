"""Bytes of live tensors, and the time of a real prompt and really generated tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..cache import NAMMCache, borrow, cache_keyword
from ..policy import Policy
from .results import FULL, Cost


def measure_costs(
    model: Any,
    tokenizer: Any,
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
        tokenizer: of the model, for policies that read twice.
        policies: by name; None is the stock cache, which is measured in any case.
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
            began = time.perf_counter()
            if policy is not None:
                policy = policy.for_context(model, tokenizer, prompt[0].tolist())
            first = time.perf_counter() - began
            with borrow(model, None if policy is None else "namm"):
                kept, kv, own, peak, second, decode = _run_once(model, policy, prompt, new_tokens)
            prefill = first + second
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
