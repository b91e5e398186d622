// Recomputed attention of a window, as a spectrogram or as a sum: the plan. window_isa.inc has the
// arithmetic.
//
// Mapping   first the queries are packed, one task per (batch row, query head); then one task per
//           tile of keys of a segment, handed out one by one.
// Cost      workspace: the window's queries once more (as float, or in bf16 parts).
// Numerics  a key's result depends on its own row alone.
// Limits    none.
#include <cmath>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "scratch.h"
#include "window_isa.h"

namespace namm_ext::cpu {
namespace {

// By Isa.
constexpr const WindowIsa* kVersions[] = {
    &base::kWindow,
#if defined(__x86_64__)
    &avx2::kWindow, &avx512::kWindow, &avx512bf16::kWindow, &amx::kWindow,
#endif
};

thread_local Scratch scratch;
thread_local Scratch workspace;

struct Tile {
  int32_t segment, key_begin, key_end;
};

// run(tile, packed queries of its segment, scratch) for all tiles of active rows, idle(row) for
// each live row of the others.
template <class Run, class Idle>
void for_each_tile(const Window& w, const WindowIsa& isa, int32_t first_row, Parallel parallel,
                   Run&& run, Idle&& idle) {
  std::vector<Tile> tiles;
  std::vector<int64_t> used_rows;  // batch rows with at least one live key
  for (int32_t b = 0; b < w.seg.batch_size; ++b) {
    bool used = false;
    for (int32_t h = 0; h < w.seg.num_kv_heads; ++h) {
      const int32_t s = b * w.seg.num_kv_heads + h;
      const int32_t length = w.seg.seqused_k[s];
      if (!w.active[b]) {
        for (int32_t i = 0; i < length; ++i) idle(int64_t{w.seg.cu_seqlens_k[s]} + i);
        continue;
      }
      for (int32_t key = 0; key < length; key += isa.tile_keys) {
        tiles.push_back({s, key, length - key < isa.tile_keys ? length : key + isa.tile_keys});
      }
      used |= length > 0;
    }
    if (used) used_rows.push_back(b);
  }
  if (tiles.empty()) return;

  const int64_t num_heads = int64_t{w.seg.num_kv_heads} * w.num_groups;
  const int64_t packed_bytes = isa.packed_bytes(w), scratch_bytes = isa.scratch_bytes(w);
  std::vector<int64_t> slot(static_cast<size_t>(w.seg.batch_size), 0);
  for (size_t i = 0; i < used_rows.size(); ++i) slot[used_rows[i]] = static_cast<int64_t>(i);
  const int64_t num_packed = static_cast<int64_t>(used_rows.size()) * num_heads;
  char* const packed = workspace.reserve(num_packed * packed_bytes);
  parallel.each(num_packed, [&](int64_t i) {
    isa.pack(w, used_rows[i / num_heads], i % num_heads, first_row, packed + i * packed_bytes);
  });
  parallel.each(static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const Tile& tile = tiles[i];
    const int64_t b = tile.segment / w.seg.num_kv_heads, h = tile.segment % w.seg.num_kv_heads;
    run(tile, packed + (slot[b] * num_heads + h * w.num_groups) * packed_bytes,
        scratch.reserve(scratch_bytes));
  });
}

}  // namespace

void spectrogram(const SpectrogramParams& p, Parallel parallel) {
  const WindowIsa& isa = *version_in_force(kVersions);
  for_each_tile(
      p.window, isa, 0, parallel,
      [&](const Tile& tile, const char* packed, char* memory) {
        isa.spectrogram(p, tile.segment, tile.key_begin, tile.key_end, packed, memory);
      },
      [&](int64_t row) {
        std::memcpy(p.state_out + row * kNumBins, p.state + row * kNumBins,
                    kNumBins * sizeof(float));
      });
}

void attention_received(const ReceivedParams& p, Parallel parallel) {
  const WindowIsa& isa = *version_in_force(kVersions);
  for_each_tile(
      p.window, isa, p.first_row, parallel,
      [&](const Tile& tile, const char* packed, char* memory) {
        isa.received(p, tile.segment, tile.key_begin, tile.key_end, packed, memory);
      },
      [&](int64_t row) { p.received[row] = 0.0f; });
}

}  // namespace namm_ext::cpu
