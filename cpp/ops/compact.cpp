#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<CompactParams, std::tuple<Tensor, Tensor, Tensor, Tensor>> prepare_compact(
    const Tensor& k, const Tensor& v, const Tensor& pos, const Tensor& state,
    const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& keep, const Tensor& num_kept,
    const Tensor& cu_seqlens_new, int64_t capacity) {
  const Check check("compact", k, "k");
  CompactParams p{};
  const int64_t size = element_size(check.cache_dtype(k, "k"));
  check.dense(k, "k", k.scalar_type(), {-1, -1});
  const int64_t rows = k.size(0);
  check.dense(v, "v", k.scalar_type(), {rows, -1});
  check.dense(pos, "pos", ScalarType::Int, {rows});
  check.dense(state, "state", ScalarType::Float, {rows, -1});
  // The op treats segments one by one: how many of them make a batch row does not matter.
  p.seg = check.segments(cu_seqlens_k, seqused_k, 1, rows);
  check.dense(keep, "keep", ScalarType::Byte, {rows});
  check.dense(num_kept, "num_kept", ScalarType::Int, {seqused_k.size(0)});
  check.dense(cu_seqlens_new, "cu_seqlens_new", ScalarType::Int, {seqused_k.size(0) + 1});
  STD_TORCH_CHECK(capacity >= 0 && capacity <= INT32_MAX, "compact: capacity must be in [0, ",
                  INT32_MAX, "], got ", capacity);

  p.cu_seqlens_new = input<int32_t>(cu_seqlens_new);
  p.keep = input<uint8_t>(keep);
  p.num_kept = input<int32_t>(num_kept);
  p.k = input<void>(k);
  p.v = input<void>(v);
  p.pos = input<int32_t>(pos);
  p.state = input<float>(state);
  p.k_row_bytes = k.size(1) * size;
  p.v_row_bytes = v.size(1) * size;
  p.num_state = static_cast<int32_t>(state.size(1));
  p.capacity_new = static_cast<int32_t>(capacity);

  const Tensor k_out = torch::stable::new_empty(k, {capacity, k.size(1)});
  const Tensor v_out = torch::stable::new_empty(v, {capacity, v.size(1)});
  const Tensor pos_out = torch::stable::new_empty(pos, {capacity});
  const Tensor state_out = torch::stable::new_empty(state, {capacity, state.size(1)});
  p.k_out = output<void>(k_out);
  p.v_out = output<void>(v_out);
  p.pos_out = output<int32_t>(pos_out);
  p.state_out = output<float>(state_out);
  return {check.op(), rows, p, {k_out, v_out, pos_out, state_out}};
}

}  // namespace namm_ext
