"""What a memory costs at a decoding step on the CPU, arithmetic aside: microseconds per layer and
token above transformers' own cache.

    python bench/decode_cost.py [--layers 24] [--steps 30] [--rounds 40] [--profile] [--json FILE]

A step is what an attention module does with a cache: ``update`` and the attention function, layer
by layer, on tensors so small that it is all Python and dispatch. Both caches see the same tokens
and take turns step by step on one thread; the fastest step of each counts, in CPU time, because a
busy machine takes turns too. No memory updates: the period is longer than the run.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from namm_ext import NAMM, NAMMCache, NAMMConfig
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PROMPT, N_UP, HEADS, GROUPS, DIM = 32, 4096, 2, 2, 8
#: What the difference is held to, in microseconds.
TARGET = 25.0


def make_model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=HEADS * GROUPS, num_key_value_heads=HEADS, head_dim=DIM,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Stepper:
    """One cache, and the attention modules that it serves."""

    def __init__(self, model: LlamaForCausalLM, cache: Any, attention: str) -> None:
        self.modules = [layer.self_attn for layer in model.model.layers]
        self.cache, self.attention = cache, ALL_ATTENTION_FUNCTIONS[attention]

    def __call__(self, q: torch.Tensor, kv: torch.Tensor) -> float:
        """CPU seconds of one step of all layers."""
        start = time.thread_time()
        for i, module in enumerate(self.modules):
            # A model's keys and values are new tensors in each layer.
            k, v = self.cache.update(kv.detach(), kv.detach(), i)
            self.attention(module, q, k, v, None, dropout=0.0, scaling=0.35)
        return time.thread_time() - start


def makers(layers: int) -> dict[str, Callable[[], Stepper]]:
    stock, ours = make_model(layers), make_model(layers)
    policy = NAMM(NAMMConfig(n_up=N_UP))
    return {
        "DynamicCache": lambda: Stepper(stock, DynamicCache(config=stock.config), "sdpa"),
        "NAMMCache": lambda: Stepper(ours, NAMMCache(ours, policy), "namm"),
    }


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, HEADS * GROUPS, length, DIM), torch.ones(1, HEADS, length, DIM)


def measure(layers: int, steps: int, rounds: int) -> dict[str, float]:
    """Microseconds per layer of the fastest step, by cache."""
    make = makers(layers)
    best = dict.fromkeys(make, float("inf"))
    prompt, token = tokens(PROMPT), tokens(1)
    for _ in range(rounds):
        steppers = {name: new() for name, new in make.items()}
        for stepper in steppers.values():
            stepper(*prompt)
        for _ in range(steps):
            for name, stepper in steppers.items():
                best[name] = min(best[name], stepper(*token) / layers * 1e6)
    return best


def profile(layers: int, steps: int) -> None:
    stepper = makers(layers)["NAMMCache"]()
    stepper(*tokens(PROMPT))
    token = tokens(1)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        stepper(*token)
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(28)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30, help="tokens of one sequence")
    parser.add_argument("--rounds", type=int, default=40, help="sequences")
    parser.add_argument("--profile", action="store_true", help="where the time goes instead")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.profile:
        with torch.inference_mode():
            profile(args.layers, args.steps * args.rounds)
        return 0
    rows = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            best = measure(args.layers, args.steps, args.rounds)
        more = best["NAMMCache"] - best["DynamicCache"]
        rows.append({"mode": mode.__name__, **best, "more": more})
        times = "   ".join(f"{name} {us:.1f} us" for name, us in best.items())
        verdict = "PASS" if more <= TARGET else "FAIL"
        print(f"{mode.__name__:15} {times}   {more:.1f} us more, at most {TARGET:.0f}: {verdict}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
