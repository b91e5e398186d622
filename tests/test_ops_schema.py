"""What PyTorch asks of an op: schema, fake kernel, gradients, torch.compile; and our messages."""

import inspect
import math
import re
from pathlib import Path

import namm_ext
import pytest
import torch
from namm_ext import ops, reference, testing
from namm_ext._library import libraries
from namm_ext.values import Segments, Window

OPS = libraries.ops
IN_PLACE = ("append_", "attend_", "gate_", "record_")
#: What the fields of a window are called as arguments of an op.
WINDOW = ("q_window", "lse_window", "pos_q", "active")


def schema(op):
    return getattr(torch.ops.namm_ext, op).default._schema


def sample(op, case="ragged", dtype=torch.float32, device="cpu"):
    """Arguments by name. Functional ops get stores without room: dead rows are unspecified."""
    in_place = op in IN_PLACE
    store = testing.ragged_store(case, dtype=dtype, device=device, room=4 if in_place else 0)
    if in_place:
        # opcheck compares all of a mutated argument, and NaN differs from itself.
        for tensor in (store.k, store.v, store.state):
            tensor.nan_to_num_()
    new = testing.new_tokens(store, (3, 2), num_groups=2, num_cols=4)
    new = {n: t.nan_to_num() if t.is_floating_point() else t for n, t in new.items()}
    q, lse, pos_q, active = testing.window(store, scale=0.2, active=(True, False))
    num_params = 4172 if op == "bam_scores" else 676
    known = {
        **store._asdict(), **new, "q_window": q, "lse_window": lse, "pos_q": pos_q,
        "active": active, "softmax_scale": 0.2, "ema_coeff": 0.99, "first_row": 16,
        "softcap": 1.5,
        "out": new["q"].new_zeros(2, 4, 4, store.v.shape[1]),
        "lse": torch.zeros(new["q"].shape[:3], device=device),
        "params": testing.bank(2, num_params, device=device),
        "param_index": torch.tensor([1, 0], dtype=torch.int32, device=device),
        "mean": torch.zeros(17, device=device), "var": torch.ones(17, device=device),
        "log_transform": True, "log_eps": 1e-3,
        "hidden": 25, "depth": 2, "bias": True, "residual_first": True,
        "scores": store.state[:, 0].contiguous() - 2, "threshold": 0.0, "cache_size": 20,
        "budget": "per_head", "fill": True, "protect_newest": True, "sink_tokens": 2,
        "recent_tokens": 3,
        "keep": torch.ones(store.capacity, dtype=torch.uint8, device=device),
        "num_kept": store.seqused_k.clone(), "cu_seqlens_new": store.cu_seqlens_k.clone(),
        "capacity": store.capacity,
        "weight": testing.bank(2, 100, device=device), "rotary_dim": 16, "interleaved": False,
        "eps": 1e-6,
    }  # fmt: skip
    if op == "gate_":
        count = int(store.seqused_k[:2].min())
        known |= {
            "pos": testing.same_newest(store, count).pos, "num_new": count,
            "bias": torch.ones(2, device=device),
        }  # fmt: skip
    if op == "record_":  # 32 positions make a period of this window
        known["pos_first"] = torch.tensor([29, 64], dtype=torch.int32, device=device)
    return {argument.name: known[argument.name] for argument in schema(op).arguments}


def values(op, args):
    """Arguments of the typed wrapper by name: the values, and what else the op takes."""
    parameters = inspect.signature(getattr(ops, op)).parameters
    known = dict(args)
    if "segments" in parameters:
        # What an op does not read may be anything.
        known["segments"] = Segments(*(args.get(n) for n in Segments._fields))
    if "window" in parameters:
        known["window"] = Window(*(args[n] for n in WINDOW))
    return {n: known[n] for n in parameters}


def positional(op, args):
    return [args[argument.name] for argument in schema(op).arguments]


def call(op, args):
    return getattr(ops, op)(**values(op, args))


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize(
    ("case", "dtype"),
    [("ragged", torch.float32), ("some_empty", torch.bfloat16), ("one_row", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, case, dtype, device):
    torch.library.opcheck(
        getattr(torch.ops.namm_ext, op).default, positional(op, sample(op, case, dtype, device))
    )


@pytest.mark.parametrize("op", OPS)
def test_compiles_without_a_graph_break(op):
    args = sample(op)
    expected_args = {n: a.clone() if isinstance(a, torch.Tensor) else a for n, a in args.items()}
    expected = call(op, expected_args)
    wrapper = getattr(ops, op)
    # All ops pass through one lambda, and dynamo compiles one code object eight times at most.
    torch.compiler.reset()
    compiled = torch.compile(
        lambda arguments: wrapper(**arguments), fullgraph=True, backend="aot_eager"
    )
    got = compiled(values(op, args))
    if expected is None:
        for name, tensor in args.items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(tensor, expected_args[name]), name
        return
    for new, old in zip(
        got if isinstance(got, tuple) else (got,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        assert torch.equal(new, old)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused(op):
    args = sample(op)
    name = next(
        n
        for n, a in args.items()
        if isinstance(a, torch.Tensor) and a.is_floating_point() and n not in ("out", "lse")
    )
    args[name] = args[name].clone().requires_grad_()
    message = (
        rf"^{op}: {name} must not require grad, got requires_grad=True; the op is not "
        r"differentiable, call it under torch.no_grad\(\)"
    )
    raw = getattr(torch.ops.namm_ext, op)
    for function in (lambda: raw(*positional(op, args)), lambda: call(op, args)):
        with pytest.raises(RuntimeError, match=message):
            function()
    with torch.no_grad():
        call(op, args)


def test_the_list_of_ops_comes_from_the_library():
    """An op without wrapper, law or test cannot hide: this list is what they are compared with."""
    source = Path(__file__).parents[1] / "cpp/ops/library.cpp"
    defined = re.findall(r'^ +"(\w+)\(Tensor', source.read_text(), re.MULTILINE)
    assert sorted(defined) == list(OPS)


@pytest.mark.parametrize("op", OPS)
def test_works_in_inference_mode(op):
    with torch.inference_mode():
        call(op, sample(op))


@pytest.mark.parametrize("op", [*OPS, "attend"])
def test_wrapper_reference_and_schema_agree(op):
    wrapper = inspect.signature(getattr(ops, op)).parameters
    law = inspect.signature(getattr(reference, op)).parameters
    names = [n for n in law if n != "round_to"]
    assert list(wrapper) == names
    assert all(wrapper[n].kind is law[n].kind for n in names)
    if op != "attend":
        # Every argument of the op is one of the wrapper's, or lies in one of its values.
        flat = set(wrapper) - {"segments", "window"}
        flat |= set(Segments._fields) if "segments" in wrapper else set()
        flat |= set(WINDOW) if "window" in wrapper else set()
        arguments = {a.name for a in schema(op).arguments}
        assert arguments <= flat
        assert flat - arguments <= set(Segments._fields), "only parts of a store may be left out"


@pytest.mark.parametrize("op", [*OPS, "attend"])
def test_docstrings_have_their_parts_in_order(op):
    text = inspect.getdoc(getattr(ops, op))
    parts = ["Args:", "Raises:", "Example:"]
    if op not in IN_PLACE:
        parts.insert(1, "Returns:")
    found = re.findall(r"^(Args|Returns|Raises|Example):$", text, re.MULTILINE)
    assert [f"{name}:" for name in found] == parts
    args = text.partition("Args:")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+): ", args, re.MULTILINE)
    assert documented == list(inspect.signature(getattr(ops, op)).parameters)


# One change to a good sample, and what the user reads. Every check has a line here.
BAD = [
    ("append_", "k", lambda t: t.to(torch.int32),
     "k must be float32, bfloat16 or float16, got int32"),
    ("append_", "k", lambda t: t[None], "k must have shape [*, *], got [1, 251, 24]"),
    ("append_", "k", lambda t: t.T.contiguous().T, "k must be contiguous, got strides [1, 251]"),
    ("append_", "v", lambda t: t[1:], "v must have shape [251, *], got [250, 24]"),
    ("append_", "v", lambda t: t.half(), "v must be float32, got float16"),
    ("append_", "pos", lambda t: t.long(), "pos must be int32, got int64"),
    ("append_", "state", lambda t: t.half(), "state must be float32, got float16"),
    ("append_", "k_new", lambda t: t[..., :5],
     "k_new must have shape [*, *, *, 24], got [2, 2, 4, 5]"),
    ("append_", "k_new", lambda t: t.mT.contiguous().mT,
     "k_new must be contiguous in its last dimension, got strides [192, 96, 1, 4]"),
    ("append_", "v_new", lambda t: t[:, :, 1:],
     "v_new must have shape [2, 2, 4, 24], got [2, 2, 3, 24]"),
    ("append_", "seqused_k", lambda t: t[1:],
     "seqused_k must have a positive multiple of 2 (batch_size) elements, got 3"),
    ("append_", "seqused_k", lambda t: t[:2], "cu_seqlens_k must have shape [3], got [5]"),
    ("append_", "cu_seqlens_k", lambda t: t[::2], "cu_seqlens_k must have shape [5], got [3]"),
    ("append_", "first", lambda t: t[:1], "first must have shape [2], got [1]"),
    ("append_", "num_new", lambda t: t.bool(), "num_new must be int32, got bool"),
    ("append_", "pos_first", lambda t: t.repeat(2)[::2],
     "pos_first must be contiguous, got strides [2]"),
    ("attend_", "q", lambda t: t[:, :3],
     "q must have a positive multiple of 2 (num_kv_heads) heads, got 3"),
    ("attend_", "k", lambda t: t[:, :8].contiguous(), "k must have shape [*, 24], got [251, 8]"),
    ("attend_", "v", lambda t: t.bfloat16(), "v must be float32, got bfloat16"),
    ("attend_", "out", lambda t: t[:, 1:], "out must have shape [2, 4, 4, 24], got [2, 3, 4, 24]"),
    ("attend_", "lse", lambda t: t.double(), "lse must be float32, got float64"),
    ("attend_", "softmax_scale", lambda x: math.inf, "softmax_scale must be finite, got inf"),
    ("record_", "q_window", lambda t: t.int(),
     "q_window must be float32, bfloat16 or float16, got int32"),
    ("record_", "q_window", lambda t: t[:, :, :16], "q_window must have more than 16 rows, got 16"),
    ("record_", "lse_window", lambda t: t[:, :, 1:],
     "lse_window must have shape [2, 4, 48], got [2, 4, 47]"),
    ("record_", "q", lambda t: t[:, :3], "q must have shape [2, 4, *, 24], got [2, 3, 4, 24]"),
    ("record_", "q", lambda t: t.half(), "q must be float32, got float16"),
    ("record_", "lse", lambda t: t.double(), "lse must be float32, got float64"),
    ("record_", "first", lambda t: t.long(), "first must be int32, got int64"),
    ("record_", "num_new", lambda t: t[1:], "num_new must have shape [2], got [1]"),
    ("record_", "pos_first", lambda t: t[1:], "pos_first must have shape [2], got [1]"),
    ("spectrogram", "q_window", lambda t: t[:, :, 1:],
     "q_window must have 16 + n_up rows with n_up a positive multiple of 16, got 47 rows"),
    ("spectrogram", "q_window", lambda t: t[:, :, :16],
     "q_window must have 16 + n_up rows with n_up a positive multiple of 16, got 16 rows"),
    ("spectrogram", "lse_window", lambda t: t[:, 1:],
     "lse_window must have shape [2, 4, 48], got [2, 3, 48]"),
    ("spectrogram", "pos_q", lambda t: t.float(), "pos_q must be int32, got float32"),
    ("spectrogram", "active", lambda t: t.int(), "active must be bool, got int32"),
    ("spectrogram", "state", lambda t: t[:, 1:].contiguous(),
     "state must have shape [235, 17], got [235, 16]"),
    ("spectrogram", "ema_coeff", lambda x: 1.5, "ema_coeff must be in [0, 1], got 1.5"),
    ("spectrogram", "ema_coeff", lambda x: math.nan, "ema_coeff must be in [0, 1], got nan"),
    ("attention_received", "first_row", lambda x: 49, "first_row must be in [0, 48], got 49"),
    ("attention_received", "k", lambda t: t.half(), "k must be float32, got float16"),
    ("bam_scores", "params", lambda t: t[:, 1:].contiguous(),
     "params must have shape [*, 4172], got [2, 4171]"),
    ("bam_scores", "params", lambda t: t[:0],
     "number of parameter vectors must be in [1, 2147483647], got 0"),
    ("bam_scores", "mean", lambda t: t[1:], "mean must have shape [17], got [16]"),
    ("bam_scores", "active", lambda t: t[:0], "the batch must have at least 1 row, got 0"),
    ("bam_scores", "log_eps", lambda x: -1.0, "log_eps must be finite and not negative, got -1"),
    ("mlp_scores", "params", lambda t: t[:, 1:].contiguous(),
     "params must have shape [*, 676], got [2, 675]"),
    ("mlp_scores", "hidden", lambda x: 24, "hidden must be 25 with residual_first, got 24"),
    ("mlp_scores", "hidden", lambda x: 0, "hidden must be in [1, 65536], got 0"),
    ("mlp_scores", "depth", lambda x: 0, "depth must be in [1, 65536], got 0"),
    ("gate_", "state", lambda t: t[:, :0],
     "number of state columns must be in [1, 2147483647], got 0"),
    ("gate_", "k", lambda t: t.int(), "k must be float32, bfloat16 or float16, got int32"),
    ("gate_", "v", lambda t: t.half(), "v must be float32, got float16"),
    ("gate_", "pos", lambda t: t[1:], "pos must have shape [251], got [250]"),
    ("gate_", "active", lambda t: t.int(), "active must be bool, got int32"),
    ("gate_", "weight", lambda t: t[:, 1:].contiguous(),
     "weight must have shape [2, 100], got [2, 99]"),
    ("gate_", "weight", lambda t: t.double(), "weight must be float32, got float64"),
    ("gate_", "bias", lambda t: t[1:], "bias must have shape [2], got [1]"),
    ("gate_", "num_new", lambda x: -1, "num_new must be in [0, 2147483647], got -1"),
    ("gate_", "rotary_dim", lambda x: 15, "rotary_dim must be even and in [0, 24], got 15"),
    ("gate_", "rotary_dim", lambda x: 26, "rotary_dim must be even and in [0, 24], got 26"),
    ("gate_", "eps", lambda x: math.nan, "eps must be finite, got nan"),
    ("gate_", "eps", lambda x: -1.0, "eps must not be negative, got -1"),
    ("select", "scores", lambda t: t.half(), "scores must be float32, got float16"),
    ("select", "pos", lambda t: t[1:], "pos must have shape [235], got [234]"),
    ("compact", "keep", lambda t: t.bool(), "keep must be uint8, got bool"),
    ("compact", "num_kept", lambda t: t[1:], "num_kept must have shape [4], got [3]"),
    ("compact", "cu_seqlens_new", lambda t: t[1:], "cu_seqlens_new must have shape [5], got [4]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    BAD,
    ids=[f"{op}-{name}-{i}" for i, (op, name, *_) in enumerate(BAD)],
)
def test_message(op, name, change, message):
    args = sample(op)
    args[name] = change(args[name])
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.namm_ext, op)(*positional(op, args))
    text = str(error.value)
    assert text.endswith(f"{op}: {message}")
    assert "/" not in text.replace("cpp/ops/", ""), "no path of the machine it was built on"


@pytest.mark.cuda
@pytest.mark.skipif("cuda" not in testing.devices(), reason="no CUDA device")
def test_tensors_on_another_device():
    args = sample("select", device="cuda")
    args["pos"] = args["pos"].cpu()
    with pytest.raises(RuntimeError) as error:
        torch.ops.namm_ext.select(*positional("select", args))
    message = "select: pos must be on the device of scores (cuda:0), got cpu"
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("op", OPS)
def test_one_tensor_on_the_meta_device(op):
    """PyTorch asks the kernel without data then, which would do nothing and say nothing."""
    args = sample(op)
    for name in [n for n, value in args.items() if isinstance(value, torch.Tensor)]:
        call = positional(op, {**args, name: args[name].to("meta")})
        with pytest.raises(RuntimeError, match=rf"{op}: all tensors must be on one device, got .*"
                           rf"{name} on meta|{op}: .* on meta"):  # fmt: skip
            getattr(torch.ops.namm_ext, op)(*call)
    getattr(torch.ops.namm_ext, op)(*(
        a.to("meta") if isinstance(a, torch.Tensor) else a for a in positional(op, args)
    ))  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_negative_views_are_refused(op):
    args = sample(op)
    floats = [
        n for n, x in args.items() if isinstance(x, torch.Tensor) and x.dtype == torch.float32
    ]
    for name in floats:
        view = torch.complex(torch.zeros_like(args[name]), -args[name]).conj().imag
        assert view.is_neg()
        with pytest.raises(RuntimeError, match=re.escape(
            f"{op}: {name} must not be a negative view; call {name}.resolve_neg()"
        )):  # fmt: skip
            getattr(torch.ops.namm_ext, op)(*positional(op, {**args, name: view}))


def test_force_isa():
    best = torch.ops.namm_ext.cpu_isa()
    assert best == testing.isas()[-1]
    with testing.force_isa("base"):
        assert torch.ops.namm_ext.cpu_isa() == "base"
    assert torch.ops.namm_ext.cpu_isa() == best
    with pytest.raises(RuntimeError) as error, testing.force_isa("sse9"):
        pass
    message = "force_isa: isa must be one of base, avx2, avx512, avx512bf16, amx, got 'sse9'"
    assert str(error.value).endswith(message)
    missing = {"avx2", "avx512", "avx512bf16", "amx"} - set(testing.isas())
    for isa in missing:
        with pytest.raises(RuntimeError, match="isa must be one this CPU has"):
            torch.ops.namm_ext.force_isa(isa)


def test_constants_agree():
    core = namm_ext._core
    assert (core.N_FFT, core.HOP, core.CARRY) == (reference.N_FFT, reference.HOP, reference.CARRY)
    assert (core.NUM_BINS, core.NUM_FEATURES) == (reference.NUM_BINS, reference.NUM_FEATURES)
    assert (core.HIDDEN, core.NUM_BAM_PARAMS) == (reference.HIDDEN, reference.NUM_BAM_PARAMS)


def test_samples_are_ugly():
    store = testing.ragged_store("some_empty")
    dead = ~store.live
    assert bool(store.k[dead].isnan().all())
    assert bool((store.pos[dead] == testing.POISON_POS).all())
    new = testing.new_tokens(store, (2, 1), num_cols=3)
    assert not new["k_new"].is_contiguous()
    assert bool(new["k_new"][0, :, 0].isnan().all())


def test_assert_no_worse_than_can_fail():
    exact = torch.zeros(3, dtype=torch.float64)
    off = torch.full((3,), 1e-3)
    testing.assert_no_worse_than(off, off, exact)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_no_worse_than(3 * off, off, exact)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_no_worse_than(torch.full((3,), math.nan), off, exact)
    with pytest.raises(AssertionError, match="infinities"):
        testing.assert_no_worse_than(off, off, torch.tensor([math.inf, 0, 0]))
