// Checks of the numbers inside index tensors, for ops on the CPU: a wrong one would be an access
// out of bounds. Linear in the number of segments, and nothing has been written before.
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

// capacity: rows of the store. num_cols: L.
void check_values(const AppendParams& params, int64_t capacity, int64_t num_cols);
void check_values(const AttendParams& params, int64_t capacity);
void check_values(const char* op, const Segments& seg, int64_t capacity);
void check_values(const char* op, const ScoreParams& params, int64_t capacity);
void check_values(const GateParams& params, int64_t capacity);
// capacity, capacity_new: rows of the old and of the new store. Linear in the live rows.
void check_values(const CompactParams& params, int64_t capacity, int64_t capacity_new);

}  // namespace namm_ext
