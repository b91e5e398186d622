#include "values.h"

#include <torch/headeronly/util/Exception.h>

namespace namm_ext {
namespace {

void check_columns(const char* op, const int32_t* first, const int32_t* num_new, int64_t batch_size,
                   int64_t num_cols) {
  for (int64_t b = 0; b < batch_size; ++b) {
    STD_TORCH_CHECK(first[b] >= 0 && num_new[b] >= 0 && int64_t{first[b]} + num_new[b] <= num_cols,
                    op, ": first[", b, "] and first[", b, "] + num_new[", b, "] must be in [0, ",
                    num_cols, "], got ", first[b], " and ", int64_t{first[b]} + num_new[b]);
  }
}

void check_segments(const char* op, const Segments& seg, int64_t capacity) {
  const int64_t num_segments = int64_t{seg.batch_size} * seg.num_kv_heads;
  const int32_t* cu = seg.cu_seqlens_k;
  STD_TORCH_CHECK(cu[0] == 0, op, ": cu_seqlens_k must start with 0, got ", cu[0]);
  for (int64_t s = 0; s < num_segments; ++s) {
    STD_TORCH_CHECK(cu[s] <= cu[s + 1], op, ": cu_seqlens_k must not decrease, got ", cu[s],
                    " before ", cu[s + 1]);
    STD_TORCH_CHECK(seg.seqused_k[s] >= 0 && seg.seqused_k[s] <= cu[s + 1] - cu[s], op,
                    ": seqused_k[", s, "] must be in [0, ", cu[s + 1] - cu[s], "], got ",
                    seg.seqused_k[s]);
  }
  STD_TORCH_CHECK(cu[num_segments] <= capacity, op, ": cu_seqlens_k must end at ", capacity,
                  " or before, got ", cu[num_segments]);
}

}  // namespace

void check_values(const char* op, const AppendParams& p, int64_t capacity) {
  const Segments& seg = p.seg;
  check_segments(op, seg, capacity);
  check_columns(op, p.first, p.num_new, seg.batch_size, p.num_cols);
  for (int64_t b = 0; b < seg.batch_size; ++b) {
    STD_TORCH_CHECK(p.pos_first[b] >= 0 && int64_t{p.pos_first[b]} + p.num_new[b] <= INT32_MAX, op,
                    ": pos_first[", b, "] must be in [0, ", INT32_MAX - p.num_new[b], "], got ",
                    p.pos_first[b]);
    for (int64_t s = b * seg.num_kv_heads; s < (b + 1) * seg.num_kv_heads; ++s) {
      const int32_t room = seg.cu_seqlens_k[s + 1] - seg.cu_seqlens_k[s] - seg.seqused_k[s];
      STD_TORCH_CHECK(p.num_new[b] <= room, op, ": num_new[", b, "] must be at most the room of ",
                      room, " rows in segment ", s, ", got ", p.num_new[b]);
    }
  }
}

void check_values(const char* op, const AttendParams& p, int64_t capacity) {
  check_segments(op, p.seg, capacity);
  check_columns(op, p.first, p.num_new, p.seg.batch_size, p.num_cols);
}

void check_values(const char* op, const RecordParams& p, int64_t) {
  check_columns(op, p.first, p.num_new, p.batch_size, p.num_cols);
  const int32_t n_up = p.num_rows - kCarry;
  for (int32_t b = 0; b < p.batch_size; ++b) {
    STD_TORCH_CHECK(p.pos_first[b] >= 0, op, ": pos_first[", b, "] must not be negative, got ",
                    p.pos_first[b]);
    const int32_t left = n_up - p.pos_first[b] % n_up;
    STD_TORCH_CHECK(p.num_new[b] <= left, op, ": num_new[", b, "] must be at most the ", left,
                    " queries up to the row's next update, got ", p.num_new[b]);
  }
}

void check_values(const char* op, const SpectrogramParams& p, int64_t capacity) {
  check_segments(op, p.window.seg, capacity);
}

void check_values(const char* op, const ReceivedParams& p, int64_t capacity) {
  check_segments(op, p.window.seg, capacity);
}

void check_values(const char* op, const ScoreParams& p, int64_t capacity) {
  check_segments(op, p.seg, capacity);
  for (int32_t b = 0; b < p.seg.batch_size; ++b) {
    STD_TORCH_CHECK(p.param_index[b] >= 0 && p.param_index[b] < p.num_candidates, op,
                    ": param_index[", b, "] must be in [0, ", p.num_candidates, "), got ",
                    p.param_index[b]);
  }
}

void check_values(const char* op, const GateParams& p, int64_t capacity) {
  check_segments(op, p.seg, capacity);
  for (int32_t b = 0; b < p.seg.batch_size; ++b) {
    if (!p.active[b]) continue;
    const int64_t first = int64_t{b} * p.seg.num_kv_heads;
    const int32_t* pos = nullptr;  // of the new rows of the first head
    for (int64_t s = first; s < first + p.seg.num_kv_heads; ++s) {
      const int32_t live = p.seg.seqused_k[s];
      STD_TORCH_CHECK(p.num_new <= live, op, ": num_new must be at most the ", live,
                      " live rows of segment ", s, ", got ", p.num_new);
      const int32_t* row = p.pos + p.seg.cu_seqlens_k[s] + live - p.num_new;
      if (pos == nullptr) pos = row;
      for (int32_t i = 0; i < p.num_new; ++i) {
        STD_TORCH_CHECK(row[i] == pos[i], op, ": pos must be equal in the newest ", p.num_new,
                        " rows of the heads of batch row ", b, ", got ", row[i], " in segment ", s,
                        " and ", pos[i], " in segment ", first);
      }
    }
  }
}

void check_values(const char* op, const SelectParams& p, int64_t capacity) {
  check_segments(op, p.seg, capacity);
}

void check_values(const char* op, const CompactParams& p, int64_t capacity) {
  check_segments(op, p.seg, capacity);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  const int32_t* cu = p.cu_seqlens_new;
  STD_TORCH_CHECK(cu[0] == 0, op, ": cu_seqlens_new must start with 0, got ", cu[0]);
  for (int64_t s = 0; s < num_segments; ++s) {
    const uint8_t* keep = p.keep + p.seg.cu_seqlens_k[s];
    int32_t kept = 0;
    for (int32_t i = 0; i < p.seg.seqused_k[s]; ++i) kept += keep[i] != 0;
    STD_TORCH_CHECK(p.num_kept[s] == kept, op, ": num_kept[", s, "] must be ", kept, ", got ",
                    p.num_kept[s]);
    STD_TORCH_CHECK(int64_t{cu[s + 1]} - cu[s] >= kept, op, ": slot ", s,
                    " of cu_seqlens_new must hold ", kept, " rows, got ",
                    int64_t{cu[s + 1]} - cu[s]);
  }
  STD_TORCH_CHECK(cu[num_segments] <= p.capacity_new, op, ": capacity must be at least ",
                  cu[num_segments], ", got ", p.capacity_new);
}

}  // namespace namm_ext
