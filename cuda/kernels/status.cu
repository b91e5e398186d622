// Status codes as text.
#include "platform.cuh"

namespace namm_ext::gpu {

const char* status_string(Status status) {
#if NAMM_EMULATED
  return status == 0 ? "no error" : emulation::last_error.c_str();
#else
  return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
}

}  // namespace namm_ext::gpu
