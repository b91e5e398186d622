"""A Llama-3-8B with random weights end to end: full cache against a memory that keeps a quarter.

``python bench/bench_e2e_cuda.py [--out FILE.json] [--seconds S] [--smoke]`` prints prefill time,
decode speed and peak memory for each context, batch and memory. Random weights have the speed of
trained ones. The full cache is transformers' own (SDPA, ``DynamicCache``), prefilled in chunks of
4096 tokens; the memory is a ``NAMMCache`` with random parameters and a budget of a quarter of
the context, updated every 512 tokens, whose decoding is launched op by op or ("graph") as one CUDA
graph. Cases start until S seconds are over; what was not reached and what cannot fit is listed, and
a case that fails does not stop the others. ``--smoke`` runs a tiny model once, also on a machine
without a GPU.

Peak is what tensors used at most, reserved what torch's allocator took from the device for them.
Every update makes a new, larger store; set ``PYTORCH_ALLOC_CONF=expandable_segments:True``, or the
old ones are too small for any later request and stay reserved.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from cuda_report import Report
from namm_ext import NAMM, NAMMCache, NAMMConfig, graphed

CHUNK = 4096
DECODE_TOKENS = 64


@dataclass
class Row:
    """One case; times in seconds, memory in GB beyond the weights."""

    context: int
    batch_size: int
    memory: str
    prefill_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    peak_gb: float = 0.0
    reserved_gb: float = 0.0
    cache_gb: float = 0.0
    note: str = ""


def make_model(device: str, smoke: bool) -> Any:
    """Llama-3-8B shapes in bf16, normal weights."""
    sizes: dict[str, Any] = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 1 << 18, "rope_theta": 500000.0, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    if smoke:
        sizes |= {
            "vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
        }  # fmt: skip
    config = transformers.LlamaConfig(**sizes)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_policy(context: int) -> NAMM:
    """A random NAMM whose cap lets a quarter of the context stay."""
    config = NAMMConfig(n_up=min(512, context // 4))
    generator = torch.Generator().manual_seed(0)
    params = 0.05 * torch.randn(config.num_params, generator=generator)
    mean, var = torch.full((17,), 0.5), torch.full((17,), 0.2)
    return NAMM(config, params, mean, var, budget=context // 4)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def kv_bytes(cache: Any) -> int:
    """Bytes of keys and values a transformers cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def measure(model: Any, device: str, context: int, batch_size: int, memory: str) -> Row:
    row = Row(context, batch_size, memory)
    generator = torch.Generator().manual_seed(1)
    vocab = model.config.vocab_size
    ids = torch.randint(2, vocab, (batch_size, context), generator=generator).to(device)
    if memory == "full":
        model.set_attn_implementation("sdpa")
        cache: Any = transformers.DynamicCache(config=model.config)
    else:
        cache = NAMMCache(model, make_policy(context))
    allocated = reserved = 0
    if device == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
    chunk = min(CHUNK, max(context // 4, 1))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    synchronize(device)
    start = time.perf_counter()
    for first in range(0, context, chunk):
        token = forward(ids[:, first : first + chunk])
    synchronize(device)
    row.prefill_s = time.perf_counter() - start

    if memory == "graph":
        step = graphed(model, cache)

        def forward(tokens: torch.Tensor) -> torch.Tensor:
            return step(tokens).argmax(-1, keepdim=True)

    for _ in range(3):
        token = forward(token)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = forward(token)
    synchronize(device)
    row.decode_tokens_per_s = batch_size * DECODE_TOKENS / (time.perf_counter() - start)
    if device == "cuda":
        row.peak_gb = (torch.cuda.max_memory_allocated() - allocated) / 1e9
        row.reserved_gb = (torch.cuda.max_memory_reserved() - reserved) / 1e9
    row.cache_gb = (kv_bytes(cache) if memory == "full" else cache.report().kv_bytes) / 1e9
    return row


def full_cache_bytes(config: Any, context: int, batch_size: int) -> int:
    """Bytes of a bfloat16 cache that keeps everything.

    Args:
        config: the model's; its sizes of layers and heads count.
    """
    row = 2 * 2 * config.num_key_value_heads * config.head_dim
    return config.num_hidden_layers * row * context * batch_size


def make_case(
    model: Any, device: str, context: int, batch_size: int, memory: str, end: float
) -> Row:
    """The measured row, or one that says why it was not measured.

    Args:
        end: the time on `time.monotonic` after which nothing begins.
    """
    if time.monotonic() > end:
        return Row(context, batch_size, memory, note="not reached in time")
    if device == "cuda" and memory == "full":
        need = full_cache_bytes(model.config, context, batch_size)
        if need > torch.cuda.mem_get_info()[0]:
            return Row(context, batch_size, memory, note=f"cannot fit, needs {need / 1e9:.0f} GB")
    if batch_size == 1:  # the first calls load kernels and choose algorithms
        measure(model, device, min(context, 8192), 1, memory)
    return measure(model, device, context, batch_size, memory)


def show(row: Row) -> str:
    head = f"{row.context:7} tokens  batch {row.batch_size}  {row.memory:5}"
    if row.note:
        return f"{head}  {row.note}"
    return (
        f"{head}  prefill {row.prefill_s:8.2f} s  decode {row.decode_tokens_per_s:8.1f} tokens/s  "
        f"peak {row.peak_gb:6.1f} GB, reserved {row.reserved_gb:6.1f} GB  "
        f"cache {row.cache_gb:6.2f} GB"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after so long")
    parser.add_argument("--smoke", action="store_true", help="tiny model, once, any device")
    parser.add_argument("--skip", type=int, default=0, help="cases done before, see cuda_report")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        parser.error("no GPU: only --smoke can run")
    end = time.monotonic() + args.seconds
    model = make_model(device, args.smoke)
    report = Report(args.out, device, args.skip)
    sizes = (
        [(256, 1), (256, 2)] if args.smoke else [(32768, 1), (32768, 8), (131072, 1), (131072, 8)]
    )
    for context, batch_size in sizes:
        # One graph from update to update, where there is a device that has them.
        graph = ("graph",) if device == "cuda" and context <= 32768 else ()
        for memory in ("full", "namm", *graph):
            report.run(
                f"{context} tokens  batch {batch_size}  {memory}",
                partial(make_case, model, device, context, batch_size, memory, end),
                show,
            )
    return int(report.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
