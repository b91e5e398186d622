// The kept rows of every segment into a new store.
//
// Mapping   one task per piece of at most 1024 rows of a segment; a run of survivors is one memcpy
//           per tensor.
// Cost      2 * kept * (k_row_bytes + v_row_bytes + 4 * num_state + 4) bytes moved, and keep read
//           twice.
// Numerics  none: bytes are copied.
// Limits    the caller has checked num_kept against keep and against the new slots.
#include <cstring>
#include <vector>

#include "kernels.h"

namespace namm_ext::cpu {
namespace {

constexpr int64_t kPiece = 1024;

struct Piece {
  int64_t row, rows;  // of the old store
  int64_t out;        // first row in the new store
};

int64_t count_kept(const uint8_t* keep, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keep[i] != 0;
  return count;
}

// First i >= begin with keep[i] set, or n.
int64_t next_kept(const uint8_t* keep, int64_t begin, int64_t n) {
  int64_t i = begin;
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, keep + i, sizeof word);
    if (word) break;
  }
  while (i < n && !keep[i]) ++i;
  return i;
}

int64_t next_dropped(const uint8_t* keep, int64_t begin, int64_t n) {
  const void* found = std::memchr(keep + begin, 0, static_cast<size_t>(n - begin));
  return found ? static_cast<const uint8_t*>(found) - keep : n;
}

void copy_rows(void* dst, const void* src, int64_t to, int64_t from, int64_t rows,
               int64_t row_bytes) {
  if (row_bytes == 0) return;
  std::memcpy(static_cast<char*>(dst) + to * row_bytes,
              static_cast<const char*>(src) + from * row_bytes,
              static_cast<size_t>(rows * row_bytes));
}

}  // namespace

void compact(const CompactParams& p, Parallel parallel) {
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  std::vector<Piece> pieces;
  for (int64_t s = 0; s < num_segments; ++s) {
    int64_t out = p.cu_seqlens_new[s];
    for (int64_t i = 0; i < p.seg.seqused_k[s]; i += kPiece) {
      const int64_t left = p.seg.seqused_k[s] - i, rows = left < kPiece ? left : kPiece;
      const int64_t row = p.seg.cu_seqlens_k[s] + i;
      pieces.push_back({row, rows, out});
      out += count_kept(p.keep + row, rows);
    }
  }
  parallel(static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      const uint8_t* keep = p.keep + piece.row;
      int64_t out = piece.out;
      for (int64_t from = next_kept(keep, 0, piece.rows); from < piece.rows;) {
        const int64_t to = next_dropped(keep, from, piece.rows), run = to - from;
        const int64_t row = piece.row + from;
        copy_rows(p.k_out, p.k, out, row, run, p.k_row_bytes);
        copy_rows(p.v_out, p.v, out, row, run, p.v_row_bytes);
        copy_rows(p.pos_out, p.pos, out, row, run, sizeof(int32_t));
        copy_rows(p.state_out, p.state, out, row, run, int64_t{sizeof(float)} * p.num_state);
        out += run;
        from = next_kept(keep, to, piece.rows);
      }
    }
  });
}

}  // namespace namm_ext::cpu
