// CPU entries: prepare, run the kernel on torch's threads. All registrations are below.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <string>
#include <type_traits>

#include "dispatch.h"
#include "kernels.h"
#include "prepare.h"
#include "values.h"

namespace namm_ext {
namespace {

Parallel torch_threads() {
  const auto run = [](int64_t n, int64_t grain, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain,
                                [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return Parallel(run, static_cast<int>(torch::stable::get_num_threads()));
}

// An op: prepare, check the numbers in index tensors, run the kernel.
template <auto kPrepare, auto kKernel, class = decltype(kPrepare)>
struct Entry;

template <auto kPrepare, auto kKernel, class Out, class... Args>
struct Entry<kPrepare, kKernel, Out (*)(Args...)> {
  static auto run(std::decay_t<Args>... args) {
    const Out prepared = kPrepare(args...);
    check_values(prepared.op, prepared.params, prepared.capacity);
    kKernel(prepared.params, torch_threads());
    if constexpr (!std::is_same_v<decltype(prepared.returned), Nothing>) {
      return prepared.returned;
    }
  }
};

// Asks for huge pages behind new memory. Blocks above 32 MB are mapped anew by glibc every time,
// and touching them 4 KB at a time then costs more than copying into them.
void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLeast = uintptr_t{32} << 20, kPage = 4096;
  const uintptr_t bytes = static_cast<uintptr_t>(size);
  if (bytes <= kLeast) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  end = (begin + bytes) / kPage * kPage;
  // Advice: a kernel without huge pages refuses, and nothing is lost.
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void compact(const CompactParams& p, Parallel parallel) {
  prefer_huge_pages(p.k_out, p.capacity_new * p.k_row_bytes);
  prefer_huge_pages(p.v_out, p.capacity_new * p.v_row_bytes);
  cpu::compact(p, parallel);
}

std::string cpu_isa() { return isa_name(current_isa()); }

std::string force_isa(std::string name) {
  std::string previous = cpu_isa();
  Isa isa{};
  STD_TORCH_CHECK(parse_isa(name.c_str(), &isa), "force_isa: isa must be one of base, avx2, ",
                  "avx512, avx512bf16, amx, got '", name, "'");
  STD_TORCH_CHECK(set_isa(isa), "force_isa: isa must be one this CPU has (at best ",
                  isa_name(best_isa()), "), got '", name, "'");
  return previous;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CPU, m) {
  m.impl("append_", TORCH_BOX((&Entry<prepare_append, cpu::append>::run)));
  m.impl("attend_", TORCH_BOX((&Entry<prepare_attend, cpu::attend>::run)));
  m.impl("record_", TORCH_BOX((&Entry<prepare_record, cpu::record>::run)));
  m.impl("spectrogram", TORCH_BOX((&Entry<prepare_spectrogram, cpu::spectrogram>::run)));
  m.impl("attention_received",
         TORCH_BOX((&Entry<prepare_attention_received, cpu::attention_received>::run)));
  m.impl("bam_scores", TORCH_BOX((&Entry<prepare_bam_scores, cpu::bam_scores>::run)));
  m.impl("mlp_scores", TORCH_BOX((&Entry<prepare_mlp_scores, cpu::mlp_scores>::run)));
  m.impl("gate_", TORCH_BOX((&Entry<prepare_gate, cpu::gate>::run)));
  m.impl("select", TORCH_BOX((&Entry<prepare_select, cpu::select>::run)));
  m.impl("compact", TORCH_BOX((&Entry<prepare_compact, compact>::run)));
}

STABLE_TORCH_LIBRARY_IMPL(namm_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("force_isa", TORCH_BOX(&force_isa));
}

}  // namespace namm_ext
