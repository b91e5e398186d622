"""Faults planted in the kernels must be found by the emulated tests.

A fault is a replacement in a copy of ``cuda/kernels``; the copy is compiled and the named tests
run against it. At least one must fail. ``UNSEEN`` lists faults that the emulation cannot see, as
cuda_emulation.h says: they need review, or ``compute-sanitizer --tool racecheck`` on a GPU.
"""

# ruff: noqa: E501 (replacements are whole lines of source)
from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import emulated
import pytest
import test_emulated_append as append
import test_emulated_attend as attend
import test_emulated_compact as compact
import test_emulated_gate as gate
import test_emulated_record as record
import test_emulated_scores as scores
import test_emulated_select as select
import test_emulated_window as window

KERNELS = emulated.ROOT / "cuda/kernels"


def _window(*names: str) -> list[Callable[[], None]]:
    return [partial(window.test_spectrogram, name) for name in names]


MMA = [
    *_window("bf16-D64-G2", "bf16-D64-G5", "fp16-D64-G1", "bf16-D24-G16", "bf16-D80-G2"),
    partial(window.test_attention_received, "bf16-D64-G2", 21),
    partial(window.test_same_bits_in_every_order_and_batch, "spectrogram", False),
    partial(window.test_bounded_logits, "bf16-D64-G2", 0.7),
]
SIMT = [
    *_window("fp32-D40-G3"),
    partial(window.test_same_bits_in_every_order_and_batch, "spectrogram", True),
    partial(window.test_bounded_logits, "fp32-D40-G3", 0.7),
]
BAM = [
    partial(scores.test_bam_scores, False, False),
    scores.test_bam_rows_out_of_range_are_done_again,
    scores.test_bam_scores_in_parts,
    partial(scores.test_same_bits_in_every_order_and_batch, False),
]
ROWS = [
    partial(scores.test_bam_scores, True, False),
    partial(scores.test_bam_scores, True, True),
    scores.test_bam_scores_show_nan,
]
MLP = [partial(scores.test_mlp_scores, (9, 4, True, False), log) for log in (False, True)]

RANDOM = emulated.ORDERS[2]
DECODE = [
    partial(attend.test_decode, attend.BF16, RANDOM),
    *(partial(attend.test_decode_shapes, dim, dim, groups) for dim, groups in ((128, 4), (256, 2))),
    attend.test_decode_of_several_columns,
    partial(attend.test_queries_in_the_middle_of_a_segment, 2, False),
    partial(attend.test_queries_that_see_nothing, 1, False),
    partial(attend.test_bounded_logits, 1, False, 0.7),
]
PREFILL = [
    partial(attend.test_prefill, RANDOM),
    partial(attend.test_prefill_shapes, 256, 256, 2, attend.BF16),
    partial(attend.test_prefill_shapes, 72, 40, 1, attend.BF16),
    partial(attend.test_queries_in_the_middle_of_a_segment, 80, False),
    partial(attend.test_queries_that_see_nothing, 70, False),
]
ATTEND_SIMT = [
    partial(attend.test_simt, 33, 7, 3, attend.FP32, split) for split in (True, False)
] + [partial(attend.test_queries_in_the_middle_of_a_segment, n, True) for n in (2, 80)]
ATTEND_SIMT += [partial(attend.test_bounded_logits, 1, True, 0.7)]
SELECT = [
    partial(select.test_select, rule, kind) for rule in select.RULES for kind in ("normal", "ties")
] + [
    partial(select.test_select, "budget_no_threshold", "zeros"),
    *(
        partial(select.test_segment_of_several_blocks, rule, "ties")
        for rule in ("threshold", "fill", "layer")
    ),
    partial(select.test_select_orders, "fill", emulated.ORDERS[1]),
    select.test_equal_keys_across_heads,
    select.test_equal_keys_cut_between_heads,
    select.test_equal_keys_behind_a_head_without_them,
    select.test_nan_takes_nothing_of_a_shared_budget,
    partial(select.test_nan_is_reported_and_poisons_its_segment_only, "layer"),
    partial(select.test_inactive_rows_keep_everything, "threshold"),
]
COMPACT = [
    partial(compact.test_compact, "random", RANDOM),
    compact.test_no_write_leaves_its_slot,
    compact.test_long_tiles,
    partial(compact.test_rows_of_every_size, 5, 3, attend.BF16, 0),
]
GATE = [
    *(partial(gate.test_gate, shape, RANDOM) for shape in gate.SHAPES),
    gate.test_more_heads_than_one_warp_takes,
    gate.test_inactive_rows_stay,
    gate.test_writes_stay_inside_their_slot,
]
APPEND = [
    partial(append.test_append, case, 16, 8, attend.BF16, 8, 0, order)
    for case in ("ragged_columns", "two_blocks")
    for order in emulated.ORDERS
] + [
    append.test_writes_stay_inside_their_slot,
    partial(append.test_append, "ragged_columns", 5, 3, attend.FP16, 1, 2, RANDOM),
]


RECORD = [
    partial(record.test_record, (1, 3), (4, 0), (60, 0), 32, 6, head_dim, attend.FP16, pad, RANDOM)
    for head_dim, pad in ((16, 8), (5, 1))
] + [partial(record.test_record, (1,), (70,), (130,), 128, 72, 16, attend.BF16, 0, RANDOM)]


@dataclass(frozen=True)
class Fault:
    """Replace ``old`` by ``new`` once in ``file``; ``source`` is the .cu that includes it."""

    name: str
    source: str
    file: str
    old: str
    new: str
    tests: tuple[Callable[[], None], ...]


def _faults(
    source: str, file: str, tests: list[Callable[[], None]], *changes: tuple[str, str, str]
) -> list[Fault]:
    return [Fault(n, source, file, old, new, tuple(tests)) for n, old, new in changes]


FAULTS = [
    *_faults(
        "window", "window_mma.cuh", MMA,
        ("no-barrier-behind-copies", "    cp_async_wait<1>();\n    __syncthreads();",
         "    cp_async_wait<1>();"),
        ("wait-too-shallow", "cp_async_wait<1>()", "cp_async_wait<2>()"),
        ("swizzle-of-reader", "q_half) ^ (q_row & 7)", "q_half) ^ (q_row & 3)"),
        ("query-fragments-crossed", "k_frag[mt][step], frag[0], frag[1]",
         "k_frag[mt][step], frag[0], frag[2]"),
        ("key-fragments-crossed", "live && second < num_words ? words[second]",
         "live && second < num_words ? words[first]"),
        ("own-row-invisible", "key_pos[mt][i >> 1] <= pos_q + row &&",
         "key_pos[mt][i >> 1] < pos_q + row &&"),
        ("diagonal-unmasked", "warp_last_pos > pos_q + row0 ||",
         "warp_last_pos > pos_q + row0 + kHop ||"),
        ("halves-of-window-swapped", "a, dft[1][t][0], dft[1][t][1]",
         "a, dft[0][t][0], dft[1][t][1]"),
        ("reads-dead-keys", "const bool live = warp_row + row < tile.live;", "const bool live = true;"),
        ("writes-dead-rows", "} else if (row < tile.live) {", "} else {"),
        ("inactive-not-copied", "out[first * kNumBins + i] = state[first * kNumBins + i];", ";"),
        ("last-part-too-long", "const int num_heads = min(part_heads, w.num_groups - stage.part * part_heads);",
         "const int num_heads = part_heads;"),
        ("ring-too-small", "kSharedBytes = kStages * kStageBytes",
         "kSharedBytes = (kStages - 1) * kStageBytes"),
        ("mean-kept-over-hops", "mean[mt][nt][i] = 0.0f;", "mean[mt][nt][i] += 0.0f;"),
        ("first-hop-is-a-frame", "if (row0 == 0) {", "if (false) {"),
        ("parts-not-counted", "stage.part == num_parts", "stage.part == 1"),
        ("ring-runs-over", "stage.slot + 1 < kStages", "stage.slot + 1 <= kStages"),
        ("key-padding-read", "live && first < num_words", "live"),
        ("query-padding-read", "real[j] = chunk * 8 < w.head_dim;", "real[j] = true;"),
        ("cap-forgotten", "if constexpr (kCapped) {", "if constexpr (false) {"),
        ("bin-16-lost", "if (c == 0) target[16]", "if (c == 1) target[16]"),
    ),
    *_faults(
        "window", "window_simt.cuh", SIMT,
        ("hop-too-late", "(pos - pos_q) / kHop : 0", "(pos - pos_q) / kHop + 1 : 0"),
        ("no-barrier-before-slices", "        __syncthreads();\n        for (int i = thread; i < kHop * kSimtSlice",
         "        for (int i = thread; i < kHop * kSimtSlice"),
        ("cap-forgotten", "cap.any() ? cap(dot[r]) : dot[r]", "dot[r]"),
        ("hops-share-a-buffer", "const float* before = probs + ((hop + 1) & 1)",
         "const float* before = probs + (hop & 1)"),
    ),
    *_faults(
        "window", "dft_table.cuh", [*_window("bf16-D64-G2"), *SIMT],
        ("sine-shifted", "cos_table(bin * m - 8)", "cos_table(bin * m - 7)"),
    ),
    *_faults(
        "window", "platform.cuh", SIMT,
        ("cap-off-by-two", "rate(2.0f * kLog2E / limit)", "rate(kLog2E / limit)"),
        ("cap-without-scale", "softcap / fabsf(softmax_scale)", "softcap"),
        ("tiles-of-segments", "first_tile(middle) <= tile",
         "first_tile(middle) - middle <= tile"),
    ),
    *_faults(
        "bam", "bam.cuh", BAM,
        ("self-masked", "j >= own && j < tile.live", "j > own && j < tile.live"),
        ("older-tokens-seen", "first < warp_row + kBamWarpRows ||", "first < warp_row ||"),
        ("tail-counted", "|| first + kBamKeys > tile.live;", ";"),
        ("wait-too-shallow", "cp_async_wait<kBamStages - 2>", "cp_async_wait<kBamStages - 1>"),
        ("no-barrier-behind-copies", "2>();\n    __syncthreads();", "2>();"),
        ("swizzle-of-reader", "(x_chunk ^ (row >> 1 & 3))", "(x_chunk ^ (row & 3))"),
        ("overflow-not-redone", "todo = !(den <= kMaxDenominator", "todo = false && !(den <= kMaxDenominator"),
        ("short-remainders-forgotten", "(2 * remainder <= length) == turn - kBamParts", "2 * remainder > length"),
        ("long-remainders-forgotten", "(2 * remainder <= length) == turn - kBamParts", "2 * remainder <= length"),
        ("whole-parts-forgotten", "? turn < num_whole", "? turn + 1 < num_whole"),
        ("parts-overlap", "end = min(begin + length, tile.live)", "end = tile.live"),
        ("last-part-not-added", "part * part_tokens(tile.live) < seen", "(part + 1) * part_tokens(tile.live) <= seen"),
        ("parts-of-the-batch", "part * part_tokens(tile.live) < seen", "part * part_tokens(p.seg.seqused_k[0]) < seen"),
        ("parts-share-a-place", "work.sums[part * work.capacity + tile.start + row] =", "work.sums[tile.start + row] ="),
        ("no-barrier-behind-folded", "  __syncthreads();\n  if (row >= tile.live) return;",
         "  if (row >= tile.live) return;"),
    ),
    *_faults(
        "bam", "bam_fold.cuh", ROWS,
        ("residual-of-own-lane", "__shfl_sync(kFullMask, residual, h)", "residual"),
        ("gain-of-residual", "w2[h * kW2 + kNumFeatures + e] *", "w2[h * kW2 + e] *"),
        ("no-barrier-behind-parameters", "w[i] = source[i];\n  __syncthreads();", "w[i] = source[i];"),
        ("parameters-of-first-row", "p.param_index[b]", "p.param_index[0]"),
        ("bias-of-last-lane", "cb += __shfl_xor_sync(kFullMask, cb, bits);", ";"),
    ),
    *_faults(
        "bam", "bam.cuh", ROWS,
        ("row-vectors-unordered", "      g[lane] = gd;\n    }\n    __syncwarp();",
         "      g[lane] = gd;\n    }"),
        ("maximum-not-merged", "sums.num * mine + other.num * theirs", "sums.num + other.num"),
    ),
    *_faults(
        "bam", "features.cuh", ROWS,
        ("angle-in-float", "const double angle = age * kRecencyFreq[j];",
         "const double angle = static_cast<float>(age) * static_cast<float>(kRecencyFreq[j]);"),
        ("log-unclamped", "clamp ? fminf(fmaxf(z, -kLogClamp), kLogClamp) : z", "z"),
    ),
    *_faults(
        "mlp", "mlp.cu", MLP,
        ("dead-layers-forgotten", "(p.depth - 2) * (hidden * hidden + biased)", "0"),
        ("reads-behind-live", "  if (row >= tile.live) return;\n\n  float x", "  float x"),
    ),
    *_faults(
        "attend", "attend_mma.cuh", [*DECODE, *PREFILL],
        ("cap-forgotten", "if constexpr (kCapped) {", "if constexpr (false) {"),
        ("swizzle-of-reader", "(vector ^ (row & 7)) << 4", "(vector ^ (threadIdx.x & 7)) << 4"),
        ("keys-crossed", "mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);",
         "mma_m16n8k16<T>(s[2 * n], a, b[0], b[2]);"),
        ("values-not-transposed", "ldmatrix_x4_trans(b, Layout::at(v,",
         "ldmatrix_x4(b, Layout::at(v,"),
        ("probabilities-crossed", "pack2<T>(s[2 * step][2], s[2 * step][3]),",
         "pack2<T>(s[2 * step + 1][2], s[2 * step + 1][3]),"),
        ("mask-off-by-one", "% 2 >= limit[j / 2]", "% 2 > limit[j / 2]"),
        ("mask-of-other-row", ">= limit[j / 2]", ">= limit[0]"),
        ("no-rescale-of-sum", "    state.sum[h] *= shrink;\n", ""),
        ("no-rescale-of-out", "state.out[n][2 * h + 1] *= shrink;", ";"),
        ("maximum-of-two-lanes", "__shfl_xor_sync(kFullMask, tile_max[h], 2)", "tile_max[h]"),
        ("sum-of-two-lanes", "sum[h] += __shfl_xor_sync(kFullMask, sum[h], 2);", ";"),
        ("empty-row-divides", "base[h] = safe_max(max);", "base[h] = max;"),
        ("dead-rows-loaded", "row < valid && vector * 8 < dim", "vector * 8 < dim"),
        ("columns-behind-row-loaded", "row < valid && vector * 8 < dim", "row < valid"),
    ),
    *_faults(
        "attend", "attend_mma.cuh", PREFILL,
        ("prefill-tile-not-awaited", "    cp_async_wait<0>();\n    __syncthreads();  // the tile",
         "    __syncthreads();  // the tile"),
        ("prefill-no-barrier", "    cp_async_wait<0>();\n    __syncthreads();  // the tile",
         "    cp_async_wait<0>();  // the tile"),
        ("prefill-mask-forgotten", "key + Shape::kKeys > seen_by_all, limit",
         "key > seen_by_all, limit"),
        ("prefill-rows-behind-written", "if (row >= rows.count) continue;", ""),
        ("prefill-values-behind-written", "if (n * 8 >= p.head_dim_v) continue;", ""),
    ),
    *_faults(
        "attend", "attend_mma.cuh", DECODE,
        ("decode-wait-too-shallow", "cp_async_wait<Shape::kStages - 2>()",
         "cp_async_wait<Shape::kStages - 1>()"),
        ("decode-no-barrier",
         "    __syncthreads();  // the tile is there for all, and nobody reads the stage to fill", "//"),
        ("decode-stage-overwritten", "load_tile(tile + Shape::kStages - 1);",
         "load_tile(tile + Shape::kStages);"),
        ("decode-part-too-long", "min(chunk.end, count_visible(pos, chunk.live, rows.pos_first + row /",
         "max(chunk.end, count_visible(pos, chunk.live, rows.pos_first + row /"),
        ("decode-merge-forgets-weight", "total += weight[w] * warp_out", "total += warp_out"),
        ("decode-merge-of-unpadded-rows", "(w * Shape::kRows + i) * Shape::kMergePitch", "(w * Shape::kRows + i) * kHeadDim"),
        ("decode-merge-before-barrier",
         "  __syncthreads();\n  for (int32_t i = warp; i <= row_last", "  for (int32_t i = warp; i <= row_last"),
        ("decode-parts-share-a-place", "int64_t{blockIdx.x} * partials.rows_per_part + row;",
         "int64_t{chunk.segment} * partials.rows_per_part + row;"),
    ),
    *_faults(
        "attend", "attend.cuh", [*DECODE, *PREFILL, *ATTEND_SIMT],
        ("guess-not-checked", "if (guess >= 1 && pos[guess - 1] == query_pos)", "if (guess >= 1)"),
        ("search-off-by-one", "if (pos[middle] <= query_pos)", "if (pos[middle] < query_pos)"),
        ("group-and-column-swapped", "(rows.first + r / p.num_groups) * p.q_strides[2]",
         "(rows.first + r % p.num_groups) * p.q_strides[2]"),
        ("lse-base-2", "(max + fast_log2(sum)) * kLn2", "(max + fast_log2(sum))"),
        ("first-column-forgotten",
         "(rows.first + r / p.num_groups) * p.out_strides[1]", "(r / p.num_groups) * p.out_strides[1]"),
    ),
    *_faults(
        "attend", "attend.cu", DECODE,
        ("combine-maximum-of-a-warp", "max = fmaxf(max, warp_max[w]);", ";"),
        ("combine-no-barrier-behind-maximum", "warp_max[warp] = max;\n  __syncthreads();", "warp_max[warp] = max;"),
        ("combine-no-barrier-behind-sum", "warp_sum[warp] = sum;\n  __syncthreads();", "warp_sum[warp] = sum;"),
        ("combine-parts-of-first-warp", "w < kCombineWarps; ++w) value +=", "w < 1; ++w) value +="),
        ("combine-warps-share-parts", "int i = warp; i < num_parts", "int i = 0; i < num_parts"),
        ("combine-columns-overwritten", "if (first > 0) __syncthreads();", ""),
        ("combine-no-barrier-behind-columns", "    __syncthreads();\n    const int d = first", "    const int d = first"),
        ("combine-of-next-segment", ">> places.shift) + segment * places.extra;", ">> places.shift);"),
        ("combine-forgets-weight", "total[j] += weight *", "total[j] +="),
        ("combine-columns-behind-row", "if (d < p.head_dim_v) total[j]", "total[j]"),
    ),
    *_faults(
        "attend", "attend.cuh", [attend.test_places_of_parts],
        ("one-place-too-few-of-512", "{9, 17}", "{9, 16}"),
        ("one-place-too-few-of-1024", "{10, 65}", "{10, 64}"),
        ("places-of-256-rows", "int64_t{tile.row >> places.shift} * rows;", "int64_t{tile.row / kMinChunk} * rows;"),
    ),
    *_faults(
        "attend", "attend.cu", [attend.test_places_of_parts],
        ("combine-of-other-places", ">> places.shift) + segment * places.extra;", "/ kMinChunk) + segment;"),
        ("workspace-of-the-fewest-rows", "num_parts(p, capacity, choose_places(p, capacity))", "num_parts(p, capacity / 2, choose_places(p, capacity))"),
    ),
    *_faults(
        "attend", "attend_simt.cuh", ATTEND_SIMT,
        ("cap-forgotten", "if (cap.any()) {", "if (false) {"),
        ("newer-keys-seen", "key < end && key_pos <=", "key < end || key_pos <="),
        ("no-barrier-before-softmax", "    __syncthreads();  // the logits are there\n", ""),
        ("no-barrier-before-values", "    __syncthreads();  // the probabilities are there\n", ""),
        ("no-barrier-before-next-keys",
         "    __syncthreads();  // the next keys may overwrite probs\n", ""),
        ("no-rescale", "out[r * dim_v + d] * shrink[r];", "out[r * dim_v + d];"),
    ),
    *_faults(
        "select", "select.cu", SELECT,
        ("minus-zero-below-zero", "p.scores[seg.start + i] + 0.0f)", "p.scores[seg.start + i])"),
        ("order-of-negatives", "bits >> 31 ? ~bits : bits | 0x80000000u", "bits | 0x80000000u"),
        ("older-wins-ties", "(static_cast<uint32_t>(pos) & 0x7fffffffu)",
         "(~static_cast<uint32_t>(pos) & 0x7fffffffu)"),
        ("threshold-excluded", ">= p.threshold ||", "> p.threshold ||"),
        ("recent-off-by-one", "< p.recent_tokens ||", "<= p.recent_tokens ||"),
        ("newest-not-first", "if (p.protect_newest && i == seg.live - 1) return kNewest;", ""),
        ("bin-off-by-one", "left <= 0 || cut.remaining > above", "left <= 0 || cut.remaining >= above"),
        ("prefix-ignored", "level == 0 || key >> bits == cut.prefix", "true"),
        ("prefix-not-shifted", "cut.prefix << (cut.shift - shift) | digit", "cut.prefix | digit"),
        ("stops-too-early", "left == counts[j] ?", "left <= counts[j] ?"),
        ("earlier-warps-forgotten", "for (int w = 0; w < warp; ++w) above += sums[w];", ""),
        ("no-barrier-behind-sums", "sums[warp] = above;\n  __syncthreads();", "sums[warp] = above;"),
        ("no-barrier-behind-found", "  __syncthreads();\n  return *found;", "  return *found;"),
        ("ties-per-segment", "for (int s = group.first; s < tile.segment; ++s) {", "for (int s = tile.segment; s < tile.segment; ++s) {"),
        ("tie-of-another-position", "return low < seg.live && key_of(p, seg, low) == key;", "return true;"),
        ("histogram-not-cleared", "histogram[i] = 0;", "histogram[i] += 0;"),
        ("no-barrier-before-counts", "histogram[i] = 0;\n  __syncthreads();", "histogram[i] = 0;"),
        ("no-barrier-behind-counts", "  __syncthreads();\n  for (int i = threadIdx.x; i < kBins; i += kThreads) {\n    if (hist",
         "  for (int i = threadIdx.x; i < kBins; i += kThreads) {\n    if (hist"),
        ("workspace-not-cleared", "fill_bytes(base, 0, layout.histograms, config.stream)", "fill_bytes(base, 0, layout.counts, config.stream)"),
        ("last-level-missing", "level < levels; ++level", "level + 1 < levels; ++level"),
        ("later-blocks-count-all", "const int32_t end = min(tile.row + kTileRows, tile.live);\n  const int shift",
         "const int32_t end = tile.live;\n  const int shift"),
        ("count-of-a-block", "atomicAdd(&p.num_kept[tile.segment], kept);", "p.num_kept[tile.segment] = kept;"),
        ("cut-of-another-level", "kLevels + level - 1;", "kLevels + max(level - 2, 0);"),
        ("fill-of-other-batch-row", "for (int s = row; s <", "for (int s = 0; s <"),
        ("fill-of-one-head", "s < row + p.seg.num_kv_heads; ++s", "s < row + 1; ++s"),
        ("nan-not-counted", "(static_cast<unsigned long long>(score != score) << 32)", "0"),
        ("nan-counts-in-the-budget", "if (count < 0) continue;", ""),
        ("nan-in-the-histogram", " || count_of(work, tile.segment) < 0) return;", ") return;"),
        ("inactive-decided", "if (!active || count_of", "if (count_of"),
        ("budget-of-one-head", "int64_t{p.cache_size} * (group.last - group.first)", "int64_t{p.cache_size}"),
    ),
    *_faults(
        "gate", "gate.cu", GATE,
        ("pairs-crossed", "p.interleaved ? 2 * i + 1 : i + half", "i + half"),
        ("other-neighbour", "p.interleaved ? 2 * i : i", "i"),
        ("log-without-eps", "logf(length + p.eps)", "logf(length)"),
        ("norm-of-pairs-only", "      key_square += x * x;\n", ""),
        ("norms-swapped", "sums.add(norms + h, logf(sqrtf(value_square)",
         "sums.add(norms + h, logf(sqrtf(key_square)"),
        ("norm-of-one-lane", "value_square = sum_lanes(value_square);", ";"),
        ("heads-share-weights", "weight[h * stride + i]", "weight[i]"),
        ("later-heads-forgotten", "p.weight + first_head * p.num_inputs", "p.weight"),
        ("bias-of-first-head", "+ p.bias[head]", "+ p.bias[0]"),
        ("first-column-written", "p.state[(row + 1) * p.num_state - 1]", "p.state[row * p.num_state]"),
        ("oldest-tokens", "return p.seg.seqused_k[segment + h] - p.num_new + token;", "return token;"),
        ("inactive-written", " || !p.active[b]) return;", ") return;"),
        ("slot-left", "if (__any_sync(kFullMask, missing)) return;", ""),
        ("tokens-behind-written", "if (token >= p.num_new || ", "if (token > p.num_new || "),
    ),
    *_faults(
        "compact", "compact.cu", COMPACT,
        ("head-bytes-forgotten", "if (t < head) count += keep[t] != 0;", ""),
        ("tail-bytes-forgotten", "if (t < n - tail) count += keep[tail + t] != 0;", ""),
        ("dead-rows-kept", "row < tile.live && keep[row] != 0", "keep[row] != 0"),
        ("rank-off-by-one", "__popc(ballots[j] & ((1u << lane) - 1u))",
         "__popc(ballots[j] & ((2u << lane) - 1u))"),
        ("no-barrier-before-counts", "  __syncthreads();\n  int32_t rank_before = 0;",
         "  int32_t rank_before = 0;"),
        ("no-barrier-before-list", "  __syncthreads();  // the list is complete\n", ""),
        ("slot-overrun", "min(int64_t{count}, room)", "int64_t{count}"),
        ("positions-of-old-store", "p.pos_out + to, p.pos + from", "p.pos_out + to, p.pos"),
    ),
    *_faults(
        "append", "append.cu", APPEND,
        ("grows-while-others-read", "const bool grow = grid.y == 1;", "const bool grow = true;"),
        ("no-barrier-before-growing", "    __syncthreads();  // everybody has read seqused_k\n", ""),
        ("state-not-cleared", "p.state[row * p.num_state + f] = 0.0f;", ";"),
        ("column-zero", "column = p.first[b] + i", "column = i"),
        ("room-ignored", "min(room, p.num_cols - p.first[b])", "p.num_cols - p.first[b]"),
        ("misaligned-vectors", "return bits % 16 == 0;", "return bits % 2 == 0;"),
    ),
    *_faults(
        "record", "record.cu", RECORD,
        ("row-of-another-position", "begin = p.pos_first[b] % n_up", "begin = p.pos_first[b] % n_up / 2"),
        ("carry-overwritten", "row = kCarry + begin + i", "row = begin + i"),
        ("column-zero", "column = p.first[b] + i", "column = i"),
        ("second-block-repeats", "row_first = blockIdx.y * kRowsPerBlock", "row_first = 0"),
        ("misaligned-vectors", "return bits % 16 == 0;", "return bits % 2 == 0;"),
    ),
]  # fmt: skip

#: Only hardware shows these.
UNSEEN = _faults(
    "bam", "bam.cuh", ROWS,
    # Lanes meet in the shuffles at the end of a row; on the GPU those order no memory.
    ("vectors-overwritten", "    __syncwarp();  // the vectors of the row before have been read\n", ""),
)  # fmt: skip


def _fails(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels)
    path = kernels / fault.file
    text = path.read_text()
    assert fault.old in text, f"{fault.file} no longer contains what {fault.name} replaces"
    path.write_text(text.replace(fault.old, fault.new, 1))
    lib = emulated.load(emulated.build(kernels, fault.source, "-O0"))
    monkeypatch.setattr(emulated, "library", lambda: lib)
    for test in fault.tests:
        try:
            test()
        except (AssertionError, emulated.EmulationError):
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.source}-{f.name}")
def test_fault_is_caught(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fails(fault, tmp_path, monkeypatch), "no test noticed"


@pytest.mark.slow
@pytest.mark.parametrize("fault", UNSEEN, ids=lambda f: f"{f.source}-{f.name}")
def test_fault_is_known_to_be_unseen(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails the emulation has learned something: move the fault to FAULTS."""
    assert not _fails(fault, tmp_path, monkeypatch)


def test_intact_kernels_pass() -> None:
    for test in {t for fault in FAULTS for t in fault.tests}:
        test()
