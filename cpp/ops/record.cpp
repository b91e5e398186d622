#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<RecordParams, Nothing> prepare_record(const Tensor& q_window, const Tensor& lse_window,
                                               const Tensor& q, const Tensor& lse,
                                               const Tensor& first, const Tensor& num_new,
                                               const Tensor& pos_first) {
  const Check check("record_", q_window, "q_window");
  RecordParams p{};
  p.dtype = check.cache_dtype(q_window, "q_window");
  const ScalarType dtype = q_window.scalar_type();
  check.rows(q_window, "q_window", dtype, {-1, -1, -1, -1});
  const int64_t batch_size = q_window.size(0), num_heads = q_window.size(1);
  const int64_t num_rows = q_window.size(2), head_dim = q_window.size(3);
  STD_TORCH_CHECK(num_rows > kCarry, "record_: q_window must have more than ", kCarry,
                  " rows, got ", num_rows);
  check.tensor(lse_window, "lse_window", ScalarType::Float, {batch_size, num_heads, num_rows});
  check.rows(q, "q", dtype, {batch_size, num_heads, -1, head_dim});
  check.tensor(lse, "lse", ScalarType::Float, {batch_size, num_heads, q.size(2)});
  check.dense(first, "first", ScalarType::Int, {batch_size});
  check.dense(num_new, "num_new", ScalarType::Int, {batch_size});
  check.dense(pos_first, "pos_first", ScalarType::Int, {batch_size});

  p.q = input<void>(q);
  p.lse = input<float>(lse);
  p.first = input<int32_t>(first);
  p.num_new = input<int32_t>(num_new);
  p.pos_first = input<int32_t>(pos_first);
  p.q_window = output<void>(q_window);
  p.lse_window = output<float>(lse_window);
  copy_strides(q, 3, p.q_strides);
  copy_strides(lse, 3, p.lse_strides);
  copy_strides(q_window, 3, p.q_window_strides);
  copy_strides(lse_window, 3, p.lse_window_strides);
  p.batch_size = check.size(batch_size, "batch_size");
  p.num_heads = check.size(num_heads, "num_heads");
  p.head_dim = check.size(head_dim, "head_dim");
  p.num_cols = static_cast<int32_t>(q.size(2));
  p.num_rows = check.size(num_rows, "num_rows");
  return {check.op(), 0, p, {}};
}

}  // namespace namm_ext
