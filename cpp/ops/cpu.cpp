// CPU entries: check, allocate, run the kernel on torch's threads. All registrations are below.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <string>
#include <tuple>

#include "checks.h"
#include "dispatch.h"
#include "kernels.h"
#include "values.h"

namespace namm_ext {
namespace {

using torch::headeronly::ScalarType;

Parallel torch_threads() {
  const auto run = [](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return Parallel(run, static_cast<int>(torch::stable::get_num_threads()));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Asks for huge pages behind a new tensor. Blocks above 32 MB are mapped anew by glibc every time,
// and touching them 4 KB at a time then costs more than copying into them.
void prefer_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t row_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLeast = uintptr_t{32} << 20, kPage = 4096;
  const uintptr_t bytes = static_cast<uintptr_t>(t.size(0) * row_bytes);
  if (bytes <= kLeast) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data<char>(t));
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  end = (begin + bytes) / kPage * kPage;
  // Advice: a kernel without huge pages refuses, and nothing is lost.
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void append(Tensor k, Tensor v, Tensor pos, Tensor state, Tensor seqused_k, Tensor cu_seqlens_k,
            Tensor k_new, Tensor v_new, Tensor first, Tensor num_new, Tensor pos_first) {
  const AppendParams params = check_append(k, v, pos, state, seqused_k, cu_seqlens_k, k_new, v_new,
                                           first, num_new, pos_first);
  check_values(params, k.size(0), k_new.size(2));
  cpu::append(params, torch_threads());
}

void attend(Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor pos, Tensor cu_seqlens_k,
            Tensor seqused_k, Tensor first, Tensor num_new, Tensor pos_first,
            double softmax_scale) {
  const AttendParams params = check_attend(out, lse, q, k, v, pos, cu_seqlens_k, seqused_k, first,
                                           num_new, pos_first, softmax_scale);
  check_values(params, k.size(0));
  cpu::attend(params, torch_threads());
}

Tensor spectrogram(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos, Tensor state,
                   Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active,
                   double softmax_scale, double ema_coeff) {
  SpectrogramParams params = check_spectrogram(q_window, lse_window, k, pos, state, cu_seqlens_k,
                                               seqused_k, pos_q, active, softmax_scale, ema_coeff);
  check_values("spectrogram", params.window.seg, k.size(0));
  Tensor state_out = torch::stable::new_empty(state, state.sizes());
  params.state_out = data<float>(state_out);
  cpu::spectrogram(params, torch_threads());
  return state_out;
}

Tensor attention_received(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos,
                          Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active,
                          double softmax_scale, int64_t first_row) {
  ReceivedParams params =
      check_attention_received(q_window, lse_window, k, pos, cu_seqlens_k, seqused_k, pos_q, active,
                               softmax_scale, first_row);
  check_values("attention_received", params.window.seg, k.size(0));
  Tensor received = torch::stable::new_empty(lse_window, {k.size(0)});
  params.received = data<float>(received);
  cpu::attention_received(params, torch_threads());
  return received;
}

Tensor bam_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, Tensor params,
                  Tensor param_index, Tensor mean, Tensor var, Tensor active, bool log_transform,
                  double log_eps) {
  ScoreParams p = check_bam_scores(state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
                                   var, active, log_transform, log_eps);
  check_values("bam_scores", p, state.size(0));
  Tensor scores = torch::stable::new_empty(state, {state.size(0)});
  p.scores = data<float>(scores);
  cpu::bam_scores(p, torch_threads());
  return scores;
}

Tensor mlp_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, Tensor params,
                  Tensor param_index, Tensor mean, Tensor var, Tensor active, bool log_transform,
                  double log_eps, int64_t hidden, int64_t depth, bool bias, bool residual_first) {
  ScoreParams p =
      check_mlp_scores(state, pos, cu_seqlens_k, seqused_k, params, param_index, mean, var, active,
                       log_transform, log_eps, hidden, depth, bias, residual_first);
  check_values("mlp_scores", p, state.size(0));
  Tensor scores = torch::stable::new_empty(state, {state.size(0)});
  p.scores = data<float>(scores);
  cpu::mlp_scores(p, torch_threads());
  return scores;
}

void gate(Tensor state, Tensor k, Tensor v, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k,
          Tensor active, Tensor weight, Tensor bias, int64_t num_new, int64_t rotary_dim,
          bool interleaved, double eps) {
  const GateParams params = check_gate(state, k, v, pos, cu_seqlens_k, seqused_k, active, weight,
                                       bias, num_new, rotary_dim, interleaved, eps);
  check_values(params, k.size(0));
  cpu::gate(params, torch_threads());
}

std::tuple<Tensor, Tensor> select(Tensor scores, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k,
                                  Tensor active, double threshold, int64_t cache_size,
                                  std::string budget, bool fill, bool protect_newest,
                                  int64_t sink_tokens, int64_t recent_tokens) {
  SelectParams params =
      check_select(scores, pos, cu_seqlens_k, seqused_k, active, threshold, cache_size, budget,
                   fill, protect_newest, sink_tokens, recent_tokens);
  check_values("select", params.seg, scores.size(0));
  Tensor keep = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Byte);
  Tensor num_kept = torch::stable::new_empty(seqused_k, seqused_k.sizes());
  params.keep = data<uint8_t>(keep);
  params.num_kept = data<int32_t>(num_kept);
  cpu::select(params, torch_threads());
  return {keep, num_kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compact(Tensor k, Tensor v, Tensor pos, Tensor state,
                                                   Tensor cu_seqlens_k, Tensor seqused_k,
                                                   Tensor keep, Tensor num_kept,
                                                   Tensor cu_seqlens_new, int64_t capacity) {
  CompactParams params = check_compact(k, v, pos, state, cu_seqlens_k, seqused_k, keep, num_kept,
                                       cu_seqlens_new, capacity);
  check_values(params, k.size(0), capacity);
  Tensor k_out = torch::stable::new_empty(k, {capacity, k.size(1)});
  Tensor v_out = torch::stable::new_empty(v, {capacity, v.size(1)});
  Tensor pos_out = torch::stable::new_empty(pos, {capacity});
  Tensor state_out = torch::stable::new_empty(state, {capacity, state.size(1)});
  prefer_huge_pages(k_out, params.k_row_bytes);
  prefer_huge_pages(v_out, params.v_row_bytes);
  params.k_out = data<void>(k_out);
  params.v_out = data<void>(v_out);
  params.pos_out = data<int32_t>(pos_out);
  params.state_out = data<float>(state_out);
  cpu::compact(params, torch_threads());
  return {k_out, v_out, pos_out, state_out};
}

std::string cpu_isa() { return isa_name(current_isa()); }

std::string force_isa(std::string name) {
  std::string previous = cpu_isa();
  Isa isa{};
  STD_TORCH_CHECK(parse_isa(name.c_str(), &isa), "force_isa: isa must be one of base, avx2, ",
                  "avx512, avx512bf16, amx, got '", name, "'");
  STD_TORCH_CHECK(set_isa(isa), "force_isa: isa must be one this CPU has (at best ",
                  isa_name(best_isa()), "), got '", name, "'");
  return previous;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CPU, m) {
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

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("force_isa", TORCH_BOX(&force_isa));
}

}  // namespace namm_ext
