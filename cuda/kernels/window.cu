// Launchers of spectrogram and attention_received.
#include <cmath>

#include "window_mma.cuh"
#include "window_simt.cuh"

namespace namm_ext::gpu {
namespace {

struct Output {
  const float* state;
  float* out;
  float frame_decay, period_decay;
  int first_row;
};

template <class T, bool kReceived>
Status launch_simt(const Window& w, const Output& o, const Launch& launch) {
  return gpu::launch(window_simt_kernel<T, kReceived>, num_tiles(w.seg, launch.capacity, kSimtKeys),
                     kSimtThreads, 0, launch.stream, w, o.state, o.out, o.frame_decay,
                     o.period_decay, o.first_row);
}

template <class T, int kHeadDim, bool kReceived, bool kCapped = false>
Status launch_mma(const Window& w, const Output& o, const Launch& launch) {
  using Tile = WindowTile<kHeadDim>;
  return gpu::launch(window_mma_kernel<T, kHeadDim, kReceived, kCapped>,
                     num_tiles(w.seg, launch.capacity, Tile::kKeys), kMmaThreads,
                     Tile::kSharedBytes, launch.stream, w, o.state, o.out, o.frame_decay,
                     o.period_decay, o.first_row);
}

bool mma_applies(const Window& w) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  bool aligned = address(w.q) % 16 == 0 && address(w.lse) % 16 == 0 && address(w.k) % 4 == 0;
  for (int64_t stride : w.q_strides) aligned = aligned && stride % 8 == 0;
  for (int64_t stride : w.lse_strides) aligned = aligned && stride % 4 == 0;
  return aligned && w.head_dim % 8 == 0 && w.head_dim <= 256;
}

template <class T, bool kReceived>
Status launch_16_bit(const Window& w, const Output& o, const Launch& launch) {
  if (launch.path == Path::kAuto && mma_applies(w)) {
    if (w.softcap > 0.0f) {  // rare: two sizes do, by padding
      return w.head_dim <= 128 ? launch_mma<T, 128, kReceived, true>(w, o, launch)
                               : launch_mma<T, 256, kReceived, true>(w, o, launch);
    }
    if (w.head_dim <= 64) return launch_mma<T, 64, kReceived>(w, o, launch);
    if (w.head_dim <= 96) return launch_mma<T, 96, kReceived>(w, o, launch);
    if (w.head_dim <= 128) return launch_mma<T, 128, kReceived>(w, o, launch);
    if (w.head_dim <= 192) return launch_mma<T, 192, kReceived>(w, o, launch);
    return launch_mma<T, 256, kReceived>(w, o, launch);
  }
  return launch_simt<T, kReceived>(w, o, launch);
}

template <bool kReceived>
Status launch_window(const Window& w, const Output& o, const Launch& launch) {
  switch (w.dtype) {
    case DType::kBFloat16:
      return launch_16_bit<bf16, kReceived>(w, o, launch);
    case DType::kFloat16:
      return launch_16_bit<fp16, kReceived>(w, o, launch);
    default:
      return launch_simt<float, kReceived>(w, o, launch);
  }
}

}  // namespace

Status launch_spectrogram(const SpectrogramParams& p, const Launch& launch) {
  const double decay = std::pow(p.ema_coeff, kHop);
  const int num_frames = p.window.num_rows / kHop - 1;
  const Output o = {p.state, p.state_out, static_cast<float>(decay),
                    static_cast<float>(std::pow(decay, num_frames)), 0};
  return launch_window<false>(p.window, o, launch);
}

Status launch_attention_received(const ReceivedParams& p, const Launch& launch) {
  const Output o = {nullptr, p.received, 0.0f, 0.0f, p.first_row};
  return launch_window<true>(p.window, o, launch);
}

}  // namespace namm_ext::gpu
