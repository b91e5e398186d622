// The boundary between cuda/ops (torch, no CUDA header) and cuda/kernels (CUDA, no torch).
//
// Every launcher enqueues its kernels on launch.stream of the current device and returns without
// waiting. Pointers are device pointers; the shapes and meanings are those of params.h. Nothing is
// allocated: an op that needs scratch memory says how much.
#pragma once

#include <cstddef>
#include <cstdint>

#include "namm_ext/params.h"

struct CUstream_st;

namespace namm_ext::gpu {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t; 0 is success

// kSimt forces the plain float kernel where kAuto would choose tensor cores; tests and
// benchmarks compare the two.
enum class Path { kAuto, kSimt };

struct Launch {
  int64_t capacity;  // rows of the store: cu_seqlens_k[S], known on the host as k.size(0)
  Stream stream = nullptr;
  void* workspace = nullptr;  // at least <op>_workspace(...) bytes, aligned to 256
  Path path = Path::kAuto;
};

const char* status_string(Status status);

Status launch_append(const AppendParams& params, const Launch& launch);

size_t attend_workspace(const AttendParams& params, int64_t capacity);
Status launch_attend(const AttendParams& params, const Launch& launch);

Status launch_record(const RecordParams& params, const Launch& launch);

Status launch_spectrogram(const SpectrogramParams& params, const Launch& launch);
Status launch_attention_received(const ReceivedParams& params, const Launch& launch);

size_t bam_scores_workspace(const ScoreParams& params, int64_t capacity);
Status launch_bam_scores(const ScoreParams& params, const Launch& launch);
Status launch_mlp_scores(const ScoreParams& params, const Launch& launch);

Status launch_gate(const GateParams& params, const Launch& launch);

size_t select_workspace(const SelectParams& params, int64_t capacity);
Status launch_select(const SelectParams& params, const Launch& launch);

Status launch_compact(const CompactParams& params, const Launch& launch);

}  // namespace namm_ext::gpu
