// A row of bytes, moved by one warp.
#pragma once

#include "platform.cuh"

namespace namm_ext::gpu {

// Copies row_bytes bytes as Units; the lanes of one warp share a row.
template <class Unit>
NAMM_DEVICE void copy_row(void* target, const void* source, int64_t row_bytes, int lane) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t u = lane; u < units; u += kWarpSize) {
    static_cast<Unit*>(target)[u] = static_cast<const Unit*>(source)[u];
  }
}

}  // namespace namm_ext::gpu
