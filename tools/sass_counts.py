#!/usr/bin/env python3
"""Instructions of every kernel of a .cu file, by kind, as the assembler left them.

    python tools/sass_counts.py cuda/kernels/bam.cu [--arch sm_90] [--loops]

Compiles the file alone and needs nvcc and cuobjdump on the PATH. A count is static: a loop's body
stands in it once. A loop is what lies between a backward branch and its target.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from ptxas_report import demangle

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("HMMA", "MUFU", "LDSM", "LDS", "STS", "LDG", "STG", "ATOM", "IMAD", "BAR", "BRA")
NAME = re.compile(r"Function : (\S+)")
CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")

Code = list[tuple[int, str, str]]


def disassemble(source: Path, arch: str) -> dict[str, Code]:
    """(address, instruction, operands) of every kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/x.cubin"
        include = [f"-I{ROOT / path}" for path in ("cuda/kernels", "cpp/include")]
        flags = ["-std=c++17", "-O3", f"-arch={arch}", "-cubin", *include]
        subprocess.run(["nvcc", *flags, "-o", cubin, str(source)], check=True)
        text = subprocess.run(
            ["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True
        ).stdout
    found: dict[str, Code] = {}
    for line in text.splitlines():
        if match := NAME.search(line):
            code = found.setdefault(match[1], [])
        elif match := CODE.search(line):
            code.append((int(match[1], 16), match[2], match[3]))
    return dict(zip(demangle(list(found)), found.values(), strict=True))


def row(name: str, code: Code) -> str:
    first = (instruction.partition(".")[0] for _, instruction, _ in code)
    kinds = Counter("ATOM" if kind.startswith("ATOM") else kind for kind in first)
    return f"| {name} | {len(code)} | " + " | ".join(str(kinds[kind]) for kind in KINDS) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--loops", action="store_true", help="also each loop by itself")
    args = parser.parse_args()
    print("| kernel | all | " + " | ".join(KINDS) + " |\n|" + " --- |" * (len(KINDS) + 2))
    for name, code in sorted(disassemble(args.source, args.arch).items()):
        print(row(name, [c for c in code if c[1] != "NOP"]))
        for address, instruction, operands in code if args.loops else ():
            target = re.search(r"0x([0-9a-f]+)", operands)
            if instruction == "BRA" and target and (first := int(target[1], 16)) < address:
                loop = [c for c in code if first <= c[0] <= address]
                print(row(f"{name} loop", loop))


if __name__ == "__main__":
    main()
