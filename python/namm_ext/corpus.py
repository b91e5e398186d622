"""Text that every Python installation carries: the standard library's source and documentation.

The corpus needs no download. A document belongs to the train, validation or test split by a hash
of its name alone, so a module is in the same split on every Python version (its text may differ a
little between versions, and a version may lack it).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")
_VALIDATION_PERCENT = 4
_TEST_PERCENT = 4

# Tests repeat themselves, alias and entity tables are not text, and installed packages differ
# from machine to machine.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
_SKIPPED_FILES = frozenset({"html/entities.py", "locale.py", "pydoc_data/topics.py"})
_MIN_CHARACTERS = 200


def percent_of(name: str) -> int:
    """A number in [0, 100) that depends on the name alone, to split data by.

    Example:
        >>> percent_of("asyncio/queues.py")
        79
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100


def split_of(module: str) -> str:
    """The split of a module, given its path relative to the standard library.

    Example:
        >>> split_of("asyncio/queues.py") in SPLITS
        True
    """
    percent = percent_of(module)
    if percent < _TEST_PERCENT:
        return "test"
    if percent < _TEST_PERCENT + _VALIDATION_PERCENT:
        return "validation"
    return "train"


@functools.cache
def load_documents(split: str) -> tuple[str, ...]:
    """The texts of one split, in the order of their names.

    A module contributes its source and, as a second document, its docstrings. Both are always in
    the same split, so nothing of a test module is seen in training.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        ValueError: if ``split`` is none of these.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    chosen = module_documents(lambda module: split_of(module) == split)
    documents = [*chosen, *_topic_documents(split)]
    return tuple(text for *_, text in sorted(documents) if len(text) >= _MIN_CHARACTERS)


def module_documents(wanted: Callable[[str], bool]) -> Iterator[tuple[str, str, str]]:
    """Yield ``(module, kind, text)`` for modules of the standard library, in no certain order.

    Args:
        wanted: says whether a module, given its path relative to the standard library, is read.

    Yields:
        Two documents per module: its ``"source"`` and its ``"docstrings"``.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            module = path.relative_to(root).as_posix()
            if module in _SKIPPED_FILES or not wanted(module):
                continue
            try:
                source = path.read_text(encoding="utf-8")
                docstrings = _docstrings(source)
            except (UnicodeDecodeError, SyntaxError):
                continue  # not every file is meant for this version of Python
            yield module, "source", source
            yield module, "docstrings", docstrings


def _topic_documents(split: str) -> Iterator[tuple[str, str, str]]:
    """Yield the language reference behind ``help()``; nothing where Python comes without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in topics.items():
        module = f"pydoc_data/topics/{topic}"
        if split_of(module) == split:
            yield module, "topic", text


def _docstrings(source: str) -> str:
    """The docstrings of a module, in the order of the file, separated by blank lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    ordered = sorted(nodes, key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in ordered if (text := ast.get_docstring(node)))
