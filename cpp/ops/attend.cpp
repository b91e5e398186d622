#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<AttendParams, Nothing> prepare_attend(const Tensor& out, const Tensor& lse,
                                               const Tensor& q, const Tensor& k, const Tensor& v,
                                               const Tensor& pos, const Tensor& cu_seqlens_k,
                                               const Tensor& seqused_k, const Tensor& first,
                                               const Tensor& num_new, const Tensor& pos_first,
                                               double softmax_scale, double softcap) {
  const Check check("attend_", q, "q");
  AttendParams p{};
  p.dtype = check.cache_dtype(q, "q");
  const ScalarType dtype = q.scalar_type();
  check.rows(q, "q", dtype, {-1, -1, -1, -1});
  const int64_t batch_size = q.size(0), num_heads = q.size(1), num_cols = q.size(2);
  const int64_t head_dim = q.size(3);
  check.dense(k, "k", dtype, {-1, head_dim});
  const int64_t capacity = k.size(0);
  check.dense(v, "v", dtype, {capacity, -1});
  const int64_t head_dim_v = v.size(1);
  check.dense(pos, "pos", ScalarType::Int, {capacity});
  p.seg = check.segments(cu_seqlens_k, seqused_k, batch_size, capacity);
  STD_TORCH_CHECK(num_heads >= 1 && num_heads % p.seg.num_kv_heads == 0,
                  "attend_: q must have a positive multiple of ", p.seg.num_kv_heads,
                  " (num_kv_heads) heads, got ", num_heads);
  check.dense(first, "first", ScalarType::Int, {batch_size});
  check.dense(num_new, "num_new", ScalarType::Int, {batch_size});
  check.dense(pos_first, "pos_first", ScalarType::Int, {batch_size});
  check.rows(out, "out", dtype, {batch_size, num_cols, num_heads, head_dim_v});
  check.tensor(lse, "lse", ScalarType::Float, {batch_size, num_heads, num_cols});

  p.q = input<void>(q);
  p.k = input<void>(k);
  p.v = input<void>(v);
  p.pos = input<int32_t>(pos);
  p.first = input<int32_t>(first);
  p.num_new = input<int32_t>(num_new);
  p.pos_first = input<int32_t>(pos_first);
  p.out = output<void>(out);
  p.lse = output<float>(lse);
  copy_strides(q, 3, p.q_strides);
  copy_strides(out, 3, p.out_strides);
  copy_strides(lse, 3, p.lse_strides);
  p.num_groups = static_cast<int32_t>(num_heads / p.seg.num_kv_heads);
  p.head_dim = check.size(head_dim, "head_dim");
  p.head_dim_v = check.size(head_dim_v, "head_dim_v");
  p.num_cols = static_cast<int32_t>(num_cols);
  p.softmax_scale = check.finite(softmax_scale, "softmax_scale");
  p.softcap = check.softcap(softcap);
  return {check.op(), capacity, p, {}};
}

}  // namespace namm_ext
