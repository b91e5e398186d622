"""The bundled models' tokenizer: byte-level BPE, trained in seconds on the training documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def train_tokenizer(documents: Iterable[str], vocab_size: int = 2048) -> Any:
    """Train a byte-level BPE tokenizer.

    Line breaks and single digits are tokens of their own: a record can stand between any two lines
    without changing how its neighbours are cut, and a number is recalled digit by digit.

    Args:
        documents: texts to learn the merges from.
        vocab_size: size of the vocabulary with its three special tokens.

    Returns:
        A ``PreTrainedTokenizerFast`` with pad, bos and eos tokens; it adds none of them by itself.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
    )
