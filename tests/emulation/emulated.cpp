// C entry points of the emulated kernels, called by emulated.py.
#include <cstring>
#include <string>

#include "platform.cuh"

namespace namm_ext::gpu {
namespace {

struct Op {
  const char* name;
  size_t bytes;
  size_t (*workspace)(const void*, int64_t);
  Status (*launch)(const void*, const Launch&);
};

template <class Params, Status (*kLaunch)(const Params&, const Launch&)>
Status call(const void* params, const Launch& launch) {
  return kLaunch(*static_cast<const Params*>(params), launch);
}

template <class Params, size_t (*kSize)(const Params&, int64_t)>
size_t size_of_workspace(const void* params, int64_t capacity) {
  return kSize(*static_cast<const Params*>(params), capacity);
}

size_t no_workspace(const void*, int64_t) { return 0; }

const Op kOps[] = {
#ifdef NAMM_HAS_APPEND
    {"append", sizeof(AppendParams), no_workspace, call<AppendParams, launch_append>},
#endif
#ifdef NAMM_HAS_ATTEND
    {"attend", sizeof(AttendParams), size_of_workspace<AttendParams, attend_workspace>,
     call<AttendParams, launch_attend>},
#endif
#ifdef NAMM_HAS_RECORD
    {"record", sizeof(RecordParams), no_workspace, call<RecordParams, launch_record>},
#endif
#ifdef NAMM_HAS_SELECT
    {"select", sizeof(SelectParams), size_of_workspace<SelectParams, select_workspace>,
     call<SelectParams, launch_select>},
#endif
#ifdef NAMM_HAS_COMPACT
    {"compact", sizeof(CompactParams), no_workspace, call<CompactParams, launch_compact>},
#endif
#ifdef NAMM_HAS_WINDOW
    {"spectrogram", sizeof(SpectrogramParams), no_workspace,
     call<SpectrogramParams, launch_spectrogram>},
    {"attention_received", sizeof(ReceivedParams), no_workspace,
     call<ReceivedParams, launch_attention_received>},
#endif
#ifdef NAMM_HAS_BAM
    {"bam_scores", sizeof(ScoreParams), size_of_workspace<ScoreParams, bam_scores_workspace>,
     call<ScoreParams, launch_bam_scores>},
#endif
#ifdef NAMM_HAS_GATE
    {"gate", sizeof(GateParams), no_workspace, call<GateParams, launch_gate>},
#endif
#ifdef NAMM_HAS_MLP
    {"mlp_scores", sizeof(ScoreParams), no_workspace, call<ScoreParams, launch_mlp_scores>},
#endif
};

const Op* find(const char* name) {
  for (const Op& op : kOps) {
    if (std::strcmp(op.name, name) == 0) return &op;
  }
  return nullptr;
}

}  // namespace
}  // namespace namm_ext::gpu

using namespace namm_ext::gpu;

extern "C" int emulated_sizeof(const char* name) {
  const Op* op = find(name);
  return op ? static_cast<int>(op->bytes) : -1;
}

extern "C" size_t emulated_workspace(const char* name, const void* params, int64_t capacity) {
  return find(name)->workspace(params, capacity);
}

extern "C" int emulated_launch(const char* name, const void* params, int64_t capacity,
                               void* workspace, int simt, unsigned threads, unsigned blocks) {
  emulation::order = {threads, blocks};
  Launch launch;
  launch.capacity = capacity;
  launch.workspace = workspace;
  launch.path = simt ? Path::kSimt : Path::kAuto;
  return find(name)->launch(params, launch);
}

extern "C" const char* emulated_error() { return status_string(1); }
