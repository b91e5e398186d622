"""gate_ against the reference in float64: one column, the newest rows, and nothing else."""

import math

import pytest
import torch
from namm_ext import ops, reference, testing

IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))
impls = pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: head_dim, head_dim_v, rotary_dim, interleaved, state columns
SHAPES = {
    "llama": (64, 64, 64, False, 18),
    "gpt_j": (64, 64, 64, True, 18),
    "partial": (40, 24, 20, False, 2),
    "partial_interleaved": (27, 33, 22, True, 1),
    "no_rope": (24, 7, 0, False, 18),
    "tiny": (2, 1, 2, True, 1),
}


def _case(
    lengths=(37, 30, 64, 129), num_new=30, shape="llama", dtype=torch.float32, device="cpu", heads=2
):
    """A store that ends with the same tokens in all heads, and the other arguments."""
    head_dim, head_dim_v, rotary_dim, interleaved, num_state = SHAPES[shape]
    store = testing.ragged_store(
        lengths, head_dim=head_dim, head_dim_v=head_dim_v, num_state=num_state, dtype=dtype,
        device=device,
    )  # fmt: skip
    num_inputs = heads * (head_dim + head_dim_v + 2)
    weight, bias = testing.bank(heads, num_inputs), testing.bank(heads, 1)[:, 0].contiguous()
    args = {
        "active": torch.ones(len(lengths) // heads, dtype=torch.bool, device=device),
        "weight": weight.to(device),
        "bias": bias.to(device),
        "num_new": num_new,
        "rotary_dim": rotary_dim,
        "interleaved": interleaved,
    }
    return testing.same_newest(store, num_new), args


def _gates(function, store, args):
    """The state afterwards; every other tensor must stay as it was."""
    store = store.clone()
    before = store.clone()
    function(store, **args)
    for name in ("k", "v", "pos", "cu_seqlens_k", "seqused_k"):
        assert torch.equal(getattr(store, name).nan_to_num(), getattr(before, name).nan_to_num())
    return store.state


def _written(store, args):
    """``[C, F]`` bool: last column of the newest rows of active batch rows."""
    mask = torch.zeros_like(store.state, dtype=torch.bool)
    for s, live in enumerate(store.slices()):
        if args["active"][s // (len(store.seqused_k) // len(args["active"]))]:
            mask[live.stop - args["num_new"] : live.stop, -1] = True
    return mask


def _check(store, args, isa):
    double = {**args, "weight": args["weight"].double(), "bias": args["bias"].double()}
    exact = _gates(reference.gate_, store.double(), double)
    same = _gates(reference.gate_, store, args)
    with testing.force_isa(isa):
        got = _gates(ops.gate_, store, args)
    mask = _written(store, args)
    # Sums of hundreds of terms: 16 units in the last place of the largest gate are noise.
    floor = 16 * torch.finfo(torch.float32).eps * float(exact[mask].abs().max())
    testing.assert_no_worse_than(got[mask], same[mask], exact[mask], floor=floor)
    assert torch.equal(got.view(torch.int32)[~mask], store.state.view(torch.int32)[~mask])


@impls
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape, dtype, device, isa):
    _check(*_case(shape=shape, dtype=dtype, device=device), isa)


@impls
@pytest.mark.parametrize("num_new", [1, 3, 4, 5, 16, 129])
@pytest.mark.parametrize("heads", [1, 3, 9])
def test_every_number_of_rows_and_heads(heads, num_new, device, isa):
    lengths = [num_new + s % 4 for s in range(2 * heads)]
    _check(*_case(lengths, num_new, "partial", torch.bfloat16, device, heads), isa)


@impls
def test_inactive_rows_and_no_rows(device, isa):
    """A row that is not active may have fewer tokens, in other places."""
    store, args = _case((37, 30, 0, 7), device=device)
    args["active"][1] = False
    _check(store, args, isa)
    store, args = _case((0, 17, 33, 0), 0, device=device)
    with testing.force_isa(isa):
        got = _gates(ops.gate_, store, args)
    assert torch.equal(got.nan_to_num(), store.state.nan_to_num())


@impls
@pytest.mark.parametrize("shape", ["llama", "partial_interleaved"])
def test_a_token_has_the_same_bits_alone(shape, device, isa):
    """Whatever stands beside it: in one call, one by one, in another batch, with more threads."""
    store, args = _case((70, 81, 64, 129), 50, shape, torch.bfloat16, device)
    with testing.force_isa(isa):
        want = _gates(ops.gate_, store, args)
        one = {**args, "num_new": 1}
        state = store.state.clone()
        for _ in range(args["num_new"]):
            state = torch.where(_written(store, one), _gates(ops.gate_, store, one), state)
            store = store._replace(seqused_k=store.seqused_k - 1)
        assert torch.equal(state.nan_to_num(), want.nan_to_num())

        store = store._replace(seqused_k=store.seqused_k + args["num_new"])
        middle = int(store.cu_seqlens_k[2])
        for b, rows in enumerate((slice(0, middle), slice(middle, None))):
            part = {**args, "active": args["active"][b : b + 1]}
            got = _gates(ops.gate_, store.part(2 * b, 2 * b + 2), part)
            assert torch.equal(got.nan_to_num(), want[rows].nan_to_num())

        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            got = _gates(ops.gate_, store._replace(state=want), args)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(got.nan_to_num(), want.nan_to_num()), "writing it again changed it"


@impls
def test_nan_reaches_all_gates_of_its_token_and_no_other(device, isa):
    store, args = _case(device=device)
    live = store.slices()
    store.k[live[1].stop - 3, 40] = math.nan
    with testing.force_isa(isa):
        got = _gates(ops.gate_, store, args)
    poisoned = [live[0].stop - 3, live[1].stop - 3]
    assert bool(got[poisoned, -1].isnan().all())
    mask = _written(store, args)
    mask[poisoned] = False
    assert bool(got[mask].isfinite().all())


@impls
def test_zero_keys_and_values_are_finite(device, isa):
    store, args = _case(device=device)
    store.k.zero_()
    store.v.zero_()
    _check(store, args, isa)


BAD = {
    "few rows": (
        {"num_new": 31},
        "gate_: num_new must be at most the 30 live rows of segment 1, got 31",
    ),
    "other positions": (
        {"pos": 5},
        "gate_: pos must be equal in the newest 30 rows of the heads of batch row 1, "
        "got 5 in segment 3 and {} in segment 2",
    ),
    "used beyond slot": (
        {"seqused_k": [37, 30, 64, 135]},
        "gate_: seqused_k[3] must be in [0, 134], got 135",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_before_writing(case):
    changes, message = BAD[case]
    store, args = _case()
    row = store.slices()[3].stop - 2
    message = message.format(int(store.pos[row]))
    if "pos" in changes:
        store.pos[row] = changes["pos"]
    if "seqused_k" in changes:
        store = store._replace(seqused_k=torch.tensor(changes["seqused_k"], dtype=torch.int32))
    args["num_new"] = changes.get("num_new", args["num_new"])
    before = store.state.clone()
    with pytest.raises(RuntimeError) as error:
        ops.gate_(store, **args)
    assert str(error.value).endswith(message)
    assert torch.equal(store.state.nan_to_num(), before.nan_to_num())
    if case != "used beyond slot":
        with pytest.raises(ValueError, match=r"gate_: .* must have"):
            reference.gate_(store, **args)


def test_float64_runs_the_reference():
    store, args = _case()
    store = store.double()
    assert torch.equal(
        _gates(ops.gate_, store, args)[store.live], _gates(reference.gate_, store, args)[store.live]
    )


def test_float32_runs_the_kernel(monkeypatch):
    store, args = _case()
    monkeypatch.setattr(reference, "gate_", None)
    ops.gate_(store, **args)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 6, 10])
def test_inputs_are_those_of_the_law(rotary_dim, interleaved):
    """Number by number, in plain Python."""
    k, v = torch.randn(2, 10, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    eps, half = 1e-6, rotary_dim // 2
    heads = list(zip(k.tolist(), v.tolist(), strict=True))
    lengths = []
    for key, _ in heads:
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
        lengths.append([math.hypot(key[i], key[j]) for i, j in pairs])
    want = []
    for (key, _), pairs in zip(heads, lengths, strict=True):
        want += pairs + key[rotary_dim:]
    want += [math.log(length + eps) for pairs in lengths for length in pairs]
    want += [x for _, value in heads for x in value]
    want += [math.log(math.hypot(*value) + eps) for _, value in heads]
    want += [math.log(math.hypot(*key) + eps) for key, _ in heads]
    got = reference.gate_inputs(k, v, rotary_dim=rotary_dim, interleaved=interleaved, eps=eps)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_inputs_do_not_depend_on_the_position(interleaved):
    k, v = torch.randn(2, 10, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    options = {"rotary_dim": 8, "interleaved": interleaved}
    angle = torch.arange(1.0, 5.0, dtype=torch.float64)
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(4), slice(4, 8))
    turned = k.clone()
    turned[:, first] = k[:, first] * angle.cos() - k[:, second] * angle.sin()
    turned[:, second] = k[:, second] * angle.cos() + k[:, first] * angle.sin()
    torch.testing.assert_close(
        reference.gate_inputs(turned, v, **options), reference.gate_inputs(k, v, **options)
    )
    wrong = reference.gate_inputs(turned, v, rotary_dim=8, interleaved=not interleaved)
    assert not torch.allclose(
        wrong, reference.gate_inputs(k, v, rotary_dim=8, interleaved=not interleaved)
    )


def test_inputs_refuse_an_odd_rotation():
    k = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"rotary_dim must be even and in \[0, 4\], got 3"):
        reference.gate_inputs(k, k, rotary_dim=3)
