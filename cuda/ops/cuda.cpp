// CUDA entries: prepare, launch on the current stream. All registrations are below.
//
// The checks are those of the CPU entries. Nothing here waits for the device, so the numbers inside
// index tensors are the caller's promise; ragged.py keeps it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernels.h"
#include "prepare.h"

namespace namm_ext {
namespace {

// Makes the device of a tensor current and knows its stream.
class Device {
 public:
  Device(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {}

  // anchor: a tensor on the device. workspace_bytes: scratch memory, given back to torch's
  // allocator when this object goes; the stream orders its next use behind our kernels.
  gpu::Launch launch(const Tensor& anchor, int64_t capacity, size_t workspace_bytes) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    gpu::Launch launch{capacity};
    launch.stream = static_cast<gpu::Stream>(stream);
    if (workspace_bytes > 0) {
      workspace_ = torch::stable::new_empty(anchor, {static_cast<int64_t>(workspace_bytes)},
                                            torch::headeronly::ScalarType::Byte);
      launch.workspace = workspace_.mutable_data_ptr();
    }
    return launch;
  }

  void check(gpu::Status status) const {
    STD_TORCH_CHECK(status == 0, op_, ": CUDA error: ", gpu::status_string(status));
  }

 private:
  const char* op_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  Tensor workspace_;
};

// An op: prepare, launch. All arguments are on the device of the first. kWorkspace says how much
// scratch memory a launch needs; null: none.
template <auto kPrepare, auto kLaunch, auto kWorkspace = nullptr, class = decltype(kPrepare)>
struct Entry;

template <auto kPrepare, auto kLaunch, auto kWorkspace, class Out, class... Args>
struct Entry<kPrepare, kLaunch, kWorkspace, Out (*)(Args...)> {
  static auto run(std::decay_t<Args>... args) {
    const Out prepared = kPrepare(args...);
    const Tensor& anchor = std::get<0>(std::tie(args...));
    Device device(prepared.op, anchor);
    size_t bytes = 0;
    if constexpr (!std::is_same_v<decltype(kWorkspace), std::nullptr_t>) {
      bytes = kWorkspace(prepared.params, prepared.capacity);
    }
    device.check(kLaunch(prepared.params, device.launch(anchor, prepared.capacity, bytes)));
    if constexpr (!std::is_same_v<decltype(prepared.returned), Nothing>) {
      return prepared.returned;
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CUDA, m) {
  m.impl("append_", TORCH_BOX((&Entry<prepare_append, gpu::launch_append>::run)));
  m.impl("attend_",
         TORCH_BOX((&Entry<prepare_attend, gpu::launch_attend, gpu::attend_workspace>::run)));
  m.impl("record_", TORCH_BOX((&Entry<prepare_record, gpu::launch_record>::run)));
  m.impl("spectrogram", TORCH_BOX((&Entry<prepare_spectrogram, gpu::launch_spectrogram>::run)));
  m.impl("attention_received",
         TORCH_BOX((&Entry<prepare_attention_received, gpu::launch_attention_received>::run)));
  m.impl("bam_scores",
         TORCH_BOX(
             (&Entry<prepare_bam_scores, gpu::launch_bam_scores, gpu::bam_scores_workspace>::run)));
  m.impl("mlp_scores", TORCH_BOX((&Entry<prepare_mlp_scores, gpu::launch_mlp_scores>::run)));
  m.impl("gate_", TORCH_BOX((&Entry<prepare_gate, gpu::launch_gate>::run)));
  m.impl("select",
         TORCH_BOX((&Entry<prepare_select, gpu::launch_select, gpu::select_workspace>::run)));
  m.impl("compact", TORCH_BOX((&Entry<prepare_compact, gpu::launch_compact>::run)));
}

}  // namespace namm_ext
