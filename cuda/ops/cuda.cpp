// CUDA entries: check, allocate, launch on the current stream. All registrations are below.
//
// The checks are those of the CPU entries. Nothing here waits for the device, so the numbers inside
// index tensors are the caller's promise; ragged.py keeps it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "kernels.h"

namespace namm_ext {
namespace {

using torch::headeronly::ScalarType;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Makes the device of a tensor current and knows its stream.
class Device {
 public:
  Device(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {}

  // anchor: a tensor on the device. workspace_bytes: scratch memory, given back to torch's
  // allocator when this object goes; the stream orders its next use behind our kernels.
  gpu::Launch launch(const Tensor& anchor, int64_t capacity, size_t workspace_bytes = 0) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    gpu::Launch launch{capacity};
    launch.stream = static_cast<gpu::Stream>(stream);
    if (workspace_bytes > 0) {
      workspace_ = torch::stable::new_empty(anchor, {static_cast<int64_t>(workspace_bytes)},
                                            ScalarType::Byte);
      launch.workspace = data<void>(workspace_);
    }
    return launch;
  }

  void check(gpu::Status status) const {
    STD_TORCH_CHECK(status == 0, op_, ": CUDA error: ", gpu::status_string(status));
  }

 private:
  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor workspace_;
};

void append(Tensor k, Tensor v, Tensor pos, Tensor state, Tensor seqused_k, Tensor cu_seqlens_k,
            Tensor k_new, Tensor v_new, Tensor first, Tensor num_new, Tensor pos_first) {
  const AppendParams params = check_append(k, v, pos, state, seqused_k, cu_seqlens_k, k_new, v_new,
                                           first, num_new, pos_first);
  Device device("append_", k);
  device.check(gpu::launch_append(params, device.launch(k, k.size(0))));
}

void attend(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor pos, Tensor cu_seqlens_k,
            Tensor seqused_k, Tensor first, Tensor num_new, Tensor pos_first,
            double softmax_scale) {
  const AttendParams params = check_attend(out, lse, q, k, v, pos, cu_seqlens_k, seqused_k, first,
                                           num_new, pos_first, softmax_scale);
  Device device("attend_", q);
  device.check(gpu::launch_attend(
      params, device.launch(q, k.size(0), gpu::attend_workspace(params, k.size(0)))));
}

Tensor spectrogram(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos, Tensor state,
                   Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active,
                   double softmax_scale, double ema_coeff) {
  SpectrogramParams params = check_spectrogram(q_window, lse_window, k, pos, state, cu_seqlens_k,
                                               seqused_k, pos_q, active, softmax_scale, ema_coeff);
  Device device("spectrogram", k);
  Tensor state_out = torch::stable::new_empty(state, state.sizes());
  params.state_out = data<float>(state_out);
  device.check(gpu::launch_spectrogram(params, device.launch(k, k.size(0))));
  return state_out;
}

Tensor attention_received(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos,
                          Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active,
                          double softmax_scale, int64_t first_row) {
  ReceivedParams params =
      check_attention_received(q_window, lse_window, k, pos, cu_seqlens_k, seqused_k, pos_q, active,
                               softmax_scale, first_row);
  Device device("attention_received", k);
  Tensor received = torch::stable::new_empty(lse_window, {k.size(0)});
  params.received = data<float>(received);
  device.check(gpu::launch_attention_received(params, device.launch(k, k.size(0))));
  return received;
}

Tensor bam_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, Tensor params,
                  Tensor param_index, Tensor mean, Tensor var, Tensor active, bool log_transform,
                  double log_eps) {
  ScoreParams p = check_bam_scores(state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
                                   var, active, log_transform, log_eps);
  Device device("bam_scores", state);
  Tensor scores = torch::stable::new_empty(state, {state.size(0)});
  p.scores = data<float>(scores);
  device.check(gpu::launch_bam_scores(
      p, device.launch(state, state.size(0), gpu::bam_scores_workspace(p, state.size(0)))));
  return scores;
}

Tensor mlp_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, Tensor params,
                  Tensor param_index, Tensor mean, Tensor var, Tensor active, bool log_transform,
                  double log_eps, int64_t hidden, int64_t depth, bool bias, bool residual_first) {
  ScoreParams p =
      check_mlp_scores(state, pos, cu_seqlens_k, seqused_k, params, param_index, mean, var, active,
                       log_transform, log_eps, hidden, depth, bias, residual_first);
  Device device("mlp_scores", state);
  Tensor scores = torch::stable::new_empty(state, {state.size(0)});
  p.scores = data<float>(scores);
  device.check(gpu::launch_mlp_scores(p, device.launch(state, state.size(0))));
  return scores;
}

void gate(Tensor state, Tensor k, Tensor v, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k,
          Tensor active, Tensor weight, Tensor bias, int64_t num_new, int64_t rotary_dim,
          bool interleaved, double eps) {
  const GateParams params = check_gate(state, k, v, pos, cu_seqlens_k, seqused_k, active, weight,
                                       bias, num_new, rotary_dim, interleaved, eps);
  Device device("gate_", k);
  device.check(gpu::launch_gate(params, device.launch(k, k.size(0))));
}

std::tuple<Tensor, Tensor> select(Tensor scores, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k,
                                  Tensor active, double threshold, int64_t cache_size,
                                  std::string budget, bool fill, bool protect_newest,
                                  int64_t sink_tokens, int64_t recent_tokens) {
  SelectParams params =
      check_select(scores, pos, cu_seqlens_k, seqused_k, active, threshold, cache_size, budget,
                   fill, protect_newest, sink_tokens, recent_tokens);
  Device device("select", scores);
  Tensor keep = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Byte);
  Tensor num_kept = torch::stable::new_empty(seqused_k, seqused_k.sizes());
  params.keep = data<uint8_t>(keep);
  params.num_kept = data<int32_t>(num_kept);
  const int64_t capacity = scores.size(0);
  device.check(gpu::launch_select(
      params, device.launch(scores, capacity, gpu::select_workspace(params, capacity))));
  return {keep, num_kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact(Tensor k, Tensor v, Tensor pos, Tensor state,
                                                   Tensor cu_seqlens_k, Tensor seqused_k,
                                                   Tensor keep, Tensor num_kept,
                                                   Tensor cu_seqlens_new, int64_t capacity) {
  CompactParams params = check_compact(k, v, pos, state, cu_seqlens_k, seqused_k, keep, num_kept,
                                       cu_seqlens_new, capacity);
  Device device("compact", k);
  Tensor k_out = torch::stable::new_empty(k, {capacity, k.size(1)});
  Tensor v_out = torch::stable::new_empty(v, {capacity, v.size(1)});
  Tensor pos_out = torch::stable::new_empty(pos, {capacity});
  Tensor state_out = torch::stable::new_empty(state, {capacity, state.size(1)});
  params.k_out = data<void>(k_out);
  params.v_out = data<void>(v_out);
  params.pos_out = data<int32_t>(pos_out);
  params.state_out = data<float>(state_out);
  device.check(gpu::launch_compact(params, device.launch(k, k.size(0))));
  return {k_out, v_out, pos_out, state_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CUDA, m) {
  m.impl("append_", TORCH_BOX(&append));
  m.impl("attend_", TORCH_BOX(&attend));
  m.impl("spectrogram", TORCH_BOX(&spectrogram));
  m.impl("attention_received", TORCH_BOX(&attention_received));
  m.impl("bam_scores", TORCH_BOX(&bam_scores));
  m.impl("mlp_scores", TORCH_BOX(&mlp_scores));
  m.impl("gate_", TORCH_BOX(&gate));
  m.impl("select", TORCH_BOX(&select));
  m.impl("compact", TORCH_BOX(&compact));
}

}  // namespace namm_ext
