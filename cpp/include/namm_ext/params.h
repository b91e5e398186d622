// Torch-free descriptions of every op, shared by the CPU and the CUDA kernels.
//
// A *segment* is one (batch row, KV head) pair, s = b * num_kv_heads + h. All per-token tensors of
// a layer are flat: segment s owns the slot of rows [cu_seqlens_k[s], cu_seqlens_k[s + 1]), of
// which the first seqused_k[s] are live, oldest first. Rows behind the live ones are room for new
// tokens; they may hold anything, NaN included, and are never read.
//
// Strides are in elements unless the name ends in _bytes. The last dimension is always contiguous.
// Sizes: B batch rows, H KV heads, G query heads per KV head (query head = h * G + g), D head_dim,
// Dv head_dim_v, L new columns of this call, C = capacity = cu_seqlens_k[S], W = kCarry + n_up.
#pragma once

#include <cstdint>

namespace namm_ext {

// The short-time Fourier transform of spec section 2. Fixed: the evolved weights depend on it.
constexpr int kNFft = 32;
constexpr int kHop = 16;
constexpr int kCarry = kNFft - kHop;  // queries of the previous period that the first frame needs
constexpr int kNumBins = kNFft / 2 + 1;

// The scorer of spec sections 5 and 6.1, and its flat parameter vector.
constexpr int kNumRecency = 8;
constexpr int kNumFeatures = kNumRecency + kNumBins;  // 25, recency first
constexpr int kHidden = 32;
constexpr double kRecencyMaxFreq = 50000.0;
constexpr int kOffsetW1 = 0;                                       // [25][96] q | k | v
constexpr int kOffsetB1 = kOffsetW1 + kNumFeatures * 3 * kHidden;  // [96]
constexpr int kOffsetW2 = kOffsetB1 + 3 * kHidden;                 // [32][50] residual | gain
constexpr int kOffsetB2 = kOffsetW2 + kHidden * 2 * kNumFeatures;  // [50]
constexpr int kOffsetW3 = kOffsetB2 + 2 * kNumFeatures;            // [25]
constexpr int kOffsetB3 = kOffsetW3 + kNumFeatures;                // [1]
constexpr int kNumBamParams = kOffsetB3 + 1;
static_assert(kNumBamParams == 4172, "the layout of the published checkpoints");

constexpr float kMinStd = 1e-7f;    // floor of sqrt(var) in the normalisation
constexpr float kLogClamp = 20.0f;  // |z| limit under feature_transform = "log"

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Where the segments of one layer lie.
struct Segments {
  const int32_t* cu_seqlens_k;  // [S + 1] slot boundaries, increasing, starts with 0
  const int32_t* seqused_k;     // [S] live rows
  int32_t batch_size;           // B
  int32_t num_kv_heads;         // H
};

// append_: new post-RoPE rows go behind the live rows of their segments.
// Row b brings columns [first[b], first[b] + num_new[b]) of k_new / v_new; the i-th of them gets
// pos = pos_first[b] + i and a zero state. seqused_k grows by num_new[b] in all segments of row b.
struct AppendParams {
  Segments seg;
  void* k;                   // [C, D] dtype, contiguous rows
  void* v;                   // [C, Dv] dtype
  int32_t* pos;              // [C]
  float* state;              // [C, F]; F may be 0
  int32_t* seqused_k;        // [S], that of seg, to be written
  const void* k_new;         // [B, H, L, D] dtype
  const void* v_new;         // [B, H, L, Dv] dtype
  const int32_t* first;      // [B]
  const int32_t* num_new;    // [B]
  const int32_t* pos_first;  // [B]
  int64_t k_new_strides[3];  // of dimensions 0, 1, 2
  int64_t v_new_strides[3];
  int32_t head_dim, head_dim_v, num_state, num_cols;  // num_cols = L
  DType dtype;
};

// attend_: softmax attention of new queries over the ragged segments, causal by position:
// query column c of row b stands at pos_first[b] + (c - first[b]) and sees the live rows with
// pos <= that. Positions increase inside a segment. Columns outside [first, first + num_new) are
// left untouched in out and lse. A query that sees nothing gets out = 0, lse = -inf.
struct AttendParams {
  Segments seg;
  const void* q;             // [B, H * G, L, D] dtype
  const void* k;             // [C, D] dtype, row stride D
  const void* v;             // [C, Dv] dtype, row stride Dv
  const int32_t* pos;        // [C]
  const int32_t* first;      // [B]
  const int32_t* num_new;    // [B]
  const int32_t* pos_first;  // [B]
  void* out;                 // [B, L, H * G, Dv] dtype
  float* lse;                // [B, H * G, L] natural log
  int64_t q_strides[3], out_strides[3], lse_strides[3];
  int32_t num_groups, head_dim, head_dim_v, num_cols;  // num_cols = L
  float softmax_scale;
  float softcap;  // 0: none; else a logit x becomes softcap * tanh(x / softcap)
  DType dtype;
};

// record_: new queries and their log-sum-exps go to the rows of the window that their positions
// say. With n_up = W - kCarry, column first[b] + i of row b, which stands at position
// p = pos_first[b] + i, goes to row kCarry + p % n_up. No row passes the end of its period.
struct RecordParams {
  const void* q;             // [B, H * G, L, D] dtype
  const float* lse;          // [B, H * G, L] natural log
  const int32_t* first;      // [B]
  const int32_t* num_new;    // [B]
  const int32_t* pos_first;  // [B]
  void* q_window;            // [B, H * G, W, D] dtype
  float* lse_window;         // [B, H * G, W]
  int64_t q_strides[3], lse_strides[3], q_window_strides[3], lse_window_strides[3];
  int32_t batch_size, num_heads, head_dim, num_cols, num_rows;  // num_cols = L, num_rows = W
  DType dtype;
};

// The window of one layer: kCarry rows of the previous period, then the n_up rows of this one.
// Row i of batch row b stands at position pos_q[b] + i (negative before the start of the sequence)
// and P[i, t] = exp(q_i . k_t * softmax_scale - lse_i) if pos[t] <= pos_q[b] + i else 0: a select,
// so that values which must not count never reach the sum.
struct Window {
  Segments seg;
  const void* q;                           // [B, H * G, W, D] dtype
  const float* lse;                        // [B, H * G, W] finite
  const void* k;                           // [C, D] dtype
  const int32_t* pos;                      // [C]
  const int32_t* pos_q;                    // [B] position of window row 0
  const uint8_t* active;                   // [B] rows of the batch to work on
  int64_t q_strides[3], lse_strides[2];    // of dimensions 0, 1, 2 and 0, 1; lse is contiguous in W
  int32_t num_groups, head_dim, num_rows;  // num_rows = W, a multiple of kHop
  float softmax_scale;
  float softcap;  // as in AttendParams, before lse is taken off
  DType dtype;
};

// spectrogram (spec 2 and 3): mean over the G heads of P, Hann-windowed DFT of kNFft rows every
// kHop rows, magnitudes, EMA over the W / kHop - 1 frames on top of the old state.
struct SpectrogramParams {
  Window window;
  const float* state;  // [C, kNumBins]
  float* state_out;    // [C, kNumBins]; live rows of inactive batch rows are copied over
  double ema_coeff;    // per token; a frame decays by ema_coeff^kHop
};

// attention_received: received[t] = sum over window rows [first_row, W) of the group mean of P.
struct ReceivedParams {
  Window window;
  float* received;  // [C]; zero for live rows of inactive batch rows
  int32_t first_row;
};

// bam_scores and mlp_scores (spec 4, 5, 6): one score per live row. Row b uses parameter vector
// param_index[b] of the bank. Statistics are shared. Age = newest pos of the segment - pos.
struct ScoreParams {
  Segments seg;
  const float* state;          // [C, kNumBins]
  const int32_t* pos;          // [C]
  const float* params;         // [num_candidates, num_params], contiguous
  const int32_t* param_index;  // [B] in [0, num_candidates)
  const float* mean;           // [kNumBins]
  const float* var;            // [kNumBins]
  const uint8_t* active;       // [B]
  float* scores;               // [C]; zero for live rows of inactive batch rows
  int64_t num_params;
  int32_t num_candidates;
  bool log_transform;  // z = (log(state + log_eps) - mean) / std, clamped to +-kLogClamp
  float log_eps;
  // mlp_scores only:
  int32_t hidden, depth;
  bool bias, residual_first;
};

// gate_ (spec 12.2): g[h] = weight[h] . x + bias[h] into the last state column of the newest
// num_new live rows of every segment of an active batch row. x is one token's [m | log pairs | v |
// log |v| | log |k|], each block for all H heads in order; m = [R / 2 lengths of rotated pairs |
// the other D - R dimensions], R = rotary_dim. Equal rows of the heads of a batch row are one
// token.
struct GateParams {
  Segments seg;
  const void *k, *v;      // [C, D], [C, Dv] dtype
  const int32_t* pos;     // [C]
  const uint8_t* active;  // [B]; the other batch rows stay as they are
  const float* weight;    // [H, num_inputs]
  const float* bias;      // [H]
  float* state;           // [C, F], of which the last column is written
  int64_t num_inputs;     // H * (D + Dv + 2)
  int32_t num_new, head_dim, head_dim_v, num_state, rotary_dim;
  bool interleaved;  // pairs are (2 i, 2 i + 1), else (i, i + R / 2)
  float eps;         // added below the logarithms
  DType dtype;
};

enum class Budget : int32_t { kPerHead = 0, kPerLayer = 1 };

// select (spec 7): which live rows stay. Forced rows: the newest of each segment (protect_newest),
// pos < sink_tokens, newest pos - pos < recent_tokens. Order: forced first (newest-of-segment
// before the others), then score descending, then position descending, then head ascending.
//   cache_size < 0: keep score >= threshold and forced rows.
//   per_head:  of those, at most cache_size per segment.
//   per_layer: of those, at most cache_size * H per batch row, shared by its segments.
//   fill (the released code's rule): every segment of a batch row then keeps
//   R = max over its segments of the count so far, filled up in the same order (per_head only).
// A segment with a NaN score reports num_kept = -1 and the caller raises.
struct SelectParams {
  Segments seg;
  const float* scores;    // [C]
  const int32_t* pos;     // [C]
  const uint8_t* active;  // [B]; inactive rows keep everything
  uint8_t* keep;          // [C], 0 / 1, written for live rows
  int32_t* num_kept;      // [S]
  float threshold;        // -inf: no threshold
  int32_t cache_size;     // -1: no budget
  Budget budget;
  bool fill, protect_newest;
  int32_t sink_tokens, recent_tokens;
};

// compact: the kept rows of every segment, in order, into a new store with its own slots.
struct CompactParams {
  Segments seg;                   // of the old store
  const int32_t* cu_seqlens_new;  // [S + 1] slots of the new store, each at least num_kept[s] long
  const uint8_t* keep;            // [C]
  const int32_t* num_kept;        // [S]
  const void *k, *v;              // [C, D], [C, Dv]
  const int32_t* pos;             // [C]
  const float* state;             // [C, F]
  void *k_out, *v_out;            // [C', D], [C', Dv]
  int32_t* pos_out;               // [C']
  float* state_out;               // [C', F]
  int64_t k_row_bytes, v_row_bytes;
  int32_t num_state;
  int32_t capacity_new;  // C', rows of the new store
};

}  // namespace namm_ext
