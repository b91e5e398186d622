"""The benchmarks run: tiny shapes, any device, checked results; verdicts follow the figures."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from namm_ext import testing, zoo

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of ``bench/``."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a script of ``bench/`` as Python does, on one thread; what it prints."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.chdir(BENCH)
    torch.set_num_threads(1)

    def script(*command: str) -> str:
        monkeypatch.setattr(sys, "argv", list(command))
        try:
            runpy.run_path(str(BENCH / command[0]), run_name="__main__")
        except SystemExit as end:
            if end.code:
                pytest.fail(str(capsys.readouterr()))
        return capsys.readouterr().out

    yield script
    torch.set_num_threads(threads)


def test_ratios(run, tmp_path: Path) -> None:
    output = run("ratios.py", "--quick", "--json", str(tmp_path / "r.json"))
    report = json.loads((tmp_path / "r.json").read_text())
    names = [row["case"] for row in report["rows"]]
    assert names == [
        "features-bundled-N128-fp32",
        "step-bundled-N128-bf16",
        "decode_all-bundled-N64-bf16",
    ]
    assert all(name in output for name in names)
    assert all(row["ratio"] > 0 and row["times_floor"] > 0 for row in report["rows"])
    assert report["isa"] == torch.ops.namm_ext.cpu_isa()
    assert {"date", "commit", "cpu", "threads", "torch", "acceptance"} <= report.keys()


def report_of(**rows: dict[str, float]) -> dict:
    cases = [{"case": name.replace("_", "-"), **row} for name, row in rows.items()]
    return {"isa": "avx512", "forced_isa": None, "rows": cases}


def test_verdicts(bench) -> None:
    ratios = bench("ratios")
    report = report_of(
        step_llama_N4096_fp32={"ratio": 8.5},
        step_llama_N4096_bf16={"ratio": 8.5},
        features_llama_N4096_fp32={"times_floor": 1.05, "ns_per_token": 100.0},
        features_llama_N65536_fp32={"ns_per_token": 131.0},
        compact_llama_N4096_fp32={"ns_per_token": 100.0},
        compact_llama_N65536_fp32={"ns_per_token": 129.0},
        decode_llama_N16384_fp32={"ratio": 2.9},
        step_llama_N65536_bf16={"peak_growth_mb": 2049.0},
    )
    holds = [line["holds"] for line in ratios.acceptance(report)]
    assert holds == [True, False, True, False, True, False, False]
    # Eight lanes: four times is what they are held to, and a forced set is no match for torch.mm.
    narrow = ratios.acceptance({**report, "isa": "avx2", "forced_isa": "avx2"})
    assert [line["holds"] for line in narrow] == [True, True, False, True, False, False]


def test_table(bench) -> None:
    ratios = bench("ratios")
    report = report_of(
        step_llama_N4096_fp32={"ratio": 8.46, "ours_ms": 230.4},
        decode_llama_N16384_bf16={"ratio": None, "ours_ms": 2.0},
    )
    assert ratios.markdown(report).splitlines()[2:] == [
        "| whole update, 4,096 tokens | 230 | 8.5 | - | - |",
        "| attention, decode, 25 % of 16,384 kept | - | - | 2 | - |",
    ]


def test_rotation_takes_turns_and_keeps_results(bench) -> None:
    timing = bench("timing")
    rotation = timing.Rotation([lambda: "a", lambda: "b", lambda: "c"])
    assert [rotation() for _ in range(4)] == ["a", "b", "c", "a"]
    assert rotation.results == ["a", "b", "c"]
    assert timing.num_copies(torch.zeros(timing.ROTATE_BYTES // 16)) == 4


def test_every_op_has_a_case(bench) -> None:
    cases = bench("cases")
    with pytest.raises(ValueError, match=r"op must be one of features, .*, decode_all: fft"):
        cases.make("fft", 64, "bundled", "fp32")


def test_gate_benchmark(run) -> None:
    lines = run("bench_gate.py", "--keys", "64").splitlines()
    assert [line.split()[1] for line in lines[2:]] == [
        "gate-smollm2-N64-fp32", "gate-smollm2-N64-bf16",
    ]  # fmt: skip


def test_never_evict(run, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    run(
        "never_evict.py", "--model", "stdlib-1m", "--length", "100", "--periods", "1",
        "--dtype", "float32", "--json", str(out),
    )  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"] == row["NAMMCache"] / row["DynamicCache"] > 0
    assert row["logits_apart"] < 1e-4


def test_decode_cost(run, tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    run("decode_cost.py", "--layers", "2", "--steps", "3", "--rounds", "2", "--json", str(out))
    rows = json.loads(out.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["no_grad", "inference_mode"]
    assert all(row["NAMMCache"] > 0 and row["DynamicCache"] > 0 for row in rows)


def test_cuda_benchmark(run, tmp_path: Path) -> None:
    run("bench_cuda.py", "--smoke", "--out", str(tmp_path / "c.json"))
    report = json.loads((tmp_path / "c.json").read_text())
    assert {row["op"] for row in report["rows"]} == {
        "spectrogram", "received", "bam_scores", "mlp_scores", "select", "compact",
        "gate_", "attend decode", "attend prefill", "append_", "record_", "whole step x 32",
    }  # fmt: skip
    assert {"date", "gpu", "commit", "torch", "cuda", "copy_tb_per_s"} <= report.keys()
    rivals = {row["op"]: set(row["rivals_ms"]) for row in report["rows"]}
    assert rivals["spectrogram"] == {"bmm", "sdpa", "plain"}
    assert rivals["whole step x 32"] == {"plain"}


def test_cuda_benchmark_refuses_wrong_results(bench) -> None:
    layer = bench("cuda_layer")
    one = torch.ones(4)
    layer.check_close("op", one * 1.001, one, 1e-2)
    for wrong in (one * 1.1, one * float("nan")):
        with pytest.raises(ArithmeticError, match="op differs from its rival"):
            layer.check_close("op", wrong, one, 1e-2)


def broken(*_: object) -> None:
    raise RuntimeError("an illegal memory access\nand more")


def test_a_failed_case_is_a_row_and_the_others_go_on(bench, tmp_path: Path, monkeypatch) -> None:
    bench_cuda = bench("bench_cuda")
    chosen = {name: bench_cuda.BENCHES[name] for name in ("append", "mlp")}
    chosen["append"] = bench_cuda.Bench(broken, (1,))
    monkeypatch.setattr(bench_cuda, "BENCHES", chosen)
    out = tmp_path / "c.json"
    assert bench_cuda.main(["--smoke", "--out", str(out)]) == 1
    failed, fine = json.loads(out.read_text())["rows"]
    assert failed == {"case": "append N=256", "error": "RuntimeError: an illegal memory access"}
    assert fine["op"] == "mlp_scores"


def test_figures_are_written_at_once(bench, tmp_path: Path) -> None:
    bench_cuda, out = bench("bench_cuda"), tmp_path / "c.json"
    report = bench("cuda_report").Report(out, "cpu")
    for i in range(2):
        report.run(str(i), lambda: bench_cuda.Row("op", "case", 1.0), bench_cuda.show)
        assert len(json.loads(out.read_text())["rows"]) == i + 1
    assert report.failures == 0


def test_after_a_lost_device_a_new_process_goes_on(bench, tmp_path: Path, monkeypatch) -> None:
    cuda_report, out, started = bench("cuda_report"), tmp_path / "c.json", []
    monkeypatch.setattr(cuda_report, "environment", lambda _: {})
    monkeypatch.setattr(cuda_report, "device_lost", lambda: True)
    monkeypatch.setattr(cuda_report.os, "execv", lambda _, command: started.append(command))
    cuda_report.Report(out, "cuda").run("first", broken, str)
    assert [command[-2:] for command in started] == [["--skip", "1"]]
    second = cuda_report.Report(out, "cpu", skip=1)
    second.run("first", lambda: pytest.fail("the case ran again"), str)
    row = bench("bench_cuda").Row("op", "second", 1.0)
    second.run("second", lambda: row, str)
    assert [r["case"] for r in json.loads(out.read_text())["rows"]] == ["first", "second"]


def test_share_of_scores_that_are_done_again(bench) -> None:
    layer = bench("cuda_layer")
    store, params, *rest = layer.score_args(layer.make_layer([40] * 8, "cpu"), "cpu")
    assert layer.redone_share(store, params, *rest) == 0.0
    # A feature that leaves fp16 is seen by its token and by the seven older ones of its head.
    store.state[7, 3] = 1e6
    assert layer.redone_share(store, params, *rest) == 8 / 320
    # Sums leave the range; the emulated kernel does as many again.
    store.state[7, 3] = 0.0
    share = layer.redone_share(store, params * 12, *rest)
    assert share == 156 / 320


def test_end_to_end_benchmark(run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run("bench_e2e_cuda.py", "--smoke", "--out", str(tmp_path / "e.json"))
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [(r["context"], r["batch_size"], r["memory"]) for r in rows] == [
        (256, 1, "full"), (256, 1, "namm"), (256, 2, "full"), (256, 2, "namm"),
    ]  # fmt: skip
    full, namm = rows[0], rows[1]
    assert namm["cache_gb"] < 0.6 * full["cache_gb"]
    assert all(r["decode_tokens_per_s"] > 0 for r in rows)


def test_size_of_a_full_cache(bench) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8
    )
    num_bytes = bench("bench_e2e_cuda").full_cache_bytes(config, 131072, 8)
    assert num_bytes == 128 << 30  # more than an 80 GB card has


def test_real_model_benchmark(run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "m.json"
    run(
        "bench_model_cuda.py", "stdlib-1m", "--policy", "bundled:stdlib-1m", "--smoke", "--out",
        str(out),
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    assert [row["memory"] for row in rows] == ["full", "h2o", "bundled:stdlib-1m"]
    assert rows[0]["kept"] == 1.0 > rows[1]["kept"]


def test_presses_go_on_with_their_file(bench, tmp_path: Path, monkeypatch) -> None:
    check, asked = bench("kvpress_check"), []
    names = {"first": 1, "second": 2, "third": 3}
    monkeypatch.setattr(check, "version", lambda name: "0")
    monkeypatch.setattr(check, "presses", lambda _: {k: partial(int, v) for k, v in names.items()})

    def answers(model, press, reading):
        asked.append(press)
        if press == stop:
            raise KeyboardInterrupt
        return [press == 1, True]

    monkeypatch.setattr(check, "answers", answers)
    contexts, out = tmp_path / "contexts.json", tmp_path / "found.json"

    def run(*options: str) -> dict:
        command = ["kvpress_check.py", "ask", str(contexts), "--json", str(out), *options]
        monkeypatch.setattr(sys, "argv", command)
        assert check.main() == 0
        return json.loads(out.read_text())["presses"]

    model = str(zoo.model_path("stdlib-1m"))
    contexts.write_text(json.dumps({"model": model, "readings": [{"task": "table"}]}))
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(json.loads(out.read_text())["presses"]) == ["first"]
    stop = None
    found = run()
    assert asked == [1, 2, 2, 3]
    assert [found[name]["exact_match"] for name in names] == [1.0, 0.5, 0.5]
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=r"other settings \(keep 0.25, now 0.5\); name another"):
        run("--keep", "0.5")
    contexts.write_text(contexts.read_text() + "\n")
    with pytest.raises(SystemExit, match=r"other settings \(contexts_sha256 '"):
        run()
    assert out.read_bytes() == before


@pytest.mark.skipif("cuda" in testing.devices(), reason="a GPU can run the real thing")
@pytest.mark.parametrize("script", ["bench_cuda.py", "bench_e2e_cuda.py"])
def test_without_a_gpu_only_the_smoke_test_runs(bench, script: str) -> None:
    with pytest.raises(SystemExit) as error:
        bench(script.removesuffix(".py")).main([])
    assert error.value.code == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "script", ["bench/gpu_check.sh", "tools/cuda_check.sh", "tools/neon_check.sh"]
)
def test_scripts(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        subprocess.run([shellcheck, str(ROOT / script)], check=True)


STAGES = (
    "gpu", "build", "shapes", "kernels", "e2e", "model", "ops", "memcheck", "racecheck",
)  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("failing", ["none", *STAGES])
def test_gpu_check_names_the_stage_that_failed(failing: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "NAMM_CHECK_COMMIT": "c0ffee"}
    environment["NAMM_CHECK_PYTHON"] = sys.executable
    result = subprocess.run(
        ["bash", str(BENCH / "gpu_check.sh"), "--stub", failing],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == (0 if failing == "none" else 7), result.stdout + result.stderr
    (table,) = tmp_path.glob("*-none-c0ffee.md")
    text = table.read_text()
    assert result.stdout.endswith(text)
    # Without a card or a build nothing else can run.
    last = failing if failing in ("gpu", "build") else STAGES[-1]
    for i, stage in enumerate(STAGES):
        ran = i <= STAGES.index(last)
        verdict = "FAILED (status 7)" if stage == failing else "passed" if ran else "not run"
        assert f"* {stage}: {verdict}\n" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_gpu_check_has_these_stages(tmp_path: Path) -> None:
    script = BENCH / "gpu_check.sh"
    (found,) = re.findall(r"^stages=\((.*)\)$", script.read_text(), re.MULTILINE)
    assert tuple(found.split()) == STAGES
    result = subprocess.run(
        ["bash", str(script), "--stub", "kernel"],
        env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--stub must be a stage (gpu build" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif("cuda" in testing.devices(), reason="a GPU can run the real thing")
def test_gpu_check_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("scikit_build_core")
    environment = {**os.environ, "NAMM_CHECK_PYTHON": sys.executable, "OUT": str(tmp_path)}
    environment["NAMM_CHECK_SECONDS"] = "6000"  # a small machine compiles for minutes
    environment["NAMM_CHECK_COMMIT"] = "c0ffee"
    result = subprocess.run(
        [str(BENCH / "gpu_check.sh"), "--dry-run"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (table,) = tmp_path.glob("*-none-c0ffee.md")
    text = table.read_text()
    verdicts = dict.fromkeys(STAGES, "skipped") | dict.fromkeys(
        ("build", "kernels", "e2e"), "passed"
    )
    for stage, verdict in verdicts.items():
        assert f"* {stage}: {verdict}" in text
    assert result.stdout.endswith(text)
    assert json.loads(table.with_suffix(".json").read_text())["commit"] == "c0ffee"


def test_model_seeds(bench) -> None:
    seeds = bench("model_seeds")
    result = doctest.testmod(seeds)
    assert result.attempted == 1
    assert result.failed == 0
    video = BENCH / "results" / "video.json"
    found = seeds.of_full(video, 0.25)
    rows = json.loads(video.read_text())["rows"]
    assert found[seeds.FULL] == 100 * rows[0]["accuracy"]
    (h2o,) = (row for row in rows if (row["method"], row["keep"]) == ("H2O", 0.25))
    assert found["H2O"] == 100 * h2o["of_full"][0]
    with pytest.raises(ValueError, match=r"--keep must be a budget of .*video.json, got 0.3"):
        seeds.of_full(video, 0.3)
