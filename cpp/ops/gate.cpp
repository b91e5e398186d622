#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<GateParams, Nothing> prepare_gate(const Tensor& state, const Tensor& k, const Tensor& v,
                                           const Tensor& pos, const Tensor& cu_seqlens_k,
                                           const Tensor& seqused_k, const Tensor& active,
                                           const Tensor& weight, const Tensor& bias,
                                           int64_t num_new, int64_t rotary_dim, bool interleaved,
                                           double eps) {
  const Check check("gate_", k, "k");
  GateParams p{};
  p.dtype = check.cache_dtype(k, "k");
  check.dense(k, "k", k.scalar_type(), {-1, -1});
  const int64_t capacity = k.size(0), head_dim = k.size(1);
  check.dense(v, "v", k.scalar_type(), {capacity, -1});
  const int64_t head_dim_v = v.size(1);
  check.dense(pos, "pos", ScalarType::Int, {capacity});
  check.dense(state, "state", ScalarType::Float, {capacity, -1});
  check.dense(active, "active", ScalarType::Bool, {-1});
  p.seg = check.segments(cu_seqlens_k, seqused_k, active.size(0), capacity);
  p.head_dim = check.size(head_dim, "head_dim");
  p.head_dim_v = check.size(head_dim_v, "head_dim_v");
  p.num_state = check.size(state.size(1), "number of state columns");
  p.num_inputs = p.seg.num_kv_heads * (head_dim + head_dim_v + 2);
  check.dense(weight, "weight", ScalarType::Float, {p.seg.num_kv_heads, p.num_inputs});
  check.dense(bias, "bias", ScalarType::Float, {p.seg.num_kv_heads});
  STD_TORCH_CHECK(num_new >= 0 && num_new <= INT32_MAX, "gate_: num_new must be in [0, ", INT32_MAX,
                  "], got ", num_new);
  STD_TORCH_CHECK(rotary_dim % 2 == 0 && rotary_dim >= 0 && rotary_dim <= head_dim,
                  "gate_: rotary_dim must be even and in [0, ", head_dim, "], got ", rotary_dim);
  p.eps = check.finite(eps, "eps");
  STD_TORCH_CHECK(eps >= 0.0, "gate_: eps must not be negative, got ", eps);

  p.k = input<void>(k);
  p.v = input<void>(v);
  p.pos = input<int32_t>(pos);
  p.active = input<uint8_t>(active);
  p.weight = input<float>(weight);
  p.bias = input<float>(bias);
  p.state = output<float>(state);
  p.num_new = static_cast<int32_t>(num_new);
  p.rotary_dim = static_cast<int32_t>(rotary_dim);
  p.interleaved = interleaved;
  return {check.op(), capacity, p, {}};
}

}  // namespace namm_ext
