// The boundary between cpp/ops (torch, no arithmetic) and the CPU kernels (arithmetic, no torch).
//
// params.h says what each function computes. Arguments are checked before they come here: shapes,
// strides and index values are right. Kernels allocate only scratch memory, use only the threads
// of Parallel, and their result for one segment depends neither on the number of threads nor on
// the other rows of the batch, bit for bit.
#pragma once

#include "namm_ext/params.h"
#include "parallel.h"

namespace namm_ext::cpu {

void append(const AppendParams& params, Parallel parallel);
void attend(const AttendParams& params, Parallel parallel);
void record(const RecordParams& params, Parallel parallel);
void spectrogram(const SpectrogramParams& params, Parallel parallel);
void attention_received(const ReceivedParams& params, Parallel parallel);
void bam_scores(const ScoreParams& params, Parallel parallel);
void mlp_scores(const ScoreParams& params, Parallel parallel);
void gate(const GateParams& params, Parallel parallel);
void select(const SelectParams& params, Parallel parallel);
void compact(const CompactParams& params, Parallel parallel);

}  // namespace namm_ext::cpu
