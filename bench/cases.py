"""Inputs of the CPU benchmarks, the plain PyTorch expressions, and the floors.

The plain expressions are what one writes first in PyTorch: dense logits, softmax, `torch.stft` and
so on, in the dtype of the model with float32 features. They see the same equal-length segments. For
attention the rival is ``scaled_dot_product_attention`` on an equally long dense cache (prefill) or
on the whole cache of which ours kept a part (decode).

The layers of a model take turns, so that none finds its store in the processor's cache. A
``Rotation`` does the same: it holds equal stores of ``ROTATE_BYTES`` together, whatever N is, and
each call works on the next one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from namm_ext import ops, reference, testing
from namm_ext.values import Segments, Window
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMA_COEFF = 0.99
#: what the stores of a rotation hold together; far more than any cache of a CPU.
ROTATE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: batch rows, KV heads, group, head_dim, period."""

    batch_size: int
    num_kv_heads: int
    num_groups: int
    head_dim: int
    n_up: int


LLAMA = Shape(1, 8, 4, 128, 512)
BUNDLED = Shape(128, 2, 2, 32, 64)
SHAPES = {"llama": LLAMA, "bundled": BUNDLED}


class Rotation:
    """One call after the other on several equal inputs.

    The result of a call stays alive until its input is due again, as a model's new store does.
    """

    def __init__(self, runs: list[Callable[[], Any]]) -> None:
        self.runs = runs
        self.results: list[Any] = [None] * len(runs)
        self.turn = 0

    def __call__(self) -> Any:
        turn, self.turn = self.turn, (self.turn + 1) % len(self.runs)
        self.results[turn] = self.runs[turn]()
        return self.results[turn]


def num_copies(*tensors: Tensor) -> int:
    """How many copies of these fill ``ROTATE_BYTES``."""
    return max(1, round(ROTATE_BYTES / sum(t.nbytes for t in tensors)))


@dataclass
class Case:
    """One thing to time, its plain expression and its floor (None: not possible, or none)."""

    name: str
    ours: Callable[[], Any]
    plain: Callable[[], Any] | None
    floor: Callable[[], Any] | None
    check: Callable[[], None]
    floor_name: str
    #: what nanoseconds per token are counted in
    num_tokens: int = 1
    #: of the products Q K^T (and P V), or 0
    flops: int = 0


class Layer:
    """The store and the window of one layer after ``n_up`` new tokens; N rows per segment."""

    def __init__(self, num_keys: int, shape: Shape, dtype: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        s = shape
        self.shape, self.num_keys = shape, num_keys
        self.segments = s.batch_size * s.num_kv_heads
        self.rows = reference.CARRY + s.n_up
        rows, total = self.rows, self.segments * num_keys
        heads = s.num_kv_heads * s.num_groups
        kind = DTYPES[dtype]
        self.scale = s.head_dim**-0.5
        k = torch.randn(total, s.head_dim, generator=generator).to(kind)
        v = torch.randn(total, s.head_dim, generator=generator).to(kind)
        q = torch.randn(s.batch_size, heads, rows, s.head_dim, generator=generator) * 2
        self.store = Segments(
            k=k,
            v=v,
            pos=torch.arange(num_keys, dtype=torch.int32).repeat(self.segments),
            state=torch.rand(total, reference.NUM_BINS, generator=generator) * 0.05,
            cu_seqlens_k=torch.arange(self.segments + 1, dtype=torch.int32) * num_keys,
            seqused_k=torch.full((self.segments,), num_keys, dtype=torch.int32),
        )
        self.window = Window(
            q=q.to(kind),
            lse=torch.empty(s.batch_size, heads, rows),
            pos_q=torch.full((s.batch_size,), num_keys - rows, dtype=torch.int32),
            active=torch.ones(s.batch_size, dtype=torch.bool),
        )
        self.params = torch.randn(1, reference.NUM_BAM_PARAMS, generator=generator) * 0.2
        self.param_index = torch.zeros(s.batch_size, dtype=torch.int32)
        self.mean = torch.full((reference.NUM_BINS,), 0.02)
        self.var = torch.full((reference.NUM_BINS,), 1e-3)
        for b in range(s.batch_size):
            for head in range(heads):
                logits = self._logits(b, head // s.num_groups, self.window.q[b, head].float())
                self.window.lse[b, head] = torch.logsumexp(logits, -1)

    def _keys(self, b: int, h: int) -> Tensor:
        start = (b * self.shape.num_kv_heads + h) * self.num_keys
        return self.store.k[start : start + self.num_keys]

    def _logits(self, b: int, h: int, q: Tensor) -> Tensor:
        logits = (q @ self._keys(b, h).to(q.dtype).T) * self.scale
        rows = torch.arange(self.num_keys - self.rows, self.num_keys)
        hidden = torch.arange(self.num_keys) > rows[:, None]
        return logits.masked_fill_(hidden, -math.inf)

    def copies(self) -> list[Layer]:
        """This one and as many copies as a rotation takes."""
        layers = [self]
        for _ in range(num_copies(self.store.k, self.store.v, self.store.state) - 1):
            layers.append(copy.copy(self))
            layers[-1].store = self.store.clone()
        return layers

    # -------- ours

    def spectrogram(self) -> Tensor:
        return ops.spectrogram(
            self.window, self.store, softmax_scale=self.scale, ema_coeff=EMA_COEFF
        )

    def received(self) -> Tensor:
        return ops.attention_received(
            self.window, self.store, softmax_scale=self.scale, first_row=reference.CARRY
        )

    def bam(self, op: Any = ops, state: Tensor | None = None) -> Tensor:
        store = self.store if state is None else self.store._replace(state=state)
        return op.bam_scores(
            store, self.params, self.param_index, self.mean, self.var, self.window.active,
            log_transform=False, log_eps=1e-6,
        )  # fmt: skip

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return ops.select(
            scores, self.store, self.window.active, threshold=-math.inf,
            cache_size=self.num_keys // 2, budget="per_head", fill=False, protect_newest=True,
            sink_tokens=0, recent_tokens=0,
        )  # fmt: skip

    def compact(self, state: Tensor, keep: Tensor, num_kept: Tensor) -> Segments:
        new = torch.zeros(self.segments + 1, dtype=torch.int32)
        new[1:] = torch.cumsum(num_kept + self.shape.n_up, 0)
        store = self.store._replace(state=state)
        return ops.compact(store, keep, num_kept, new, capacity=int(new[-1]))

    def step(self) -> Segments:
        state = self.spectrogram()
        return self.compact(state, *self.select(self.bam(state=state)))

    # -------- plain PyTorch

    def plain_spectrogram(self) -> Tensor:
        s, window = self.shape, reference.hann_window()
        q = self.window.q.view(s.batch_size, s.num_kv_heads, s.num_groups, self.rows, s.head_dim)
        k = self.store.k.view(s.batch_size, s.num_kv_heads, 1, self.num_keys, s.head_dim)
        if q.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # PyTorch's product of bf16 takes 18 times that of floats on such a CPU.
            q, k = q.float(), k.float()
        logits = (q @ k.transpose(-1, -2)) * self.scale
        rows = torch.arange(self.num_keys - self.rows, self.num_keys)
        hidden = torch.arange(self.num_keys) > rows[:, None]
        attn = logits.masked_fill_(hidden, -math.inf).softmax(-1, dtype=torch.float32)
        columns = attn.mean(2).flatten(0, 1).transpose(-1, -2).flatten(0, 1)
        frames = torch.stft(
            columns, reference.N_FFT, reference.HOP, window=window, center=False,
            return_complex=True,
        ).abs()  # fmt: skip
        alpha = EMA_COEFF**reference.HOP
        count = frames.shape[-1]
        weight = alpha ** torch.arange(count - 1, -1, -1, dtype=torch.float32)
        return (1 - alpha) * (frames @ weight) + alpha**count * self.store.state

    def plain_bam(self, state: Tensor) -> Tensor:
        n = self.num_keys
        features = reference.token_features(
            state[:n], self.store.pos[:n], self.mean, self.var, False, 1e-6
        )[:, : reference.NUM_RECENCY].expand(self.segments, -1, -1)
        z = reference.normalise(state, self.mean, self.var).view(self.segments, n, -1)
        return reference.bam(torch.cat([features, z], -1), self.params[0]).flatten()

    def plain_keep(self, scores: Tensor) -> Tensor:
        kept = scores.view(self.segments, -1).topk(self.num_keys // 2, dim=-1).indices
        kept = kept.sort(-1).values
        return (kept + torch.arange(self.segments)[:, None] * self.num_keys).flatten()

    def plain_compact(self, state: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.index_select(0, rows) for x in (*self.store.tokens[:3], state))

    def plain_step(self) -> tuple[Tensor, ...]:
        state = self.plain_spectrogram()
        return self.plain_compact(state, self.plain_keep(self.plain_bam(state)))


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def _check_features(layer: Layer) -> None:
    """The first segment against the law in float64."""
    few = Layer(min(layer.num_keys, 1024), layer.shape, "fp32")
    window = few.window._replace(q=few.window.q.double())
    exact = reference.spectrogram(
        window, few.store.double(), softmax_scale=few.scale, ema_coeff=EMA_COEFF
    )
    error = relative_error(few.spectrogram(), exact)
    assert error <= 1e-6, f"spectrogram: relative error {error:.1e}"
    if layer.num_keys <= 1024:
        error = relative_error(layer.spectrogram(), layer.plain_spectrogram())
        limit = 1e-4 if layer.store.k.dtype == torch.float32 else 2e-2
        assert error <= limit, f"spectrogram and plain expression differ by {error:.1e}"


def _check_scores(layer: Layer) -> None:
    n = min(layer.num_keys, 1024)
    few = Layer(n, Shape(1, 1, 1, 8, 16), "fp32")
    error = float((few.bam() - few.bam(reference, few.store.state.double())).abs().max())
    assert error <= 1e-4, f"bam_scores: error {error:.1e}"
    error = float((few.bam() - few.plain_bam(few.store.state)).abs().max())
    assert error <= 2e-4, f"bam_scores and plain expression differ by {error:.1e}"


def _check_compact(layer: Layer) -> None:
    state = layer.store.state
    keep, num_kept = layer.select(torch.randn(state.shape[0]))
    new = layer.compact(state, keep, num_kept)
    rows = torch.nonzero(keep).squeeze(1)
    want = layer.plain_compact(state, rows)
    first = int(num_kept[0])
    for ours, plain in zip(new.tokens, want, strict=True):
        assert torch.equal(ours[:first], plain[:first]), "compact differs from index_select"


OPS = (
    "features", "received", "bam", "select", "compact", "step", "prefill", "decode", "decode_all",
)  # fmt: skip


def make(op: str, num_keys: int, shape_name: str, dtype: str, plain: bool = True) -> Case:
    """The case of one op.

    Args:
        op: one of OPS; "decode" reads a quarter of the cache, "decode_all" all of it.
        num_keys: N, live rows per segment; of the whole cache for "decode".
        shape_name: key of SHAPES.
        dtype: key of DTYPES.
        plain: whether to offer the plain expression; it needs N^2 memory.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}: {op}")
    if op == "prefill":
        return prefill(num_keys, SHAPES[shape_name], shape_name, dtype)
    if op == "decode":
        return decode(num_keys, SHAPES[shape_name], shape_name, dtype, 0.25)
    if op == "decode_all":
        return decode(num_keys, SHAPES[shape_name], shape_name, dtype, 1.0)
    layer = Layer(num_keys, SHAPES[shape_name], dtype)
    s = layer.shape
    ours: Callable[[], Any]
    check: Callable[[], None]
    plain_fn: Callable[[], Any] | None = None
    floor: Callable[[], Any] | None = None
    floor_name, flops = "", 0
    if op in ("features", "step", "received"):
        q = layer.window.q.float().reshape(layer.segments, -1, s.head_dim)
        k = layer.store.k.float().view(layer.segments, num_keys, s.head_dim)
        out = torch.empty(q.shape[1], num_keys)

        def matmul() -> None:
            for i in range(layer.segments):
                torch.mm(q[i], k[i].T, out=out)

        floor, floor_name = matmul, "fp32 mm(Q, K^T)"
        flops = 2 * layer.segments * out.numel() * s.head_dim
    if op == "features":
        ours = Rotation([each.spectrogram for each in layer.copies()])
        plain_fn = layer.plain_spectrogram
        check = lambda: _check_features(layer)  # noqa: E731
    elif op == "received":
        ours = Rotation([each.received for each in layer.copies()])
        check = lambda: _check_features(layer)  # noqa: E731
    elif op == "bam":
        exps = torch.randn(min(num_keys * num_keys // 2, 2**20))
        turns = max(1, layer.segments * num_keys * num_keys // 2 // exps.numel())

        def exponentials() -> None:
            for _ in range(turns):
                torch.exp(exps)

        ours, plain_fn = layer.bam, lambda: layer.plain_bam(layer.store.state)
        floor, floor_name = exponentials, "its exponentials"
        check = lambda: _check_scores(layer)  # noqa: E731
    elif op in ("select", "compact"):
        scores = torch.randn(layer.segments * num_keys)
        keep, num_kept = layer.select(scores)
        rows = torch.nonzero(keep).squeeze(1)
        check = lambda: _check_compact(layer)  # noqa: E731
        if op == "select":
            ours, plain_fn = lambda: layer.select(scores), lambda: layer.plain_keep(scores)
        else:
            layers = layer.copies()
            ours = Rotation([partial(e.compact, e.store.state, keep, num_kept) for e in layers])
            plain_fn = Rotation([partial(e.plain_compact, e.store.state, rows) for e in layers])
            source = torch.zeros(rows.numel() * 2 * s.head_dim, dtype=layer.store.k.dtype)
            floor = Rotation([each.clone for each in _copies(source)])
            floor_name = "copy of kept K, V"
    else:
        ours, plain_fn = layer.step, layer.plain_step

        def check() -> None:
            _check_features(layer)
            _check_scores(layer)
            _check_compact(layer)

    name = f"{op}-{shape_name}-N{num_keys}-{dtype}"
    return Case(
        name, ours, plain_fn if plain else None, floor, check, floor_name,
        layer.segments * num_keys, flops,
    )  # fmt: skip


# -------- attention


def _copies(*tensors: Tensor) -> list[Any]:
    """These, and copies for a rotation; a single tensor by itself."""
    sets = [tensors] + [tuple(t.clone() for t in tensors) for _ in range(num_copies(*tensors) - 1)]
    return sets if len(tensors) > 1 else [t for (t,) in sets]


def _double(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "q": args["q"].double(), "segments": args["segments"].double()}


def _attend_args(
    lengths: list[int], shape: Shape, num_new: int, dtype: str
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of ``attend_`` for new tokens on segments of these lengths, and its outputs."""
    kind = DTYPES[dtype]
    store = testing.ragged_store(
        lengths, head_dim=shape.head_dim, num_state=0, room=num_new, dtype=kind
    )
    generator = torch.Generator().manual_seed(1)
    batch_size, heads = shape.batch_size, shape.num_kv_heads * shape.num_groups
    q = torch.randn(batch_size, heads, num_new, shape.head_dim, generator=generator).to(kind)
    kv = torch.randn(
        2, batch_size, shape.num_kv_heads, num_new, shape.head_dim, generator=generator
    ).to(kind)
    first = torch.zeros(batch_size, dtype=torch.int32)
    count = torch.full((batch_size,), num_new, dtype=torch.int32)
    position = testing.newest_of_rows(store, batch_size) + 1
    ops.append_(store, kv[0], kv[1], first, count, position)
    args = {
        "q": q, "segments": store, "first": first, "num_new": count, "pos_first": position,
        "softmax_scale": shape.head_dim**-0.5,
    }  # fmt: skip
    out = torch.zeros(batch_size, num_new, heads, shape.head_dim, dtype=kind)
    return args, out, torch.zeros(batch_size, heads, num_new)


def _attend_rotation(args: dict[str, Any], out: Tensor, lse: Tensor) -> Rotation:
    store = args["segments"]
    stores = [store] + [store.clone() for _ in range(num_copies(store.k, store.v) - 1)]
    return Rotation([partial(ops.attend_, out, lse, **{**args, "segments": s}) for s in stores])


def _live_copy(args: dict[str, Any]) -> Rotation:
    """Copies of the live bytes of K and V: what cannot be avoided."""
    store = args["segments"]
    live = int(store.seqused_k.sum()) * store.k.shape[1]
    sources = _copies(torch.zeros(2 * live, dtype=store.k.dtype))
    target = torch.empty_like(sources[0])
    return Rotation([partial(target.copy_, source) for source in sources])


def prefill(
    cached: int, shape: Shape, shape_name: str, dtype: str, num_new: int | None = None
) -> Case:
    """A chunk of new tokens on ``cached`` ones in every segment, against the same densely.

    Args:
        cached: rows per segment before.
        shape: sizes of the layer.
        shape_name: for the name of the case.
        dtype: key of DTYPES.
        num_new: new tokens per batch row; None: as many as between two updates.
    """
    columns = shape.n_up if num_new is None else num_new
    segments, keys = shape.batch_size * shape.num_kv_heads, cached + columns
    args, out, lse = _attend_args([cached] * segments, shape, columns, dtype)
    dense = (shape.batch_size, shape.num_kv_heads, keys, shape.head_dim)
    k, v = args["segments"].k.view(dense), args["segments"].v.view(dense)
    mask = torch.ones(columns, keys, dtype=torch.bool).tril(cached)

    def rival() -> Tensor:
        return scaled_dot_product_attention(
            args["q"], k, v, attn_mask=mask, enable_gqa=shape.num_groups > 1
        )

    def check() -> None:
        want, _ = reference.attend(**_double(args))
        ops.attend_(out, lse, **args)
        testing.assert_no_worse_than(out, rival().transpose(1, 2), want)

    return Case(
        f"prefill-{shape_name}-N{cached}-{dtype}", lambda: ops.attend_(out, lse, **args), rival,
        _live_copy(args), check, "copy of live K, V", segments * keys,
        4 * segments * shape.num_groups * shape.head_dim * columns * keys,
    )  # fmt: skip


def decode(context: int, shape: Shape, shape_name: str, dtype: str, kept: float) -> Case:
    """One token on a ragged cache of ``kept * context`` rows on average, against the whole cache.

    Args:
        context: rows per segment of the whole cache.
        shape: sizes of the layer.
        shape_name: for the name of the case.
        dtype: key of DTYPES.
        kept: average part of it that is left; segments lie between half and one and a half of it.
            1.0: all of it, equally long.
    """
    segments = shape.batch_size * shape.num_kv_heads
    steps = [0.5 + i / max(1, segments - 1) for i in range(segments)]
    lengths = [context - 1 if kept == 1.0 else int(kept * context * step) for step in steps]
    args, out, lse = _attend_args(lengths, shape, 1, dtype)
    whole = (shape.batch_size, shape.num_kv_heads, context, shape.head_dim)
    k, v = (torch.randn(whole).to(DTYPES[dtype]) for _ in range(2))

    def rival(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(args["q"], k, v, enable_gqa=shape.num_groups > 1)

    def check() -> None:
        same, _ = reference.attend(**args)
        want, _ = reference.attend(**_double(args))
        ops.attend_(out, lse, **args)
        testing.assert_no_worse_than(out, same, want)

    op = "decode" if kept < 1.0 else "decode_all"
    return Case(
        f"{op}-{shape_name}-N{context}-{dtype}", _attend_rotation(args, out, lse),
        Rotation([partial(rival, k, v) for k, v in _copies(k, v)]), _live_copy(args), check,
        "copy of live K, V", segments * context,
        4 * shape.num_groups * shape.head_dim * sum(lengths),
    )  # fmt: skip


# -------- time


def interleaved(case: Case, rounds: int, seconds: float = 6.0) -> dict[str, float]:
    """Least CPU seconds of each of the three, taken in turns; a slow plain one at most 3 times.

    Of a rotation every member is timed in every round, and the mean of their minima counts. Two
    rounds are the least; then no other begins after so many seconds.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, list[float]] = {}
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and time.perf_counter() - begun > seconds:
            break
        for what in ("ours", "plain", "floor"):
            run = getattr(case, what)
            turns = len(run.runs) if isinstance(run, Rotation) else 1
            if run is None or (what == "plain" and i >= 3 and sum(best[what]) > 0.5):
                continue
            times = best.setdefault(what, [math.inf] * turns)
            for turn in range(turns):
                start = clock()
                run()
                times[turn] = min(times[turn], clock() - start)
    return {what: sum(times) / len(times) for what, times in best.items()}
