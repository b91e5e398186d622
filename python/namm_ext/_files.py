"""Files and folders that survive a crash and a second process. Standard library only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file as a whole: whoever reads, now or after a crash, sees the old or the new.

    Args:
        path: of the file.
        write: called with a binary file to write the content to.
    """
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. The lock ends with the process, however it ends.

    Args:
        folder: made if it is missing.

    Raises:
        ValueError: if another one has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process works on the run in {folder}") from error
        yield
