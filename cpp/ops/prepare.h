// One function per op. Every entry, CPU or CUDA, starts with it: it checks shapes, dtypes, devices
// and strides, allocates what the op returns, and fills the parameter struct that the kernels see.
//
// What it does not check are the numbers inside index tensors: on a GPU that would wait for the
// device. values.h does so for the CPU.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <tuple>

#include "namm_ext/params.h"

namespace namm_ext {

using torch::stable::Tensor;

// What is left to do is to launch. Returned: a tensor, a tuple of them, or Nothing.
template <class Params, class Returned>
struct Prepared {
  const char* op;
  int64_t capacity;  // rows of the store; 0 for ops without one
  Params params;
  Returned returned;
};

struct Nothing {};  // the op writes into its arguments

Prepared<AppendParams, Nothing> prepare_append(const Tensor& k, const Tensor& v, const Tensor& pos,
                                               const Tensor& state, const Tensor& seqused_k,
                                               const Tensor& cu_seqlens_k, const Tensor& k_new,
                                               const Tensor& v_new, const Tensor& first,
                                               const Tensor& num_new, const Tensor& pos_first);

Prepared<AttendParams, Nothing> prepare_attend(const Tensor& out, const Tensor& lse,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& pos, const Tensor& cu_seqlens_k,
                                               const Tensor& seqused_k, const Tensor& first,
                                               const Tensor& num_new, const Tensor& pos_first,
                                               double softmax_scale, double softcap);

Prepared<RecordParams, Nothing> prepare_record(const Tensor& q_window, const Tensor& lse_window,
                                               const Tensor& q, const Tensor& lse,
                                               const Tensor& first, const Tensor& num_new,
                                               const Tensor& pos_first);

// Returns the new state.
Prepared<SpectrogramParams, Tensor> prepare_spectrogram(
    const Tensor& q_window, const Tensor& lse_window, const Tensor& k, const Tensor& pos,
    const Tensor& state, const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& pos_q,
    const Tensor& active, double softmax_scale, double ema_coeff, double softcap);

Prepared<ReceivedParams, Tensor> prepare_attention_received(
    const Tensor& q_window, const Tensor& lse_window, const Tensor& k, const Tensor& pos,
    const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& pos_q, const Tensor& active,
    double softmax_scale, int64_t first_row, double softcap);

// Both return the scores.
Prepared<ScoreParams, Tensor> prepare_bam_scores(const Tensor& state, const Tensor& pos,
                                                 const Tensor& cu_seqlens_k,
                                                 const Tensor& seqused_k, const Tensor& params,
                                                 const Tensor& param_index, const Tensor& mean,
                                                 const Tensor& var, const Tensor& active,
                                                 bool log_transform, double log_eps);
Prepared<ScoreParams, Tensor> prepare_mlp_scores(const Tensor& state, const Tensor& pos,
                                                 const Tensor& cu_seqlens_k,
                                                 const Tensor& seqused_k, const Tensor& params,
                                                 const Tensor& param_index, const Tensor& mean,
                                                 const Tensor& var, const Tensor& active,
                                                 bool log_transform, double log_eps, int64_t hidden,
                                                 int64_t depth, bool bias, bool residual_first);

Prepared<GateParams, Nothing> prepare_gate(const Tensor& state, const Tensor& k, const Tensor& v,
                                           const Tensor& pos, const Tensor& cu_seqlens_k,
                                           const Tensor& seqused_k, const Tensor& active,
                                           const Tensor& weight, const Tensor& bias,
                                           int64_t num_new, int64_t rotary_dim, bool interleaved,
                                           double eps);

// Returns keep and num_kept.
Prepared<SelectParams, std::tuple<Tensor, Tensor>> prepare_select(
    const Tensor& scores, const Tensor& pos, const Tensor& cu_seqlens_k, const Tensor& seqused_k,
    const Tensor& active, double threshold, int64_t cache_size, const std::string& budget,
    bool fill, bool protect_newest, int64_t sink_tokens, int64_t recent_tokens);

// Returns k, v, pos and state of the new store.
Prepared<CompactParams, std::tuple<Tensor, Tensor, Tensor, Tensor>> prepare_compact(
    const Tensor& k, const Tensor& v, const Tensor& pos, const Tensor& state,
    const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& keep, const Tensor& num_kept,
    const Tensor& cu_seqlens_new, int64_t capacity);

}  // namespace namm_ext
