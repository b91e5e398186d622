"""Replays the golden vectors: outputs of the original implementation (golden/README.md).

The folder comes from NAMM_GOLDEN_DIR (default ``tests/golden``), files are found by pattern and
every size is read from the file. Tolerances are those of the README; indices are exact.
Ragged functions run from ``namm_ext.reference`` and from ``namm_ext.ops`` (the kernels), which
run on CUDA too where there is a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import cma_reference
import device_errors
import numpy as np
import pytest
import torch
from golden_files import golden_dir
from namm_ext import NAMM, Budget, NAMMConfig, ops, policy, reference, testing
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

GOLDEN = golden_dir()


class OpsOnCuda:
    """``namm_ext.ops`` on CPU tensors, through copies on the GPU."""

    device = "cuda"

    def __getattr__(self, name: str):
        def call(*args, **kwargs):
            moved = tree_map_only(Tensor, Tensor.cuda, args)
            result = getattr(ops, name)(*moved, **kwargs)
            if name.endswith("_"):
                for original, copy in zip(tree_leaves(args), tree_leaves(moved), strict=True):
                    original.copy_(copy)
            return tree_map_only(Tensor, Tensor.cpu, result)

        return call


IMPLEMENTATIONS = [
    pytest.param(reference, id="reference"),
    pytest.param(ops, id="ops"),
    pytest.param(
        OpsOnCuda(),
        id="ops-cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]
EMA_COEFF = 0.99


def golden_files(pattern: str, without: str | None = None) -> list:
    """Files of the folder as parameters; ``without`` leaves out npz files with such a key."""
    paths = sorted(GOLDEN.glob(pattern))
    if without is not None:
        paths = [path for path in paths if not any(without in key for key in np.load(path).files)]
    return [pytest.param(path, id=path.stem) for path in paths]


def load(path: Path) -> dict[str, Tensor | str]:
    """All arrays as tensors; uint16 bits of bfloat16 as bfloat16; strings as str."""
    arrays: dict[str, Tensor | str] = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            array = file[key]
            if array.dtype.kind == "U":
                arrays[key] = str(array)
            elif key.endswith("__bf16bits"):
                bits = torch.from_numpy(array.view(np.int16).copy())
                arrays[key.removesuffix("__bf16bits")] = bits.view(torch.bfloat16)
            else:
                arrays[key] = torch.from_numpy(np.array(array))
    return arrays


def assert_near(got: Tensor, want: Tensor, atol: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, want {list(want.shape)}"
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= atol, f"{what}: error {error:.3e} > {atol:.0e}"


def test_folder_holds_vectors():
    assert list(GOLDEN.glob("chain_*.npz")) or list(GOLDEN.glob("unit_*.npz")), (
        f"no golden vectors in {GOLDEN}"
    )


# Units --------------------------------------------------------------------------------------------


def replay_stft(v):
    assert_near(reference.hann_window(), v["window"], 1e-6, "window")
    lengths = {int(key[1:].split("_")[0]) for key in v if key.endswith("_signal")}
    assert lengths
    for n in lengths:
        signal = v[f"n{n}_signal"]
        tail, ema = None, torch.zeros(signal.shape[1], reference.NUM_BINS)
        for c in range(signal.shape[0] // n):
            chunk = signal[c * n : (c + 1) * n]
            magnitudes = reference.spectrogram_from_attention(chunk, tail)
            ema = reference.fold_ema(magnitudes, ema, EMA_COEFF)
            tail = chunk[-reference.CARRY :].T
            assert_near(magnitudes, v[f"n{n}_c{c}_mag"], 1e-5, f"n{n} chunk {c} magnitudes")
            assert_near(ema, v[f"n{n}_c{c}_ema"], 1e-5, f"n{n} chunk {c} ema")


def cases(v):
    for i in range(sum(key.endswith(("_scores", "_out_mean")) for key in v)):
        yield (
            f"case {i}",
            {key.split("_", 1)[1]: value for key, value in v.items() if key.startswith(f"c{i}_")},
        )


def replay_bam(v):
    for name, c in cases(v):
        got = reference.bam(c["x"], c["params"], c["keymask"])
        assert_near(got, c["scores"], 2e-5 * float(c["scores"].abs().max()), name)


def replay_mlp(v):
    for name, c in cases(v):
        assert c["residual"], "the ops have no MLP without residuals"
        hidden = int(c["hidden"]) if c["hidden"] > 0 else reference.NUM_FEATURES
        shape = (hidden, int(c["depth"]), bool(c["bias"]))
        got = reference.mlp(c["x"], c["params"], *shape, bool(c["residual_first"]))
        assert_near(got, c["scores"], 1e-5, name)


def replay_norm_merge(v):
    for name, c in cases(v):
        merged = reference.Statistics(c["old_mean"], c["old_var"], c["old_num"])
        for r in range(c["new_mean"].shape[0]):
            new = reference.Statistics(c["new_mean"][r], c["new_var"][r], c["new_num"][r])
            merged = reference.merge_statistics(merged, new)
        assert_near(merged.mean, c["out_mean"], 1e-5, f"{name} mean")
        assert_near(merged.var, c["out_var"], 1e-5, f"{name} var")
        assert torch.equal(merged.num, c["out_num"]), name


def replay_recency(v):
    got = reference.recency_embedding(v["ages"], int(v["start_recency_from"]))
    assert_near(got, v["emb"], 1e-7, "emb")


# Of the models in unit_rope_ntk: head_dim, rope_theta, max_position_embeddings, factor, alpha.
ROPE_MODELS = {"llama3_8b": (128, 5e5, 8192, 4.0, 2.0), "tiny": (16, 1e4, 128, 4.0, 2.0)}


def replay_rope_ntk(v):
    names = [key.removesuffix("_base") for key in v if key.endswith("_base")]
    assert names
    for name in names:
        head_dim, theta, max_positions, factor, alpha = ROPE_MODELS[name]
        ntk = reference.rope_ntk_inv_freq(head_dim, theta, factor, alpha)
        production = reference.rope_ntk_inv_freq(head_dim, theta, factor, alpha, round_to_bf16=True)
        changed = theta * (alpha * factor - (alpha - 1)) ** (head_dim / (head_dim - 2))
        assert changed == pytest.approx(float(v[f"{name}_base"]), rel=1e-12)
        by_length = {
            f"manual_{key.split('_')[-2]}": int(key.split("_")[-2][1:])
            for key in v
            if key.startswith(f"{name}_manual_T")
        }
        assert by_length
        by_length["max"] = int(factor * max_positions)
        manual = {
            mode: reference.rope_manual_inv_freq(head_dim, theta, factor, max_positions, seqlen)
            for mode, seqlen in by_length.items()
        }
        checked = {f"{name}_base", f"{name}_pos"}
        for suffix, inv_freq, dtype in (
            ("inv_freq", ntk, torch.float32),
            ("inv_freq_production_bf16", production, torch.float32),
            ("max_inv_freq", manual["max"], torch.float32),
            ("cos", ntk, torch.float32),
            ("sin", ntk, torch.float32),
            ("cos_production", production, torch.bfloat16),
            ("sin_production", production, torch.bfloat16),
            *((f"{mode}_cos", f, torch.float32) for mode, f in manual.items()),
        ):
            key = f"{name}_{suffix}"
            checked.add(key)
            if "inv_freq" in suffix:
                error = (inv_freq / v[key] - 1).abs().max().item()
                assert error <= 2.5e-7, f"{key}: relative error {error:.1e}"
                continue
            angles = v[f"{name}_pos"][:, None].float() * inv_freq
            angles = torch.cat([angles, angles], dim=-1)
            wave = (angles.cos() if "cos" in suffix else angles.sin()).to(dtype)
            # One ulp of the frequency, which grows with the position.
            tolerance = 1e-6 + 1.2e-7 * v[f"{name}_pos"][:, None]
            if dtype == torch.bfloat16:
                tolerance = tolerance + 2**-8
            assert ((wave.float() - v[key]).abs() <= tolerance).all(), key
        unknown = {key for key in v if key.startswith(f"{name}_")} - checked
        assert not unknown, f"not replayed: {sorted(unknown)}"


def replay_selection(v, impl=reference):
    for name, c in cases(v):
        kind, cache_size = c["kind"], int(c["cache_size"])
        batch, heads, num_keys = c["scores"].shape
        # The original couples the rows of a batch through R; ours never: all as heads of one row.
        num_segments = batch * heads
        valid = c["mask"].bool().expand(batch, heads, num_keys)
        scores = torch.where(valid, c["scores"], torch.finfo(torch.float32).min)
        thresholds = {
            "binary": float(c["shift"]),
            "dynamic": float(c["logthresh"]),
            "topk": -math.inf,
        }
        k = torch.zeros(num_segments * num_keys, 0)
        store = Segments(
            k=k,
            v=k,
            pos=torch.arange(num_keys, dtype=torch.int32).repeat(num_segments),
            state=k,
            cu_seqlens_k=torch.arange(num_segments + 1, dtype=torch.int32) * num_keys,
            seqused_k=torch.full((num_segments,), num_keys, dtype=torch.int32),
        )
        keep, num_kept = impl.select(
            scores.reshape(-1).contiguous(),
            store,
            torch.tensor([True]),
            threshold=thresholds[kind],
            cache_size=cache_size,
            budget="per_head",
            fill=kind != "topk",
            protect_newest=kind != "topk",
            sink_tokens=0,
            recent_tokens=0,
        )
        assert num_kept.tolist() == [c["idx"].shape[-1]] * num_segments, name
        kept = keep.view(batch, heads, num_keys).nonzero()[:, 2].view(batch, heads, -1)
        assert torch.equal(kept, c["idx"].long()), name


UNITS = {
    "unit_stft": replay_stft,
    "unit_bam": replay_bam,
    "unit_mlp": replay_mlp,
    "unit_norm_merge": replay_norm_merge,
    "unit_recency": replay_recency,
    "unit_rope_ntk": replay_rope_ntk,
    "unit_selection": replay_selection,
}


@pytest.mark.parametrize("path", golden_files("unit_*.npz"))
def test_unit(path):
    kinds = [kind for kind in UNITS if path.stem.startswith(kind)]
    assert kinds, f"{path.name}: no replay for this kind of unit; known are {', '.join(UNITS)}"
    UNITS[kinds[0]](load(path))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", golden_files("unit_selection*.npz"))
def test_selection(path, impl):
    replay_selection(load(path), impl)


# Chains: attention -> spectrogram -> EMA -> normalisation -> scores -> selection -> eviction ------


class Chain:
    """A golden chain file and the ragged stores of its layers."""

    def __init__(self, path: Path, impl):
        self.v = load(path)
        self.impl = impl
        self.device = getattr(impl, "device", "cpu")
        self.n_up, self.num_heads = int(self.v["n_up"]), int(self.v["n_kv_heads"])
        self.groups = int(self.v["groups"])
        self.num_layers, self.num_steps = int(self.v["n_layers"]), int(self.v["n_steps"])
        self.dtype = self.v["s0_l0_attn_in"].dtype
        self.frozen = "norm_mean" in self.v
        self.running: reference.Statistics | None = None
        # k and v of the store carry what the test wants gathered: row numbers, attention tails.
        empty = torch.zeros(0, reference.CARRY, dtype=self.dtype)
        pos = torch.zeros(0, dtype=torch.int32)
        cu, used = (torch.zeros(self.num_heads + i, dtype=torch.int32) for i in (1, 0))
        start = Segments(empty, empty, pos, torch.zeros(0, 17), cu, used)
        self.stores = [start] * self.num_layers
        self.one = torch.tensor([True])

    def steps(self):
        for step in range(self.num_steps):
            for layer in range(self.num_layers):
                yield step, layer

    def want(self, step: int, layer: int, name: str) -> Tensor | None:
        return self.v.get(f"s{step}_l{layer}_{name}")

    def append(self, step: int, layer: int) -> Segments:
        """The layer's store with n_up new rows in each head, through ``append_``."""
        old = self.stores[layer]
        cu = torch.zeros_like(old.cu_seqlens_k)
        cu[1:] = torch.cumsum(old.seqused_k + self.n_up, 0)
        keep = torch.ones(old.capacity, dtype=torch.uint8)
        store = self.impl.compact(old, keep, old.seqused_k.clone(), cu, capacity=int(cu[-1]))
        new = torch.zeros(1, self.num_heads, self.n_up, reference.CARRY, dtype=self.dtype)
        first, count, pos_first = (
            torch.tensor([i], dtype=torch.int32) for i in (0, self.n_up, step * self.n_up)
        )
        self.impl.append_(store, new, new, first, count, pos_first)
        return store

    def statistics(self, ema: Tensor) -> tuple[Tensor, Tensor]:
        """Frozen statistics, or the running ones including this update."""
        if self.frozen:
            return self.v["norm_mean"], self.v["norm_var"]
        batch = reference.batch_statistics(ema)
        merged = reference.merge_statistics(self.running, batch) if self.running else batch
        self.running = merged
        return merged.mean, merged.var

    def score(self, store: Segments, mean: Tensor, var: Tensor) -> Tensor:
        return self.impl.bam_scores(
            store, self.v["params"][None], torch.zeros(1, dtype=torch.int32), mean, var, self.one,
            log_transform=False, log_eps=1e-6,
        )  # fmt: skip

    def check_scores(self, step: int, layer: int, scores: Tensor, atol: float) -> Tensor:
        """Compare with the golden scores; returns those to go on with.

        These are the golden ones where a device's error exceeds the margin of the golden decision,
        so that rounding never decides what the following steps are compared with.
        """
        want = self.want(step, layer, "scores")
        atol = max(atol, device_errors.BAM_SCORES[self.device] * float(want.abs().max()))
        assert_near(scores.view(want.shape), want, atol, "scores")
        if self.device == "cpu":
            return scores
        kept = self.want(step, layer, "retained_idx").long()
        dropped = want.scatter(-1, kept, -math.inf)
        gap = want.gather(-1, kept).amin(-1) - dropped.amax(-1)
        margin = min(float(want.abs().min()), float(gap.min()))
        sure = margin > 2 * float((scores.view(want.shape) - want).abs().max())
        return scores if sure else want.reshape(scores.shape).contiguous()

    def evict(self, step: int, layer: int, scores: Tensor, store: Segments) -> Tensor:
        """Select with the released code's rule, compact, compare; returns kept rows [H, R]."""
        keep, num_kept = self.impl.select(
            scores, store, self.one, threshold=0.0, cache_size=-1, budget="per_head", fill=True,
            protect_newest=True, sink_tokens=0, recent_tokens=0,
        )  # fmt: skip
        kept = keep.view(self.num_heads, -1).nonzero()[:, 1].view(self.num_heads, -1)
        assert torch.equal(kept[None], self.want(step, layer, "retained_idx").long())
        cu_new = torch.zeros_like(store.cu_seqlens_k)
        cu_new[1:] = torch.cumsum(num_kept, 0)
        self.stores[layer] = self.impl.compact(
            store, keep, num_kept, cu_new, capacity=int(cu_new[-1])
        )
        pos = self.stores[layer].pos.view(1, self.num_heads, -1)
        assert torch.equal(pos, self.want(step, layer, "position_ids_after"))
        return kept

    def check_running(self, step: int, layer: int) -> None:
        if self.running is None or layer != self.num_layers - 1:
            return
        assert_near(self.running.mean, self.v[f"s{step}_running_mean"], 1e-6, "running mean")
        assert_near(self.running.var, self.v[f"s{step}_running_var"], 1e-6, "running var")
        assert (self.running.num == self.v[f"s{step}_running_num"]).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", golden_files("chain_*.npz"))
def test_chain(path, impl):
    """Attention rows as given; the tail of the last period is carried with the tokens."""
    chain = Chain(path, impl)
    round_to = torch.bfloat16 if chain.dtype == torch.bfloat16 else None
    for step, layer in chain.steps():
        store = chain.append(step, layer)
        shape = (1, chain.num_heads, int(store.seqused_k[0]))
        pos = store.pos
        assert torch.equal(pos.view(shape), chain.want(step, layer, "position_ids_in"))

        attn = reference.group_mean(chain.want(step, layer, "attn_in"), chain.groups, round_to)
        magnitudes = reference.spectrogram_from_attention(attn, store.v.view(*shape, -1))
        if (want := chain.want(step, layer, "magnitudes")) is not None:
            assert_near(magnitudes, want, 2e-6, "magnitudes")
        ema = reference.fold_ema(magnitudes, store.state.view(*shape, -1), EMA_COEFF)
        assert_near(ema, chain.want(step, layer, "ema_out"), 1e-6, "ema")

        mean, var = chain.statistics(ema)
        z = reference.normalise(ema, mean, var)
        assert_near(z, chain.want(step, layer, "normalised"), 5e-5, "normalised")
        x = torch.stack(
            [
                reference.token_features(ema[0, h], pos.view(shape)[0, h], mean, var, False, 0.0)
                for h in range(chain.num_heads)
            ]
        )
        assert_near(x[None], chain.want(step, layer, "embedding"), 5e-5, "embedding")

        store = store._replace(state=ema.reshape(-1, 17).contiguous())
        scores = chain.check_scores(step, layer, chain.score(store, mean, var), 1e-4)

        tails = attn[..., -reference.CARRY :, :].transpose(-1, -2).to(chain.dtype)
        tails = tails.reshape(-1, reference.CARRY).contiguous()
        chain.evict(step, layer, scores, store._replace(v=tails))
        after = chain.stores[layer]
        want = chain.want(step, layer, "prev_attn_tail_after")
        assert_near(after.v.view(want.shape), want, 1e-6 if round_to is None else 0.0, "tail")
        want = chain.want(step, layer, "ema_state_after")
        assert_near(after.state.view(want.shape), want, 1e-6, "ema after")
        chain.check_running(step, layer)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("path", golden_files("chain_*.npz", without="__bf16bits"))
def test_chain_from_queries(path, impl):
    """The float32 chains with queries and keys that produce exactly the given attention.

    Keys are one-hot by row and queries are log-probabilities, so ``exp(q k - 0)`` is the golden
    attention: this drives ``spectrogram`` with its recomputed left context and visibility rule.
    The bfloat16 chains were rounded after the softmax, which no queries reproduce.
    """
    chain = Chain(path, impl)
    previous = [None] * chain.num_layers
    for step, layer in chain.steps():
        store = chain.append(step, layer)
        num_keys = int(store.seqused_k[0])
        head_dim = -(-num_keys // 8) * 8
        if impl is not reference and head_dim > 256:
            pytest.skip("one-hot keys need head_dim >= keys, and the kernels stop at 256")

        probs = chain.want(step, layer, "attn_in")
        window = probs.new_zeros(probs.shape[1], reference.CARRY + chain.n_up, head_dim)
        window[:, reference.CARRY :, :num_keys] = probs[0]
        if previous[layer] is not None:
            carried, kept = previous[layer]
            index = kept.repeat_interleave(chain.groups, 0)[:, None].expand(-1, 16, -1)
            window[:, : reference.CARRY, : kept.shape[1]] = carried.gather(2, index)
        q = window.clamp(min=1e-30).log()[None]
        k = torch.eye(num_keys, head_dim).repeat(chain.num_heads, 1)
        pos_q = torch.tensor([step * chain.n_up - reference.CARRY], dtype=torch.int32)
        state = impl.spectrogram(
            Window(q, torch.zeros(q.shape[:3]), pos_q, chain.one), store._replace(k=k),
            softmax_scale=1.0, ema_coeff=EMA_COEFF,
        )  # fmt: skip
        store = store._replace(state=state)
        want = chain.want(step, layer, "ema_out")
        # exp(log p) in float32 is off by |log p| ulps; the attention itself was exact.
        assert_near(state.view(want.shape), want, device_errors.CHAIN_EMA[chain.device], "ema")

        mean, var = chain.statistics(want)
        scores = chain.check_scores(step, layer, chain.score(store, mean, var), 2e-4)
        kept = chain.evict(step, layer, scores, store)
        previous[layer] = probs[0, :, -reference.CARRY :], kept


# Checkpoints of the original ----------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files("ckpt_*.pt"))
@pytest.mark.parametrize(("which", "key"), [("mean", "mean"), ("best", "best_member")])
def test_checkpoint(path, which, key):
    raw = torch.load(path, weights_only=True)["evolution_state"]
    got = policy.read_original_checkpoint(path, which)
    stored = "stored_buffers_to_save.token_embedding_0_output_"
    assert torch.equal(got.params, raw[key])
    assert torch.equal(got.mean, raw[f"{stored}mean"].flatten())
    assert torch.equal(got.var, raw[f"{stored}var"].flatten())
    assert got.count == int(raw[f"{stored}num"].max()) > 0


@pytest.mark.parametrize("path", golden_files("ckpt_layout_*.json"))
def test_checkpoint_full_layout(path, tmp_path):
    layout = json.loads(path.read_text())["evolution_state"]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, (shape, dtype) in layout.items():
        dtype = getattr(torch, dtype.removeprefix("torch."))
        if len(shape) == 2:  # stored as one number: the loader must not touch the n x n matrices
            state[key] = torch.zeros(1, dtype=dtype).expand(shape)
        elif dtype == torch.int64:
            state[key] = torch.full(shape, 7, dtype=dtype)
        else:
            state[key] = torch.rand(shape, generator=generator, dtype=dtype)
    file = tmp_path / "full.pt"
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    torch.save({"evolution_state": compiled, "iter_num": 3, "best_val_loss": 0.5}, file)
    for which, key in (("mean", "mean"), ("best", "best_member")):
        namm = NAMM.load_original_checkpoint(file, which)
        assert namm.budget == Budget(threshold=0.0, selection="original")
        assert torch.equal(namm.params, state[key])
        assert torch.equal(namm.params[4146:4171, None], namm.named_parameters()["W3"])
        stored = "stored_buffers_to_save.token_embedding_0_output_"
        assert torch.equal(namm.mean, state[f"{stored}mean"].flatten())
        assert torch.equal(namm.var, state[f"{stored}var"].flatten())
        assert namm.count == 7


# CMA-ES of the original -------------------------------------------------------------------------


@pytest.mark.parametrize("path", golden_files("cma_constants*.json"))
def test_cma_constants(path):
    content = json.loads(path.read_text())
    assert content
    for name, want in content.items():
        n, popsize = (int(part[1:]) for part in name.split("_"))
        got = cma_reference.constants(n, popsize)
        values = {
            **dataclasses.asdict(got),
            "weights_truncated": np.maximum(got.weights, 0),
            "sum_weights": got.weights.sum(),
        }
        assert set(want) == set(values)
        for key, value in want.items():
            np.testing.assert_allclose(
                values[key], value, rtol=1e-5, atol=1e-7, err_msg=f"{name} {key}"
            )


@pytest.mark.parametrize("path", golden_files("cma_traj*.npz"))
def test_cma_trajectory(path):
    with np.load(path) as v:
        es = cma_reference.CMAES(v["init_mean"], float(v["init_sigma"]), int(v["pop"]))
        assert es.n == int(v["n"])
        for g in range(int(v["gens"])):
            B, D = es.decompose()
            y = v[f"g{g}_y"].astype(np.float64)
            want = {
                "sampleC": es.sample_C,
                "D": D,
                "x": es.mean + es.sigma * y,
            }
            golden_B, golden_D = v[f"g{g}_B"], v[f"g{g}_D"]
            near(golden_B * golden_D**2 @ golden_B.T, B * D**2 @ B.T, f"g{g} B")
            es.tell(y, v[f"g{g}_fitness"].astype(np.float64))
            want |= {
                "after_mean": es.mean,
                "after_sigma": es.sigma,
                "after_C": es.C,
                "after_evo_path_sigma": es.p_sigma,
                "after_evo_path_c": es.p_c,
                "after_best_member": es.best_member,
                "after_best_fitness": es.best_fitness,
                "after_g": es.generation,
            }
            for key, value in want.items():
                near(v[f"g{g}_{key}"], value, f"g{g} {key}")


def near(golden, value, what):
    np.testing.assert_allclose(golden, value, rtol=0, atol=2e-4, err_msg=what)


# End to end: e2e_* through the drop-in ------------------------------------------------------------


class Recorder(policy.Policy):
    """Writes down what another policy decides: scores and kept rows of every update, by layer."""

    def __init__(self, inner: NAMM) -> None:
        self.inner, self.n_up, self.num_state = inner, inner.n_up, inner.num_state
        self.updates: dict[int, list[dict[str, Tensor]]] = {}

    def update(self, ctx):
        return self.inner.update(ctx)

    def select(self, scores, ctx):
        keep, num_kept = self.inner.select(scores, ctx)
        live = ctx.segments.slices()
        kept = [keep[rows].nonzero().flatten() for rows in live]
        self.updates.setdefault(ctx.layer_idx, []).append(
            {
                "scores": torch.stack([scores[rows] for rows in live]),
                "retained_idx": torch.stack(kept),
                "retained_pos": torch.stack(
                    [ctx.segments.pos[rows][i] for rows, i in zip(live, kept, strict=True)]
                ),
            }
        )
        return keep, num_kept

    def fingerprint(self):
        return self.inner.fingerprint()


def e2e_model(path: Path, v: dict):
    """The model of an e2e file under a current transformers: static NTK base, then its weights."""
    transformers = pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    stem = path.name.removesuffix("_fp32.npz")
    settings = json.loads((path.parent / f"{stem}_config.json").read_text())
    scaling = settings.pop("rope_scaling", None)
    theta = settings.pop("rope_theta")
    config = transformers.LlamaConfig(**settings)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    weights = safetensors.load_file(str(path.parent / f"{stem}_weights.safetensors"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing or (missing == ["lm_head.weight"] and config.tie_word_embeddings)
    assert all("inv_freq" in name for name in unexpected)
    if scaling is None:
        return model
    inv_freq = reference.rope_ntk_inv_freq(
        config.head_dim, theta, scaling["factor"], scaling["alpha"],
        round_to_bf16=bool(v["inv_freq_is_bf16"]),
    )  # fmt: skip
    assert_near(inv_freq, v["inv_freq"], 1e-7, "inv_freq")
    model.model.rotary_emb.inv_freq = inv_freq.float()
    return model


def e2e_policy(v: dict, params: Tensor) -> Recorder:
    config, budget = NAMMConfig(n_up=int(v["n_up"])), Budget(threshold=0.0, selection="original")
    return Recorder(NAMM(config, params, v["norm_mean"], v["norm_var"], budget=budget))


def check_updates(got: Recorder, v: dict, first: int, prefix: str) -> int:
    """Compare updates ``first ...`` with ``<prefix>u<k>_l<l>_*``; how many there were."""
    layers = sorted(got.updates)
    k = first
    while f"{prefix}u{k}_l0_scores" in v:
        for layer in layers:
            update, name = got.updates[layer][k], f"{prefix}u{k}_l{layer}"
            assert_near(update["scores"], v[f"{name}_scores"], 1e-4, f"{name} scores")
            assert torch.equal(update["retained_idx"], v[f"{name}_retained_idx"].long()), name
            assert torch.equal(update["retained_pos"], v[f"{name}_retained_pos"]), name
        k += 1
    assert all(len(updates) == k for updates in got.updates.values())
    return k - first


@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
@pytest.mark.parametrize("cut", [None, "chunk", 1], ids=["whole", "pieces", "one_by_one"])
def test_e2e(path, cut):
    from namm_ext import NAMMCache

    v = load(path)
    model = e2e_model(path, v)
    ids = v["input_ids"].long()
    recorder = e2e_policy(v, v["params"])
    cache = NAMMCache(model, recorder)
    width = {None: ids.shape[1], "chunk": int(v["chunk"])}.get(cut, cut)
    with torch.no_grad():
        logits = torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split(width, 1)], 1
        )
    assert check_updates(recorder, v, 0, "") == int(v["n_updates"])
    last = v["logits_last_chunk"]
    assert_near(logits[0, -last.shape[0] :], last, 3e-4, "logits")

    for layer in cache.layers:
        store, name = layer.kv.store.segments, f"l{layer.layer_idx}"
        rows = store.slices()
        for x in ("k", "v"):
            held = torch.stack([getattr(store, x)[r] for r in rows])
            assert_near(held, v[f"final_{x}_{name}"], 1e-4, f"{x} {name}")
        old = v[f"final_cache_pos_{name}"]
        pos = torch.stack([store.pos[r] for r in rows])
        assert torch.equal(pos[:, : old.shape[1]], old)

    wanted = v["gen_tokens"].long()
    with torch.no_grad():
        for i, token in enumerate(wanted.tolist()):
            assert_near(logits[0, -1], v["gen_logits"][i], 3e-4, f"logits of token {i}")
            assert int(logits[0, -1].argmax()) == token, f"token {i}"
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
    assert check_updates(recorder, v, int(v["n_updates"]), "gen_") + int(v["n_updates"]) == int(
        v["gen_n_updates"]
    )


@pytest.mark.parametrize("device", testing.devices())
@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
def test_e2e_generate(path, device):
    """The same tokens from ``generate`` on a patched model, update in the middle of decoding."""
    from namm_ext import patch

    v = load(path)
    model = e2e_model(path, v).to(device)
    recorder = e2e_policy(v, v["params"])
    ids, wanted = v["input_ids"].long(), v["gen_tokens"].long()
    with patch(model, recorder):
        out = model.generate(
            ids.to(device), max_new_tokens=len(wanted), do_sample=False, eos_token_id=None,
            attention_mask=torch.ones_like(ids).to(device),
        )  # fmt: skip
    assert torch.equal(out[0, ids.shape[1] :].cpu(), wanted)
    assert len(recorder.updates[0]) == int(v["gen_n_updates"])


@pytest.mark.parametrize("path", golden_files("e2e_*_fp32.npz"))
def test_e2e_without_eviction(path):
    from namm_ext import NAMMCache

    v = load(path)
    model = e2e_model(path, v)
    cache = NAMMCache(model, e2e_policy(v, torch.zeros_like(v["params"])))
    with torch.no_grad():
        logits = model(v["input_ids"].long(), past_key_values=cache).logits
    want = v["noevict_logits_last_chunk"]
    assert_near(logits[0, -want.shape[0] :], want, 3e-4, "logits")
    assert set(cache.layers[0].kv.lengths) == {v["input_ids"].shape[1]}
