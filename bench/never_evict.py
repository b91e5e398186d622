"""What a memory costs that never forgets: a model's decoding against transformers' own cache.

    python bench/never_evict.py [--model smollm2-135m] [--length 4096] [--json FILE]

Both caches read the same context and then decode the same tokens, in turns, token by token, for
some periods of the memory; updates that score every token and keep them all are counted in. One
thread, CPU time, since a busy machine takes turns too. For each token of a period its least time
over the periods counts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from namm_ext import NAMM, NAMMCache, corpus, zoo
from namm_ext.cache import borrow, cache_keyword
from namm_ext.policy import Policy
from transformers import DynamicCache

#: What the ratio is held to.
TARGET = 1.10


class Decoder:
    """A model and a cache that go on from a context."""

    def __init__(self, model: Any, policy: Policy | None) -> None:
        self.model, self.attention = model, None if policy is None else "namm"
        config = model.config
        self.cache = DynamicCache(config=config) if policy is None else NAMMCache(model, policy)

    def __call__(self, ids: torch.Tensor) -> float:
        """CPU seconds of reading these, and the next token's logits in ``self.logits``."""
        with borrow(self.model, self.attention):
            start = time.process_time()
            given = {cache_keyword(self.model): self.cache, "use_cache": True}
            self.logits = self.model(ids, logits_to_keep=1, **given).logits
            return time.process_time() - start


@torch.inference_mode()
def measure(model: Any, policy: Policy, ids: torch.Tensor, periods: int) -> dict[str, float]:
    """Milliseconds per token of both, and the largest difference of their logits."""
    decoders = {"DynamicCache": Decoder(model, None), "NAMMCache": Decoder(model, policy)}
    n_up = policy.n_up
    steps = ids.shape[1] - periods * n_up
    for decoder in decoders.values():
        decoder(ids[:, :steps])
    times = torch.zeros(len(decoders), periods, n_up, dtype=torch.float64)
    apart = 0.0
    for period in range(periods):
        for step in range(n_up):
            token = ids[:, steps + period * n_up + step, None]
            for row, decoder in zip(times, decoders.values(), strict=True):
                row[period, step] = decoder(token)
            ours, stock = decoders["NAMMCache"].logits, decoders["DynamicCache"].logits
            apart = max(apart, (ours - stock).abs().max().item())
    kept = decoders["NAMMCache"].cache.report().kept_fraction
    if kept != 1:
        raise ArithmeticError(f"the memory should have kept every token, but kept {kept:.1%}")
    best = 1e3 * times.amin(1).mean(1)
    return {**dict(zip(decoders, best.tolist(), strict=True)), "logits_apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="of the zoo, or a folder")
    parser.add_argument("--policy", help="the bundled one of the model")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the context")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--periods", type=int, default=3, help="updates while decoding")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    policy = NAMM.from_pretrained(args.policy or f"bundled:{args.model}")
    policy = policy.with_budget(size=2 * args.length, threshold=None)
    tokenizer = zoo.load_tokenizer(args.model)
    text = "\n".join(corpus.load_documents("test"))
    count = args.length + args.periods * policy.n_up
    ids = torch.tensor([tokenizer.encode(text[: 8 * count])[:count]])
    rows = []
    for dtype in args.dtype:
        model = zoo.load_model(args.model, dtype=getattr(torch, dtype))
        row: dict[str, Any] = {"dtype": dtype, **measure(model, policy, ids, args.periods)}
        row["ratio"] = row["NAMMCache"] / row["DynamicCache"]
        rows.append(row)
        both = "   ".join(f"{name} {row[name]:.1f} ms" for name in ("DynamicCache", "NAMMCache"))
        verdict = "PASS" if row["ratio"] <= TARGET else "FAIL"
        print(
            f"{dtype:9} {both}   ratio {row['ratio']:.2f}, at most {TARGET:.2f}: {verdict}   "
            f"logits {row['logits_apart']:.1e} apart",
            flush=True,
        )
    if args.json:
        settings = {"model": args.model, "length": args.length, "n_up": policy.n_up}
        content = {"settings": {**settings, "torch": torch.__version__}, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
