"""Read a context once, ask many questions about it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .cache import NAMMCache, borrow, cache_keyword
from .policy import Policy
from .report import Report
from .tasks.readings import Chat


class Replies(NamedTuple):
    """What :func:`ask` returns.

    Attributes:
        answers: one text for each question, in their order.
        report: what the memory held after the context (with ``question_visible``, after the
            context and the last question).
    """

    answers: list[str]
    report: Report


@torch.inference_mode()
def ask(
    model: Any,
    tokenizer: Any,
    context: str,
    questions: str | Sequence[str],
    policy: Policy,
    *,
    question_visible: bool = False,
    max_new_tokens: int = 64,
    **generation: Any,
) -> Replies:
    """Let a model read a long text with a memory, and answer questions about it.

    The text is read once; each question sees a copy of the memory, as if it were the only one. The
    chat template is applied if there is one.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model, a fast one.
        context: the text.
        questions: one or several.
        policy: decides what is kept of the text.
        question_visible: read the text anew for each question, with the question behind it, before
            the last tokens are forgotten. What is kept may then depend on the question, as where a
            prompt is compressed whose question is known; it costs a reading for each of them.
        max_new_tokens: most tokens of an answer.
        **generation: for ``model.generate``; greedy by default.

    Raises:
        ValueError: if the context is empty or there is no question.

    Example:
        >>> from namm_ext import ask, baselines, zoo
        >>> model, tokenizer = zoo.load_model(), zoo.load_tokenizer()
        >>> text = "import os\\n" + "x = 1\\n" * 100
        >>> replies = ask(
        ...     model, tokenizer, text, ["What is x?", "What is imported?"],
        ...     baselines.KeyDiff(0.25, n_up=64), max_new_tokens=4)
        >>> len(replies.answers), replies.report.kept_fraction < 0.3
        (2, True)
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    if not asked or not all(isinstance(question, str) and question for question in asked):
        raise ValueError(f"ask: questions must be one or more texts, got {questions!r}")
    if not context:
        raise ValueError("ask: context must not be empty")
    words = Chat(tokenizer)
    text = words.ids(f"{words.head}{context}")
    behind = [words.ids(f"\n\n{words.opening}{question}{words.tail}") for question in asked]
    key, answers = cache_keyword(model), []
    with borrow(model):

        def read(ids: list[int]) -> NAMMCache:
            cache = NAMMCache(model, policy.for_context(model, tokenizer, ids))
            given = {cache_keyword(model.base_model): cache}
            model.base_model(torch.tensor([ids], device=model.device), **given, use_cache=True)
            return cache

        memory = None if question_visible else read(text)
        for ids in behind:
            whole = [*text, *ids]
            # ``generate`` itself reads the last token.
            cache = read(whole[:-1]) if memory is None else copy.deepcopy(memory)
            prompt = torch.tensor([whole], device=model.device)
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                **{key: cache},
                max_new_tokens=max_new_tokens,
                **{"do_sample": False, **generation},
            )
            answer = tokenizer.decode(out[0, len(whole) :], skip_special_tokens=True)
            answers.append(answer.strip())
        return Replies(answers, (memory or cache).report())
