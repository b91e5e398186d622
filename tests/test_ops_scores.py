"""bam_scores and mlp_scores against the reference in float64, on every instruction set."""

import itertools

import device_errors
import pytest
import torch
from namm_ext import ops, reference, testing
from namm_ext.values import Segments

IMPLS = [("cpu", isa) for isa in testing.isas()]
if "cuda" in testing.devices():
    IMPLS.append(("cuda", "base"))
impls = pytest.mark.parametrize(("device", "isa"), IMPLS, ids=[f"{d}-{i}" for d, i in IMPLS])

MLPS = {
    "linear": {"hidden": 25, "depth": 1, "bias": False, "residual_first": False},
    "linear_bias": {"hidden": 25, "depth": 1, "bias": True, "residual_first": False},
    "two_layers": {"hidden": 13, "depth": 2, "bias": True, "residual_first": False},
    "residual": {"hidden": 25, "depth": 2, "bias": False, "residual_first": True},
    "deep": {"hidden": 25, "depth": 4, "bias": True, "residual_first": True},
}


def _case(lengths, device="cpu", num_params=reference.NUM_BAM_PARAMS, active=(True, True)):
    store = testing.ragged_store(lengths, device=device)
    generator = torch.Generator().manual_seed(7)
    args = {
        "params": testing.bank(3, num_params, device=device),
        "param_index": torch.tensor([2, 0], dtype=torch.int32, device=device),
        "mean": torch.rand(17, generator=generator).to(device),
        # One bin without any variance: its floor is 1e-7, so it is kept at its mean here.
        "var": torch.rand(17, generator=generator).to(device) + 0.1,
        "active": torch.tensor(active, device=device),
    }
    return store, args


def _scores(function, store, args, log_transform=False, **mlp):
    return function(
        store, args["params"], args["param_index"], args["mean"], args["var"], args["active"],
        log_transform=log_transform, log_eps=1e-3, **mlp,
    )  # fmt: skip


def _check(name, store, args, isa, **kwargs):
    double_args = dict(args)
    for key in ("params", "mean", "var"):
        double_args[key] = args[key].double()
    exact = _scores(getattr(reference, name), store.double(), double_args, **kwargs)
    same = _scores(getattr(reference, name), store, args, **kwargs)
    with testing.force_isa(isa):
        got = _scores(getattr(ops, name), store, args, **kwargs)
    live = store.live
    assert got.shape == store.pos.shape
    # Sums of about 100 terms: 16 units in the last place of the largest score are noise.
    largest = float(exact[live].abs().max())
    floor = 16 * torch.finfo(torch.float32).eps * max(1.0, largest)
    if name == "bam_scores":
        floor = max(floor, device_errors.BAM_SCORES[got.device.type] * largest)
    testing.assert_no_worse_than(got[live], same[live], exact[live], floor=floor)


@impls
@pytest.mark.parametrize("log_transform", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("lengths", testing.LENGTHS)
def test_bam_scores(lengths, log_transform, device, isa):
    _check("bam_scores", *_case(lengths, device), isa, log_transform=log_transform)


@impls
@pytest.mark.parametrize("log_transform", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("lengths", ["ragged", "some_empty"])
def test_mlp_scores(lengths, mlp, log_transform, device, isa):
    sizes = MLPS[mlp]
    num_params = reference.num_mlp_params(sizes["hidden"], sizes["depth"], sizes["bias"])
    case = _case(lengths, device, num_params)
    _check("mlp_scores", *case, isa, log_transform=log_transform, **sizes)


def _first_row(args):
    return {k: v[:1] if k in ("param_index", "active") else v for k, v in args.items()}


@impls
@pytest.mark.parametrize("log_transform", [False, True], ids=["linear", "log"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 257, 700])
def test_bam_scores_of_every_length(length, log_transform, device, isa):
    """Around the edges of tiles, and over many of them."""
    store, args = _case((length, 3), device)
    _check("bam_scores", store, _first_row(args), isa, log_transform=log_transform)


@pytest.mark.parametrize("isa", testing.isas())
def test_bam_scores_are_redone_where_the_anchor_overflows(isa):
    """Weights so large that 2^(logit - self logit) leaves float32."""
    store, args = _case((90, 3))
    args = _first_row(args)
    args["params"][:, : 25 * 96] *= 12
    args["mean"][:], args["var"][:] = 0.5, 2.0
    live = store.live
    same = _scores(reference.bam_scores, store, args)[live]
    want = _scores(reference.bam_scores, store.double(), args)[live]
    with testing.force_isa(isa):
        got = _scores(ops.bam_scores, store, args)[live]
    assert got.isfinite().all()
    testing.assert_no_worse_than(got, same, want, factor=4.0)


@impls
def test_old_ages(device, isa):
    """Ages beyond the original's table, in a store whose positions start late."""
    store, args = _case("equal", device)
    live = store.live
    store.pos[live] = store.pos[live] * 20_000_000
    assert int(store.pos[live].max()) > 2**29
    _check("bam_scores", store, args, isa)
    _check("mlp_scores", store, {**args, "params": testing.bank(3, 25, device=device)}, isa,
           **MLPS["linear"])  # fmt: skip


@impls
@pytest.mark.parametrize("feature", range(reference.NUM_RECENCY))
def test_recency_is_exact_to_units_in_the_last_place(feature, device, isa):
    """Every age up to 40,000 and random ones up to the largest position."""
    far = torch.randint(0, 2**31 - 2, (40_000,))
    ages = torch.cat([torch.arange(40_000), far]).sort(descending=True).values
    pos = (2**31 - 2 - ages).int().to(device)
    num = pos.numel()
    params = torch.zeros(1, reference.NUM_FEATURES, device=device)
    params[0, feature] = 1
    k = torch.zeros(num, 0, device=device)
    store = Segments(
        k, k, pos, torch.zeros(num, 17, device=device),
        torch.tensor([0, num], dtype=torch.int32, device=device),
        torch.tensor([num], dtype=torch.int32, device=device),
    )  # fmt: skip
    args = {
        "params": params,
        "param_index": torch.zeros(1, dtype=torch.int32, device=device),
        "mean": torch.zeros(17, device=device),
        "var": torch.ones(17, device=device),
        "active": torch.tensor([True], device=device),
    }
    with testing.force_isa(isa):
        got = _scores(ops.mlp_scores, store, args, **MLPS["linear"])
    exact = reference.recency_embedding((pos[-1].long() - pos.long()).cpu(), dtype=torch.float64)
    assert (got.cpu().double() - exact[:, feature]).abs().max() < device_errors.RECENCY[device]


@impls
@pytest.mark.parametrize("name", ["bam_scores", "mlp_scores"])
def test_zero_parameters_score_exactly_zero(name, device, isa):
    kwargs = {} if name == "bam_scores" else MLPS["linear"]
    store, args = _case("ragged", device)
    args["params"] = torch.zeros(3, 4172 if name == "bam_scores" else 25, device=device)
    with testing.force_isa(isa):
        got = _scores(getattr(ops, name), store, args, **kwargs)
    assert bool((got[store.live] == 0).all())


@impls
@pytest.mark.parametrize("name", ["bam_scores", "mlp_scores"])
def test_nan_reaches_the_score(name, device, isa):
    """A poisoned state must end as an error in select, not as a decision."""
    kwargs = {} if name == "bam_scores" else MLPS["two_layers"]
    num_params = 4172 if name == "bam_scores" else reference.num_mlp_params(13, 2, True)
    store, args = _case("ragged", device, num_params)
    row = int(store.cu_seqlens_k[2]) + 3
    store.state[row, 5] = float("nan")
    with testing.force_isa(isa):
        got = _scores(getattr(ops, name), store, args, **kwargs)
    assert bool(got[row].isnan())
    assert bool(
        got[: int(store.cu_seqlens_k[2])][store.live[: int(store.cu_seqlens_k[2])]].isfinite().all()
    )


@impls
@pytest.mark.parametrize("name", ["bam_scores", "mlp_scores"])
def test_inactive_rows_score_zero(name, device, isa):
    kwargs = {} if name == "bam_scores" else MLPS["linear"]
    store, args = _case("ragged", device, 4172 if name == "bam_scores" else 25, (True, False))
    with testing.force_isa(isa):
        got = _scores(getattr(ops, name), store, args, **kwargs)
    second = int(store.cu_seqlens_k[2])
    assert bool((got[second:][store.live[second:]] == 0).all())
    assert bool((got[:second][store.live[:second]] != 0).all())


@pytest.mark.parametrize(
    ("isa", "name"), list(itertools.product(testing.isas(), ["bam_scores", "mlp_scores"]))
)
def test_scores_are_deterministic_and_batch_invariant(name, isa):
    kwargs = {} if name == "bam_scores" else MLPS["deep"]
    num_params = 4172 if name == "bam_scores" else reference.num_mlp_params(25, 4, True)
    store, args = _case((70, 5, 64, 200), "cpu", num_params)
    function, live = getattr(ops, name), store.live
    with testing.force_isa(isa):
        scores = _scores(function, store, args, **kwargs)
        assert torch.equal(_scores(function, store, args, **kwargs)[live], scores[live])
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if threads > 1 else 2)
        try:
            again = _scores(function, store, args, **kwargs)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(again[live], scores[live])
        for b in range(2):
            rows = slice(int(store.cu_seqlens_k[2 * b]), int(store.cu_seqlens_k[2 * b + 2]))
            one = store.part(2 * b, 2 * b + 2)
            part = {
                k: t[b : b + 1] if k in ("param_index", "active") else t for k, t in args.items()
            }
            got = _scores(function, one, part, **kwargs)
            assert torch.equal(got[live[rows]], scores[rows][live[rows]])


@pytest.mark.parametrize("index", [-1, 3])
def test_param_index_outside_the_bank(index):
    store, args = _case("ragged")
    args["param_index"][1] = index
    with pytest.raises(RuntimeError) as error:
        _scores(ops.bam_scores, store, args)
    message = f"bam_scores: param_index[1] must be in [0, 3), got {index}"
    assert str(error.value).endswith(message)


def test_scores_float64_run_the_reference():
    store, args = _case("ragged")
    live = store.live
    got = _scores(ops.bam_scores, store.double(), args)
    assert torch.equal(got[live], _scores(reference.bam_scores, store.double(), args)[live])
    args["params"] = testing.bank(3, 25)
    got = _scores(ops.mlp_scores, store.double(), args, **MLPS["linear"])
    exact = _scores(reference.mlp_scores, store.double(), args, **MLPS["linear"])
    assert torch.equal(got[live], exact[live])
