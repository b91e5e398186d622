"""Long-context tasks: hidden records in real text, their generators and their metrics.

Example:
    >>> from namm_ext import tasks, zoo
    >>> from namm_ext.corpus import load_documents
    >>> tokenizer = zoo.load_tokenizer()
    >>> example = tasks.make_example(
    ...     "prose", tokenizer, load_documents("test"),
    ...     length=512, num_records=4, seed=tasks.TEST_SEED,
    ... )
    >>> len(example.input_ids), len(example.answer_spans)
    (512, 4)
"""

from .examples import (
    IN_USE,
    STATED_ONCE,
    TEST_SEED,
    TRAIN_SEED,
    VALIDATION_SEED,
    Example,
    Prompt,
    RecordMix,
    TooShort,
    make_batch,
    make_example,
    make_mixed_batch,
    make_prompt,
)
from .families import (
    EVOLUTION_FAMILIES,
    FAMILIES,
    HELD_OUT_FAMILIES,
    UNSEEN_FAMILIES,
    VARIED_FAMILIES,
    Family,
)
from .metrics import (
    Scores,
    TokenScores,
    bits_per_byte,
    score_examples,
    score_tokens,
    stack,
)
from .reader import TextReader, reader_of

__all__ = [
    "EVOLUTION_FAMILIES",
    "FAMILIES",
    "HELD_OUT_FAMILIES",
    "IN_USE",
    "STATED_ONCE",
    "TEST_SEED",
    "TRAIN_SEED",
    "UNSEEN_FAMILIES",
    "VALIDATION_SEED",
    "VARIED_FAMILIES",
    "Example",
    "Family",
    "Prompt",
    "RecordMix",
    "Scores",
    "TextReader",
    "TokenScores",
    "TooShort",
    "bits_per_byte",
    "make_batch",
    "make_example",
    "make_mixed_batch",
    "make_prompt",
    "reader_of",
    "score_examples",
    "score_tokens",
    "stack",
]
