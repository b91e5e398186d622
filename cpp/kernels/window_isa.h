// Between the plan of the window ops (window_cpu.cpp) and their arithmetic (window_isa.inc).
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

// The queries of one (batch row, query head) are packed once per call, in the layout that the
// instruction set likes; the G heads of a segment follow each other. A task is one tile of keys of
// one segment: rows [key_begin, key_end) of its live rows, at most tile_keys of them.
struct WindowIsa {
  int32_t tile_keys;
  int64_t (*packed_bytes)(const Window&);
  int64_t (*scratch_bytes)(const Window&);
  // Window rows below first_row are not needed and may stay unpacked.
  void (*pack)(const Window&, int64_t batch_row, int64_t head, int32_t first_row, char* packed);
  void (*spectrogram)(const SpectrogramParams&, int64_t segment, int32_t key_begin, int32_t key_end,
                      const char* packed, char* scratch);
  void (*received)(const ReceivedParams&, int64_t segment, int32_t key_begin, int32_t key_end,
                   const char* packed, char* scratch);
};

namespace base {
extern const WindowIsa kWindow;
}
namespace avx2 {
extern const WindowIsa kWindow;
}
namespace avx512 {
extern const WindowIsa kWindow;
}
namespace avx512bf16 {
extern const WindowIsa kWindow;
}
namespace amx {
extern const WindowIsa kWindow;
}

}  // namespace namm_ext
