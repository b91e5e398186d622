"""How good is a memory? One forward pass over examples, any number of candidates at once.

The batch holds every candidate's copy of every example; each row reads its own parameter vector
from the policy's bank. Fitness needs no generation: with teacher forcing the argmax at the answer
positions is what greedy decoding would have produced, and the log-likelihoods are smooth where
exact match is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache import NAMMCache, cache_keyword
from ..policy import Policy
from ..tasks import Example, TokenScores, score_tokens

#: Logits made at a time, in floats: they are far wider than the model and should stay in caches.
_LOGITS = 1 << 21


@dataclass(frozen=True)
class Evaluation:
    """Per candidate (first axis) and example (second axis) results.

    Attributes:
        answer_ll: ``[P, E]`` mean log-likelihood per answer token, nats.
        text_ll: ``[P, E]`` mean log-likelihood, nats, per token that is neither an answer nor a
            record's random value.
        exact_match: ``[P, E]`` share of an example's answers that are right in every token.
        kept: ``[P, E]`` tokens kept after the last update / tokens seen up to it, mean over
            layers and heads.
    """

    answer_ll: Tensor
    text_ll: Tensor
    exact_match: Tensor
    kept: Tensor

    def fitness(self, text_weight: float) -> Tensor:
        """``[P]`` mean answer log-likelihood + ``text_weight`` x mean text log-likelihood."""
        return self.answer_ll.mean(1) + text_weight * self.text_ll.mean(1)


@torch.inference_mode()
def evaluate_population(
    model: Any,
    policy: Policy,
    examples: Sequence[Example],
    num_candidates: int = 1,
    *,
    max_tokens: int = 16384,
) -> Evaluation:
    """Evaluate every candidate of a bank on every example.

    Args:
        model: a causal language model of transformers that a ``NAMMCache`` works with.
        policy: ``NAMM`` with a bank of ``num_candidates`` parameter vectors, or any policy when
            ``num_candidates`` is 1.
        examples: all of one length.
        num_candidates: P.
        max_tokens: rows x length per forward pass; bounds memory. Results depend on it by
            rounding only.

    Returns:
        Evaluation: float64 tensors of shape ``[num_candidates, len(examples)]`` on the CPU.

    Raises:
        ValueError: if there is no example or the lengths differ.
    """
    lengths = sorted({len(example.input_ids) for example in examples})
    if len(lengths) != 1:
        raise ValueError(f"examples must be non-empty and of one length, got {lengths}")
    device = model.device
    all_ids = torch.tensor([example.input_ids for example in examples], device=device)
    rows = [(p, e) for p in range(num_candidates) for e in range(len(examples))]
    step = max(1, max_tokens // lengths[0])
    results: list[tuple[float, float, float, float]] = []
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        index = torch.tensor([p for p, _ in part], dtype=torch.int32)
        ids = all_ids[[e for _, e in part]]
        cache = NAMMCache(model, policy, param_index=index)
        given = {cache_keyword(model.base_model): cache}
        hidden = model.base_model(ids, **given, use_cache=True).last_hidden_state
        kept = cache.kept_fraction_per_row().tolist()
        del cache
        tokens = _score(model.get_output_embeddings(), hidden, ids)
        logprob, correct = tokens.logprob.cpu().double().numpy(), tokens.correct.cpu().numpy()
        for row, (_, e) in enumerate(part):
            results.append((*_row_result(logprob[row], correct[row], examples[e]), kept[row]))
    table = torch.tensor(results, dtype=torch.float64).view(num_candidates, len(examples), 4)
    return Evaluation(*table.unbind(-1))


def evaluate_policy(model: Any, policy: Policy, examples: Sequence[Example]) -> Evaluation:
    """:func:`evaluate_population` for a single policy: ``[1, E]`` results."""
    return evaluate_population(model, policy, examples)


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


def _row_result(
    logprob: NDArray[np.float64], correct: NDArray[np.bool_], example: Example
) -> tuple[float, float, float]:
    is_answer, is_text = np.zeros_like(correct), np.ones_like(correct)
    for start, stop in example.answer_spans:
        is_answer[start - 1 : stop - 1] = True
    for start, stop in (*example.answer_spans, *example.value_spans):
        is_text[start - 1 : stop - 1] = False
    right = [bool(correct[start - 1 : stop - 1].all()) for start, stop in example.answer_spans]
    return (
        float(logprob[is_answer].mean()),
        float(logprob[is_text].mean()),
        sum(right) / len(right),
    )
