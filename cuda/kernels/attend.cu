// attend_: which kernel runs, and the kernel that joins the parts of a split attention.
//
// Few query rows per segment (decoding): the keys are split over blocks. Many (prefill): the rows
// are. The choice depends on L * G alone, the parts on a segment's own length alone.
#include "attend.cuh"
#include "attend_mma.cuh"
#include "attend_simt.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kMaxSplitRows = 64;  // query rows of a segment up to which its keys are split

// Joins the parts of one query row.
//
// Mapping   block = one packed query row of one segment. Warp w adds up parts w, w + 8, ..., lanes
//           side by side over Dv; then the warps' sums are added in the order of the warps.
// Cost      4 * Dv bytes per part and row.
constexpr int kCombineThreads = 256;
constexpr int kCombineWarps = kCombineThreads / kWarpSize;
constexpr int kCombineColumns = 128;  // of Dv at a time
template <class T>
__global__ __launch_bounds__(kCombineThreads) void combine_kernel(
    const __grid_constant__ AttendParams p, const Partials partials) {
  NAMM_SHARED(float, warp_max, kCombineWarps);
  NAMM_SHARED(float, warp_sum, kCombineWarps);
  NAMM_SHARED(float, warp_out, kCombineWarps* kCombineColumns);
  const int segment = blockIdx.x;
  const int32_t row = blockIdx.y;
  const QueryRows rows = query_rows(p, segment);
  const int32_t live = p.seg.seqused_k[segment], size = chunk_rows(live);
  if (row >= rows.count || live <= size) return;  // a single part has written the result itself
  const int32_t num_parts = (live + size - 1) / size;
  // The inverse of find_tile.
  const Places& places = partials.places;
  const int64_t tile = (p.seg.cu_seqlens_k[segment] >> places.shift) + segment * places.extra;
  const float2* max_sum = partials.max_sum + tile * partials.rows_per_part + row;
  const float* out = partials.out + (tile * partials.rows_per_part + row) * p.head_dim_v;
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;

  float max = -INFINITY, sum = 0.0f;
  for (int i = thread; i < num_parts; i += kCombineThreads) {
    max = fmaxf(max, max_sum[int64_t{i} * partials.rows_per_part].x);
  }
  for (int bits = 16; bits > 0; bits /= 2) max = fmaxf(max, __shfl_xor_sync(kFullMask, max, bits));
  if (lane == 0) warp_max[warp] = max;
  __syncthreads();
  for (int w = 0; w < kCombineWarps; ++w) max = fmaxf(max, warp_max[w]);
  const float base = safe_max(max);
  for (int i = thread; i < num_parts; i += kCombineThreads) {
    const float2 part = max_sum[int64_t{i} * partials.rows_per_part];
    sum += ex2(part.x - base) * part.y;
  }
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullMask, sum, bits);
  if (lane == 0) warp_sum[warp] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int w = 0; w < kCombineWarps; ++w) sum += warp_sum[w];
  if (thread == 0) *lse_of_row(p, rows, row) = natural_lse(max, sum);

  for (int first = 0; first < p.head_dim_v; first += kCombineColumns) {
    float total[kCombineColumns / kWarpSize] = {};
    for (int i = warp; i < num_parts; i += kCombineWarps) {
      const int64_t offset = int64_t{i} * partials.rows_per_part;
      const float weight = ex2(max_sum[offset].x - base);
#pragma unroll
      for (int j = 0; j < kCombineColumns / kWarpSize; ++j) {
        const int d = first + j * kWarpSize + lane;
        if (d < p.head_dim_v) total[j] += weight * out[offset * p.head_dim_v + d];
      }
    }
    if (first > 0) __syncthreads();  // the columns before have been read
#pragma unroll
    for (int j = 0; j < kCombineColumns / kWarpSize; ++j) {
      warp_out[warp * kCombineColumns + j * kWarpSize + lane] = total[j];
    }
    __syncthreads();
    const int d = first + thread;
    if (thread < kCombineColumns && d < p.head_dim_v) {
      float value = 0.0f;
      for (int w = 0; w < kCombineWarps; ++w) value += warp_out[w * kCombineColumns + thread];
      out_row<T>(p, rows, row)[d] = from_float<T>(value * normaliser(sum));
    }
  }
}

int64_t packed_rows(const AttendParams& p) { return int64_t{p.num_cols} * p.num_groups; }
bool splits_keys(const AttendParams& p) { return packed_rows(p) <= kMaxSplitRows; }

int64_t num_parts(const AttendParams& p, int64_t capacity, const Places& places) {
  return num_tiles(p.seg, capacity, 1 << places.shift, places.extra);
}

// The way that takes the fewest places. Nothing that is computed depends on it.
Places choose_places(const AttendParams& p, int64_t capacity) {
  Places best = kPlaces[0];
  for (const Places& other : kPlaces) {
    if (num_parts(p, capacity, other) < num_parts(p, capacity, best)) best = other;
  }
  return best;
}

bool fits_tensor_cores(const AttendParams& p) {
  if (p.dtype == DType::kFloat32 || p.head_dim > 256 || p.head_dim_v > 256) return false;
  uintptr_t bits = reinterpret_cast<uintptr_t>(p.q) | reinterpret_cast<uintptr_t>(p.k) |
                   reinterpret_cast<uintptr_t>(p.v) | static_cast<uintptr_t>(p.head_dim) * 2 |
                   static_cast<uintptr_t>(p.head_dim_v) * 2;
  for (const int64_t stride : p.q_strides) bits |= static_cast<uintptr_t>(stride) * 2;
  uintptr_t out_bits = reinterpret_cast<uintptr_t>(p.out);
  for (const int64_t stride : p.out_strides) out_bits |= static_cast<uintptr_t>(stride) * 2;
  return bits % 16 == 0 && out_bits % 4 == 0;
}

template <class T, int kHeadDim, bool kCapped = false>
Status launch_mma(const AttendParams& p, const Partials& partials, const Launch& config) {
  if (splits_keys(p)) {
    using Shape = DecodeShape<kHeadDim>;
    const dim3 grid(static_cast<unsigned>(num_parts(p, config.capacity, partials.places)),
                    static_cast<unsigned>(ceil_div(packed_rows(p), Shape::kRows)));
    return launch(attend_decode_kernel<T, kHeadDim, kCapped>, grid, dim3(Shape::kThreads),
                  Shape::kSharedBytes, config.stream, p, partials);
  }
  using Shape = PrefillShape<kHeadDim>;
  const auto row_tiles = static_cast<int>(ceil_div(packed_rows(p), Shape::kRows));
  const auto segments = static_cast<unsigned>(p.seg.batch_size * p.seg.num_kv_heads);
  return launch(attend_prefill_kernel<T, kHeadDim, kCapped>, dim3(segments * row_tiles),
                dim3(Shape::kThreads), Shape::kSharedBytes, config.stream, p, row_tiles);
}

template <class T>
Status launch_simt(const AttendParams& p, const Partials& partials, const Launch& config) {
  const size_t shared = SimtShape::shared_bytes(p.head_dim, p.head_dim_v);
  const auto row_tiles = static_cast<int>(ceil_div(packed_rows(p), SimtShape::kRows));
  if (splits_keys(p)) {
    const dim3 grid(static_cast<unsigned>(num_parts(p, config.capacity, partials.places)),
                    static_cast<unsigned>(row_tiles));
    return launch(attend_simt_kernel<T, true>, grid, dim3(SimtShape::kThreads), shared,
                  config.stream, p, partials, row_tiles);
  }
  const auto segments = static_cast<unsigned>(p.seg.batch_size * p.seg.num_kv_heads);
  return launch(attend_simt_kernel<T, false>, dim3(segments * row_tiles), dim3(SimtShape::kThreads),
                shared, config.stream, p, partials, row_tiles);
}

template <class T>
Status launch_typed(const AttendParams& p, const Partials& partials, const Launch& config) {
  Status status = 0;
  const int dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  if constexpr (std::is_same_v<T, float>) {
    status = launch_simt<T>(p, partials, config);
  } else if (config.path == Path::kSimt || !fits_tensor_cores(p)) {
    status = launch_simt<T>(p, partials, config);
  } else if (p.softcap > 0.0f) {  // rare: two sizes do, by padding
    status = dim <= 128 ? launch_mma<T, 128, true>(p, partials, config)
                        : launch_mma<T, 256, true>(p, partials, config);
  } else if (dim <= 64) {
    status = launch_mma<T, 64>(p, partials, config);
  } else if (dim <= 96) {
    status = launch_mma<T, 96>(p, partials, config);
  } else if (dim <= 128) {
    status = launch_mma<T, 128>(p, partials, config);
  } else {
    status = launch_mma<T, 256>(p, partials, config);
  }
  if (status != 0 || !splits_keys(p)) return status;
  const dim3 grid(static_cast<unsigned>(p.seg.batch_size * p.seg.num_kv_heads),
                  static_cast<unsigned>(packed_rows(p)));
  return launch(combine_kernel<T>, grid, dim3(kCombineThreads), 0, config.stream, p, partials);
}

}  // namespace

size_t attend_workspace(const AttendParams& p, int64_t capacity) {
  if (!splits_keys(p)) return 0;
  return sizeof(float) * static_cast<size_t>(num_parts(p, capacity, choose_places(p, capacity))) *
         static_cast<size_t>(packed_rows(p)) * (static_cast<size_t>(p.head_dim_v) + 2);
}

Status launch_attend(const AttendParams& p, const Launch& config) {
  // max_sum first: its elements have 8 bytes.
  auto* max_sum = static_cast<float2*>(config.workspace);
  const Places places = choose_places(p, config.capacity);
  const int64_t part_rows =
      splits_keys(p) ? num_parts(p, config.capacity, places) * packed_rows(p) : 0;
  const Partials partials{reinterpret_cast<float*>(max_sum + part_rows), max_sum,
                          static_cast<int32_t>(packed_rows(p)), places};
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(p, partials, config);
    case DType::kBFloat16:
      return launch_typed<bf16>(p, partials, config);
    default:
      return launch_typed<fp16>(p, partials, config);
  }
}

}  // namespace namm_ext::gpu
