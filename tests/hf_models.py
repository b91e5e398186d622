"""Tiny random models and the dense oracle for the tests of the transformers drop-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from namm_ext import NAMM, Budget, NAMMConfig, reference
from namm_ext.cache.latent import caches_latents
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VOCAB = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama_mha": lambda: transformers.LlamaConfig(**{**COMMON, "num_key_value_heads": 4}),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, use_sliding_window=False),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=None),
    "phi3": lambda: transformers.Phi3Config(**COMMON, sliding_window=None),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1,
        eos_token_id=None, pad_token_id=0, initializer_range=0.3,
    ),
}  # fmt: skip


def gemma3_config(**changes: Any) -> Any:
    """A hybrid: sliding layers 0 and 1, full layer 2."""
    return transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 3, "head_dim": 8, "sliding_window": 24,
           "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], **changes}
    )  # fmt: skip


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The causal language model of a config with random weights, ready for inference."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    # from_pretrained would set these; without them generate warns about nothing in particular.
    return model.to(dtype).eval().requires_grad_(False)


def tokens(batch_size: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids without padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch_size, length), generator=generator)


def evicting_policy(
    n_up: int = 16, seed: int = 1, budget: Budget | int | None = None, **config: Any
) -> NAMM:
    """A random NAMM that keeps roughly half of what it sees in these models."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {"n_up": n_up, **config}
    policy = NAMM(
        NAMMConfig(**settings),
        0.2 * torch.randn(NAMMConfig(**settings).num_params, generator=generator),
        mean=torch.full((17,), 0.3),
        var=torch.full((17,), 0.2),
        budget=budget,
    )
    return policy


# The oracle --------------------------------------------------------------------------------------


@dataclass
class OracleLayer:
    """What the oracle knows about one layer; nothing is ever removed from it."""

    alive: Tensor  # [H, T] bool
    probs: Tensor  # [H, T, T] group mean of the attention of every query so far
    ema: Tensor  # [H, T, 17]
    keys: Tensor  # [H, T, D]
    values: Tensor  # [H, T, Dv]
    queries: Tensor  # [H, G, T, D]
    updates: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # scores, alive after


Score = Callable[["DenseOracle", OracleLayer, int, int], Tensor]
"""(oracle, layer, layer index, tokens so far) -> [H, T] scores, higher stays."""


class DenseOracle:
    """Eviction as a -inf mask on a stock cache that keeps everything, one query at a time.

    Independent of the ragged store, of its windows and of its recomputed attention: it keeps
    the probabilities of the forward pass itself. One row, no padding.

    Args:
        n_up: tokens between updates.
        score: what to rank tokens by.
        select: scores ``[H, T]``, alive ``[H, T]`` and tokens so far -> alive.
        memories: layers that evict, None for all; the others attend as SDPA does.
    """

    def __init__(
        self, n_up: int, score: Score, select: Callable[[Tensor, Tensor, int], Tensor],
        memories: set[int] | None = None,
    ) -> None:  # fmt: skip
        self.n_up, self.score, self.select = n_up, score, select
        self.memories = memories
        self.owners: dict[int, int] = {}  # of layers that read another one's keys
        self.layers: dict[int, OracleLayer] = {}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, s_aux: Tensor | None = None, softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if self.memories is not None and module.layer_idx not in self.memories:
            return dense(query, key, value, attention_mask, scaling, s_aux, softcap), None
        _, num_heads, new, dim = query.shape
        _, h, total, _ = key.shape
        scale = dim**-0.5 if scaling is None else scaling
        owner = self.owners.get(module.layer_idx)
        if owner is not None:
            return self._read(self.layers[owner], query, key, value, scale, softcap), None
        # Heads that are made of one latent live and die together.
        parts = 1 if caches_latents(module.config) else h
        layer = self._grow(module.layer_idx, parts, total, query.dtype)
        layer.keys, layer.values = key[0], value[0]
        asked = query[0].unflatten(0, (h, num_heads // h))
        layer.queries = torch.cat([layer.queries, asked], 2) if total > new else asked
        out = torch.zeros(1, new, num_heads, value.shape[-1], dtype=query.dtype)
        for i in range(new):
            t = total - new + i
            q = query[0, :, i].view(h, num_heads // h, dim)
            logits = torch.einsum("hgd,htd->hgt", q, key[0, :, : t + 1]) * scale
            layer.alive[:, t] = True
            logits = bounded(logits, softcap).view(parts, -1, t + 1)
            logits = logits.masked_fill(~layer.alive[:, None, : t + 1], -torch.inf)
            p = _with_sink(logits, s_aux)
            seen = p.view(h, -1, t + 1)
            out[0, i] = torch.einsum("hgt,htd->hgd", seen, value[0, :, : t + 1]).flatten(0, 1)
            layer.probs[:, t, : t + 1] = p.mean(1)
            if (t + 1) % self.n_up == 0:
                scores = self.score(self, layer, module.layer_idx, t + 1)
                layer.alive[:, : t + 1] = self.select(
                    scores[:, : t + 1], layer.alive[:, : t + 1], t + 1
                )
                layer.updates.append((scores, layer.alive.clone()))
        return out, None

    def _read(
        self, layer: OracleLayer, query: Tensor, key: Tensor, value: Tensor, scale: float,
        softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """A layer without keys: each query sees what its owner's query at its place saw."""
        h, total = key.shape[1], key.shape[2]
        new = query.shape[2]
        q = query[0].unflatten(0, (h, query.shape[1] // h))
        out = query.new_zeros(1, new, query.shape[1], value.shape[-1])
        for i in range(new):
            t = total - new + i
            alive = torch.ones(h, t + 1, dtype=torch.bool)
            for number, (_, after) in enumerate(layer.updates, start=1):
                if number * self.n_up <= t:
                    alive[:, : number * self.n_up] = after[:, : number * self.n_up]
            logits = torch.einsum("hgd,htd->hgt", q[:, :, i], key[0, :, : t + 1]) * scale
            logits = bounded(logits, softcap).masked_fill(~alive[:, None], -torch.inf)
            p = logits.softmax(-1)
            out[0, i] = torch.einsum("hgt,htd->hgd", p, value[0, :, : t + 1]).flatten(0, 1)
        return out

    def _grow(self, index: int, h: int, total: int, dtype: torch.dtype) -> OracleLayer:
        old = self.layers.get(index)
        layer = OracleLayer(
            torch.zeros(h, total, dtype=torch.bool),
            torch.zeros(h, total, total, dtype=dtype),
            torch.zeros(h, total, 17, dtype=dtype),
            *torch.zeros(3, 0),
        )
        if old is not None:
            n = old.alive.shape[1]
            layer.alive[:, :n], layer.ema[:, :n] = old.alive, old.ema
            layer.probs[:, :n, :n], layer.updates = old.probs, old.updates
            layer.queries = old.queries
        self.layers[index] = layer
        return layer

    def kept_positions(self, layer: int) -> list[list[int]]:
        """Positions alive in each head."""
        return [row.nonzero().flatten().tolist() for row in self.layers[layer].alive]


def namm_score(policy: NAMM) -> Score:
    """Scores of a NAMM from saved probabilities, by the law's dense functions."""
    c = policy.config

    def score(oracle: DenseOracle, layer: OracleLayer, index: int, t: int) -> Tensor:
        scores = torch.full(layer.alive.shape, -torch.inf, dtype=layer.ema.dtype)
        for h, alive in enumerate(layer.alive):
            rows = alive.nonzero().flatten()
            attn = layer.probs[h, :t, rows]
            tail = attn.new_zeros(rows.numel(), 16)
            before = min(16, t - c.n_up)
            if before:
                tail[:, 16 - before :] = attn[t - c.n_up - before : t - c.n_up].T
            mags = reference.spectrogram_from_attention(attn[t - c.n_up :], tail)
            layer.ema[h, rows] = reference.fold_ema(mags, layer.ema[h, rows], c.ema_coeff)
            features = reference.token_features(
                layer.ema[h, rows], rows, policy.mean, policy.var,
                c.feature_transform == "log", c.log_eps,
            )  # fmt: skip
            scores[h, rows] = reference.bam(features, policy.params)
        return scores

    return score


def select_by(
    threshold: float | None = None,
    cache_size: int | None = None,
    budget: str = "per_head",
    fill: bool = False,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The selection rules by sorting Python tuples."""

    def select(scores: Tensor, alive: Tensor, t: int) -> Tensor:
        num_heads = alive.shape[0]
        ranked: list[list[tuple[Any, ...]]] = []
        for h in range(num_heads):
            entries = []
            for p in alive[h].nonzero().flatten().tolist():
                newest = p == t - 1
                forced = newest or p < sink_tokens or t - 1 - p < recent_tokens
                s = float(scores[h, p])
                if forced or threshold is None or s >= threshold or fill:
                    entries.append((-newest, -forced, -s, -p, h, forced or threshold is None
                                    or s >= threshold))  # fmt: skip
            ranked.append(sorted(entries))
        if fill:
            size = max(sum(e[-1] for e in entries) for entries in ranked)
            if cache_size is not None:
                size = min(size, cache_size)
            chosen = [e for entries in ranked for e in entries[:size]]
        elif cache_size is None:
            chosen = [e for entries in ranked for e in entries]
        elif budget == "per_head":
            chosen = [e for entries in ranked for e in entries[:cache_size]]
        else:
            chosen = sorted(e for entries in ranked for e in entries)[: cache_size * num_heads]
        result = torch.zeros_like(alive)
        for *_, minus_p, h, _ in chosen:
            result[h, -minus_p] = True
        return result

    return select


def namm_oracle(policy: NAMM, memories: set[int] | None = None) -> DenseOracle:
    """The oracle of a NAMM, whatever its selection."""
    b = policy.budget
    return DenseOracle(
        policy.n_up,
        namm_score(policy),
        select_by(
            b.threshold, b.size, b.scope, b.selection == "original", b.sink_tokens, b.recent_tokens
        ),
        memories,
    )


def oracle_of(policy: NAMM, cache: Any) -> DenseOracle:
    """The oracle of a NAMM on the layers that have a memory in ``cache``, and on their readers."""
    owners = {reader: x.layer_idx for x in cache.memory_layers for reader in x.readers}
    oracle = namm_oracle(policy, {x.layer_idx for x in cache.memory_layers} | {*owners})
    oracle.owners = owners
    return oracle


def _with_sink(logits: Tensor, s_aux: Tensor | None) -> Tensor:
    """Softmax over the last of ``[H, G, ...]`` with one more column per head, left out again."""
    if s_aux is None:
        return logits.softmax(-1)
    sink = s_aux.to(logits).view(*logits.shape[:2], *[1] * (logits.dim() - 2))
    return torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


def bounded(logits: Tensor, softcap: float | None) -> Tensor:
    """Gemma 2's bound of logits."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
    s_aux: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Dense attention ``[B, L, Hq, Dv]`` under a mask of transformers; 0 where nothing is seen."""
    h, length, total = key.shape[1], query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = torch.ones(length, total, dtype=torch.bool).tril(total - length)
    rows = []
    for i, row in enumerate(query):
        q = row.unflatten(0, (h, query.shape[1] // h))
        logits = bounded(torch.einsum("hgld,htd->hglt", q, key[i]) * scale, softcap)
        seen = visible if mask is None else mask[i % len(mask), 0]
        p = _with_sink(logits.masked_fill(~seen, -torch.inf), s_aux).nan_to_num(0.0)
        rows.append(torch.einsum("hglt,htd->lhgd", p, value[i]).flatten(1, 2))
    return torch.stack(rows)


def _exact(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, s_aux: Tensor | None = None,
    softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    return dense(query, key, value, attention_mask, scaling, s_aux, softcap), None


# Stock attention for models whose own one is "eager", which rounds the softmax to float32.
AttentionInterface.register("exact", _exact)
AttentionMaskInterface.register("exact", sdpa_mask)


_current: list[DenseOracle] = []
AttentionInterface.register("dense_oracle", lambda *a, **kw: _current[-1].attention(*a, **kw))
AttentionMaskInterface.register("dense_oracle", sdpa_mask)


@contextmanager
def under_oracle(model: Any, oracle: DenseOracle) -> Iterator[None]:
    """The model attends as the oracle does; towers beside the decoder keep their attention."""
    config = model.config.get_text_config()
    part = "" if config is model.config else "text_config"
    before = config._attn_implementation
    model.set_attn_implementation({part: "dense_oracle"})
    _current.append(oracle)
    try:
        yield
    finally:
        _current.pop()
        model.set_attn_implementation({part: before})


def oracle_logits(model: Any, oracle: DenseOracle, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of every position of one row under the oracle's evictions; ``inputs`` are what towers
    beside the decoder read."""
    with under_oracle(model, oracle), torch.no_grad():
        return model(ids, use_cache=True, **inputs).logits


def greedy(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    return model.generate(ids, do_sample=False, **{"max_new_tokens": 40, **kwargs})


def positions(layer: Any, row: int = 0) -> list[list[int]]:
    """Positions that a NAMMLayer holds for each head of a batch row, in order."""
    h, store = layer.kv.num_kv_heads, layer.kv.store.segments
    return [store.pos[live].tolist() for live in store.slices()[row * h : (row + 1) * h]]
