// append_: new rows of k and v go behind the live rows of their segments.
//
// Mapping   block = (segment, 64 new rows), one warp per row; lanes move 16-byte vectors, or single
//           elements where a row or a stride is no multiple of 16 bytes.
// Cost      2 * num_new * (D + Dv) * element size bytes per segment.
// Numerics  bytes are copied.
// Limits    numbers in index tensors are the caller's promise; still no write leaves its slot.
//           seqused_k is read by every block of a segment, so it grows in a launch of its own
//           unless a segment has one block.
#include "copy_row.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowsPerBlock = 64;
static_assert(kRowsPerBlock % kWarps == 0, "every warp moves the same number of rows");

NAMM_DEVICE int32_t rows_to_append(const AppendParams& p, int segment) {
  const int b = segment / p.seg.num_kv_heads;
  const int32_t room =
      p.seg.cu_seqlens_k[segment + 1] - p.seg.cu_seqlens_k[segment] - p.seqused_k[segment];
  return max(0, min(p.num_new[b], min(room, p.num_cols - p.first[b])));
}

template <class Unit>
__global__ __launch_bounds__(kThreads) void append_kernel(const __grid_constant__ AppendParams p,
                                                          int size, bool grow) {
  const int segment = blockIdx.x;
  const int b = segment / p.seg.num_kv_heads, h = segment % p.seg.num_kv_heads;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t n = rows_to_append(p, segment);
  const int32_t live = p.seqused_k[segment];
  const int64_t behind = int64_t{p.seg.cu_seqlens_k[segment]} + live;
  const int64_t k_bytes = int64_t{p.head_dim} * size;
  const int64_t v_bytes = int64_t{p.head_dim_v} * size;

  const int32_t row_first = blockIdx.y * kRowsPerBlock;
  for (int32_t i = row_first + warp; i < min(n, row_first + kRowsPerBlock); i += kWarps) {
    const int64_t column = p.first[b] + i, row = behind + i;
    const int64_t k_from =
        b * p.k_new_strides[0] + h * p.k_new_strides[1] + column * p.k_new_strides[2];
    const int64_t v_from =
        b * p.v_new_strides[0] + h * p.v_new_strides[1] + column * p.v_new_strides[2];
    copy_row<Unit>(static_cast<char*>(p.k) + row * k_bytes,
                   static_cast<const char*>(p.k_new) + k_from * size, k_bytes, lane);
    copy_row<Unit>(static_cast<char*>(p.v) + row * v_bytes,
                   static_cast<const char*>(p.v_new) + v_from * size, v_bytes, lane);
    for (int f = lane; f < p.num_state; f += kWarpSize) p.state[row * p.num_state + f] = 0.0f;
    if (lane == 0) p.pos[row] = p.pos_first[b] + i;
  }
  if (grow) {
    __syncthreads();  // everybody has read seqused_k
    if (threadIdx.x == 0) p.seqused_k[segment] = live + n;
  }
}

__global__ __launch_bounds__(kThreads) void grow_kernel(const __grid_constant__ AppendParams p) {
  const int segment = blockIdx.x * kThreads + threadIdx.x;
  if (segment >= p.seg.batch_size * p.seg.num_kv_heads) return;
  p.seqused_k[segment] += rows_to_append(p, segment);
}

bool aligned16(const AppendParams& p, int size) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v) |
                   reinterpret_cast<uintptr_t>(p.k_new) | reinterpret_cast<uintptr_t>(p.v_new) |
                   static_cast<uintptr_t>(p.head_dim) * size |
                   static_cast<uintptr_t>(p.head_dim_v) * size;
  for (int i = 0; i < 3; ++i) {
    bits |= static_cast<uintptr_t>(p.k_new_strides[i] * size) |
            static_cast<uintptr_t>(p.v_new_strides[i] * size);
  }
  return bits % 16 == 0;
}

}  // namespace

Status launch_append(const AppendParams& p, const Launch& config) {
  const int size = static_cast<int>(element_size(p.dtype));
  const auto segments = static_cast<unsigned>(p.seg.batch_size * p.seg.num_kv_heads);
  const dim3 grid(segments, static_cast<unsigned>(ceil_div(p.num_cols, kRowsPerBlock)));
  const bool grow = grid.y == 1;
  auto* kernel = aligned16(p, size) ? append_kernel<uint4>
                 : size == 4        ? append_kernel<uint32_t>
                                    : append_kernel<uint16_t>;
  const Status status = launch(kernel, grid, dim3(kThreads), 0, config.stream, p, size, grow);
  if (status != 0 || grow || p.num_cols == 0) return status;
  return launch(grow_kernel, dim3(static_cast<unsigned>(ceil_div(segments, kThreads))),
                dim3(kThreads), 0, config.stream, p);
}

}  // namespace namm_ext::gpu
