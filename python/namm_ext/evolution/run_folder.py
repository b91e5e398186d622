"""The folder of a run: what it is a run of, its state, its log, and one process at a time.

::

    config.json    the settings, and fingerprints of model, tokenizer and data
    fit.npz        while a start is fitted: the state of the fit
    state.npz      afterwards: all that was asked, told and found
    log.jsonl      one record per generation, for people; the state has them too
    policy/        the memory that validated best so far
    .lock          held by the process that works on the run

Each file is whole at any moment (:func:`namm_ext._files.write_file`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._files import lock_folder, write_file

CONFIG_FILE, FIT_FILE, STATE_FILE = "config.json", "fit.npz", "state.npz"
LOG_FILE, POLICY_DIR = "log.jsonl", "policy"
FORMAT = "namm_ext.evolve 2"


class RunFolder:
    """The files of a run; :meth:`open` makes one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.policy = path / POLICY_DIR

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str]) -> Iterator[RunFolder]:
        """A folder that this process alone works on, to the end of the ``with`` block.

        Args:
            path: made if it is missing; otherwise empty or with a run in it.

        Raises:
            ValueError: if it holds something else or another process works on it.
        """
        folder = cls(Path(path))
        if folder.path.is_file():
            raise ValueError(f"evolve: output_dir must be a folder, got the file {folder.path}")
        names = [path.name for path in folder.path.glob("[!.]*")]
        if names and not folder._holds_run():
            raise ValueError(
                f"evolve: output_dir must be empty or hold a run, got {folder.path} with "
                f"{min(names)}"
            )
        with lock_folder(folder.path):
            yield folder

    def _holds_run(self) -> bool:
        if (self.path / STATE_FILE).exists() or (self.path / FIT_FILE).exists():
            return True
        try:
            return "format" in json.loads((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False

    def check(self, description: Mapping[str, Any]) -> None:
        """Note what this is a run of, or refuse to go on with a run of something else.

        Args:
            description: for JSON, by part; where a part is a mapping, its entries are compared.

        Raises:
            ValueError: if the folder's run has another description, naming what differs, or none
                that can be read.
        """
        path = self.path / CONFIG_FILE
        if not any((self.path / name).exists() for name in (STATE_FILE, FIT_FILE)):
            values = {"format": FORMAT, **description}
            write_file(path, lambda file: file.write(_json(values, indent=1).encode()))
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["format"] != FORMAT:
                raise ValueError(f"format {stored['format']!r}")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"evolve: {path} must be the description of a run of this version, got {error!r}"
            ) from error
        ours, theirs = _flat(json.loads(_json(description))), _flat(stored)
        changed = [name for name in ours if ours[name] != theirs.get(name)]
        if changed:
            raise ValueError(
                f"evolve: {self.path} holds a run of something else; these differ: "
                f"{', '.join(changed)}"
            )

    def load(self, name: str, keys: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of a state file; None if there is no such file.

        Raises:
            ValueError: if it is damaged or lacks one of ``keys``.
        """
        path = self.path / name
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                state = {key: file[key] for key in file.files}
        except Exception as error:  # damaged zip files make numpy raise almost anything
            raise ValueError(f"evolve: {path} must be a state file, got a damaged one") from error
        missing = [key for key in keys if key not in state]
        if missing:
            raise ValueError(
                f"evolve: {path} must be a state of this program, got one without {missing[0]!r}"
            )
        return state

    def save(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Write a state file."""
        write_file(self.path / name, lambda file: np.savez(file, **arrays))

    def remove(self, name: str) -> None:
        """Remove a state file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def append_to_log(self, record: Mapping[str, Any]) -> None:
        """One line more; the state that has it too is written before."""
        with open(self.path / LOG_FILE, "a", encoding="utf-8") as log:
            log.write(_json(record) + "\n")

    def rewrite_log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A run that is killed between state and log lacks a line, or has half of one."""
        text = "".join(_json(record) + "\n" for record in records)
        write_file(self.path / LOG_FILE, lambda file: file.write(text.encode()))


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, allow_nan=False, **options)


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name if key is None else f"{name}.{key}": value
        for name, part in description.items()
        for key, value in (part.items() if isinstance(part, dict) else [(None, part)])
    }
