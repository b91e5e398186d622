"""One context, one question, and what the model answers with all of it and with a quarter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..answers import answer_readings
from ..cache import NAMMCache
from ..measure import fixed_budget
from ..patching import patch
from ..policy import Policy
from ..tasks import suite
from ..tasks.readings import Reading

TASK = "paraphrase"
"""Facts in other words than the questions about them."""

_AROUND = 60  # tokens shown on either side of the fact
_SHADES = ((0.5, "bold"), (0.25, ""), (0.0, "dim"))


@dataclass(frozen=True)
class Example:
    """What the demo shows first.

    Attributes:
        question: what is asked.
        expected: the answer that the context states.
        full, memory: what the model wrote, with the full cache and with the memory.
        kept: tokens kept / tokens read.
    """

    question: str
    expected: str
    full: str
    memory: str
    kept: float


def show_example(
    model: Any,
    tokenizer: Any,
    policy: Policy,
    console: Console,
    *,
    length: int,
    keep: float,
    new_tokens: int = 8,
) -> Example:
    """Print a context as the memory keeps it, a question, and both answers.

    Args:
        length: tokens of the context.
        keep: the budget, as a share of them.
        new_tokens: at most so many are generated.
    """
    reading, which = _first_answered(model, tokenizer, length)
    question = reading.questions[which]
    text = tokenizer.decode(question.ids)
    ids = torch.tensor([[*reading.context_ids, *question.ids]], device=model.device)
    full = _generate(model, tokenizer, ids, new_tokens)
    with patch(model, fixed_budget(policy, keep, length)) as memory:
        answer = _generate(model, tokenizer, ids, new_tokens)
        assert memory.cache is not None
        shares = share_of_heads(memory.cache, length)
        kept = memory.report().kept_fraction
    expected = tokenizer.decode(question.answer_ids).strip()

    begin, end = _excerpt(reading, which)
    console.print(
        f"[bold]A context of {length:,} tokens[/], of which tokens {begin} to {end}. Bold: at "
        "least half of the model's heads still hold the token; dim: fewer than a quarter. "
        "The question is the first of the test split that the full cache answers."
    )
    console.print(_shaded(tokenizer, reading, which, shares, begin, end))
    console.print(_asked(text), style="italic")
    for name, said in (
        (f"the full cache ({length:,} tokens)", full),
        (f"NAMM ({kept:.0%} of them)", answer),
    ):
        right = said.startswith(expected)
        console.print(Text(f"  {name:<30}") + Text(said, "green" if right else "red"))
    console.print(f"  {'the context says':<30}{expected}\n", highlight=False)
    return Example(text, expected, full, answer, kept)


def _first_answered(model: Any, tokenizer: Any, length: int) -> tuple[Reading, int]:
    """The first question of the test split that the full cache answers, among eight contexts."""
    readings = (
        suite.make_reading(TASK, tokenizer, split="test", length=length, index=i) for i in range(8)
    )
    first = next(readings)
    for reading in (first, *readings):
        correct = answer_readings(model, None, [reading]).correct
        if correct.any():
            return reading, int(correct.argmax())
    return first, 0


def share_of_heads(cache: NAMMCache, length: int) -> list[float]:
    """For each of the first ``length`` positions, the share of layers and heads that hold it."""
    counts = torch.zeros(length)
    total = 0
    for layer in cache.memory_layers:
        assert layer.kv is not None
        segments = layer.kv.store.segments
        starts = segments.cu_seqlens_k.tolist()
        for start, used in zip(starts, segments.seqused_k.tolist(), strict=False):
            held = segments.pos[start : start + used].long().cpu()
            counts[held[held < length]] += 1
            total += 1
    return (counts / max(total, 1)).tolist()


@torch.inference_mode()
def _generate(model: Any, tokenizer: Any, ids: torch.Tensor, new_tokens: int) -> str:
    """The first line that the model writes."""
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text.strip().split("\n")[0]


def _excerpt(reading: Reading, which: int) -> tuple[int, int]:
    start, stop = reading.spans[which]
    return max(0, start - _AROUND), min(len(reading.context_ids), stop + _AROUND)


def _shaded(
    tokenizer: Any, reading: Reading, which: int, shares: list[float], begin: int, end: int
) -> Text:
    text = Text()
    start, stop = reading.spans[which]
    for i in range(begin, end):
        style = next(style for least, style in _SHADES if shares[i] >= least)
        if start <= i < stop:
            style += " underline"
        text.append(tokenizer.decode([reading.context_ids[i]]), style=style)
    return Text("… ") + text + Text(" …")


def _asked(text: str) -> str:
    """The question without the marks of the chat, on one line."""
    plain = re.sub(r"<\|[^|]*\|>(user|assistant|system)?", " ", text)
    return " ".join(plain.split())
