"""How much faster than plain PyTorch, and how far from the floor: one interleaved run of minima.

``python bench/ratios.py [--quick] [--json FILE] [--threads N] [--isa NAME] [--only TEXT]`` measures
and ends with what was to be reached; ``python bench/ratios.py --markdown FILE`` prints the table of
the README from such a file.

Every case is checked against the law or the plain expression first; nothing is printed for a case
that fails. With one thread the clock is CPU time, so other jobs disturb less. What depends on
memory rotates over half a GB of equal stores, at every N (bench/timing.py).

"Share of the fp32 peak" is against the FLOP/s of a large ``torch.mm`` in the same run, the best
this PyTorch reaches on the machine, and counts the products of Q K^T alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import timing
import torch

# op, N, shape, dtype, whether the plain expression can run (it needs memory of W * N * Hq and N^2)
# compact of long stores comes first: later, the allocator would have room left over from other
# cases, and a new store would not cost the page faults that it costs in a model.
FULL = [
    *(("compact", n, "llama", "fp32", True) for n in (65536, 16384)),
    *(
        (op, 4096, "llama", dtype, True)
        for op in ("features", "bam", "select", "compact", "step", "prefill", "decode")
        for dtype in ("fp32", "bf16")
    ),
    ("features", 4096, "llama", "fp16", False),
    ("received", 4096, "llama", "fp32", False),
    *((op, 1024, "llama", dtype, True) for op in ("step",) for dtype in ("fp32", "bf16")),
    *(
        (op, 256, "bundled", dtype, True)
        for op in ("features", "bam", "step", "prefill", "decode_all")
        for dtype in ("fp32", "bf16")
    ),
    *(
        (op, n, "llama", "fp32", op != "features")
        for n in (16384, 65536)
        for op in ("features", "decode")
    ),
    *(("decode", n, "llama", "bf16", True) for n in (16384, 65536)),
    *(("decode_all", 16384, "llama", dtype, True) for dtype in ("fp32", "bf16")),
    ("step", 16384, "llama", "bf16", False),
    ("step", 65536, "llama", "bf16", False),
]
QUICK = [
    ("features", 128, "bundled", "fp32", True),
    ("step", 128, "bundled", "bf16", True),
    ("decode_all", 64, "bundled", "bf16", True),
]

Report = dict[str, Any]


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
    """Most resident memory during a run, results included, above that before it (Linux, glibc)."""
    statm = Path("/proc/self/statm")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if not statm.exists() or trim is None:
        return None
    trim(0)  # what earlier runs left behind in the allocator would hide the growth

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


def environment(threads: int) -> Report:
    """What a figure depends on."""
    cpu = platform.processor() or "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(re.findall(r"^(.+?)\s*: (.+)$", info.read_text(), re.MULTILINE))
        family = f"family {fields.get('cpu family')}, model {fields.get('model')}"
        cpu = f"{fields.get('model name', cpu)} ({family})"

    def git(*command: str) -> str:
        result = subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent,
            check=False,
        )  # fmt: skip
        return result.stdout.strip()

    dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + dirty,
        "cpu": cpu,
        "isa": torch.ops.namm_ext.cpu_isa(),
        "threads": threads,
        "torch": torch.__version__,
    }


def measure(case: timing.Case, op: str, num_keys: int, rounds: int, peak: float) -> Report:
    """One row of the table."""
    best = timing.interleaved(case, rounds)
    ours, plain, floor = best["ours"], best.get("plain"), best.get("floor")
    row: Report = {
        "case": case.name,
        "op": op,
        "num_keys": num_keys,
        "ours_ms": ours * 1e3,
        "plain_ms": plain * 1e3 if plain else None,
        "ratio": plain / ours if plain else None,
        "floor": case.floor_name,
        "floor_ms": floor * 1e3 if floor else None,
        "times_floor": ours / floor if floor else None,
        "ns_per_token": ours * 1e9 / case.num_tokens,
    }
    if op == "features":
        row["share_of_fp32_mm_peak"] = case.flops / ours / peak
    if op == "step":
        row["peak_growth_mb"] = peak_growth_mb(case.ours)
    return row


def acceptance(report: Report) -> list[Report]:
    """What was to be reached, as far as the rows tell: line, value, limit, whether it holds.

    "At least" lines have ``at_least``. An instruction set below AVX-512 has its own limit for the
    step; the bare product is a fair floor only where PyTorch's may not use a wider one, that is
    where nothing was forced.
    """
    rows = {row["case"]: row for row in report["rows"]}
    wide = report["isa"] not in ("base", "avx2")
    lines: list[Report] = []

    def line(what: str, value: float | None, limit: float, at_least: bool) -> None:
        if value is not None:
            holds = value >= limit if at_least else value <= limit
            lines.append(
                {"line": what, "value": value, "limit": limit, "at_least": at_least, "holds": holds}
            )

    def get(case: str, field: str) -> float | None:
        return rows[case][field] if case in rows else None

    for dtype, limit in (("fp32", 8.0), ("bf16", 12.0)):
        name = f"step-llama-N4096-{dtype}"
        line(f"{name}: plain / ours", get(name, "ratio"), limit if wide else 4.0, True)
    if not report.get("forced_isa"):
        name = "features-llama-N4096-fp32"
        line(f"{name}: ours / bare fp32 mm", get(name, "times_floor"), 1.1, False)
    for op in ("features", "compact", "decode"):
        few, many = (get(f"{op}-llama-N{n}-fp32", "ns_per_token") for n in (4096, 65536))
        if few and many:
            line(f"{op}: time per token, 64k / 4k", many / few, 1.3, False)
    growth = get("step-llama-N65536-bf16", "peak_growth_mb")
    line("step-llama-N65536-bf16: MB above the cache", growth, 2048.0, False)
    for n in (16384, 65536):
        for dtype in ("fp32", "bf16"):
            name = f"decode-llama-N{n}-{dtype}"
            line(f"{name}, 25 % kept: SDPA / ours", get(name, "ratio"), 3.0, True)
    for name in ("prefill-llama-N4096", "decode_all-llama-N16384"):
        for dtype in ("fp32", "bf16"):
            line(f"{name}-{dtype}: SDPA / ours", get(f"{name}-{dtype}", "ratio"), 1.0, True)
    return lines


def show(row: Report) -> str:
    """One line of the printed table."""
    text = f"{row['case']:<32}{row['ours_ms']:>10.2f}"
    text += (
        f"{row['plain_ms']:>10.1f}{row['ratio']:>7.1f}" if row["ratio"] else f"{'-':>10}{'-':>7}"
    )
    if row["floor_ms"]:
        text += f"{row['floor_ms']:>10.2f}{row['times_floor']:>9.2f}"
    return f"{text}  {row['floor']}"


#: rows of the README's table: what it says, op, N, shape
README_ROWS = [
    ("whole update, 4,096 tokens", "step", 4096, "llama"),
    ("whole update, 1,024", "step", 1024, "llama"),
    ("attention, prefill 512 on 4,096", "prefill", 4096, "llama"),
    ("attention, decode, 25 % of 16,384 kept", "decode", 16384, "llama"),
    ("attention, decode, 25 % of 65,536 kept", "decode", 65536, "llama"),
    ("whole update, bundled model, 128 rows of 256", "step", 256, "bundled"),
]


def markdown(report: Report) -> str:
    """The table of the README."""
    rows = {row["case"]: row for row in report["rows"]}
    lines = [
        "| one layer | fp32 ms | times faster | bf16 ms | times faster |",
        "|---|---|---|---|---|",
    ]
    for what, op, num_keys, shape in README_ROWS:
        cells = []
        for dtype in ("fp32", "bf16"):
            row = rows.get(f"{op}-{shape}-N{num_keys}-{dtype}")
            ratio = row and row["ratio"]
            cells += [f"{row['ours_ms']:.3g}" if row else "-", f"{ratio:.1f}" if ratio else "-"]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {' | '.join([what, *cells])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", type=Path, help="only print the README's table of this file")
    parser.add_argument("--quick", action="store_true", help="three small cases, as a smoke test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="force an instruction set of the CPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7, help="of long cases fewer are taken")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        print(markdown(json.loads(arguments.markdown.read_text())))
        return 0
    torch.set_num_threads(arguments.threads)
    if arguments.isa:
        torch.ops.namm_ext.force_isa(arguments.isa)
    peak = peak_flops()
    if arguments.quick:
        timing.ROTATE_BYTES = 2**20
    report: Report = {
        **environment(arguments.threads), "forced_isa": arguments.isa, "fp32_mm_flops": peak,
        "rows": [],
    }  # fmt: skip
    print(
        f"torch {report['torch']}, {report['cpu']}, {report['isa']}, {arguments.threads} "
        f"thread(s), fp32 mm {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'case':<32}{'ours ms':>10}{'plain ms':>10}{'ratio':>7}{'floor ms':>10}{'x floor':>9}")
    failed = 0
    for op, num_keys, shape, dtype, plain in QUICK if arguments.quick else FULL:
        if arguments.only not in f"{op}-{shape}-N{num_keys}-{dtype}":
            continue
        rounds = 1 if op == "step" and num_keys > 4096 else arguments.rounds
        with torch.no_grad():
            case = cases.make(op, num_keys, shape, dtype, plain)
            try:
                case.check()
            except AssertionError as error:
                print(f"{case.name:<32} FAILED: {error}")
                failed += 1
                continue
            row = measure(case, op, num_keys, rounds, peak)
        report["rows"].append(row)
        print(show(row), flush=True)
    report["acceptance"] = acceptance(report)
    for line in report["acceptance"]:
        verdict = "PASS" if line["holds"] else "FAIL"
        bound = "at least" if line["at_least"] else "at most"
        print(f"{verdict}  {line['line']:<52}{line['value']:>9.2f}  {bound} {line['limit']:g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
