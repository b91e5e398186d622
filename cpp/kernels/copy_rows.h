// Rows of bytes from one strided place to another.
#pragma once

#include <cstdint>
#include <cstring>

namespace namm_ext::cpu {

// Rows that lie next to each other on both sides are one memcpy.
inline void copy_rows(char* dst, const char* src, int64_t rows, int64_t row_bytes,
                      int64_t dst_stride, int64_t src_stride) {
  if (src_stride == row_bytes && dst_stride == row_bytes) {
    std::memcpy(dst, src, static_cast<size_t>(rows * row_bytes));
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(dst + i * dst_stride, src + i * src_stride, static_cast<size_t>(row_bytes));
  }
}

}  // namespace namm_ext::cpu
