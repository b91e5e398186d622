"""The figures of a CUDA benchmark: case by case, written at once, whatever happens to a case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def environment(device: str) -> dict[str, str]:
    """What a figure depends on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent, check=False,
    )  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "commit": os.environ.get("NAMM_CHECK_COMMIT") or commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def device_lost() -> bool:
    """Whether CUDA fails in this process from now on, as after an illegal access."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Report:
    """Runs cases one by one. A case that fails becomes a row with its error.

    After an error that CUDA does not recover from, this process is replaced by one that goes on
    behind the case: ``--skip N`` on its command line, N rows in the file.

    Args:
        out: JSON file, written after every row; None for none.
        device: ``"cuda"`` or ``"cpu"``.
        skip: so many cases were done by the process before this one.
        facts: more to write beside the rows.
    """

    def __init__(self, out: Path | None, device: str, skip: int = 0, **facts: Any) -> None:
        self.out, self.device, self.skip = out, device, skip
        self.head = {**environment(device), **facts}
        self.rows: list[dict[str, Any]] = []
        if out and skip:
            self.rows = json.loads(out.read_text())["rows"]
        self.num_cases = 0

    @property
    def failures(self) -> int:
        """Rows with an error."""
        return sum("error" in row for row in self.rows)

    def run(self, name: str, case: Callable[[], Any], show: Callable[[Any], str]) -> None:
        """Run a case, print and write its row.

        Args:
            name: says which case failed.
            case: returns a dataclass of figures.
            show: makes a line of it.
        """
        self.num_cases += 1
        if self.num_cases <= self.skip:
            return
        failed = False
        try:
            row = case()
            self.rows.append(asdict(row))
            line = show(row)
        except Exception as error:
            failed = True
            what = (str(error).strip() or "no message").splitlines()[0]
            self.rows.append({"case": name, "error": f"{type(error).__name__}: {what}"})
            line = f"{name}  FAILED: {self.rows[-1]['error']}"
        print(line, flush=True)
        if self.out:
            self.out.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1))
        if self.device != "cuda":
            return
        if failed and device_lost() and self.out:
            print("the device is lost to this process: a new one goes on", flush=True)
            os.execv(sys.executable, [sys.executable, *sys.argv, "--skip", str(self.num_cases)])
        torch.cuda.empty_cache()
