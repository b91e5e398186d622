// Between the plan of attend (attend_cpu.cpp) and its arithmetic (attend_isa.inc).
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

// Rows of a segment: row = (column - first) * num_groups + group. A task computes rows
// [row_begin, row_end) against live keys [key_begin, key_end).
struct AttendTask {
  int32_t segment;
  int32_t row_begin, row_end;
  int32_t key_begin, key_end;
  // Null: the task writes out and lse. Otherwise row r's unnormalised result goes to
  // partial[(r - row_begin) * (head_dim_v + 2)]: sum of p v, then the maximum in log2 units, then
  // the sum of p, where p = 2^(logit * log2(e) - maximum).
  float* partial;
};

constexpr int kAttendDecodeRows = 8;      // at most so many rows: one dot product per (row, key)
constexpr int kAttendSplitRows = 64;      // at most so many rows: keys are split in chunks
constexpr int kAttendChunk = 2048;        // keys per chunk
constexpr int kAttendRowsPerTask = 512;   // a multiple of every block size of attend_isa.inc
constexpr float kAttendNothing = -1e30f;  // maximum of a row that has seen nothing

struct AttendIsa {
  int64_t (*scratch_bytes)(const AttendParams&);
  void (*run)(const AttendParams&, const AttendTask&, char* scratch);
};

namespace base {
extern const AttendIsa kAttend;
}
namespace avx2 {
extern const AttendIsa kAttend;
}
namespace avx512 {
extern const AttendIsa kAttend;
}
namespace avx512bf16 {
extern const AttendIsa kAttend;
}
namespace amx {
extern const AttendIsa kAttend;
}

}  // namespace namm_ext
