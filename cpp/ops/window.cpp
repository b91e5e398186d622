#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "prepare.h"

namespace namm_ext {
namespace {

Window check_window(const Check& check, const Tensor& q_window, const Tensor& lse_window,
                    const Tensor& k, const Tensor& pos, const Tensor& cu_seqlens_k,
                    const Tensor& seqused_k, const Tensor& pos_q, const Tensor& active,
                    double softmax_scale, double softcap) {
  Window w{};
  w.dtype = check.cache_dtype(q_window, "q_window");
  const ScalarType dtype = q_window.scalar_type();
  check.rows(q_window, "q_window", dtype, {-1, -1, -1, -1});
  const int64_t batch_size = q_window.size(0), num_heads = q_window.size(1);
  const int64_t num_rows = q_window.size(2), head_dim = q_window.size(3);
  STD_TORCH_CHECK(num_rows >= kNFft && num_rows % kHop == 0, check.op(),
                  ": q_window must have 16 + n_up rows with n_up a positive multiple of ", kHop,
                  ", got ", num_rows, " rows");
  check.rows(lse_window, "lse_window", ScalarType::Float, {batch_size, num_heads, num_rows});
  check.dense(k, "k", dtype, {-1, head_dim});
  const int64_t capacity = k.size(0);
  check.dense(pos, "pos", ScalarType::Int, {capacity});
  w.seg = check.segments(cu_seqlens_k, seqused_k, batch_size, capacity);
  STD_TORCH_CHECK(num_heads >= 1 && num_heads % w.seg.num_kv_heads == 0, check.op(),
                  ": q_window must have a positive multiple of ", w.seg.num_kv_heads,
                  " (num_kv_heads) heads, got ", num_heads);
  check.dense(pos_q, "pos_q", ScalarType::Int, {batch_size});
  check.dense(active, "active", ScalarType::Bool, {batch_size});

  w.q = input<void>(q_window);
  w.lse = input<float>(lse_window);
  w.k = input<void>(k);
  w.pos = input<int32_t>(pos);
  w.pos_q = input<int32_t>(pos_q);
  w.active = input<uint8_t>(active);
  copy_strides(q_window, 3, w.q_strides);
  copy_strides(lse_window, 2, w.lse_strides);
  w.num_groups = static_cast<int32_t>(num_heads / w.seg.num_kv_heads);
  w.head_dim = check.size(head_dim, "head_dim");
  w.num_rows = check.size(num_rows, "num_rows");
  w.softmax_scale = check.finite(softmax_scale, "softmax_scale");
  w.softcap = check.softcap(softcap);
  return w;
}

}  // namespace

Prepared<SpectrogramParams, Tensor> prepare_spectrogram(
    const Tensor& q_window, const Tensor& lse_window, const Tensor& k, const Tensor& pos,
    const Tensor& state, const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& pos_q,
    const Tensor& active, double softmax_scale, double ema_coeff, double softcap) {
  const Check check("spectrogram", q_window, "q_window");
  SpectrogramParams p{};
  p.window = check_window(check, q_window, lse_window, k, pos, cu_seqlens_k, seqused_k, pos_q,
                          active, softmax_scale, softcap);
  check.dense(state, "state", ScalarType::Float, {k.size(0), kNumBins});
  STD_TORCH_CHECK(ema_coeff >= 0.0 && ema_coeff <= 1.0,
                  "spectrogram: ema_coeff must be in [0, 1], got ", ema_coeff);
  p.state = input<float>(state);
  p.ema_coeff = ema_coeff;

  const Tensor state_out = torch::stable::new_empty(state, state.sizes());
  p.state_out = output<float>(state_out);
  return {check.op(), k.size(0), p, state_out};
}

Prepared<ReceivedParams, Tensor> prepare_attention_received(
    const Tensor& q_window, const Tensor& lse_window, const Tensor& k, const Tensor& pos,
    const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& pos_q, const Tensor& active,
    double softmax_scale, int64_t first_row, double softcap) {
  const Check check("attention_received", q_window, "q_window");
  ReceivedParams p{};
  p.window = check_window(check, q_window, lse_window, k, pos, cu_seqlens_k, seqused_k, pos_q,
                          active, softmax_scale, softcap);
  STD_TORCH_CHECK(first_row >= 0 && first_row <= p.window.num_rows,
                  "attention_received: first_row must be in [0, ", p.window.num_rows, "], got ",
                  first_row);
  p.first_row = static_cast<int32_t>(first_row);

  const Tensor received = torch::stable::new_empty(lse_window, {k.size(0)});
  p.received = output<float>(received);
  return {check.op(), k.size(0), p, received};
}

}  // namespace namm_ext
