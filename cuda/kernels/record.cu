// record_: new queries and their log-sum-exps go into the window of their layer.
//
// Mapping   block = (batch row, query head, 64 new rows), one warp per row; lanes move 16-byte
//           vectors, or single elements where a row or a stride is no multiple of 16 bytes.
// Cost      2 * num_new * (D * element size + 4) bytes per head.
// Numerics  bytes are copied.
// Limits    numbers in index tensors are the caller's promise; still no write leaves the window.
//           The row is computed from the position here, so a captured launch is right at any time.
#include "copy_row.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kRowsPerBlock = 64;

template <class Unit>
__global__ __launch_bounds__(kThreads) void record_kernel(const __grid_constant__ RecordParams p,
                                                          int size) {
  const int b = blockIdx.x / p.num_heads, h = blockIdx.x % p.num_heads;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t n_up = p.num_rows - kCarry, begin = p.pos_first[b] % n_up;
  const int32_t n = min(p.num_new[b], min(n_up - begin, p.num_cols - p.first[b]));
  const int64_t row_bytes = int64_t{p.head_dim} * size;

  const int32_t row_first = blockIdx.y * kRowsPerBlock;
  for (int32_t i = row_first + warp; i < min(n, row_first + kRowsPerBlock); i += kWarps) {
    const int64_t column = p.first[b] + i, row = kCarry + begin + i;
    const int64_t from = b * p.q_strides[0] + h * p.q_strides[1] + column * p.q_strides[2];
    const int64_t to =
        b * p.q_window_strides[0] + h * p.q_window_strides[1] + row * p.q_window_strides[2];
    copy_row<Unit>(static_cast<char*>(p.q_window) + to * size,
                   static_cast<const char*>(p.q) + from * size, row_bytes, lane);
    if (lane == 0) {
      p.lse_window[b * p.lse_window_strides[0] + h * p.lse_window_strides[1] +
                   row * p.lse_window_strides[2]] =
          p.lse[b * p.lse_strides[0] + h * p.lse_strides[1] + column * p.lse_strides[2]];
    }
  }
}

bool aligned16(const RecordParams& p, int size) {
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.q_window) |
                   static_cast<uintptr_t>(p.head_dim) * size;
  for (int i = 0; i < 3; ++i) {
    bits |= static_cast<uintptr_t>(p.q_strides[i] * size) |
            static_cast<uintptr_t>(p.q_window_strides[i] * size);
  }
  return bits % 16 == 0;
}

}  // namespace

Status launch_record(const RecordParams& p, const Launch& config) {
  const int size = static_cast<int>(element_size(p.dtype));
  const dim3 grid(static_cast<unsigned>(p.batch_size * p.num_heads),
                  static_cast<unsigned>(ceil_div(p.num_cols, kRowsPerBlock)));
  auto* kernel = aligned16(p, size) ? record_kernel<uint4>
                 : size == 4        ? record_kernel<uint32_t>
                                    : record_kernel<uint16_t>;
  return launch(kernel, grid, dim3(kThreads), 0, config.stream, p, size);
}

}  // namespace namm_ext::gpu
