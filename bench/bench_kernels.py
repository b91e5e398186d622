"""Each CPU op against the plain PyTorch expression (or SDPA) and its floor.

``pytest bench/bench_kernels.py``; ``--benchmark-disable`` runs every case once, as a smoke test.
"""

from __future__ import annotations

from typing import Any

import cases
import pytest
import timing

SIZES = {"llama": (1024, 4096), "bundled": (128, 256)}


@pytest.mark.parametrize("what", ["ours", "plain", "floor"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", ["llama-0", "llama-1", "bundled-0", "bundled-1"])
@pytest.mark.parametrize("op", cases.OPS)
def test_kernel(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, op: str, size: str, dtype: str, what: str
) -> None:
    shape, index = size.split("-")
    num_keys = SIZES[shape][int(index)]
    if benchmark.disabled and (num_keys > 256 or dtype == "fp32"):
        pytest.skip("smoke test: small shapes only")
    if benchmark.disabled:
        monkeypatch.setattr(timing, "ROTATE_BYTES", 2**20)
    case = cases.make(op, num_keys, shape, dtype)
    run = getattr(case, what)
    if run is None:
        pytest.skip(f"{op} has no {what}")
    case.check()
    benchmark.group = case.name
    benchmark.pedantic(run, rounds=3 if what == "plain" else 7, warmup_rounds=1)
