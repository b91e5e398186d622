"""Hidden records as a problem: recall from long texts of any kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from ..policy import Policy
from ..tasks import (
    EVOLUTION_FAMILIES,
    STATED_ONCE,
    TRAIN_SEED,
    VALIDATION_SEED,
    Example,
    RecordMix,
    make_mixed_batch,
)
from .evaluate import Evaluation, evaluate_population, score_records
from .fingerprint import hash_texts, hash_tokenizer
from .problem import Batch, SizedProblem


@dataclass(frozen=True, eq=False)
class RecordProblem(SizedProblem):
    """Records hidden in documents and asked for at the end (:mod:`namm_ext.tasks`).

    The fitness is the mean log-likelihood of the answers + ``text_weight`` x that of the text.

    Attributes:
        tokenizer: of the model, from Hugging Face.
        train: documents of the training contexts.
        validation: documents of the validation contexts.
        mixes: records hidden in one context; the contexts of a batch take equal parts of each.
        families: task families, which take turns.
        text_weight: weight of the text's log-likelihood beside the answers'.

    Example:
        >>> from namm_ext import zoo
        >>> from namm_ext.corpus import load_documents
        >>> problem = RecordProblem(
        ...     zoo.load_tokenizer(), load_documents("train"), load_documents("validation")
        ... )
        >>> len(problem.training_batch(seed=0, generation=1)[0].input_ids)
        512
    """

    tokenizer: Any
    train: Sequence[str]
    validation: Sequence[str]
    _: KW_ONLY
    mixes: tuple[RecordMix, ...] = (STATED_ONCE,)
    families: tuple[str, ...] = EVOLUTION_FAMILIES
    text_weight: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(self.num_examples, self.num_validation)
        if not 1 <= len(self.mixes) <= most:
            raise ValueError(
                f"RecordProblem: mixes must have 1 to {most} entries, one example of each in "
                f"every batch, got {len(self.mixes)}"
            )
        if not math.isfinite(self.text_weight):
            raise ValueError(f"RecordProblem: text_weight must be finite, got {self.text_weight}")

    def draw(self, split: str, key: tuple[int, ...], length: int, size: int) -> list[Example]:
        training = split == "train"
        return make_mixed_batch(
            self.mixes,
            self.families,
            self.tokenizer,
            self.train if training else self.validation,
            length=length,
            seed=(TRAIN_SEED if training else VALIDATION_SEED, *key),
            batch_size=size,
        )

    def fitness(
        self, model: Any, policy: Policy, batch: Batch, num_candidates: int = 1
    ) -> Evaluation:
        weights = {"answer_ll": 1.0, "text_ll": self.text_weight}
        return evaluate_population(
            model, policy, batch, num_candidates, score=score_records, weights=weights
        )

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "mixes": [asdict(mix) for mix in self.mixes],
            "families": list(self.families),
            "text_weight": self.text_weight,
        }

    def fingerprint(self) -> dict[str, str]:
        return {
            **super().fingerprint(),
            "data": hash_texts([*self.train, "", *self.validation]),
            "tokenizer": hash_tokenizer(self.tokenizer),
        }
