// _core: what is not a tensor operator. Holds no torch and no state.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "dispatch.h"
#include "namm_ext/params.h"

namespace py = pybind11;

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build information and CPU detection of namm_ext.";

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = NAMM_VERSION;
        info["torch"] = NAMM_TORCH_VERSION;
        info["compiler"] = NAMM_COMPILER;
        info["build_type"] = NAMM_BUILD_TYPE;
        return info;
      },
      "Version, and the torch, compiler and build type this was built with.");

  m.def(
      "supported_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < namm_ext::kNumIsas; ++i) {
          const auto isa = static_cast<namm_ext::Isa>(i);
          if (namm_ext::isa_supported(isa)) names.emplace_back(namm_ext::isa_name(isa));
        }
        return names;
      },
      "Instruction sets of this CPU that the kernels know, worst first.");

  m.attr("N_FFT") = namm_ext::kNFft;
  m.attr("HOP") = namm_ext::kHop;
  m.attr("CARRY") = namm_ext::kCarry;
  m.attr("NUM_BINS") = namm_ext::kNumBins;
  m.attr("NUM_FEATURES") = namm_ext::kNumFeatures;
  m.attr("HIDDEN") = namm_ext::kHidden;
  m.attr("NUM_BAM_PARAMS") = namm_ext::kNumBamParams;
}
