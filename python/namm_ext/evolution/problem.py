"""What a memory is evolved on: batches to read, and how good a memory is on one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..policy import Policy
from .evaluate import Context, Evaluation, evaluate_population, score_answers
from .fingerprint import hash_values

Batch = Sequence[Context]


class Problem(ABC):
    """Supplies the contexts of an evolution and says how good a memory is on them.

    Batches depend on their arguments and on the problem alone, so that a run can be resumed. A
    context has ``input_ids`` and ``answer_spans`` (`Context`); what else it has is between the
    problem's own methods.

    Attributes:
        metric: the name of the metric that logs and progress bars show.

    Example:
        Contexts of one's own are two methods; here a line is to be repeated, 500 tokens later::

            class Repeat(Problem):
                context_lengths = (512,)

                def draw(self, key, size):
                    rng = np.random.default_rng(key)
                    for ids in rng.integers(5, 2000, (size, 504)):
                        yield PlainContext((*ids.tolist(), *ids[:8].tolist()), ((504, 512),))

                def training_batch(self, seed, generation):
                    return list(self.draw((0, seed, generation), 8))

                def validation_batches(self):
                    return [list(self.draw((1,), 32))]

            evolve(model, Repeat(), EvolveConfig(), "runs/repeat")
    """

    metric: ClassVar[str] = "exact_match"

    @property
    @abstractmethod
    def context_lengths(self) -> tuple[int, ...]:
        """Tokens of the contexts that are to be read, all lengths there are."""

    @abstractmethod
    def training_batch(self, seed: int, generation: int) -> Batch:
        """What all candidates of a generation (from 0) are evaluated on."""

    @abstractmethod
    def validation_batches(self) -> list[Batch]:
        """What decides which memory is kept: the same for every seed, seen in no training.

        The contexts of a batch share a budget, which is a part of the longest one's length, so
        contexts of very different lengths belong in different batches.
        """

    def calibration_batch(self, seed: int) -> Batch:
        """What the statistics of the features are taken from; the first training batch."""
        return self.training_batch(seed, 0)

    def fit_batches(self, seed: int, round_: int, num_tokens: int) -> list[Batch]:
        """What a start is fitted to in one round (:func:`imitate`), about ``num_tokens`` per
        batch or in all; no two rounds alike. Training batches by default."""
        batches: list[Batch] = []
        missing = num_tokens
        while missing > 0:
            # Far from the generations of any run.
            generation = (1 << 32) + (round_ << 20) + len(batches)
            batches.append(self.training_batch(seed, generation))
            missing -= num_tokens_of(batches[-1])
        return batches

    def fitness(
        self, model: Any, policy: Policy, batch: Batch, num_candidates: int = 1
    ) -> Evaluation:
        """How good each candidate is on each context of a batch.

        Args:
            model: a causal language model of transformers.
            policy: with a bank of ``num_candidates`` parameter vectors and with its budget.
            batch: one of this problem's.
            num_candidates: P.

        Returns:
            Evaluation: by default exact match and log-likelihood of the answers, which is the
            fitness.
        """
        return evaluate_population(model, policy, batch, num_candidates, score=score_answers)

    def settings(self) -> dict[str, Any]:
        """What defines the problem besides data and tokenizer, as JSON has it."""
        return {"problem": type(self).__name__, "context_lengths": list(self.context_lengths)}

    def fingerprint(self) -> dict[str, str]:
        """Hashes of what a run depends on, by the name of the part.

        A run is resumed only if all are what they were.
        """
        return {"problem": hash_values(self.settings())}


@dataclass(frozen=True)
class PlainContext:
    """Token ids, and the spans ``(start, stop)`` of the answers in them, if there are any."""

    input_ids: tuple[int, ...]
    answer_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class SizedProblem(Problem):
    """A problem that has contexts of any length.

    Attributes:
        lengths: tokens of the training contexts; generation g has ``lengths[g % len(lengths)]``.
        num_examples: contexts per generation, the same ones for all candidates.
        validation_lengths: tokens of the validation contexts: long ones, because a memory that is
            best on short ones can be the worst on long ones.
        num_validation: validation contexts of each length.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    num_examples: int = 8
    validation_lengths: tuple[int, ...] = (1024,)
    num_validation: int = 32

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("num_examples", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{owner}: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lengths", "validation_lengths"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ValueError(f"{owner}: {name} must be positive, at least one, got {values}")

    @abstractmethod
    def draw(self, split: str, key: tuple[int, ...], length: int, size: int) -> Batch:
        """``size`` contexts of ``length`` tokens, fixed by the arguments.

        Args:
            split: "train" or "validation", whose data are seen in no training.
            key: non-negative integers; contexts of another key are others.
        """

    @property
    def context_lengths(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((*self.lengths, *self.validation_lengths)))

    def calibration_batch(self, seed: int) -> Batch:
        return self.draw("train", (seed, 0), max(self.validation_lengths), self.num_examples)

    def training_batch(self, seed: int, generation: int) -> Batch:
        length = self.lengths[generation % len(self.lengths)]
        return self.draw("train", (seed, generation + 1), length, self.num_examples)

    def fit_batches(self, seed: int, round_: int, num_tokens: int) -> list[Batch]:
        return [
            self.draw("train", (seed, 1, round_, number), length, max(1, num_tokens // length))
            for number, length in enumerate(self.lengths)
        ]

    def validation_batches(self) -> list[Batch]:
        return [
            self.draw("validation", (), length, self.num_validation)
            for length in self.validation_lengths
        ]

    def settings(self) -> dict[str, Any]:
        return {
            "problem": type(self).__name__,
            "lengths": list(self.lengths),
            "num_examples": self.num_examples,
            "validation_lengths": list(self.validation_lengths),
            "num_validation": self.num_validation,
        }


def length_of(batch: Batch) -> int:
    """Tokens of the longest context."""
    return max(len(context.input_ids) for context in batch)


def num_tokens_of(batch: Batch) -> int:
    """Tokens of all contexts."""
    return sum(len(context.input_ids) for context in batch)
