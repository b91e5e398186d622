"""How well a memory answers: contexts are read once, then all their questions are asked.

Everything is teacher-forced, so an answer counts as right where greedy decoding would have written
exactly it. `answer_readings` serves every policy and the stock cache alike, `text_bits` gives bits
per byte of plain text, `interval` says how sure a difference is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from .cache import NAMMCache, borrow, cache_keyword
from .policy import Policy
from .tasks.metrics import score_tokens
from .tasks.readings import Question, Reading
from .tasks.suite import TextWindow

#: Logits made at a time, in floats: they are far wider than the model and should stay in caches.
_LOGITS = 1 << 22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """What became of the Q questions of R readings, in their order.

    Attributes:
        correct: ``[Q]`` bool, every token of the answer was the most probable one.
        loglik: ``[Q]`` natural log of the probability of the answer, summed over its tokens.
        reading: ``[Q]`` int64, the index of the question's reading.
        kept: ``[R]`` tokens kept / tokens read after the context, mean over layers and heads.
        context_loglik: ``[R]`` mean natural log of the probability of a token of the context, read
            with the memory; None if it was not asked for.
        kv_bytes: keys and values of all contexts, live tokens only.
        memory_bytes: what the policy keeps beside them.
        full_bytes: keys and values of a cache that keeps everything.
    """

    correct: NDArray[np.bool_]
    loglik: Floats
    reading: NDArray[np.int64]
    kept: Floats
    kv_bytes: int
    memory_bytes: int
    full_bytes: int
    context_loglik: Floats | None = None

    def accuracy(self) -> float:
        """Share of the questions that were answered exactly."""
        return float(self.correct.mean())


@torch.inference_mode()
def answer_readings(
    model: Any,
    policy: Policy | None,
    readings: Sequence[Reading],
    *,
    batch_size: int = 1,
    score_contexts: bool = False,
) -> Answers:
    """Let a model read each context once, then ask its questions.

    The questions of a context are rows of one batch, each behind its own copy of the cache, so they
    do not see one another; in readings with turns they follow one another.

    Args:
        model: a causal language model of transformers.
        policy: decides what the memory keeps; None for transformers' own cache.
        readings: of one length; with and without turns may be mixed.
        batch_size: contexts read at once. Results depend on it by rounding only.
        score_contexts: whether the contexts are scored too, as text.

    Raises:
        ValueError: if there are no readings or their contexts differ in length.
    """
    lengths = sorted({len(reading.context_ids) for reading in readings})
    if len(lengths) != 1:
        raise ValueError(f"readings must be non-empty and of one length, got {lengths}")
    results: dict[int, list[tuple[bool, float]]] = {}
    kept: dict[int, float] = {}
    as_text: dict[int, float] = {}
    sizes = np.zeros(3, np.int64)
    with borrow(model, None if policy is None else "namm"):
        for part in _batches(readings, batch_size):
            cache = _cache(model, policy)
            ids = torch.tensor([readings[i].context_ids for i in part], device=model.device)
            hidden = _read(model, cache, ids)
            if score_contexts:
                logprob, _ = _score(model, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                as_text.update(zip(part, logprob.view(len(part), -1).mean(1).tolist(), strict=True))
            kept.update(zip(part, _kept(cache, len(part)), strict=True))
            sizes += _bytes(cache)
            if readings[part[0]].turns:
                results[part[0]] = _ask_in_turn(model, cache, readings[part[0]].questions)
                continue
            rows = [(row, i, q) for row, i in enumerate(part) for q in readings[i].questions]
            cache.batch_select_indices(torch.tensor([row for row, *_ in rows], device=model.device))
            for (_, i, _), result in zip(
                rows, _ask(model, cache, lengths[0], [q for *_, q in rows]), strict=True
            ):
                results.setdefault(i, []).append(result)
    table = [(i, *result) for i in range(len(readings)) for result in results[i]]
    return Answers(
        correct=np.array([correct for _, correct, _ in table], bool),
        loglik=np.array([loglik for *_, loglik in table]),
        reading=np.array([i for i, *_ in table], np.int64),
        kept=np.array([kept[i] for i in range(len(readings))]),
        kv_bytes=int(sizes[0]),
        memory_bytes=int(sizes[1]),
        full_bytes=int(sizes[2]),
        context_loglik=np.array([as_text[i] for i in range(len(readings))]) if as_text else None,
    )


@torch.inference_mode()
def text_bits(
    model: Any, policy: Policy | None, windows: Sequence[TextWindow], *, batch_size: int = 1
) -> Floats:
    """Bits per byte of the scored part of each window, read with a memory from its first token on.

    Args:
        model: a causal language model of transformers.
        policy: decides what the memory keeps; None for transformers' own cache.
        windows: of one length and start.
        batch_size: windows read at once.

    Returns:
        ``[len(windows)]``.
    """
    result: list[float] = []
    with borrow(model, None if policy is None else "namm"):
        for begin in range(0, len(windows), batch_size):
            part = windows[begin : begin + batch_size]
            ids = torch.tensor([window.ids for window in part], device=model.device)
            start = part[0].start
            hidden = _read(model, _cache(model, policy), ids)[:, start - 1 : -1]
            logprob, _ = _score(model, hidden.flatten(0, 1), ids[:, start:].flatten())
            totals = logprob.view(len(part), -1).sum(1).tolist()
            result += [
                -total / (window.num_bytes * math.log(2))
                for total, window in zip(totals, part, strict=True)
            ]
    return np.array(result)


def interval(
    scores: Sequence[NDArray[Any]],
    contexts: NDArray[Any],
    *,
    tasks: NDArray[Any] | None = None,
    statistic: Callable[..., Any] = lambda mean: mean,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of mean scores, and its bootstrap interval.

    Contexts are drawn again with replacement, within each task; all scores see the same draw, so
    that memories measured on the same contexts are compared in pairs.

    Args:
        scores: arrays ``[Q]``, one per memory.
        contexts: ``[Q]``, which context a question belongs to.
        tasks: ``[Q]``, the task of a question; the mean is over tasks, each counts the same.
        statistic: takes one mean per array of ``scores``, and gives the number of interest.
        level: probability that the interval holds.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The statistic, the lower and the upper bound.

    Example:
        >>> a, b = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 0])
        >>> value, low, high = interval([a, b], np.arange(4), statistic=lambda x, y: x - y)
        >>> value, low <= value <= high
        (0.5, True)
    """
    generator = np.random.default_rng(seed)
    columns = np.stack([np.ones(len(contexts)), *(np.asarray(s, float) for s in scores)])
    labels = np.zeros(len(contexts)) if tasks is None else np.asarray(tasks)
    means, draws = [], []
    for label in np.unique(labels):
        chosen = labels == label
        names, index = np.unique(np.asarray(contexts)[chosen], return_inverse=True)
        sums = np.zeros((len(columns), len(names)))
        for row, column in zip(sums, columns[:, chosen], strict=True):
            np.add.at(row, index, column)
        drawn = sums[:, generator.integers(len(names), size=(resamples, len(names)))].sum(-1)
        total = sums.sum(-1)
        means.append(total[1:] / total[0])
        draws.append(drawn[1:] / drawn[0])
    values = statistic(*np.mean(draws, axis=0))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(*np.mean(means, axis=0))), float(low), float(high)


def _batches(readings: Sequence[Reading], batch_size: int) -> list[list[int]]:
    """Indices of readings that are read together: one at a time where there are turns."""
    alone = [[i] for i, reading in enumerate(readings) if reading.turns]
    rest = [i for i, reading in enumerate(readings) if not reading.turns]
    return [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)] + alone


def _cache(model: Any, policy: Policy | None) -> Any:
    return DynamicCache(config=model.config) if policy is None else NAMMCache(model, policy)


def _read(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states ``[B, T, hidden]`` of new tokens."""
    given = {cache_keyword(model.base_model): cache}
    output = model.base_model(ids, attention_mask=mask, use_cache=True, **given)
    return output.last_hidden_state


def _kept(cache: Any, rows: int) -> list[float]:
    if isinstance(cache, NAMMCache):
        return [float(share) for share in cache.kept_fraction_per_row()]
    return [1.0] * rows


def _bytes(cache: Any) -> tuple[int, int, int]:
    if isinstance(cache, NAMMCache):
        report = cache.report()
        return report.kv_bytes_live, report.memory_bytes, report.full_bytes
    full = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    return full, 0, full


def _ask(
    model: Any, cache: Any, length: int, questions: Sequence[Question]
) -> list[tuple[bool, float]]:
    """One question per row of the cache."""
    texts = [[*q.ids, *q.answer_ids[:-1]] for q in questions]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
    mask = None
    if any(len(text) < width for text in texts):
        mask = torch.ones(len(texts), length + width, dtype=torch.int64, device=model.device)
        for row, text in enumerate(texts):
            mask[row, length + len(text) :] = 0
    hidden = _read(model, cache, ids, mask)
    rows = [h[len(q.ids) - 1 : len(t)] for h, q, t in zip(hidden, questions, texts, strict=True)]
    return _judge(model, rows, questions)


def _ask_in_turn(model: Any, cache: Any, questions: Sequence[Question]) -> list[tuple[bool, float]]:
    """All questions behind one another, each with the right answer to the one before."""
    rows: list[Tensor] = []
    before: list[int] = []
    for q in questions:
        ids = [*before, *q.ids, *q.answer_ids[:-1]]
        hidden = _read(model, cache, torch.tensor([ids], device=model.device))
        rows.append(hidden[0, -len(q.answer_ids) :])
        before = [q.answer_ids[-1]]
    return _judge(model, rows, questions)


def _judge(
    model: Any, rows: Sequence[Tensor], questions: Sequence[Question]
) -> list[tuple[bool, float]]:
    """Exactness and log-likelihood of each answer, given the hidden states that predict it."""
    targets = torch.tensor([t for q in questions for t in q.answer_ids], device=model.device)
    logprob, correct = _score(model, torch.cat(list(rows)), targets)
    sizes = [len(q.answer_ids) for q in questions]
    return [
        (bool(right.all()), float(logs.sum()))
        for right, logs in zip(correct.split(sizes), logprob.split(sizes), strict=True)
    ]


def _score(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (float64) and correctness ``[N]`` of tokens, given ``[N, hidden]``."""
    head = model.get_output_embeddings()
    step = max(1, _LOGITS // head.weight.shape[0])
    parts = [
        score_tokens(head(h), t)
        for h, t in zip(hidden.split(step), targets.split(step), strict=True)
    ]
    logprob = torch.cat([part.logprob for part in parts]).double().cpu()
    return logprob, torch.cat([part.correct for part in parts]).cpu()
