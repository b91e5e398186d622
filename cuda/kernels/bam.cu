// Launcher of bam_scores.
#include "bam.cuh"

namespace namm_ext::gpu {
namespace {

// Parts of the workspace at multiples of 256 bytes.
struct Carver {
  unsigned char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return part;
  }
};

size_t carve(const ScoreParams& p, int64_t capacity, void* base, BamWorkspace* work) {
  Carver carver{static_cast<unsigned char*>(base)};
  work->folded = carver.take<Folded>(p.seg.batch_size);
  work->x = carver.take<uint32_t>(capacity * (kPadded / 2));
  work->z = carver.take<uint32_t>(capacity * (kPadded / 2));
  work->g = carver.take<uint32_t>(capacity * (kPadded / 2));
  work->c = carver.take<float>(capacity);
  work->anchor = carver.take<float>(capacity);
  work->sums = carver.take<float2>(capacity * kBamParts);
  work->capacity = capacity;
  return carver.used;
}

}  // namespace

size_t bam_scores_workspace(const ScoreParams& params, int64_t capacity) {
  BamWorkspace work;
  return carve(params, capacity, nullptr, &work);
}

Status launch_bam_scores(const ScoreParams& params, const Launch& launch) {
  BamWorkspace work;
  carve(params, launch.capacity, launch.workspace, &work);
  const auto tiles = [&](int rows) { return num_tiles(params.seg, launch.capacity, rows); };
  const dim3 fold_grid(kFoldItems / kFoldWarps, static_cast<unsigned>(params.seg.batch_size));
  Status status =
      gpu::launch(bam_fold_kernel, fold_grid, kFoldThreads, 0, launch.stream, params, work.folded);
  if (status != 0) return status;
  if (launch.path == Path::kSimt) {
    return gpu::launch(bam_rows_kernel<true>, tiles(kRowsPerBlock), kBamThreads, 0, launch.stream,
                       params, work);
  }
  status =
      gpu::launch(bam_prep_kernel, tiles(kBamThreads), kBamThreads, 0, launch.stream, params, work);
  if (status != 0) return status;
  status = gpu::launch(bam_pairs_kernel, dim3(tiles(kBamRows), kBamTurns), kBamThreads,
                       kBamSharedBytes, launch.stream, params, work);
  if (status != 0) return status;
  return gpu::launch(bam_rows_kernel<false>, tiles(kRowsPerBlock), kBamThreads, 0, launch.stream,
                     params, work);
}

}  // namespace namm_ext::gpu
