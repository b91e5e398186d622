"""Where the golden vectors are."""

from __future__ import annotations

import os
from pathlib import Path


def golden_dir() -> Path:
    """Folder of the golden vectors: NAMM_GOLDEN_DIR, or the one next to this file."""
    return Path(os.environ.get("NAMM_GOLDEN_DIR") or Path(__file__).parent / "golden")
