"""The Python of a page, as the installed transformers wants it."""

from __future__ import annotations

import re
from pathlib import Path

from namm_ext.cache import cache_keyword
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parent.parent
#: What a call hands its cache to, by the class instead of a model.
KEYWORD = cache_keyword(LlamaForCausalLM.__new__(LlamaForCausalLM))


def run_page(page: str) -> dict[str, object]:
    """Run the Python blocks of a page one after the other; the names that they leave."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks, f"{page} has no Python"
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        code = re.sub(r"\bcache=cache\b", f"{KEYWORD}=cache", block)
        exec(compile(code, page, "exec"), names)
    return names
