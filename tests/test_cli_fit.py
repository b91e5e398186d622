"""``namm fit`` and ``namm calibrate``: another model needs no code."""

import json
import sys
from pathlib import Path

import pytest
from namm_ext import NAMM
from namm_ext.cli import main


def _namm(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["namm", *map(str, arguments)])
    main()


def test_fit_and_calibrate(monkeypatch, capsys, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(400)))
    out = tmp_path / "memory"
    with pytest.raises(SystemExit) as ended:
        _namm(
            monkeypatch, "fit", "stdlib-1m", out, "--text", folder, "--length", 128, "--count", 3,
            "--scorer", "none",
        )  # fmt: skip
    assert not ended.value.code
    assert "texts held out" in " ".join(capsys.readouterr().out.split())
    report = json.loads((out / "fit.json").read_text())
    assert report["gate"]["num_held_out"] == 1
    assert report["texts"]["count"] == 3
    assert not (out / "gate.npz").exists()
    assert NAMM.from_pretrained(out).gate is not None

    with pytest.raises(SystemExit) as ended:
        _namm(
            monkeypatch, "calibrate", "stdlib-1m", tmp_path / "ready", "--policy",
            "bundled:stdlib-1m", "--text", folder, "--length", 128, "--count", 1,
        )  # fmt: skip
    assert not ended.value.code
    ready = NAMM.from_pretrained(tmp_path / "ready")
    assert ready.budget.scope == "global"
    assert ready.calibration is not None

    with pytest.raises(SystemExit, match="bfloat16 or float16, got 'int8'"):
        _namm(monkeypatch, "fit", "stdlib-1m", tmp_path / "no", "--dtype", "int8")
