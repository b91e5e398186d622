// New tokens to the end of their segments.
//
// Mapping   one task per segment; rows that lie next to each other on both sides are one memcpy.
// Cost      2 * B * H * num_new * (D + Dv) elements moved.
// Limits    the caller has checked that every slot has room: nothing is written before that.
#include <cstring>

#include "copy_rows.h"
#include "kernels.h"

namespace namm_ext::cpu {
void append(const AppendParams& p, Parallel parallel) {
  const int64_t size = element_size(p.dtype);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  // One thread per 64 KiB or so: below that, waking one costs more than the copy.
  int64_t max_new = 1;
  for (int32_t b = 0; b < p.seg.batch_size; ++b) {
    if (p.num_new[b] > max_new) max_new = p.num_new[b];
  }
  const int64_t segment_bytes = max_new * (p.head_dim + p.head_dim_v) * size;
  const int64_t grain = 1 + (int64_t{1} << 16) / segment_bytes;

  parallel(num_segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t b = s / p.seg.num_kv_heads, h = s % p.seg.num_kv_heads;
      const int64_t n = p.num_new[b], column = p.first[b];
      if (n == 0) continue;
      const int64_t row = int64_t{p.seg.cu_seqlens_k[s]} + p.seqused_k[s];
      const auto copy = [&](void* dst, const void* src, const int64_t* strides, int64_t dim) {
        if (dim == 0) return;  // no values, and no address
        const int64_t offset = b * strides[0] + h * strides[1] + column * strides[2];
        copy_rows(static_cast<char*>(dst) + row * dim * size,
                  static_cast<const char*>(src) + offset * size, n, dim * size, dim * size,
                  strides[2] * size);
      };
      copy(p.k, p.k_new, p.k_new_strides, p.head_dim);
      copy(p.v, p.v_new, p.v_new_strides, p.head_dim_v);
      for (int64_t i = 0; i < n; ++i) p.pos[row + i] = p.pos_first[b] + static_cast<int32_t>(i);
      if (p.num_state > 0) {
        std::memset(p.state + row * p.num_state, 0,
                    sizeof(float) * static_cast<size_t>(n * p.num_state));
      }
      p.seqused_k[s] += static_cast<int32_t>(n);
    }
  });
}

}  // namespace namm_ext::cpu
