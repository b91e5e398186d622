// Every schema of the library, and nothing else. params.h says what each op computes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(namm_ext, m) {
  // New tokens go behind the live rows of their segments.
  m.def(
      "append_(Tensor(a!) k, Tensor(b!) v, Tensor(c!) pos, Tensor(d!) state, "
      "Tensor(e!) seqused_k, Tensor cu_seqlens_k, Tensor k_new, Tensor v_new, Tensor first, "
      "Tensor num_new, Tensor pos_first) -> ()");
  // Attention of new queries over the ragged segments, with its log-sum-exp.
  m.def(
      "attend_(Tensor(a!) out, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, Tensor pos, "
      "Tensor cu_seqlens_k, Tensor seqused_k, Tensor first, Tensor num_new, Tensor pos_first, "
      "float softmax_scale, float softcap=0.0) -> ()");
  // New queries and their log-sum-exps go into the window of their layer.
  m.def(
      "record_(Tensor(a!) q_window, Tensor(b!) lse_window, Tensor q, Tensor lse, Tensor first, "
      "Tensor num_new, Tensor pos_first) -> ()");
  // Spectrum of the attention each key received, folded into its running average.
  m.def(
      "spectrogram(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos, Tensor state, "
      "Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active, float softmax_scale, "
      "float ema_coeff, float softcap=0.0) -> Tensor");
  // Sum of the attention each key received.
  m.def(
      "attention_received(Tensor q_window, Tensor lse_window, Tensor k, Tensor pos, "
      "Tensor cu_seqlens_k, Tensor seqused_k, Tensor pos_q, Tensor active, float softmax_scale, "
      "int first_row, float softcap=0.0) -> Tensor");
  // One score per live token, by backward attention memory.
  m.def(
      "bam_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, "
      "Tensor params, Tensor param_index, Tensor mean, Tensor var, Tensor active, "
      "bool log_transform, float log_eps) -> Tensor");
  // The same, by a multilayer perceptron.
  m.def(
      "mlp_scores(Tensor state, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, "
      "Tensor params, Tensor param_index, Tensor mean, Tensor var, Tensor active, "
      "bool log_transform, float log_eps, int hidden, int depth, bool bias, "
      "bool residual_first) -> Tensor");
  // Linear gate of the newest tokens, into the last column of the state.
  m.def(
      "gate_(Tensor(a!) state, Tensor k, Tensor v, Tensor pos, Tensor cu_seqlens_k, "
      "Tensor seqused_k, Tensor active, Tensor weight, Tensor bias, int num_new, int rotary_dim, "
      "bool interleaved, float eps) -> ()");
  // Which live rows stay.
  m.def(
      "select(Tensor scores, Tensor pos, Tensor cu_seqlens_k, Tensor seqused_k, Tensor active, "
      "float threshold, int cache_size, str budget, bool fill, bool protect_newest, "
      "int sink_tokens, int recent_tokens) -> (Tensor keep, Tensor num_kept)");
  // The rows that stay, in a new store.
  m.def(
      "compact(Tensor k, Tensor v, Tensor pos, Tensor state, Tensor cu_seqlens_k, "
      "Tensor seqused_k, Tensor keep, Tensor num_kept, Tensor cu_seqlens_new, int capacity) "
      "-> (Tensor k, Tensor v, Tensor pos, Tensor state)");

  // Instruction set of the CPU kernels; force_isa returns the one it replaces.
  m.def("cpu_isa() -> str");
  m.def("force_isa(str isa) -> str");
}
