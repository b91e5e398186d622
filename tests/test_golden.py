"""Replays the golden vectors: outputs of the original implementation (golden/README.md).

The folder comes from NAMM_GOLDEN_DIR (default ``tests/golden``), files are found by pattern and
every size is read from the file. Tolerances are those of the README; indices are exact.
Ragged functions run from ``namm_ext.reference`` and from ``namm_ext.ops`` (the kernels), which
run on CUDA too where there is a GPU.
"""

from __future__ import annotations

import math
from pathlib import Path

import device_errors
import pytest
import torch
from golden_files import assert_near, golden_dir, golden_files, load
from namm_ext import ops, reference
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
