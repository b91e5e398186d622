"""The CUDA ops on a GPU: against the law, against the CPU ops, and against themselves.

The op tests (``test_ops_*.py``) already run on every device with ugly inputs, which take the plain
paths. Here the inputs are aligned, so that the tensor cores work.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_calls import (
    BF16,
    FP16,
    FP32,
    RULES,
    Call,
    append_call,
    attend_call,
    compact_call,
    gate_call,
    law,
    record_call,
    score_call,
    select_call,
    to_device,
    window_call,
)
from namm_ext import ops, testing
from namm_ext.values import Segments
from torch.utils._pytree import tree_leaves

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif("cuda" not in testing.devices(), reason="needs a GPU and the CUDA ops"),
]

REPEATS = 250
SHAPES = [
    pytest.param(64, 4, BF16, id="D64-G4-bf16"),
    pytest.param(96, 3, FP16, id="D96-G3-fp16"),
    pytest.param(128, 1, BF16, id="D128-G1-bf16"),
    pytest.param(128, 4, BF16, id="D128-G4-bf16"),
    pytest.param(128, 8, FP16, id="D128-G8-fp16"),
    pytest.param(256, 2, BF16, id="D256-G2-bf16"),
    pytest.param(80, 7, BF16, id="D80-G7-bf16"),
    pytest.param(192, 12, BF16, id="D192-G12-bf16"),
    pytest.param(72, 2, FP32, id="D72-G2-fp32"),
]


# Against the law and the CPU ----------------------------------------------------------------------


@pytest.mark.parametrize("num_new", [(1, 1), (2, 0), (33, 20), (300, 64)], ids=str)
@pytest.mark.parametrize(("head_dim", "groups", "dtype"), SHAPES)
def test_attend(head_dim, groups, dtype, num_new):
    call = attend_call(head_dim, groups, dtype, num_new)
    got = call.run("cuda")
    exact = law(call, torch.float64)
    same = law(call, dtype, None if dtype == FP32 else dtype)
    for ours, theirs, truth in zip(got, same, exact, strict=True):
        testing.assert_no_worse_than(ours, theirs, truth)


@pytest.mark.parametrize("name", ["spectrogram", "attention_received"])
@pytest.mark.parametrize(("head_dim", "groups", "dtype"), SHAPES)
def test_window(name, head_dim, groups, dtype):
    call = window_call(name, head_dim, groups, dtype)
    (got,), (exact,) = call.select(call.run("cuda")), call.select(law(call, torch.float64))
    error = (got.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == FP32 else 5e-4), f"relative L2 error {error:.1e}"


@pytest.mark.parametrize("spread", [0.1, 0.3, 3.0], ids=lambda s: f"std{s}")
@pytest.mark.parametrize("name", ["bam_scores", "mlp_scores"])
def test_scores(name, spread):
    call = score_call(name, spread)
    (got,), (exact,) = call.select(call.run("cuda")), call.select(law(call, torch.float64))
    error = (got.double() - exact).norm() / exact.norm()
    # Large weights multiply the rounding of fp16 features; see kernels.md on precision.
    assert error < (2e-3 if spread <= 0.3 else 5e-2), f"relative L2 error {error:.1e}"
    rms = exact.square().mean().sqrt()
    flipped = (got >= 0) != (exact >= 0)
    assert bool((exact[flipped].abs() <= (5e-3 if spread <= 0.3 else 1e-1) * rms).all())


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("rule", RULES)
def test_select_decides_like_the_cpu(rule, ties):
    call = select_call(rule, ties)
    for ours, theirs in zip(
        call.select(call.run("cuda")), call.select(call.run("cpu")), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(128, BF16), (80, FP16), (72, FP32), (5, BF16), (6, FP16)]
)
def test_compact_and_append_copy_like_the_cpu(head_dim, dtype):
    for make in (compact_call, append_call, record_call):
        call = make(head_dim, dtype)
        for ours, theirs in zip(call.run("cuda"), call.run("cpu"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("head_dim", "groups", "dtype"), SHAPES)
def test_attend_like_the_cpu(head_dim, groups, dtype):
    call = attend_call(head_dim, groups, dtype, (33, 1))
    tolerance = {FP32: 2e-5, FP16: 4e-3, BF16: 3e-2}[dtype]
    for ours, theirs in zip(call.run("cuda"), call.run("cpu"), strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("name", ["spectrogram", "attention_received"])
@pytest.mark.parametrize(("head_dim", "groups", "dtype"), SHAPES)
def test_window_like_the_cpu(name, head_dim, groups, dtype):
    call = window_call(name, head_dim, groups, dtype)
    (ours,), (theirs,) = call.select(call.run("cuda")), call.select(call.run("cpu"))
    error = (ours - theirs).norm() / theirs.norm()
    assert error < (1e-5 if dtype == FP32 else 5e-4), f"relative L2 difference {error:.1e}"


@pytest.mark.parametrize("name", ["bam_scores", "mlp_scores"])
def test_scores_choose_like_the_cpu(name):
    call = score_call(name, 0.3)
    (ours,), (theirs,) = call.run("cuda"), call.run("cpu")
    (mine,), (want,) = call.select([ours]), call.select([theirs])
    error = (mine - want).norm() / want.norm()
    assert error < 2e-3, f"relative L2 difference {error:.1e}"
    rule = {
        "threshold": 0.0, "cache_size": -1, "budget": "per_head", "fill": False,
        "protect_newest": True, "sink_tokens": 0, "recent_tokens": 0,
    }  # fmt: skip
    store, *_, active = call.args
    keep = [ops.select(scores, store, active, **rule)[0] for scores in (ours, theirs)]
    differ = (keep[0] != keep[1])[call.live]
    # Only where the score lies within the error of the threshold, and seldom.
    assert bool((want[differ].abs() <= 5e-3 * want.square().mean().sqrt()).all())
    assert differ.float().mean() <= 1e-3


# Against themselves -------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], Call]] = {
    "append": lambda: append_call(128, BF16),
    "record": lambda: record_call(128, BF16),
    "attend_decode": lambda: attend_call(128, 4, BF16, (1, 1)),
    "attend_prefill": lambda: attend_call(128, 4, BF16, (64, 40)),
    "attend_simt": lambda: attend_call(72, 2, FP32, (20, 1)),
    "spectrogram": lambda: window_call("spectrogram", 128, 4, BF16),
    "spectrogram_simt": lambda: window_call("spectrogram", 72, 2, FP32),
    "attention_received": lambda: window_call("attention_received", 128, 4, BF16),
    "bam_scores": lambda: score_call("bam_scores"),
    "bam_scores_large": lambda: score_call("bam_scores", 3.0),
    "mlp_scores": lambda: score_call("mlp_scores"),
    "gate": lambda: gate_call(128, BF16),
    "select": lambda: select_call("layer", ties=True),
    "compact": lambda: compact_call(128, BF16),
}


@pytest.mark.parametrize("name", CALLS)
def test_equal_bits_every_time(name):
    call = CALLS[name]()
    first = call.select(call.run("cuda"))
    args, kwargs = to_device(call.args, "cuda"), to_device(call.kwargs, "cuda")
    live = None if call.live is None else call.live.cuda()
    device_call = Call(call.name, args, kwargs, live)
    expected = [t.cuda() for t in first]
    function = getattr(ops, call.name)
    for _ in range(REPEATS):
        fresh = to_device(args, "cuda") if call.name.endswith("_") else args
        got = function(*fresh, **kwargs)
        got = device_call.select(tree_leaves(fresh if got is None else got))
        for a, b in zip(got, expected, strict=True):
            same = (a == b) | ((a != a) & (b != b))
            assert bool(same.all())


@pytest.mark.parametrize("num_new", [1, 100], ids=["decode", "prefill"])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, BF16), (72, FP32)], ids=["mma", "simt"])
def test_attend_does_not_depend_on_the_batch(head_dim, dtype, num_new):
    call = attend_call(head_dim, 4, dtype, (num_new, num_new))
    out, lse = call.run("cuda")
    q, store, *columns = call.args
    for b in range(2):
        mine = (t[b : b + 1] for t in columns)
        args = (q[b : b + 1], store.part(2 * b, 2 * b + 2), *mine)
        got, got_lse = Call("attend", args, call.kwargs, None).run("cuda")
        assert torch.equal(got[0], out[b])
        assert torch.equal(got_lse[0], lse[b])


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("spectrogram", 128, BF16),
        ("spectrogram", 72, FP32),
        ("attention_received", 128, BF16),
        ("bam_scores", 0, FP32),
        ("mlp_scores", 0, FP32),
    ],
)
def test_features_and_scores_do_not_depend_on_the_batch(name, head_dim, dtype):
    scores = name.endswith("_scores")
    call = score_call(name) if scores else window_call(name, head_dim, 4, dtype)
    (whole,) = call.run("cuda")
    # The second batch row alone: everything per row or per segment is cut.
    if scores:
        store, params, index, mean, var, active = call.args
        part = store.part(2, 4)
        args = (part, params, index[1:], mean, var, active[1:])
    else:
        window, store = call.args
        part = store.part(2, 4)
        args = (window._make(t[1:].contiguous() for t in window), part)
    (alone,) = Call(name, args, call.kwargs, part.live).run("cuda")
    start = int(store.cu_seqlens_k[2])
    assert torch.equal(alone[part.live], whole[start:][part.live])


@pytest.mark.parametrize("rule", list(RULES))
def test_select_and_compact_do_not_depend_on_the_batch(rule):
    call = select_call(rule, ties=True)
    keep, kept = call.run("cuda")
    scores, store, active = call.args
    for b in range(2):
        part = store.part(2 * b, 2 * b + 2)
        rows = slice(int(store.cu_seqlens_k[2 * b]), int(store.cu_seqlens_k[2 * b + 2]))
        args = (scores[rows], part, active[b : b + 1])
        alone, alone_kept = Call("select", args, call.kwargs, None).run("cuda")
        assert torch.equal(alone[part.live], keep[rows][part.live])
        assert torch.equal(alone_kept, kept[2 * b : 2 * b + 2])
    call = compact_call(128, BF16)
    *whole, _, _ = call.run("cuda")
    store, keep, kept, new = call.args
    start, out = int(store.cu_seqlens_k[2]), slice(int(new[2]), int(new[4]))
    args = (store.part(2, 4), keep[start:], kept[2:], new[2:] - new[2])
    *got, _, _ = Call("compact", args, {"capacity": out.stop - out.start}, None).run("cuda")
    for ours, part in zip(got, whole, strict=True):
        assert torch.equal(ours, part[out])


# Memory, streams, the drop-in ---------------------------------------------------------------------


def test_ops_run_on_the_current_stream():
    call = compact_call(128, BF16)
    expected = call.run("cuda")
    args = to_device(call.args, "cuda")
    late = args[0].k.clone()
    args[0].k.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # an op on another stream would read the zeros
        args[0].k.copy_(late)
        got = ops.compact(*args, **call.kwargs)
    stream.synchronize()
    torch.testing.assert_close(got.k.cpu(), expected[0], rtol=0, atol=0)


def test_ops_do_not_wait_for_the_device():
    calls = [CALLS[name]() for name in CALLS]
    ready = [(c, to_device(c.args, "cuda"), to_device(c.kwargs, "cuda")) for c in calls]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for call, args, kwargs in ready:
            getattr(ops, call.name)(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_stores_beyond_32_bits():
    # 2^31 elements and more per tensor: byte and element offsets need 64 bits.
    head_dim, rows = 128, (1 << 24) + 4096
    if torch.cuda.mem_get_info()[0] < 20 * rows * head_dim:
        pytest.skip("needs 40 GB of free device memory")
    cuda = {"device": "cuda"}
    k = torch.zeros(rows, head_dim, dtype=BF16, **cuda)
    k[-300:] = torch.randn(300, head_dim, **cuda).to(BF16)
    used = torch.tensor([rows - 300, 300], dtype=torch.int32, **cuda)
    cu = torch.tensor([0, rows - 300, rows], dtype=torch.int32, **cuda)
    pos = torch.arange(rows, dtype=torch.int32, **cuda)
    keep = torch.zeros(rows, dtype=torch.uint8, **cuda)
    keep[-300:] = 1
    kept = torch.tensor([0, 300], dtype=torch.int32, **cuda)
    state = torch.zeros(rows, 1, **cuda)
    store = Segments(k, k, pos, state, cu, used)
    slots = torch.tensor([0, 0, 300], dtype=torch.int32, **cuda)
    new = ops.compact(store, keep, kept, slots, capacity=300)
    assert torch.equal(new.k, k[-300:])
    assert torch.equal(new.pos, pos[-300:])
    q = torch.randn(1, 2, 1, head_dim, **cuda).to(BF16)
    one = torch.ones(1, dtype=torch.int32, **cuda)
    out, _ = ops.attend(q, store, 0 * one, one, 0 * one + rows, softmax_scale=0.1)
    logits = (k[-300:].double() @ q[0, 1, 0].double()) * 0.1
    want = torch.softmax(logits, 0) @ k[-300:].double()
    torch.testing.assert_close(out[0, 0, 1].double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_drop_in_generates_like_the_cpu(family):
    hf_models = pytest.importorskip("hf_models")
    from namm_ext import NAMMCache

    policy = hf_models.evicting_policy(budget=24)
    ids = hf_models.tokens(2, 90)
    results = []
    for device in ("cpu", "cuda"):
        model = hf_models.build(hf_models.FAMILIES[family](), FP32).to(device)
        cache = NAMMCache(model, policy)
        text = model.generate(
            ids.to(device), past_key_values=cache, do_sample=False, max_new_tokens=40
        )
        report = cache.report()
        results.append((text.cpu(), report.tokens_kept, report.tokens_live))
    assert results[0][1:] == results[1][1:]
    # Random weights, float32: sums in another order may flip a near tie late in the text.
    agreement = (results[0][0] == results[1][0]).float().mean().item()
    assert agreement > 0.95, f"{agreement:.3f} of the tokens agree"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_drop_in_on_tensor_cores(dtype):
    hf_models = pytest.importorskip("hf_models")
    transformers = pytest.importorskip("transformers")
    from namm_ext import NAMMCache
    from namm_ext.baselines import NeverEvict

    config = transformers.LlamaConfig(
        **{**hf_models.COMMON, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}
    )
    model = hf_models.build(config, dtype).to("cuda")
    ids = hf_models.tokens(2, 150).cuda()
    mine = model(ids, past_key_values=NAMMCache(model, NeverEvict(n_up=64))).logits.double()
    exact_model = hf_models.build(config, torch.float64)
    exact_model.load_state_dict({k: v.double().cpu() for k, v in model.state_dict().items()})
    exact = exact_model(ids.cpu()).logits
    model.set_attn_implementation("sdpa")
    plain = model(ids, use_cache=False).logits.double()
    ours, theirs = (mine.cpu() - exact).abs().max(), (plain.cpu() - exact).abs().max()
    assert ours <= 2 * theirs, f"{ours:.2e} > 2 * {theirs:.2e}"


def _decoding(hf_models):
    """A model, a cache that has read a prompt, and the tokens that come."""
    from namm_ext import NAMMCache

    model = hf_models.build(hf_models.FAMILIES["llama"](), FP32).to("cuda")
    cache = NAMMCache(model, hf_models.evicting_policy(16, budget=24))
    ids = hf_models.tokens(2, 90).cuda()
    with torch.no_grad():
        model(ids[:, :50], past_key_values=cache)
    return model, cache, ids[:, 50:]


@torch.no_grad()
def test_drop_in_as_a_graph():
    import namm_ext

    hf_models = pytest.importorskip("hf_models")
    model, cache, ids = _decoding(hf_models)
    _, other, _ = _decoding(hf_models)
    step = namm_ext.graphed(model, cache)
    for t in range(ids.shape[1]):
        column = ids[:, t : t + 1]
        want = model(column, past_key_values=other).logits[:, -1]
        torch.testing.assert_close(step(column), want)
    assert cache.report().tokens_kept == other.report().tokens_kept


@torch.no_grad()
def test_drop_in_decodes_without_waiting():
    model, cache, ids = _decoding(pytest.importorskip("hf_models"))
    model(ids[:, :1], past_key_values=cache)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(1, 10):  # no update before token 64
            model(ids[:, t : t + 1], past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
