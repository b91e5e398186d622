// New queries and their log-sum-exps into the window of their layer.
//
// Mapping   one task per (batch row, query head).
// Cost      2 * B * H * G * num_new * (D elements + 4 bytes) moved.
// Limits    the caller has checked that no row passes the end of its period.
#include "copy_rows.h"
#include "kernels.h"

namespace namm_ext::cpu {

void record(const RecordParams& p, Parallel parallel) {
  const int64_t size = element_size(p.dtype), row_bytes = p.head_dim * size;
  const int64_t n_up = p.num_rows - kCarry;
  // As in append: one thread per 64 KiB or so.
  const int64_t grain = 1 + (int64_t{1} << 16) / (row_bytes * (p.num_cols > 0 ? p.num_cols : 1));

  parallel(int64_t{p.batch_size} * p.num_heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.num_heads, h = i % p.num_heads;
      const int64_t n = p.num_new[b], column = p.first[b];
      if (n == 0) continue;
      const int64_t row = kCarry + p.pos_first[b] % n_up;
      const auto at = [&](const int64_t* strides, int64_t index) {
        return b * strides[0] + h * strides[1] + index * strides[2];
      };
      copy_rows(static_cast<char*>(p.q_window) + at(p.q_window_strides, row) * size,
                static_cast<const char*>(p.q) + at(p.q_strides, column) * size, n, row_bytes,
                p.q_window_strides[2] * size, p.q_strides[2] * size);
      for (int64_t j = 0; j < n; ++j) {
        p.lse_window[at(p.lse_window_strides, row + j)] = p.lse[at(p.lse_strides, column + j)];
      }
    }
  });
}

}  // namespace namm_ext::cpu
