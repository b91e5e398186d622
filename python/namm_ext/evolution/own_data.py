"""Problems of one's own files: plain text, or prompts with their answers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..corpus import percent_of
from ..policy import Policy
from ..tasks import reader_of
from .evaluate import Evaluation, evaluate_population, score_text
from .fingerprint import hash_texts, hash_tokenizer
from .problem import Batch, PlainContext, Problem, SizedProblem

_VALIDATION_PERCENT = 10


@dataclass(frozen=True, eq=False)
class TextProblem(SizedProblem):
    """A folder of text files: a good memory is one under which the text stays likely.

    The fitness is the mean log-likelihood per token of windows of the text. A file belongs to the
    training or the validation data by a hash of its name: about one in ten is for validation.

    Attributes:
        folder: searched with all its subfolders; hidden files and those that are not UTF-8 text
            are left out.
        tokenizer: of the model, from Hugging Face.
        documents: the texts by split, in the order of their files' names.

    Raises:
        ValueError: if there are fewer than two files of text.

    Example:
        A memory for one's own text::

            import namm_ext
            from namm_ext import zoo
            from namm_ext.evolution import EvolveConfig, ImitateConfig, TextProblem, evolve

            model, tokenizer = zoo.load_model(), zoo.load_tokenizer()
            problem = TextProblem("my/notes", tokenizer, lengths=(512, 1024))
            config = EvolveConfig(generations=50, imitation=ImitateConfig())
            result = evolve(model, problem, config, "runs/notes")
            inputs = tokenizer("A text to go on with", return_tensors="pt")
            with namm_ext.patch(model, result.policy):
                model.generate(**inputs, max_new_tokens=100)
    """

    metric: ClassVar[str] = "text_ll"

    folder: str | os.PathLike[str]
    tokenizer: Any
    _: KW_ONLY
    documents: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        texts = dict(_text_files(Path(self.folder)))
        if len(texts) < 2:
            raise ValueError(
                "TextProblem: folder must hold two text files at least, one to train and one to "
                f"validate on, got {os.fspath(self.folder)!r} with {len(texts)}"
            )
        split = _split({name: name for name in texts})
        documents = {part: tuple(texts[name] for name in names) for part, names in split.items()}
        object.__setattr__(self, "documents", documents)

    def draw(self, split: str, key: tuple[int, ...], length: int, size: int) -> list[PlainContext]:
        reader = reader_of(self.tokenizer, self.documents[split])
        bos = self.tokenizer.bos_token_id
        start = () if bos is None else (bos,)
        contexts = []
        for i in range(size):
            rng = np.random.default_rng([split == "train", length, i, *key])
            text, _ = reader.draw_window(length - len(start), rng)
            contexts.append(PlainContext((*start, *text.tolist())))
        return contexts

    def fitness(
        self, model: Any, policy: Policy, batch: Batch, num_candidates: int = 1
    ) -> Evaluation:
        return evaluate_population(
            model, policy, batch, num_candidates, score=score_text, weights={"text_ll": 1.0}
        )

    def fingerprint(self) -> dict[str, str]:
        return {
            **super().fingerprint(),
            "data": hash_texts([*self.documents["train"], "", *self.documents["validation"]]),
            "tokenizer": hash_tokenizer(self.tokenizer),
        }


@dataclass(frozen=True, eq=False)
class JsonlProblem(Problem):
    """Prompts with their answers, a JSON object ``{"prompt": ..., "answer": ...}`` on each line.

    The memory reads prompt and answer at once, the answer's tokens given (teacher forcing). The
    fitness is the mean log-likelihood per token of the answer; exact match is measured beside it. A
    prompt belongs to the training or the validation data by a hash of its text: about one in ten
    is for validation. The examples of a batch have like lengths and share a budget.

    Attributes:
        file: UTF-8; empty lines and other keys are ignored.
        tokenizer: of the model, from Hugging Face.
        chat_template: put the prompt into the tokenizer's chat template, as the user's message.
        num_examples: examples per generation, the same ones for all candidates.
        num_validation: most validation examples.
        contexts: the examples by split, shorter ones first.

    Raises:
        ValueError: if a line is not such an object or there are fewer than two prompts.

    Example:
        ::

            problem = JsonlProblem("questions.jsonl", tokenizer, chat_template=True)
            result = evolve(model, problem, EvolveConfig(), "runs/questions")
    """

    file: str | os.PathLike[str]
    tokenizer: Any
    _: KW_ONLY
    chat_template: bool = False
    num_examples: int = 8
    num_validation: int = 32
    contexts: Mapping[str, tuple[PlainContext, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_validation"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"JsonlProblem: {name} must be at least 1, got {getattr(self, name)}"
                )
        pairs = list(_read_pairs(Path(self.file)))
        if len({prompt for prompt, _ in pairs}) < 2:
            raise ValueError(
                "JsonlProblem: file must hold two different prompts at least, one to train and "
                f"one to validate on, got {os.fspath(self.file)!r} with {len(pairs)} lines"
            )
        split = _split({i: prompt for i, (prompt, _) in enumerate(pairs)})
        contexts = {
            part: tuple(
                sorted((self._context(*pairs[i]) for i in lines), key=lambda c: len(c.input_ids))
            )
            for part, lines in split.items()
        }
        object.__setattr__(self, "contexts", contexts)

    def _context(self, prompt: str, answer: str) -> PlainContext:
        encode = self.tokenizer.encode
        if self.chat_template:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
            ids = encode(text, add_special_tokens=False)
        else:
            bos = self.tokenizer.bos_token_id
            ids = [*([] if bos is None else [bos]), *encode(prompt, add_special_tokens=False)]
        answer_ids = encode(answer, add_special_tokens=False)
        if not ids or not answer_ids:
            raise ValueError(
                "JsonlProblem: prompt and answer must have a token at least, got "
                f"{prompt!r:.40} and {answer!r:.40}"
            )
        span = (len(ids), len(ids) + len(answer_ids))
        return PlainContext((*ids, *answer_ids), (span,))

    @property
    def context_lengths(self) -> tuple[int, ...]:
        """The longest one of each split; shorter ones evict less, or nothing."""
        return tuple(len(contexts[-1].input_ids) for contexts in self.contexts.values())

    def training_batch(self, seed: int, generation: int) -> Batch:
        contexts = self.contexts["train"]
        last = max(0, len(contexts) - self.num_examples)
        first = int(np.random.default_rng([seed, generation]).integers(last + 1))
        return contexts[first : first + self.num_examples]

    def validation_batches(self) -> list[Batch]:
        contexts = self.contexts["validation"]
        count = min(len(contexts), self.num_validation)
        places = np.linspace(0, len(contexts) - 1, count).round().astype(int)
        chosen = [contexts[place] for place in places]
        return [chosen[i : i + self.num_examples] for i in range(0, len(chosen), self.num_examples)]

    def settings(self) -> dict[str, Any]:
        return {
            "problem": type(self).__name__,
            "chat_template": self.chat_template,
            "num_examples": self.num_examples,
            "num_validation": self.num_validation,
        }

    def fingerprint(self) -> dict[str, str]:
        ids = [str(c.input_ids) for contexts in self.contexts.values() for c in contexts]
        return {
            **super().fingerprint(),
            "data": hash_texts(ids),
            "tokenizer": hash_tokenizer(self.tokenizer),
        }


def _split(names: Mapping[Any, str]) -> dict[str, list[Any]]:
    """Keys by the hash of their names; neither part is empty where there are two names."""
    order = sorted(set(names.values()), key=lambda name: (percent_of(name), name))
    validation = {name for name in order if percent_of(name) < _VALIDATION_PERCENT}
    validation = (validation | {order[0]}) - {order[-1]}
    return {
        "train": [key for key, name in names.items() if name not in validation],
        "validation": [key for key, name in names.items() if name in validation],
    }


def _text_files(folder: Path) -> Iterator[tuple[str, str]]:
    """Names relative to ``folder``, in order, and texts."""
    if not folder.is_dir():
        raise ValueError(f"TextProblem: folder must be a folder, got {str(folder)!r}")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name.as_posix(), text


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Prompt and answer of each line."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            found = values if isinstance(values, dict) else {}
            prompt, answer = found.get("prompt"), found.get("answer")
            if not isinstance(prompt, str) or not isinstance(answer, str):
                raise ValueError(
                    f"JsonlProblem: {path}, line {number} must be a JSON object with the texts "
                    f'"prompt" and "answer", got {line.strip():.60}'
                )
            yield prompt, answer
