#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<AppendParams, Nothing> prepare_append(const Tensor& k, const Tensor& v, const Tensor& pos,
                                               const Tensor& state, const Tensor& seqused_k,
                                               const Tensor& cu_seqlens_k, const Tensor& k_new,
                                               const Tensor& v_new, const Tensor& first,
                                               const Tensor& num_new, const Tensor& pos_first) {
  const Check check("append_", k, "k");
  AppendParams p{};
  p.dtype = check.cache_dtype(k, "k");
  const ScalarType dtype = k.scalar_type();
  check.dense(k, "k", dtype, {-1, -1});
  const int64_t capacity = k.size(0), head_dim = k.size(1);
  check.dense(v, "v", dtype, {capacity, -1});
  const int64_t head_dim_v = v.size(1);
  check.dense(pos, "pos", ScalarType::Int, {capacity});
  check.dense(state, "state", ScalarType::Float, {capacity, -1});
  check.rows(k_new, "k_new", dtype, {-1, -1, -1, head_dim});
  const int64_t batch_size = k_new.size(0), num_kv_heads = k_new.size(1);
  check.rows(v_new, "v_new", dtype, {batch_size, num_kv_heads, k_new.size(2), head_dim_v});
  p.seg = check.segments(cu_seqlens_k, seqused_k, batch_size, capacity);
  check.shape(seqused_k, "seqused_k", {batch_size * num_kv_heads});
  check.dense(first, "first", ScalarType::Int, {batch_size});
  check.dense(num_new, "num_new", ScalarType::Int, {batch_size});
  check.dense(pos_first, "pos_first", ScalarType::Int, {batch_size});

  p.k = output<void>(k);
  p.v = output<void>(v);
  p.pos = output<int32_t>(pos);
  p.state = output<float>(state);
  p.seqused_k = output<int32_t>(seqused_k);
  p.k_new = input<void>(k_new);
  p.v_new = input<void>(v_new);
  p.first = input<int32_t>(first);
  p.num_new = input<int32_t>(num_new);
  p.pos_first = input<int32_t>(pos_first);
  copy_strides(k_new, 3, p.k_new_strides);
  copy_strides(v_new, 3, p.v_new_strides);
  p.head_dim = check.size(head_dim, "head_dim");
  p.head_dim_v = check.size(head_dim_v, "head_dim_v", 0);
  p.num_state = static_cast<int32_t>(state.size(1));
  p.num_cols = static_cast<int32_t>(k_new.size(2));
  return {check.op(), capacity, p, {}};
}

}  // namespace namm_ext
