"""Rules of cuda/kernels that a compiler does not check, and the report that guards registers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(p for p in (ROOT / "cuda/kernels").iterdir() if p.suffix in {".cu", ".cuh", ".h"})
FORBIDDEN = {
    "torch header": r"#include\s*[<\"](torch|ATen|c10)/",
    "inline PTX": r"\basm\b",
    "launch syntax": r"<<<",
    "extern shared": r"extern\s+__shared__",
    "CUDA header": r"#include\s*<cuda",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_kernels_stay_portable(path: Path) -> None:
    code = re.sub(r"//.*", "", path.read_text())
    found = [name for name, pattern in FORBIDDEN.items() if re.search(pattern, code)]
    assert path.name == "platform.cuh" or not found


def test_kernel_files_say_who_does_what() -> None:
    for path in SOURCES:
        text = path.read_text()
        if re.search(r"^(\s*template.*\n)?\s*__global__", text, re.MULTILINE):
            missing = [word for word in ("Mapping", "Cost") if f"// {word}" not in text]
            assert not missing, f"{path.name}: a kernel without {missing}"


@pytest.fixture
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxas_report", ROOT / "tools/ptxas_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOG = """\
ptxas info    : Compiling entry function '_ZN8namm_ext3gpu1fILi3EEEvf' for 'sm_90'
ptxas info    : Function properties for _ZN8namm_ext3gpu1fILi3EEEvf
    {stack} bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem
"""


def test_report_reads_a_build_log(report: ModuleType) -> None:
    log = LOG.format(stack=8, spills=0, registers=40, shared=16)
    usage = {"stack": 8, "spills": 0, "registers": 40, "shared": 16}
    assert report.parse(log) == {"sm_90": {"f<3>": usage}}


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        ({}, None),
        ({"registers": 44}, None),
        ({"registers": 45}, "45 registers, baseline 40"),
        ({"spills": 4}, "spills 4 bytes"),
        ({"shared": 32}, "32 bytes shared, baseline 16"),
    ],
)
def test_report_complains(report: ModuleType, now: dict[str, int], complaint: str | None) -> None:
    usage = {"stack": 0, "spills": 0, "registers": 40, "shared": 16}
    baseline = report.parse(LOG.format(**usage))
    bad = report.complaints(report.parse(LOG.format(**{**usage, **now})), baseline)
    assert bad == ([f"sm_90 f<3>: {complaint}"] if complaint else [])


def test_report_notices_kernels_that_come_and_go(report: ModuleType) -> None:
    here = {"sm_90": {"f": {"registers": 1, "spills": 0, "shared": 0}}}
    assert report.complaints(here, {"sm_90": {}}) == ["sm_90 f: not in the baseline"]
    assert report.complaints({"sm_90": {}}, here) == ["sm_90 f: gone from the build"]
