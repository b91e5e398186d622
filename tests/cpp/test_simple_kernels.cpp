// append, record, mlp_scores, gate, select and compact on tensors without one spare byte: under
// AddressSanitizer, a row read or written too far is an error. Values are tested from Python.
#include <cstdio>
#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace namm_ext {
namespace {

int failures = 0;

void expect(bool condition, const char* what, int length) {
  if (condition) return;
  std::printf("FAILED %s at length %d\n", what, length);
  ++failures;
}

void run(int32_t length) {
  constexpr int kDim = 3;
  const std::vector<int32_t> cu = {0, length};
  std::vector<int32_t> used = {0};
  const std::vector<int32_t> zero = {0}, all = {length};
  const std::vector<uint8_t> active = {1};
  std::vector<float> k(length * kDim), v(length * kDim), state(length * kNumBins);
  std::vector<int32_t> pos(length);
  const std::vector<float> rows(length * kDim, 2.0f);

  AppendParams a{};
  a.seg = {cu.data(), used.data(), 1, 1};
  a.k = k.data();
  a.v = v.data();
  a.pos = pos.data();
  a.state = state.data();
  a.seqused_k = used.data();
  a.k_new = a.v_new = rows.data();
  a.first = a.pos_first = zero.data();
  a.num_new = all.data();
  a.k_new_strides[2] = a.v_new_strides[2] = kDim;
  a.head_dim = a.head_dim_v = kDim;
  a.num_state = kNumBins;
  cpu::append(a, kSerial);
  expect(used[0] == length && k == rows && v == rows, "append", length);

  std::vector<float> q_window((kCarry + length) * kDim), lse_window(kCarry + length);
  RecordParams r{};
  r.q = r.lse = rows.data();
  r.first = r.pos_first = zero.data();
  r.num_new = all.data();
  r.q_window = q_window.data();
  r.lse_window = lse_window.data();
  r.q_strides[2] = r.q_window_strides[2] = kDim;
  r.lse_strides[2] = r.lse_window_strides[2] = 1;
  r.batch_size = r.num_heads = 1;
  r.head_dim = kDim;
  r.num_cols = length;
  r.num_rows = kCarry + length;
  if (length > 0) cpu::record(r, kSerial);
  expect(length == 0 || (q_window.back() == 2.0f && lse_window.back() == 2.0f), "record", length);

  const Segments seg = a.seg;
  std::vector<float> scores(length);
  const std::vector<float> params(kNumFeatures, 0.5f), mean(kNumBins), var(kNumBins, 1.0f);
  ScoreParams s{};
  s.seg = seg;
  s.state = state.data();
  s.pos = pos.data();
  s.params = params.data();
  s.param_index = zero.data();
  s.mean = mean.data();
  s.var = var.data();
  s.active = active.data();
  s.scores = scores.data();
  s.num_params = kNumFeatures;
  s.num_candidates = 1;
  s.hidden = kNumFeatures;
  s.depth = 1;
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!set_isa(static_cast<Isa>(isa))) continue;
    cpu::mlp_scores(s, kSerial);
    // Age 0: four sines of 0 and four cosines of 1, each times 0.5.
    expect(length == 0 || scores[length - 1] == 2.0f, "mlp_scores", length);
  }

  const std::vector<float> weight(2 * kDim + 2), bias = {4.0f};
  GateParams g{};
  g.seg = seg;
  g.k = k.data();
  g.v = v.data();
  g.active = active.data();
  g.weight = weight.data();
  g.bias = bias.data();
  g.state = state.data();
  g.num_inputs = static_cast<int64_t>(weight.size());
  g.num_new = length;
  g.head_dim = g.head_dim_v = kDim;
  g.num_state = kNumBins;
  g.rotary_dim = 2;
  g.eps = 1e-6f;
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!set_isa(static_cast<Isa>(isa))) continue;
    for (const bool interleaved : {false, true}) {
      g.interleaved = interleaved;
      cpu::gate(g, kSerial);
      expect(length == 0 || state[length * kNumBins - 1] == 4.0f, "gate", length);
    }
  }

  std::vector<uint8_t> keep(length);
  std::vector<int32_t> num_kept(1);
  SelectParams e{};
  e.seg = seg;
  e.scores = scores.data();
  e.pos = pos.data();
  e.active = active.data();
  e.keep = keep.data();
  e.num_kept = num_kept.data();
  e.threshold = -1e30f;
  e.cache_size = 1 + length / 2;
  e.protect_newest = true;
  cpu::select(e, kSerial);
  const int32_t expected = length < e.cache_size ? length : e.cache_size;
  expect(num_kept[0] == expected, "select", length);

  const std::vector<int32_t> cu_new = {0, num_kept[0]};
  std::vector<float> k_out(expected * kDim), v_out(k_out), state_out(expected * kNumBins);
  std::vector<int32_t> pos_out(expected);
  CompactParams c{};
  c.seg = seg;
  c.cu_seqlens_new = cu_new.data();
  c.keep = keep.data();
  c.num_kept = num_kept.data();
  c.k = k.data();
  c.v = v.data();
  c.pos = pos.data();
  c.state = state.data();
  c.k_out = k_out.data();
  c.v_out = v_out.data();
  c.pos_out = pos_out.data();
  c.state_out = state_out.data();
  c.k_row_bytes = c.v_row_bytes = kDim * sizeof(float);
  c.num_state = kNumBins;
  c.capacity_new = expected;
  cpu::compact(c, kSerial);
  expect(length == 0 || pos_out[expected - 1] == length - 1, "compact", length);
}

}  // namespace
}  // namespace namm_ext

int main() {
  for (int32_t length = 0; length < 70; ++length) namm_ext::run(length);
  namm_ext::run(2500);
  if (namm_ext::failures == 0) std::printf("append, mlp_scores, gate, select, compact: ok\n");
  return namm_ext::failures != 0;
}
