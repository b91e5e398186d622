"""A problem of tasks that people recognise: contexts read once, then asked about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..answers import answer_readings
from ..budget import Budget
from ..library import Library, load_library
from ..policy import Policy
from ..tasks.readings import Reading
from ..tasks.suite import TRAINING_TASKS, make_reading
from .evaluate import Evaluation
from .fingerprint import hash_texts, hash_tokenizer
from .problem import Batch, SizedProblem


class Population(Policy):
    """Several memories that are judged one after the other.

    Args:
        members: what makes one of each candidate ``[n]``.
        candidates: ``[P, n]``.

    Example:
        The scorer of a memory with gate and calibration goes on evolving from where it is::

            evolve(
                model, ReadingProblem(tokenizer), config, "runs/mine", x0=memory.params,
                policy_of=lambda x: Population.of(memory.with_params, x),
            )
    """

    def __init__(self, members: Sequence[Policy]) -> None:
        if not members:
            raise ValueError("Population: members must hold at least one policy, got none")
        self.members = list(members)
        self.n_up, self.budget = members[0].n_up, members[0].budget

    @classmethod
    def of(cls, make: Callable[[Tensor], Policy], candidates: Tensor) -> Policy:
        """The memory of one candidate ``[n]``, the population of several ``[P, n]``."""
        if candidates.dim() == 1:
            return make(candidates)
        return cls([make(candidate) for candidate in candidates])

    def with_budget(self, budget: Budget | None = None, **changes: Any) -> Population:
        """All members with another budget."""
        return Population([member.with_budget(budget, **changes) for member in self.members])

    def to_dict(self) -> dict[str, Any]:
        """Settings of all members."""
        return {"members": [member.to_dict() for member in self.members]}


@dataclass(frozen=True)
class _Context:
    """A reading as evolution wants it."""

    reading: Reading

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.reading.context_ids

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        return ()


@dataclass(frozen=True, eq=False)
class ReadingProblem(SizedProblem):
    """Hidden facts, tables, code: a good memory is one after which questions are answered.

    The fitness is the mean log-likelihood per answer; the questions come after the context was
    read. The log-likelihood of the context itself may count too, so that text does not pay for
    answers. Tasks that are never trained on are not among them.

    Attributes:
        tokenizer: of the model, a fast one.
        tasks: the tasks, which take turns.
        text_weight: what the mean log-likelihood per token of the context counts in the fitness.
        libraries: documents for "train" and "validation"; the standard library's by default.
    """

    metric: ClassVar[str] = "exact_match"

    tokenizer: Any
    _: KW_ONLY
    tasks: tuple[str, ...] = TRAINING_TASKS
    text_weight: float = 0.0
    libraries: tuple[Library, Library] | None = None

    def draw(self, split: str, key: tuple[int, ...], length: int, size: int) -> Batch:
        train, validation = self.libraries or (load_library("train"), load_library("validation"))
        library = train if split == "train" else validation
        seed = int(np.random.SeedSequence([2, *key]).generate_state(1)[0])
        return [
            _Context(
                make_reading(
                    self.tasks[i % len(self.tasks)], self.tokenizer, split=split, length=length,
                    index=i, seed=seed, library=library,
                )
            )
            for i in range(size)
        ]  # fmt: skip

    def fitness(
        self, model: Any, policy: Policy, batch: Batch, num_candidates: int = 1
    ) -> Evaluation:
        """``exact_match``, ``answer_ll`` and with a ``text_weight`` ``text_ll`` per reading.

        Args:
            model: a causal language model of transformers.
            policy: a `Population`, or one memory.
            batch: one of this problem's.
            num_candidates: of the population.
        """
        members = policy.members if isinstance(policy, Population) else [policy]
        if len(members) != num_candidates:
            raise ValueError(
                f"ReadingProblem: policy must have {num_candidates} members (a Population), got "
                f"{len(members)}"
            )
        readings = [context.reading for context in batch]  # type: ignore[attr-defined]
        scored = self.text_weight != 0
        found: list[dict[str, np.ndarray]] = []
        for member in members:
            answers = answer_readings(model, member, readings, score_contexts=scored)
            rows = [answers.reading == i for i in range(len(readings))]
            values = {
                "exact_match": np.array([answers.correct[r].mean() for r in rows]),
                "answer_ll": np.array([answers.loglik[r].mean() for r in rows]),
                "kept": np.asarray(answers.kept),
            }
            if answers.context_loglik is not None:
                values["text_ll"] = answers.context_loglik
            found.append(values)
        metrics = {
            name: torch.tensor(np.stack([values[name] for values in found]), dtype=torch.float64)
            for name in found[0]
        }
        kept = metrics.pop("kept")
        weights = {"answer_ll": 1.0, **({"text_ll": self.text_weight} if scored else {})}
        return Evaluation(metrics, kept, weights)

    def settings(self) -> dict[str, Any]:
        values = {**super().settings(), "tasks": list(self.tasks)}
        return {**values, "text_weight": self.text_weight} if self.text_weight else values

    def fingerprint(self) -> dict[str, str]:
        libraries = self.libraries or (load_library("train"), load_library("validation"))
        texts = [
            text
            for library in libraries
            for text in (*library.code, *(t for _, texts in library.prose for t in texts))
        ]
        return {
            **super().fingerprint(),
            "data": hash_texts(texts),
            "tokenizer": hash_tokenizer(self.tokenizer),
        }
