"""How much faster than plain PyTorch, and how far from the floor: one interleaved run of minima.

``python bench/ratios.py [--quick] [--json FILE] [--threads N] [--isa NAME] [--only TEXT]``

Every case is checked against the law or the plain expression first; nothing is printed for a case
that fails. With one thread the clock is CPU time, so other jobs disturb less.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch

# op, N, shape, dtype, whether the plain expression can run (it needs memory of W * N * Hq and N^2)
FULL = [
    *(
        (op, 4096, "llama", dtype, True)
        for op in ("features", "bam", "select", "compact", "step")
        for dtype in ("fp32", "bf16")
    ),
    ("features", 4096, "llama", "fp16", False),
    ("received", 4096, "llama", "fp32", False),
    ("step", 1024, "llama", "fp32", True),
    ("step", 1024, "llama", "bf16", True),
    *(
        (op, 256, "bundled", dtype, True)
        for op in ("features", "bam", "step")
        for dtype in ("fp32", "bf16")
    ),
]
LONG = [
    *((op, n, "llama", "fp32", False) for n in (16384, 65536) for op in ("features", "compact")),
    ("step", 16384, "llama", "bf16", False),
    ("step", 65536, "llama", "bf16", False),
]
QUICK = [("features", 128, "bundled", "fp32", True), ("step", 128, "bundled", "bf16", True)]


def peak_flops() -> float:
    """FLOP/s of a large float32 matrix product, the best this machine's PyTorch reaches."""
    a = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, a)
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def peak_growth_mb(run: Callable[[], Any]) -> float | None:
    """Most resident memory during a run, results included, above that before it (Linux)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None

    def resident() -> float:
        return int(statm.read_text().split()[1]) * 4096 / 2**20

    start, done = resident(), threading.Event()
    most = [start]

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    most[0] = max(most[0], resident())
    done.set()
    watcher.join()
    del result
    return most[0] - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the figures to this file as well")
    parser.add_argument("--quick", action="store_true", help="two small cases, as a smoke test")
    parser.add_argument("--long", action="store_true", help="also N = 16k and 64k (minutes)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="force an instruction set of the CPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.isa:
        torch.ops.namm_ext.force_isa(arguments.isa)
    isa = torch.ops.namm_ext.cpu_isa()
    peak = peak_flops()
    print(
        f"torch {torch.__version__}, {platform.machine()} {isa}, {arguments.threads} thread(s), "
        f"fp32 mm {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'case':<32}{'ours ms':>10}{'plain ms':>10}{'ratio':>7}{'floor ms':>10}{'x floor':>9}")
    rows, failed = [], 0
    wanted = QUICK if arguments.quick else FULL + (LONG if arguments.long else [])
    for op, num_keys, shape, dtype, plain in wanted:
        if arguments.only not in f"{op}-{shape}-N{num_keys}-{dtype}":
            continue
        with torch.no_grad():
            case = cases.make(op, num_keys, shape, dtype, plain)
            try:
                case.check()
            except AssertionError as error:
                print(f"{case.name:<32} FAILED: {error}")
                failed += 1
                continue
            best = cases.interleaved(case, arguments.rounds if num_keys <= 4096 else 1)
            growth = peak_growth_mb(case.ours)
        ours, plain_time, floor = best["ours"], best.get("plain"), best.get("floor")
        segments = cases.SHAPES[shape].batch_size * cases.SHAPES[shape].num_kv_heads
        row = {
            "case": case.name, "isa": isa, "threads": arguments.threads,
            "ours_ms": ours * 1e3,
            "plain_ms": plain_time * 1e3 if plain_time else None,
            "ratio": plain_time / ours if plain_time else None,
            "floor": case.floor_name,
            "floor_ms": floor * 1e3 if floor else None,
            "times_floor": ours / floor if floor else None,
            "ns_per_token": ours * 1e9 / (segments * num_keys),
            "peak_growth_mb": growth,
        }  # fmt: skip
        if op == "features":
            s = cases.SHAPES[shape]
            flops = 2 * segments * s.num_groups * (16 + s.n_up) * num_keys * s.head_dim
            row["share_of_fp32_mm_peak"] = flops / ours / peak
        rows.append(row)
        print(
            f"{case.name:<32}{row['ours_ms']:>10.2f}"
            + (
                f"{row['plain_ms']:>10.1f}{row['ratio']:>7.1f}"
                if plain_time
                else f"{'-':>10}{'-':>7}"
            )
            + (f"{row['floor_ms']:>10.2f}{row['times_floor']:>9.2f}" if floor else "")
            + f"  {case.floor_name}",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "fp32_mm_flops": peak, "rows": rows}, file, indent=1
            )
            file.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
