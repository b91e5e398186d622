#!/usr/bin/env python3
"""Registers, stack, spills and static shared memory of every CUDA kernel, held to a baseline.

Reads the output of a build with ``-Xptxas -v`` (``tools/cuda_check.sh`` makes one) and fails if a
kernel spills registers, needs more registers than ``tools/ptxas_baseline.json`` allows, is missing
from it, or has gone from the build.

    python tools/ptxas_report.py build.log            compare
    python tools/ptxas_report.py build.log --update   write the baseline
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

BASELINE = Path(__file__).with_name("ptxas_baseline.json")
#: Registers a kernel may gain before the check fails: noise of the allocator.
SLACK = 4
FIELDS = ("registers", "stack", "spills", "shared")

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")

Usage = dict[str, int]
Report = dict[str, dict[str, Usage]]


def demangle(names: list[str]) -> list[str]:
    """Names without namespaces and argument lists: ``window_mma_kernel<bf16, 128, false>``."""
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = []
    for line in run.stdout.splitlines():
        name = line.replace("(anonymous namespace)::", "").replace("namm_ext::gpu::", "")
        name = re.sub(r"^void ", "", name)
        depth, end = 0, len(name)
        for i, char in enumerate(name):  # the first parenthesis outside the template arguments
            depth += (char == "<") - (char == ">")
            if char == "(" and depth == 0:
                end = i
                break
        plain.append(re.sub(r"\((?:bool|int)\)", "", name[:end]))
    return plain


def parse(log: str) -> Report:
    """Usage by architecture and kernel."""
    found: list[tuple[str, str, Usage]] = []
    for line in log.splitlines():
        if match := ENTRY.search(line):
            found.append((match[2], match[1], {}))
        elif not found:
            continue
        elif match := FRAME.search(line):
            found[-1][2].setdefault("stack", int(match[1]))
            found[-1][2].setdefault("spills", int(match[2]) + int(match[3]))
        elif match := USED.search(line):
            found[-1][2].setdefault("registers", int(match[1]))
            found[-1][2].setdefault("shared", int(match[2] or 0))
    report: Report = {}
    plain = demangle([name for _, name, _ in found])
    for (arch, _, usage), name in zip(found, plain, strict=True):
        report.setdefault(arch, {})[name] = usage
    return {arch: dict(sorted(report[arch].items())) for arch in sorted(report)}


def complaints(report: Report, baseline: Report) -> list[str]:
    """What breaks a rule, one line each."""
    lines = []
    for arch, kernels in report.items():
        known = baseline.get(arch, {})
        for name, usage in kernels.items():
            where = f"{arch} {name}"
            if usage.get("spills", 0) > 0:
                lines.append(f"{where}: spills {usage['spills']} bytes")
            if name not in known:
                lines.append(f"{where}: not in the baseline")
            elif usage["registers"] > known[name]["registers"] + SLACK:
                lines.append(
                    f"{where}: {usage['registers']} registers, baseline {known[name]['registers']}"
                )
            elif usage["shared"] > known[name]["shared"]:
                lines.append(
                    f"{where}: {usage['shared']} bytes shared, baseline {known[name]['shared']}"
                )
        lines += [f"{arch} {name}: gone from the build" for name in known if name not in kernels]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("log", type=Path, help="output of a build with -Xptxas -v")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    args = parser.parse_args()
    report = parse(args.log.read_text())
    if not report:
        print(f"{args.log}: no kernel in it; was it built with -Xptxas -v, and afresh?")
        return 1
    names = sorted({name for kernels in report.values() for name in kernels})
    width = max(map(len, names))
    print(f"{'registers / stack / spills / shared':<{width}}" + "".join(f"{a:>22}" for a in report))
    for name in names:
        cells = []
        for kernels in report.values():
            usage = kernels.get(name, {})
            cells.append(" / ".join(str(usage.get(f, "-")) for f in FIELDS))
        print(f"{name:<{width}}" + "".join(f"{c:>22}" for c in cells))
    if args.update:
        BASELINE.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {BASELINE}")
        return 0
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    bad = complaints(report, baseline)
    print("\n".join(bad) if bad else f"{len(names)} kernels within the baseline, no spills")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
