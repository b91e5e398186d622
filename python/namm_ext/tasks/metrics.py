"""What is measured on an example: exact match, answer and text log-likelihood, bits per byte.

Everything is teacher-forced: one pass over the sequence gives every answer. If the most probable
token is right at each position of an answer, greedy generation from its question would have
written exactly this answer, so exact match needs no generation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .examples import Example


@dataclass(frozen=True)
class TokenScores:
    """How well each token was predicted.

    Attributes:
        logprob: ``[..., T]`` float32, natural log of the probability of the token.
        correct: ``[..., T]`` bool, whether it was the most probable one.
    """

    logprob: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Scores:
    """Results of one batch.

    Attributes:
        exact_match: ``[num_queries]`` bool, over all examples in order.
        answer_logprob: ``[num_queries]`` float32, mean log-probability per answer token.
        text_logprob: ``[num_examples]`` float32, mean log-probability of the tokens that are
            neither an answer nor a record's random value.
        families: ``num_queries`` names.
        distances: ``num_queries`` token counts between a value and its answer.
    """

    exact_match: Tensor
    answer_logprob: Tensor
    text_logprob: Tensor
    families: tuple[str, ...]
    distances: tuple[int, ...]

    def accuracy(self) -> float:
        """Fraction of queries answered exactly."""
        return self.exact_match.float().mean().item()


def stack(examples: Sequence[Example]) -> Tensor:
    """Token ids ``[batch_size, length]``, int64, of examples of equal length."""
    return torch.tensor([example.input_ids for example in examples])


def score_tokens(logits: Tensor, targets: Tensor) -> TokenScores:
    """Compare predictions with what came; works on any piece of a sequence.

    Args:
        logits: ``[..., T, vocab_size]``, any float dtype.
        targets: ``[..., T]`` int64; ``targets[..., t]`` is the token that ``logits[..., t, :]``
            predicts, that is, ``input_ids[..., t + 1]``.
    """
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float()
    logprob = picked - logits.float().logsumexp(-1)
    return TokenScores(logprob, logits.argmax(-1) == targets)


def score_examples(tokens: TokenScores, examples: Sequence[Example]) -> Scores:
    """Sum up token scores per answer and per text.

    Args:
        tokens: scores ``[batch_size, length - 1]`` for the tokens from index 1 on (the first
            token is never predicted).
        examples: the ``batch_size`` examples they belong to.
    """
    expected = (len(examples), len(examples[0].input_ids) - 1)
    if tuple(tokens.logprob.shape) != expected:
        raise ValueError(
            f"tokens must have shape {expected} (examples, length - 1), "
            f"got {tuple(tokens.logprob.shape)}"
        )
    matches, answers, texts = [], [], []
    for row, example in enumerate(examples):
        logprob, correct = tokens.logprob[row], tokens.correct[row]
        is_text = torch.ones_like(correct)
        for start, stop in example.answer_spans:
            matches.append(correct[start - 1 : stop - 1].all())
            answers.append(logprob[start - 1 : stop - 1].mean())
            is_text[start - 1 : stop - 1] = False
        for start, stop in example.value_spans:
            is_text[start - 1 : stop - 1] = False
        texts.append(logprob[is_text].mean())
    return Scores(
        exact_match=torch.stack(matches),
        answer_logprob=torch.stack(answers),
        text_logprob=torch.stack(texts),
        families=tuple(e.family for e in examples for _ in e.answer_spans),
        distances=tuple(d for e in examples for d in e.distances),
    )


def bits_per_byte(total_logprob: float, num_bytes: int) -> float:
    """Cross-entropy in bits per UTF-8 byte, comparable between tokenizers.

    Args:
        total_logprob: natural log-probability of the text, summed over its tokens.
        num_bytes: bytes of the same text.
    """
    return -total_logprob / (num_bytes * math.log(2))
