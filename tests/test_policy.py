"""NAMMConfig, NAMM, its files, and the calibration of statistics and thresholds."""

from __future__ import annotations

import dataclasses
import doctest
import json
import math
import os
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from namm_ext import NAMM, Budget, NAMMConfig, config, policy, reference
from namm_ext.policy import (
    StatisticsCalibrator,
    StatisticsCollector,
    UpdateContext,
    calibrate_threshold,
)
from small_context import context, ints
from torch import Tensor

CHANGED = {
    "n_up": 64, "ema_coeff": 0.9, "scorer": "mlp", "mlp_hidden": 25, "mlp_depth": 2,
    "mlp_bias": True, "mlp_residual_first": True, "feature_transform": "log", "log_eps": 1e-4,
}  # fmt: skip


def random_namm(budget: Budget | None = None, **changes) -> NAMM:
    settings = NAMMConfig(**changes)
    params = torch.randn(settings.num_params) * 0.3
    return NAMM(settings, params, torch.rand(17), torch.rand(17) + 0.1, 12, budget=budget)


@pytest.mark.parametrize("module", [config, policy.namm, policy.statistics])
def test_docstring_examples(module):
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 1
    assert result.failed == 0


# NAMMConfig ---------------------------------------------------------------------------------------


def test_defaults_are_the_first_stage_of_the_original():
    assert NAMMConfig().to_dict() == {
        "n_up": 512, "ema_coeff": 0.99, "scorer": "bam", "mlp_hidden": 25, "mlp_depth": 1,
        "mlp_bias": False, "mlp_residual_first": False, "feature_transform": "none",
        "log_eps": 1e-6,
    }  # fmt: skip


def test_config_round_trip():
    changed = NAMMConfig(**CHANGED)
    values = json.loads(json.dumps(changed.to_dict()))
    assert NAMMConfig.from_dict(values) == changed
    defaults = NAMMConfig().to_dict()
    same = {name for name in defaults if values[name] == defaults[name]}
    assert same <= {"mlp_hidden"}
    assert NAMMConfig().replace(**CHANGED) == changed
    assert hash(changed) == hash(NAMMConfig(**CHANGED))


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMMConfig().n_up = 64  # type: ignore[misc]


BAD_CONFIGS = [
    ({"n_up": 0}, "n_up must be a positive multiple of 16, got 0"),
    ({"n_up": 40}, "n_up must be a positive multiple of 16, got 40"),
    ({"n_up": 64.0}, "n_up must be a positive multiple of 16, got 64.0"),
    ({"ema_coeff": 1.0}, "ema_coeff must be a number in (0, 1), got 1.0"),
    ({"ema_coeff": "x"}, "ema_coeff must be a number in (0, 1), got 'x'"),
    ({"scorer": "gnn"}, "scorer must be 'bam' or 'mlp', got 'gnn'"),
    ({"mlp_hidden": 0}, "mlp_hidden must be an int of at least 1, got 0"),
    ({"mlp_depth": 0}, "mlp_depth must be an int of at least 1, got 0"),
    ({"mlp_bias": 1}, "mlp_bias must be a bool, got 1"),
    (
        {"mlp_residual_first": True, "mlp_depth": 2, "mlp_hidden": 16},
        "mlp_hidden must be 25 with mlp_residual_first, got 16",
    ),
    ({"feature_transform": "sqrt"}, "feature_transform must be 'none' or 'log', got 'sqrt'"),
    ({"log_eps": 0.0}, "log_eps must be a positive number, got 0.0"),
]


@pytest.mark.parametrize(("values", "message"), BAD_CONFIGS, ids=[str(b[0]) for b in BAD_CONFIGS])
def test_bad_config(values, message):
    with pytest.raises(ValueError) as error:
        NAMMConfig(**values)
    assert str(error.value) == f"NAMMConfig: {message}"


def test_unknown_key():
    with pytest.raises(ValueError, match=r"keys must be among n_up, .*, got nup, window"):
        NAMMConfig.from_dict({"window": 1, "nup": 2, "n_up": 64})
    with pytest.raises(TypeError, match="values must be a mapping, got list"):
        NAMMConfig.from_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(("hidden", "depth", "bias"), [(25, 1, False), (25, 2, True), (7, 3, True)])
def test_sizes_agree_with_the_reference(hidden, depth, bias):
    mlp = NAMMConfig(scorer="mlp", mlp_hidden=hidden, mlp_depth=depth, mlp_bias=bias)
    assert mlp.num_params == reference.num_mlp_params(hidden, depth, bias)
    assert NAMMConfig().num_params == reference.NUM_BAM_PARAMS
    assert NAMMConfig().num_bins == reference.NUM_BINS


# Parameters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"scorer": "mlp", "mlp_depth": 2, "mlp_bias": True}])
def test_named_parameters_are_views_in_the_published_order(changes):
    namm = random_namm(**changes)
    named = namm.named_parameters()
    assert torch.equal(torch.cat([t.flatten() for t in named.values()]), namm.params)
    named["b1"][3] = 123.0
    start = named["W1"].numel()
    assert namm.params[start + 3] == 123.0
    back = NAMM.from_named(namm.config, named, namm.mean, namm.var)
    assert back.fingerprint() == namm.fingerprint()


def test_from_named_names_what_is_wrong():
    named = random_namm().named_parameters()
    with pytest.raises(ValueError, match="parameters must be W1, b1, W2, b2, W3, b3, got W1, b1"):
        NAMM.from_named(NAMMConfig(), {"W1": named["W1"], "b1": named["b1"]})
    with pytest.raises(ValueError, match=r"NAMM: W2 must be \[32, 50\], got \[50, 32\]"):
        NAMM.from_named(NAMMConfig(), {**named, "W2": named["W2"].T})


def test_arguments_are_copied():
    params = torch.ones(4172)
    namm = NAMM(NAMMConfig(), params)
    params.zero_()
    assert namm.params.min() == 1


NONFINITE = torch.zeros(4172)
NONFINITE[[1, 5]] = torch.tensor([math.nan, math.inf])


@pytest.mark.parametrize(("values", "message"), [
    ({"params": torch.zeros(4171)}, "NAMM: params must be [4172] or [P, 4172], got [4171]"),
    ({"params": torch.zeros(1, 1, 9)}, "NAMM: params must be [4172] or [P, 4172], got [1, 1, 9]"),
    ({"params": torch.zeros(0, 4172)}, "NAMM: params must hold at least one vector, got none"),
    ({"params": ints(*[0] * 4172)}, "NAMM: params must be a floating tensor, got torch.int32"),
    ({"params": [0.0] * 4172}, "NAMM: params must be a floating tensor, got list"),
    ({"params": NONFINITE}, "NAMM: params must be finite, got 2 NaN or infinite values"),
    ({"mean": torch.zeros(16)}, "NAMM: mean must be [17], got [16]"),
    ({"var": -torch.ones(17)}, "NAMM: var must not be negative, got -1.0"),
], ids=range(8))  # fmt: skip
def test_bad_parameters(values, message):
    with pytest.raises(ValueError) as error:
        NAMM(NAMMConfig(), **values)
    assert str(error.value) == message


def test_fingerprint_sees_every_part():
    namm = random_namm()
    bumped = namm.params.clone()
    bumped[-1] += 1e-3
    others = [
        namm.with_params(bumped),
        namm.with_config(ema_coeff=0.9),
        namm.with_budget(size=9),
        NAMM(namm.config, namm.params, namm.mean + 1, namm.var),
        NAMM(namm.config, namm.params, namm.mean, namm.var + 1),
        StatisticsCalibrator(namm.config),
    ]
    assert len({namm.fingerprint(), *(o.fingerprint() for o in others)}) == 7
    assert NAMM(namm.config, namm.params, namm.mean, namm.var).fingerprint() == namm.fingerprint()


def test_to_moves_all_tensors():
    namm = random_namm()
    assert namm.to("cpu") is namm
    moved = namm.to("meta")
    assert {t.device.type for t in (moved.params, moved.mean, moved.var)} == {"meta"}
    assert moved.config == namm.config
    assert moved.count == 12
    assert namm.params.device.type == "cpu"


# Deciding: the policy calls the ops with what the layer shows it ---------------------------------


def expected_state(ctx: UpdateContext, ema_coeff: float) -> Tensor:
    return reference.spectrogram(ctx.window, ctx.segments, softmax_scale=0.3, ema_coeff=ema_coeff)


def with_due(ctx: UpdateContext, due: tuple[bool, ...]) -> UpdateContext:
    window = ctx.window._replace(active=torch.tensor(due))
    return dataclasses.replace(ctx, window=window, due=due)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("changes", [
    {}, {"feature_transform": "log", "log_eps": 1e-3}, {"ema_coeff": 0.9},
    {"scorer": "mlp"}, {"scorer": "mlp", "mlp_depth": 2, "mlp_bias": True, "mlp_hidden": 6},
    {"scorer": "mlp", "mlp_depth": 2, "mlp_residual_first": True, "feature_transform": "log"},
], ids=str)  # fmt: skip
def test_update_is_spectrogram_then_scores(changes, dtype):
    ctx = context(dtype)
    namm = random_namm(n_up=16, **changes)
    c = namm.config
    bank = torch.stack([namm.params, -namm.params])
    scores, state = namm.with_params(bank).update(dataclasses.replace(ctx, param_index=ints(1, 0)))
    want_state = expected_state(ctx, c.ema_coeff)
    live = ctx.segments.live
    assert scores.dtype == state.dtype == dtype
    torch.testing.assert_close(state[live], want_state[live])
    features = torch.cat([
        reference.token_features(
            want_state[rows], ctx.segments.pos[rows], namm.mean, namm.var,
            c.feature_transform == "log", c.log_eps,
        ) for rows in ctx.segments.slices()[:2]
    ]).view(2, 40, 25)  # fmt: skip
    if c.scorer == "bam":
        want = reference.bam(features, -namm.params)
    else:
        want = reference.mlp(
            features, -namm.params, c.mlp_hidden, c.mlp_depth, c.mlp_bias, c.mlp_residual_first
        )
    got = scores[live].view(4, 40)
    torch.testing.assert_close(got[:2], want, rtol=1e-4, atol=1e-4)
    assert not got[2:].any()  # the row that is not due


def test_one_vector_serves_every_row():
    ctx = with_due(dataclasses.replace(context(), param_index=ints(0, 0)), (True, True))
    namm = random_namm(n_up=16)
    scores, _ = namm.update(ctx)
    bank = namm.with_params(torch.stack([torch.zeros(4172), namm.params]))
    again, _ = bank.update(dataclasses.replace(ctx, param_index=ints(1, 1)))
    live = ctx.segments.live
    assert torch.equal(scores[live], again[live])
    assert repr(bank).endswith("params: 2 candidates of 4172)")


def test_zero_parameters_keep_everything():
    ctx = context()
    namm = NAMM(NAMMConfig(n_up=16))
    scores, _ = namm.update(dataclasses.replace(ctx, param_index=ints(0, 0)))
    assert namm.select(scores, ctx)[1].tolist() == [40] * 4


def test_nan_scores_are_named():
    ctx = context()
    scores = torch.zeros(ctx.segments.capacity)
    _, counts = NAMM(NAMMConfig(n_up=16)).select(scores, ctx)
    assert policy.check_num_kept(counts, ctx) == [40] * 4
    scores[43 + 7] = math.nan
    _, counts = NAMM(NAMMConfig(n_up=16)).select(scores, ctx)
    message = "select: scores must not be NaN, got NaN in layer 4, batch row 0, KV head 1"
    with pytest.raises(ValueError, match=message):
        policy.check_num_kept(counts, ctx)


# Statistics and thresholds ------------------------------------------------------------------------


def test_collector_pools_batches():
    parts = [torch.randn(n, 2, 17) for n in (5, 1, 60)]
    collector = StatisticsCollector()
    for part in parts:
        collector.add(part)
    pooled = torch.cat(parts).reshape(-1, 17)
    assert collector.count == 132
    torch.testing.assert_close(collector.mean, pooled.mean(0))
    torch.testing.assert_close(collector.var, pooled.var(0, correction=0))


@pytest.mark.parametrize("transform", ["none", "log"])
def test_calibrator_collects_due_rows_and_evicts_nothing(transform):
    settings = NAMMConfig(n_up=16, feature_transform=transform, log_eps=1e-3, ema_coeff=0.9)
    calibrator = StatisticsCalibrator(settings)
    with pytest.raises(ValueError, match="at least one update must have run, got none"):
        _ = calibrator.mean
    ctx = context()
    features = []
    for active in ((True, False), (False, False), (True, True)):
        ctx = with_due(ctx, active)
        scores, state = calibrator.update(ctx)
        _, counts = calibrator.select(scores, ctx)
        assert counts.tolist() == [40] * 4
        want = expected_state(ctx, 0.9).view(2, 2, 43, 17)[:, :, :40]
        features.append(want[torch.tensor(active)].reshape(-1, 17))
        ctx = dataclasses.replace(ctx, segments=ctx.segments._replace(state=state))
    pooled = torch.cat(features)
    pooled = (pooled + 1e-3).log() if transform == "log" else pooled
    assert calibrator.count == pooled.shape[0] == 240
    torch.testing.assert_close(calibrator.mean, pooled.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calibrator.var, pooled.var(0, correction=0), rtol=1e-4, atol=1e-5)
    namm = NAMM(settings).with_statistics(calibrator)
    assert torch.equal(namm.mean, calibrator.mean)
    assert torch.equal(namm.var, calibrator.var)
    assert namm.count == 240


def test_calibrated_threshold_meets_the_goal():
    scores = [torch.randn(300), torch.randn(100) * 4 - 3]
    pooled = torch.cat(scores)
    for goal, wanted in (({"keep_fraction": 0.25}, 100), ({"target_tokens": 30}, 60)):
        threshold = calibrate_threshold(scores, **goal)
        assert int((pooled >= threshold).sum()) == wanted
    assert calibrate_threshold(scores, keep_fraction=1.0) == pooled.min().item()
    assert calibrate_threshold(scores, target_tokens=10**6) == pooled.min().item()
    assert calibrate_threshold(scores, keep_fraction=1e-9) == pooled.max().item()


@pytest.mark.parametrize(("args", "message"), [
    (([], 0.5), "scores must hold at least one score, got none"),
    (([torch.tensor([math.nan])], 0.5), "scores must not be NaN, got NaN"),
    (([torch.ones(1)],), "exactly one of keep_fraction and target_tokens must be given, got None"),
    (([torch.ones(1)], 0.5, 3), "exactly one of keep_fraction and target_tokens must be given"),
    (([torch.ones(1)], 1.5), r"keep_fraction must be in \(0, 1\], got 1.5"),
    (([torch.ones(1)], None, 0), "target_tokens must be positive, got 0"),
], ids=range(6))  # fmt: skip
def test_bad_calibration(args, message):
    with pytest.raises(ValueError, match=message):
        calibrate_threshold(*args)


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", [False, True], ids=["vector", "bank"])
@pytest.mark.parametrize(
    "changes",
    [{}, {**CHANGED, "budget": Budget(77, scope="per_layer", recent_tokens=0.5)}],
    ids=["defaults", "changed"],
)
def test_save_and_load(tmp_path, changes, bank):
    namm = random_namm(**changes)
    if bank:
        namm = namm.with_params(torch.randn(3, namm.config.num_params))
    namm.save_pretrained(tmp_path / "policy")
    back = NAMM.from_pretrained(tmp_path / "policy")
    assert back.config == namm.config
    assert back.budget == namm.budget
    assert back.count == namm.count == 12
    for name in ("params", "mean", "var"):
        assert torch.equal(getattr(back, name), getattr(namm, name))
    assert back.fingerprint() == namm.fingerprint()
    assert sorted(os.listdir(tmp_path / "policy")) == ["config.json", "namm.safetensors"]


@pytest.fixture
def saved(tmp_path) -> Path:
    random_namm().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    path = str(folder / "namm.safetensors")
    content = {**load_file(path), **tensors}
    save_file({name: t for name, t in content.items() if t is not None}, path)


@pytest.mark.parametrize(("tensors", "message"), [
    ({"params": torch.zeros(100)}, r"params must be \[4172\] or \[P, 4172\], got \[100\]"),
    ({"params": NONFINITE}, "params must be finite, got 2 NaN or infinite values"),
    ({"params": torch.zeros(4172).int()}, "params must be a floating tensor, got torch.int32"),
    ({"mean": torch.full((17,), math.nan)}, "mean must be finite, got 17 NaN or infinite values"),
    ({"var": torch.ones(3)}, r"var must be \[17\], got \[3\]"),
    ({"var": None}, "tensors must be count, mean, params, var, got count, mean, params"),
    ({"extra": torch.ones(1)}, "tensors must be count, .*, got count, extra, mean, params, var"),
    ({"count": torch.ones(2)}, r"count must be one number, got \[2\]"),
], ids=range(8))  # fmt: skip
def test_bad_tensors_in_the_file(saved, tensors, message):
    rewrite(saved, **tensors)
    with pytest.raises(ValueError, match=rf"namm\.safetensors: {message}"):
        NAMM.from_pretrained(saved)


def test_damaged_tensor_file(saved):
    path = saved / "namm.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"namm\.safetensors: must be a safetensors file, got "):
        NAMM.from_pretrained(saved)
    torch.save({"params": torch.zeros(4172)}, path)
    with pytest.raises(ValueError, match=r"namm\.safetensors: must be a safetensors file, got "):
        NAMM.from_pretrained(saved)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"namm\.safetensors is missing"):
        NAMM.from_pretrained(saved)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda c: c["config"].update(colour=1), "NAMMConfig: keys must be among n_up, .*, got colour"),
    (lambda c: c["config"].update(n_up=3), "n_up must be a positive multiple of 16, got 3"),
    (lambda c: c.update(config=3), "NAMMConfig: values must be a mapping, got int"),
    (lambda c: c.update(format_version=3), "format_version must be 1 or 2, got 3"),
    (lambda c: c["budget"].update(size=0), "config.json: Budget: size must be an int of at least"),
    (lambda c: c.pop("format"), "format must be 'namm_ext.NAMM'; this is not a saved NAMM"),
    (lambda c: c["config"].update(scorer="mlp"), r"params must be \[25\] or .*, got \[4172\]"),
], ids=range(7))  # fmt: skip
def test_bad_config_file(saved, edit, message):
    path = saved / "config.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        NAMM.from_pretrained(saved)


def test_unreadable_config_file(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: must be JSON, got "):
        NAMM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        NAMM.from_pretrained(saved)


def test_hub_id(saved, monkeypatch):
    calls = []

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision, allow_patterns))
        return str(saved)

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    namm = NAMM.from_pretrained("someone/some-namm", revision="v1")
    assert namm.fingerprint() == NAMM.from_pretrained(saved).fingerprint()
    assert calls == [("someone/some-namm", "v1", ["config.json", "namm.safetensors"])]

    # A local folder of that name wins, and a path never reaches the Hub.
    monkeypatch.chdir(saved.parent)
    assert NAMM.from_pretrained(saved.name).fingerprint() == namm.fingerprint()
    for path in ("./nothing", "/no/such/folder", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="name_or_path must be a folder, got"):
            NAMM.from_pretrained(path)
    assert len(calls) == 1


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"'a/b' is not a folder, and .* huggingface_hub"):
        NAMM.from_pretrained("a/b")


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'namm_ext\[hf\]'"):
        random_namm().save_pretrained(tmp_path)


def test_bundled_policies(monkeypatch, tmp_path):
    assert "mine" not in policy.bundled_policies()
    namm = random_namm()
    namm.save_pretrained(tmp_path / "zoo" / "policies" / "mine")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    assert policy.bundled_policies() == ["mine"]
    assert NAMM.from_pretrained("bundled:mine").fingerprint() == namm.fingerprint()
    with pytest.raises(
        FileNotFoundError, match=r"bundled policy must be one of mine, got '\.\./x'"
    ):
        NAMM.from_pretrained("bundled:../x")


def test_every_bundled_policy_loads():
    for name in policy.bundled_policies():
        assert NAMM.from_pretrained(f"bundled:{name}").params.abs().max() > 0, name


# Checkpoints of the original ----------------------------------------------------------------------

STORED = "stored_buffers_to_save.token_embedding_0_output_"


def checkpoint(path: Path, n: int = 4172, **changes) -> Path:
    state = {
        "mean": torch.randn(n),
        "best_member": torch.randn(n),
        f"{STORED}mean": torch.rand(1, 1, 1, 17),
        f"{STORED}var": torch.rand(1, 1, 1, 17),
        f"{STORED}num": torch.full((1, 1, 1, 17), 9),
        **changes,
    }
    state = {key: value for key, value in state.items() if value is not None}
    torch.save({"evolution_state": state, "iter_num": 1, "best_val_loss": 0.1}, path)
    return path


def test_checkpoint_of_another_size_is_refused(tmp_path):
    path = checkpoint(tmp_path / "x.pt", n=12)
    with pytest.raises(ValueError, match=r"x\.pt: params must be \[4172\] .*, got \[12\]"):
        NAMM.load_original_checkpoint(path)


def test_checkpoint_with_another_config(tmp_path):
    path = checkpoint(tmp_path / "x.pt", n=25)
    config = NAMMConfig(scorer="mlp", n_up=64)
    namm = NAMM.load_original_checkpoint(path, config=config, budget=9)
    assert namm.budget == Budget(9)
    assert namm.config.scorer == "mlp"
    assert namm.params.shape == (25,)


def test_checkpoint_of_the_old_file_format(tmp_path):
    path = checkpoint(tmp_path / "x.pt")
    content = torch.load(path, weights_only=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    namm = NAMM.load_original_checkpoint(path, "best")
    assert torch.equal(namm.params, content["evolution_state"]["best_member"])


def test_checkpoint_without_statistics(tmp_path):
    path = checkpoint(tmp_path / "x.pt", **{f"{STORED}num": torch.zeros(1, 1, 1, 17).long()})
    with pytest.warns(UserWarning, match="no normalisation statistics were collected"):
        namm = NAMM.load_original_checkpoint(path)
    assert namm.mean.abs().max() == 0
    assert namm.var.min() == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"mean": None}, "evolution_state must hold the tensor 'mean', got none"),
    ({f"{STORED}var": None}, f"must hold the tensor '{STORED}var', got none"),
    ({"mean": NONFINITE}, "mean must be finite, got 2 NaN or infinite values"),
    ({f"{STORED}mean": torch.zeros(16)}, r"mean must be \[17\], got \[16\]"),
], ids=range(4))  # fmt: skip
def test_incomplete_checkpoint(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        NAMM.load_original_checkpoint(checkpoint(tmp_path / "x.pt", **changes))


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_foreign_and_damaged_checkpoints(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="no such file"):
        NAMM.load_original_checkpoint(path)
    refused = r"x\.pt: must be a torch checkpoint that loads without executing code, got "
    torch.save({"evolution_state": Payload(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    assert not (tmp_path / "executed").exists()
    path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    whole = checkpoint(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=refused):
        NAMM.load_original_checkpoint(path)
    for foreign in ({"model": {}}, [1, 2], {"evolution_state": torch.zeros(3)}):
        torch.save(foreign, path)
        with pytest.raises(ValueError, match="must hold an 'evolution_state' dict"):
            NAMM.load_original_checkpoint(path)
    with pytest.raises(ValueError, match="which must be 'mean' or 'best', got 'median'"):
        NAMM.load_original_checkpoint(path, "median")
