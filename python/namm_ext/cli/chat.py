"""``namm chat``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console

from .shared import (
    Device,
    DType,
    Keep,
    ModelArgument,
    Policy,
    Threads,
    load_model,
    load_policy,
    make_console,
    set_threads,
)

_HELP = "/reset forgets all, /off and /on stop and start forgetting, /report, /exit"


def chat(
    model: ModelArgument = "smollm2-135m",
    policy: Policy = None,
    keep: Keep = 0.25,
    new_tokens: Annotated[
        int, typer.Option(help="An answer has at most so many tokens.", min=1)
    ] = 256,
    dtype: DType = "bfloat16",
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Talk to a language model whose memory forgets. Ctrl-C ends an answer, Ctrl-D the chat."""
    set_threads(threads)
    loaded, tokenizer, name = load_model(model, dtype, device)
    memory, policy_name = load_policy(policy, name)
    memory = memory.with_budget(replace(memory.budget, size=keep))
    talk = Conversation(loaded, tokenizer, memory, new_tokens)
    console = make_console()
    console.print(
        f"[bold]{name}[/] with the memory [bold]{policy_name}[/], which keeps {keep:.0%} of the "
        f"tokens. {_HELP}.\n"
    )
    while (line := _read(console)) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            talk.reset()
        elif text in ("/on", "/off"):
            talk.cache.evicts = text == "/on"
        elif text == "/report":
            console.print(str(talk.cache.report()) if talk.ids else "Nothing was read yet.")
        elif text.startswith("/"):
            console.print(f"There is no {text}. {_HELP}.", markup=False)
        elif text:
            talk.say(text)
            console.print(talk.status(), style="dim", highlight=False)


class Conversation:
    """A chat of one user with a model, in one cache.

    Args:
        model: a causal language model of transformers.
        tokenizer: with a chat template.
        policy: of its memory.
        new_tokens: most tokens of an answer.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, policy: Any, new_tokens: int) -> None:
        from ..cache import NAMMCache
        from ..tasks.readings import Chat

        if not tokenizer.chat_template:
            raise ValueError("chat needs a model that chats, this one has no chat template")
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens
        self.words = Chat(tokenizer)
        self.cache = NAMMCache(model, policy)
        self.ids: list[int] = []  # of everything said so far

    def reset(self) -> None:
        """Start again."""
        self.cache.reset()
        self.ids = []

    def say(self, text: str) -> str:
        """A turn: the answer is written as it comes, and returned."""
        import torch
        from transformers import TextStreamer

        from ..cache import cache_keyword

        words, end = self.words, self.tokenizer.eos_token_id
        if not self.ids:
            said = words.ids(f"{words.head}{text}{words.tail}")
        else:
            if self.ids[-1] == end:  # the template says it too
                self.ids.pop()
            said = words.ids(f"{words.between}{text}{words.tail}")
        self.ids += said
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with _stopped_by_ctrl_c() as stop:
            out = self.model.generate(
                torch.tensor([self.ids], device=self.model.device),
                attention_mask=torch.ones(1, len(self.ids), device=self.model.device).long(),
                **{cache_keyword(self.model): self.cache},
                max_new_tokens=self.new_tokens,
                do_sample=False,
                stopping_criteria=[stop],
                streamer=streamer,
                pad_token_id=end,
            )
        answer = out[0, len(self.ids) :].tolist()
        self.ids += answer
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def status(self) -> str:
        """What the memory holds now."""
        from ..report import size_of

        report = self.cache.report()
        return (
            f"{self.cache.get_seq_length():,} tokens read, {report.live_fraction:.0%} held: "
            f"{size_of(report.kv_bytes_live + report.memory_bytes)} instead of "
            f"{size_of(report.full_bytes)}"
        )


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[Any]:
    """A criterion for ``generate``: between two tokens, so that the cache stays right."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        yield lambda input_ids, scores, **_: input_ids.new_full(
            (input_ids.shape[0],), bool(pressed)
        ).bool()
    finally:
        signal.signal(signal.SIGINT, before)


def _read(console: Console) -> str | None:
    """A line of the user; None at the end."""
    try:
        if sys.stdin.isatty():
            return console.input("[bold green]> [/]")
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    if line:
        console.print(f"> {line.rstrip()}", markup=False, highlight=False)
    return line or None
