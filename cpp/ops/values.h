// Checks of the numbers inside index tensors, for ops on the CPU: a wrong one would be an access
// out of bounds. Linear in the number of segments, and nothing has been written before.
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

// capacity: rows of the store. Of GateParams linear in the new rows, of
// CompactParams in the live ones.
void check_values(const char* op, const AppendParams& params, int64_t capacity);
void check_values(const char* op, const AttendParams& params, int64_t capacity);
void check_values(const char* op, const RecordParams& params, int64_t capacity);
void check_values(const char* op, const SpectrogramParams& params, int64_t capacity);
void check_values(const char* op, const ReceivedParams& params, int64_t capacity);
void check_values(const char* op, const ScoreParams& params, int64_t capacity);
void check_values(const char* op, const GateParams& params, int64_t capacity);
void check_values(const char* op, const SelectParams& params, int64_t capacity);
void check_values(const char* op, const CompactParams& params, int64_t capacity);

}  // namespace namm_ext
