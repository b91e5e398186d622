"""gate_ of the newest 64 tokens in the 30 layers of SmolLM2-135M, against plain PyTorch.

``python bench/bench_gate.py [--threads N] [--isa NAME] [--keys N]`` prints milliseconds for all
layers together: the op, the plain expression on the same equal-length segments, and the floor, one
product of inputs that are there already with the weights. Minima of interleaved runs; with one
thread the clock is CPU time. Nothing is printed before the op agrees with the law in float64.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch
from layers import DTYPES
from namm_ext import ops, reference, testing
from namm_ext.values import Segments
from timing import Case, interleaved

LAYERS, HEADS, HEAD_DIM, NUM_NEW = 30, 3, 64, 64
NUM_INPUTS = HEADS * (2 * HEAD_DIM + 2)
OPTIONS = {"num_new": NUM_NEW, "rotary_dim": HEAD_DIM}


def make(num_keys: int, dtype: str) -> Case:
    """The case of all layers; N live rows per segment."""
    generator = torch.Generator().manual_seed(0)
    rows = HEADS * num_keys
    cu = torch.arange(HEADS + 1, dtype=torch.int32) * num_keys
    used = torch.full((HEADS,), num_keys, dtype=torch.int32)
    pos = torch.arange(num_keys, dtype=torch.int32).repeat(HEADS)
    stores = [
        Segments(
            *(torch.randn(rows, HEAD_DIM, generator=generator).to(DTYPES[dtype]) for _ in "kv"),
            pos, torch.zeros(rows, 18), cu, used,
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    weights = [torch.randn(HEADS, NUM_INPUTS, generator=generator) * 0.1 for _ in range(LAYERS)]
    bias, active = torch.zeros(HEADS), torch.tensor([True])
    ready, product = torch.randn(NUM_NEW, NUM_INPUTS), torch.empty(NUM_NEW, HEADS)

    def each(run: Callable[[Segments, torch.Tensor], object]) -> Callable[[], None]:
        def run_all() -> None:
            for store, weight in zip(stores, weights, strict=True):
                run(store, weight)

        return run_all

    def plain(store: Segments, weight: torch.Tensor) -> None:
        k, v = (
            t.view(HEADS, num_keys, -1)[:, -NUM_NEW:].transpose(0, 1).float()
            for t in (store.k, store.v)
        )
        x = reference.gate_inputs(k, v, rotary_dim=HEAD_DIM)
        gate = torch.addmm(bias, x, weight.T)
        store.state.view(HEADS, num_keys, -1)[:, -NUM_NEW:, -1] = gate.T

    def check() -> None:
        store, weight = stores[0], weights[0]
        exact = store.double()
        reference.gate_(exact, active, weight.double(), bias.double(), **OPTIONS)
        for run in (lambda: ops.gate_(store, active, weight, bias, **OPTIONS),
                    lambda: plain(store, weight)):  # fmt: skip
            store.state.zero_()
            run()
            error = float((store.state - exact.state).abs().max())
            assert error <= 2e-5, f"gate_: error {error:.1e}"

    return Case(
        f"gate-smollm2-N{num_keys}-{dtype}",
        each(lambda store, weight: ops.gate_(store, active, weight, bias, **OPTIONS)),
        each(plain),
        each(lambda _, weight: torch.mm(ready, weight.T, out=product)),
        check, "its product", LAYERS * NUM_NEW,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="instruction set; the best of this CPU by default")
    parser.add_argument("--keys", type=int, default=2048, help="live rows per segment")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| case | ours ms | plain ms | ratio | floor ms | ns per token |\n|---|---|---|---|---|---|"
    )
    with testing.force_isa(args.isa) if args.isa else contextlib.nullcontext(), torch.no_grad():
        for dtype in ("fp32", "bf16"):
            case = make(args.keys, dtype)
            case.check()
            ms = {what: 1e3 * best for what, best in interleaved(case, rounds=40).items()}
            ours, plain = ms["ours"], ms["plain"]
            print(
                f"| {case.name} | {ours:.2f} | {plain:.2f} | {plain / ours:.1f} | "
                f"{ms['floor']:.2f} | {1e6 * ours / case.num_tokens:.0f} |"
            )


if __name__ == "__main__":
    main()
