"""How good is a memory? One forward pass over examples, any number of candidates at once.

The batch holds every candidate's copy of every example; each row reads its own parameter vector
from the policy's bank. Fitness needs no generation: with teacher forcing the argmax at the answer
positions is what greedy decoding would have produced, and the log-likelihoods are smooth where
exact match is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import NAMMCache, borrow, cache_keyword
from ..policy import Policy
from ..tasks import Example, TokenScores, score_tokens

#: Rows x length that are read at a time.
MAX_TOKENS = 16384

#: Logits made at a time, in floats: they are far wider than the model and should stay in caches.
_LOGITS = 1 << 21


class Context(Protocol):
    """What is read: token ids, and the spans of answers, each to be predicted from all before it.

    A span is a half-open range of token indices ``(start, stop)``.
    """

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def answer_spans(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Evaluation:
    """What a population reached, per candidate (first axis) and context (second axis).

    Attributes:
        metrics: ``[P, E]`` float64 each, by name, such as ``exact_match`` (share of a context's
            answers that are right in every token), ``answer_ll`` (mean log-likelihood per answer
            token, nats) or ``text_ll`` (the same of the text).
        kept: ``[P, E]`` tokens kept after the last update / tokens seen up to it, mean over
            layers and heads.
        weights: what each metric counts in the fitness; metrics without a weight do not count.
    """

    metrics: Mapping[str, Tensor]
    kept: Tensor
    weights: Mapping[str, float]

    def fitness(self) -> Tensor:
        """``[P]`` weighted sum of the means over the contexts; more is better."""
        parts = [weight * self.metrics[name].mean(1) for name, weight in self.weights.items()]
        return torch.stack(parts).sum(0)

    @classmethod
    def join(cls, evaluations: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of the contexts of all; candidates, metrics and weights are the same."""
        first = evaluations[0]
        return cls(
            {name: torch.cat([e.metrics[name] for e in evaluations], 1) for name in first.metrics},
            torch.cat([e.kept for e in evaluations], 1),
            first.weights,
        )

    @property
    def exact_match(self) -> Tensor:
        return self.metrics["exact_match"]

    @property
    def answer_ll(self) -> Tensor:
        return self.metrics["answer_ll"]

    @property
    def text_ll(self) -> Tensor:
        return self.metrics["text_ll"]


# What the scores of the tokens from index 1 on say about one context.
Score = Callable[[NDArray[np.float64], NDArray[np.bool_], Any], dict[str, float]]


def score_answers(
    logprob: NDArray[np.float64], correct: NDArray[np.bool_], context: Context
) -> dict[str, float]:
    """``exact_match`` and ``answer_ll`` of a context.

    Args:
        logprob: ``[T - 1]`` log-likelihoods of the tokens from index 1 on, nats.
        correct: ``[T - 1]`` whether each was the most probable one.
        context: of T tokens.
    """
    is_answer = np.zeros_like(correct)
    for start, stop in context.answer_spans:
        is_answer[start - 1 : stop - 1] = True
    right = [bool(correct[start - 1 : stop - 1].all()) for start, stop in context.answer_spans]
    return {
        "exact_match": sum(right) / len(right),
        "answer_ll": float(logprob[is_answer].mean()),
    }


def score_records(
    logprob: NDArray[np.float64], correct: NDArray[np.bool_], context: Example
) -> dict[str, float]:
    """As :func:`score_answers`, and ``text_ll`` of the tokens that are neither an answer nor a
    record's random value."""
    is_text = np.ones_like(correct)
    for start, stop in (*context.answer_spans, *context.value_spans):
        is_text[start - 1 : stop - 1] = False
    answers = score_answers(logprob, correct, context)
    return {**answers, "text_ll": float(logprob[is_text].mean())}


def score_text(
    logprob: NDArray[np.float64], correct: NDArray[np.bool_], context: Context
) -> dict[str, float]:
    """``text_ll`` of all tokens."""
    del correct, context
    return {"text_ll": float(logprob.mean())}


@torch.inference_mode()
def read(
    model: Any, policy: Policy, ids: Tensor, param_index: Tensor | None = None
) -> tuple[Tensor, NAMMCache]:
    """Read token ids through a fresh memory.

    Args:
        model: a causal language model of transformers that a ``NAMMCache`` works with.
        policy: of the memory.
        ids: ``[R, T]``.
        param_index: ``[R]`` int32, the parameter vector of the bank each row reads; None for 0.

    Returns:
        ``[R, T, hidden]`` last hidden states, and the memory after them.
    """
    with borrow(model):
        cache = NAMMCache(model, policy, param_index=param_index)
        given = {cache_keyword(model.base_model): cache}
        return model.base_model(ids, **given, use_cache=True).last_hidden_state, cache


def evaluate_population(
    model: Any,
    policy: Policy,
    contexts: Sequence[Any],
    num_candidates: int = 1,
    *,
    score: Score = score_records,
    weights: Mapping[str, float] | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Evaluation:
    """Evaluate every candidate of a bank on every context.

    Args:
        model: a causal language model of transformers that a ``NAMMCache`` works with.
        policy: ``NAMM`` with a bank of ``num_candidates`` parameter vectors, or any policy when
            ``num_candidates`` is 1.
        contexts: what ``score`` understands, with ``input_ids``; those of one length are read
            together.
        num_candidates: P.
        score: metrics of a context from the scores of its tokens.
        weights: of the metrics in the fitness; ``answer_ll`` alone by default.
        max_tokens: rows x length per forward pass; bounds memory. Results depend on it by
            rounding only.

    Returns:
        Evaluation: float64 tensors of shape ``[num_candidates, len(contexts)]`` on the CPU.

    Raises:
        ValueError: if there is no context.
    """
    if not contexts:
        raise ValueError("contexts must not be empty")
    results: dict[tuple[int, int], dict[str, float]] = {}
    for members in by_length(contexts).values():
        rows = [(p, e) for p in range(num_candidates) for e in members]
        step = max(1, max_tokens // len(contexts[members[0]].input_ids))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            ids = torch.tensor([contexts[e].input_ids for _, e in part], device=model.device)
            index = torch.tensor([p for p, _ in part], dtype=torch.int32)
            hidden, cache = read(model, policy, ids, index)
            kept = cache.kept_fraction_per_row().tolist()
            del cache
            tokens = _score(model.get_output_embeddings(), hidden, ids)
            logprob, correct = tokens.logprob.cpu().double().numpy(), tokens.correct.cpu().numpy()
            for row, (p, e) in enumerate(part):
                metrics = score(logprob[row], correct[row], contexts[e])
                results[p, e] = {**metrics, "kept": kept[row]}

    def table(name: str) -> Tensor:
        values = [
            [results[p, e][name] for e in range(len(contexts))] for p in range(num_candidates)
        ]
        return torch.tensor(values, dtype=torch.float64)

    tables = {name: table(name) for name in results[0, 0]}
    return Evaluation(
        kept=tables.pop("kept"), metrics=tables, weights=weights or {"answer_ll": 1.0}
    )


def evaluate_policy(model: Any, policy: Policy, contexts: Sequence[Any]) -> Evaluation:
    """:func:`evaluate_population` of hidden records for a single policy: ``[1, E]`` results."""
    return evaluate_population(model, policy, contexts)


def by_length(contexts: Sequence[Context]) -> dict[int, list[int]]:
    """Indices of the contexts of each length, in the order of their first ones."""
    groups: dict[int, list[int]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(len(context.input_ids), []).append(i)
    return groups


@torch.inference_mode()
def _score(head: Any, hidden: Tensor, ids: Tensor) -> TokenScores:
    """Scores ``[R, T - 1]`` of the tokens from index 1 on."""
    inputs, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    step = max(1, _LOGITS // head.weight.shape[0])
    parts = [
        score_tokens(head(h), t)
        for h, t in zip(inputs.split(step), targets.split(step), strict=True)
    ]
    shape = (ids.shape[0], ids.shape[1] - 1)
    return TokenScores(
        torch.cat([part.logprob for part in parts]).view(shape),
        torch.cat([part.correct for part in parts]).view(shape),
    )
