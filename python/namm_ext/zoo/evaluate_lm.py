"""Every figure that is told about a bundled language model comes from here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..corpus import load_documents
from ..tasks import (
    EVOLUTION_FAMILIES,
    HELD_OUT_FAMILIES,
    TEST_SEED,
    UNSEEN_FAMILIES,
    Scores,
    bits_per_byte,
    make_batch,
    score_examples,
    score_tokens,
    stack,
)

ALL_FAMILIES = EVOLUTION_FAMILIES + HELD_OUT_FAMILIES + UNSEEN_FAMILIES


def evaluate_lm(
    model: Any,
    tokenizer: Any,
    *,
    lengths: Sequence[int] = (256, 512, 1024, 2048),
    num_records: int = 4,
    examples_per_family: int = 24,
    text_windows: int = 96,
) -> dict[str, Any]:
    """Measure language and recall with the full cache, on documents of the test split.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        lengths: tokens of the examples and of the text windows.
        num_records: records per example.
        examples_per_family: examples of each family at each length.
        text_windows: windows of plain text at each length, at most as many as there are.

    Returns:
        ``bits_per_byte`` by length (a longer window has more context, so these differ for one and
        the same text); ``recall`` by length with exact match over the families the model was
        trained on (``known``), by family, and by distance between value and answer.
    """
    model.eval()
    return {
        "split": "test",
        "seed": TEST_SEED,
        "num_records": num_records,
        "examples_per_family": examples_per_family,
        "bits_per_byte": {
            str(length): round(text_bits_per_byte(model, tokenizer, length, text_windows), 4)
            for length in lengths
        },
        "recall": {
            str(length): _recall(model, tokenizer, length, num_records, examples_per_family)
            for length in lengths
        },
    }


@torch.inference_mode()
def text_bits_per_byte(model: Any, tokenizer: Any, length: int, max_windows: int) -> float:
    """Bits per byte of the test documents, read in separate windows.

    Args:
        length: tokens of a window; its first one is only context where there is no ``<bos>``.
        max_windows: windows to read, spread evenly over the documents.
    """
    ids = tokenizer.encode("\n\n".join(load_documents("test")), add_special_tokens=False)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    size = length - len(bos)
    starts = np.arange(0, len(ids) - size + 1, size)
    if not starts.size:
        raise ValueError(f"length must be at most {len(ids) + len(bos)} tokens, got {length}")
    starts = starts[np.linspace(0, starts.size - 1, min(max_windows, starts.size)).astype(int)]
    total_logprob, num_bytes = 0.0, 0
    for start in starts.tolist():
        window = torch.tensor([bos + ids[start : start + size]])
        logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
        total_logprob -= F.cross_entropy(logits[0], window[0, 1:], reduction="sum").item()
        num_bytes += len(tokenizer.decode(window[0, 1:].tolist()).encode())
    return bits_per_byte(total_logprob, num_bytes)


@torch.inference_mode()
def _recall(
    model: Any, tokenizer: Any, length: int, num_records: int, examples_per_family: int
) -> dict[str, Any]:
    results: list[Scores] = []
    for family in ALL_FAMILIES:
        examples = make_batch(
            (family,),
            tokenizer,
            load_documents("test"),
            length=length,
            num_records=num_records,
            seed=TEST_SEED,
            batch_size=examples_per_family,
        )
        for i in range(0, examples_per_family, 4):
            input_ids = stack(examples[i : i + 4])
            logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
            tokens = score_tokens(logits, input_ids[:, 1:])
            results.append(score_examples(tokens, examples[i : i + 4]))
    matches = torch.cat([scores.exact_match for scores in results]).numpy()
    families = np.array([family for scores in results for family in scores.families])
    distances = np.array([d for scores in results for d in scores.distances])
    known = ~np.isin(families, UNSEEN_FAMILIES)
    edges = [edge for edge in (0, 128, 256, 512, 1024, 1536) if edge < length] + [length]
    by_distance = {}
    for low, high in itertools.pairwise(edges):
        chosen = known & (low <= distances) & (distances < high)
        if chosen.any():
            by_distance[f"{low}-{high}"] = _accuracy(matches[chosen])
    return {
        "known": _accuracy(matches[known]),
        "by_family": {name: _accuracy(matches[families == name]) for name in ALL_FAMILIES},
        "by_distance": by_distance,
    }


def _accuracy(matches: np.ndarray) -> dict[str, float | int]:
    return {"exact_match": round(float(matches.mean()), 4), "queries": int(matches.size)}
