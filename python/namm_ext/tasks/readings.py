"""Contexts that are read once, and questions that are asked after it, for models that chat.

A `Reading` is what an instruction model gets: one message of the user that begins with a long
context and ends with a question. The memory has read the whole context before the question comes,
so it cannot know what will be asked. Several questions share a context, each as if it were the
only one; in a reading with ``turns`` they follow one another as turns of a conversation.

Generators write a `Draft`, which knows nothing of tokens; `lay_out` makes it exactly as long as it
is to be with any fast tokenizer, with or without a chat template.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Question:
    """One question and its answer.

    Attributes:
        ids: tokens that follow the context (or the answer before, in a reading with turns): the
            question, what opens the assistant's turn, the beginning of the answer's sentence.
        answer_ids: tokens of the answer.
    """

    ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """A context and what is asked about it.

    Attributes:
        task: its name.
        context_ids: exactly as many tokens as were asked for, what opens the chat included.
        questions: in a reading with ``turns`` each follows the answer before.
        spans: per question, the tokens ``[start, stop)`` of the context that state the answer.
        turns: whether the questions are turns of one conversation.
    """

    task: str
    context_ids: tuple[int, ...]
    questions: tuple[Question, ...]
    spans: tuple[Span, ...]
    turns: bool = False


@dataclass(frozen=True)
class Ask:
    """A question in words.

    Attributes:
        question: what the user says.
        prefix: how the assistant's sentence begins, up to the word before the answer.
        answer: follows the prefix.
        fact: index of the fact that states the answer; None if it is the context as a whole.
        space: what stands between prefix and answer.
    """

    question: str
    prefix: str
    answer: str
    fact: int | None = None
    space: str = " "


@dataclass(frozen=True)
class Draft:
    """A context in words.

    Attributes:
        intro: says what comes; stands before everything else.
        facts: texts to hide, in their order in the context.
        asks: the questions.
        filler: endless text to hide them in, piece by piece.
        gap: what stands between two pieces.
        together: whether the facts stand in one block, a line each.
        turns: whether the questions are turns of one conversation.
    """

    intro: str
    facts: tuple[str, ...]
    asks: tuple[Ask, ...]
    filler: Iterator[str]
    gap: str = "\n\n"
    together: bool = False
    turns: bool = False


class Chat:
    """Where the words of a user and an assistant stand in a prompt.

    Args:
        tokenizer: a fast tokenizer of transformers; without a chat template, questions and
            answers are marked in words.

    Raises:
        ValueError: if the tokenizer gives no offsets, or its template changes what a user says.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer must be a fast one (with offsets), got {type(tokenizer).__name__}"
            )
        self.tokenizer = tokenizer
        self.head, self.opening = "", "Question: "
        self.tail, self.between = "\nAnswer: ", "\n\n"
        if tokenizer.chat_template:
            marks = ("\u27e6first\u27e7", "\u27e6second\u27e7", "\u27e6third\u27e7")
            roles = ("user", "assistant", "user")
            messages = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
            once, twice = self._render(messages[:1]), self._render(messages)
            if once.count(marks[0]) != 1 or any(twice.count(mark) != 1 for mark in marks):
                raise ValueError("tokenizer's chat template must repeat each message once")
            self.head, self.tail = once.split(marks[0])
            self.opening = ""
            self.between = twice.split(marks[1])[1].split(marks[2])[0]

    def _render(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def ids(self, text: str) -> list[int]:
        """Tokens of ``text``, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def question(self, ask: Ask, after_answer: bool = False) -> Question:
        """The tokens of a question behind a context, or behind the answer before."""
        before = f".{self.between}" if after_answer else "\n\n"
        text = f"{before}{self.opening}{ask.question}{self.tail}{ask.prefix}"
        encoded = self.tokenizer(
            f"{text}{ask.space}{ask.answer}", add_special_tokens=False, return_offsets_mapping=True
        )
        # Where the space before the answer is a token of its own, it is not part of the answer.
        given = sum(stop <= len(text) + len(ask.space) for _, stop in encoded.offset_mapping)
        return Question(tuple(encoded.input_ids[:given]), tuple(encoded.input_ids[given:]))


def lay_out(task: str, draft: Draft, chat: Chat, length: int, rng: random.Random) -> Reading:
    """Hide the facts of a draft in as much filler as makes the context ``length`` tokens long.

    Facts stand at random depths, none before the first piece of filler. The context ends with a
    whole piece; its length is made exact by cutting the first piece at its beginning, as if the
    text were an extract.

    Raises:
        ValueError: if the facts do not fit into ``length`` tokens.
    """
    head = chat.ids(f"{chat.head}{draft.intro}\n\n")
    room = length - len(head)
    count = sum(len(chat.ids(fact)) + 1 for fact in draft.facts)
    pieces: list[str] = []
    while count < room:
        pieces.append(next(draft.filler))
        count += len(chat.ids(pieces[-1])) + 1
    if len(pieces) < 2:
        raise ValueError(f"{task} does not fit into {length} tokens: its facts take {count}")
    if draft.together:
        slots = [rng.randrange(1, len(pieces) + 1)] * len(draft.facts)
    else:
        slots = sorted(rng.randrange(1, len(pieces) + 1) for _ in draft.facts)
    sides = [rng.random() < 0.5 for _ in draft.facts]
    grown = False
    while True:
        body, places = _join(draft, pieces, slots, sides)
        encoded = chat.tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)
        cut = len(encoded.input_ids) - room
        if cut < 0:
            pieces, slots = [next(draft.filler), *pieces], [slot + 1 for slot in slots]
            grown = True
        elif not grown and len(pieces) > 1 and cut >= len(chat.ids(pieces[0] + draft.gap)):
            pieces, slots = pieces[1:], [max(1, slot - 1) for slot in slots]
        else:
            break
    spans = [_tokens(encoded.offset_mapping, place) for place in places]
    shift = len(head) - cut
    spans = [(start + shift, stop + shift) for start, stop in spans]
    if any(start < len(head) for start, _ in spans):
        raise ValueError(f"{task} does not fit into {length} tokens")
    everything = (len(head), length)
    return Reading(
        task=task,
        context_ids=(*head, *encoded.input_ids[cut:]),
        questions=tuple(
            chat.question(ask, after_answer=draft.turns and i > 0)
            for i, ask in enumerate(draft.asks)
        ),
        spans=tuple(everything if ask.fact is None else spans[ask.fact] for ask in draft.asks),
        turns=draft.turns,
    )


def _join(
    draft: Draft, pieces: list[str], slots: list[int], sides: list[bool]
) -> tuple[str, list[Span]]:
    """The text, and the characters ``[start, stop)`` of each fact in it."""
    body, places, fact = pieces[0], [], 0
    for i in range(1, len(pieces) + 1):
        joint = draft.gap
        while fact < len(slots) and slots[fact] == i:
            # In prose a fact ends one paragraph or begins the next.
            inside = draft.gap == "\n\n" and not draft.together
            before = " " if inside and (sides[fact] or joint == " ") else joint
            joint = "\n" if draft.together else " " if inside and not sides[fact] else draft.gap
            body += before
            places.append((len(body), len(body) + len(draft.facts[fact])))
            body += draft.facts[fact]
            fact += 1
        if i < len(pieces):
            body += (draft.gap if draft.together else joint) + pieces[i]
    return body, places


def _tokens(offsets: list[Span], place: Span) -> Span:
    """The tokens that hold the characters ``[start, stop)``."""
    inside = [i for i, (a, b) in enumerate(offsets) if b > place[0] and a < place[1]]
    return inside[0], inside[-1] + 1
