"""What it costs that a memory of latents holds them once: `attend` with keys that are values too.

    python bench/latents.py

DeepSeek-V3's sizes (latents of 512 numbers, 64 rotated ones) and 16 query heads, one thread: values
of their own against none, in turns, the least CPU time of twelve calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from namm_ext import ops, testing
from torch import Tensor

RANK, ROPE, HEADS, TOKENS = 512, 64, 16, 4096


def attention(dtype: torch.dtype, columns: int, head_dim_v: int) -> Callable[[], object]:
    """A call of as many newest queries over a store with values of ``head_dim_v`` numbers."""
    dim = ROPE + RANK
    store = testing.ragged_store([TOKENS], head_dim=dim, head_dim_v=head_dim_v, dtype=dtype)
    q = torch.randn(1, HEADS, columns, dim).to(dtype)

    def count(n: int) -> Tensor:
        return torch.tensor([n], dtype=torch.int32)

    where = count(0), count(columns), count(int(store.newest()[0]) + 1 - columns)
    return lambda: ops.attend(q, store.with_values, *where, softmax_scale=dim**-0.5)


def main() -> None:
    torch.set_num_threads(1)
    print("| | queries | k and v | k alone | ratio |\n| --- | ---: | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        for columns in (1, 64):
            calls = [attention(dtype, columns, dim) for dim in (RANK, 0)]
            best = [float("inf")] * 2
            for _ in range(12):
                for i, call in enumerate(calls):
                    start = time.thread_time()
                    call()
                    best[i] = min(best[i], time.thread_time() - start)
            own, none = (1000 * seconds for seconds in best)
            name = str(dtype).removeprefix("torch.")
            print(f"| {name} | {columns} | {own:.2f} ms | {none:.2f} ms | {none / own:.2f} |")


if __name__ == "__main__":
    main()
