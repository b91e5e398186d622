// Recomputed attention of a window, as a spectrogram or as a sum: the plain version.
//
// Mapping   one task per segment; per key, the column of W probabilities, then its frames.
// Cost      B * Hq * W * K * D multiply-adds for the probabilities, 2 * W * K * 34 for the frames.
// Numerics  float sums; Hann window and Fourier table in double, rounded once.
// Limits    none.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "scalar.h"

namespace namm_ext::cpu {
namespace {

int64_t num_segments(const Segments& seg) { return int64_t{seg.batch_size} * seg.num_kv_heads; }

// column[i] = mean over the group of P[i, t] for the key in flat row `row` of segment s.
template <class T>
void attention_column(const Window& w, int64_t s, int64_t row, float* column) {
  const int64_t b = s / w.seg.num_kv_heads, h = s % w.seg.num_kv_heads;
  const T* k = static_cast<const T*>(w.k) + row * w.head_dim;
  for (int64_t i = 0; i < w.num_rows; ++i) {
    column[i] = 0.0f;
    if (w.pos[row] > w.pos_q[b] + i) continue;
    for (int64_t g = 0; g < w.num_groups; ++g) {
      const int64_t head = h * w.num_groups + g;
      const T* q = static_cast<const T*>(w.q) + b * w.q_strides[0] + head * w.q_strides[1] +
                   i * w.q_strides[2];
      const float lse = w.lse[b * w.lse_strides[0] + head * w.lse_strides[1] + i];
      float dot = 0.0f;
      for (int64_t d = 0; d < w.head_dim; ++d) dot += load(q[d]) * load(k[d]);
      column[i] += std::exp(dot * w.softmax_scale - lse);
    }
    column[i] /= static_cast<float>(w.num_groups);
  }
}

struct WindowedFourier {
  float re[kNumBins][kNFft], im[kNumBins][kNFft];
  WindowedFourier() {
    const double pi = std::acos(-1.0);
    for (int bin = 0; bin < kNumBins; ++bin) {
      for (int m = 0; m < kNFft; ++m) {
        const double hann = 0.5 * (1.0 - std::cos(2.0 * pi * m / kNFft));
        const double angle = -2.0 * pi * (bin * m % kNFft) / kNFft;
        re[bin][m] = static_cast<float>(hann * std::cos(angle));
        im[bin][m] = static_cast<float>(hann * std::sin(angle));
      }
    }
  }
};

}  // namespace

void spectrogram(const SpectrogramParams& p, Parallel parallel) {
  static const WindowedFourier fourier;
  const Window& w = p.window;
  const int num_frames = w.num_rows / kHop - 1;
  const double alpha = std::pow(p.ema_coeff, kHop);
  std::vector<float> weight(static_cast<size_t>(num_frames));
  for (int f = 0; f < num_frames; ++f) {
    weight[f] = static_cast<float>((1.0 - alpha) * std::pow(alpha, num_frames - 1 - f));
  }
  const float carry = static_cast<float>(std::pow(alpha, num_frames));

  with_type(w.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel.each(num_segments(w.seg), [&](int64_t s) {
      std::vector<float> column(static_cast<size_t>(w.num_rows));
      for (int64_t i = 0; i < w.seg.seqused_k[s]; ++i) {
        const int64_t row = w.seg.cu_seqlens_k[s] + i;
        const float* old = p.state + row * kNumBins;
        float* out = p.state_out + row * kNumBins;
        const bool active = w.active[s / w.seg.num_kv_heads];
        if (active) attention_column<T>(w, s, row, column.data());
        for (int bin = 0; bin < kNumBins; ++bin) {
          if (!active) {
            out[bin] = old[bin];
            continue;
          }
          float ema = carry * old[bin];
          for (int f = 0; f < num_frames; ++f) {
            float re = 0.0f, im = 0.0f;
            for (int m = 0; m < kNFft; ++m) {
              re += fourier.re[bin][m] * column[f * kHop + m];
              im += fourier.im[bin][m] * column[f * kHop + m];
            }
            ema += weight[f] * std::sqrt(re * re + im * im);
          }
          out[bin] = ema;
        }
      }
    });
  });
}

void attention_received(const ReceivedParams& p, Parallel parallel) {
  const Window& w = p.window;
  with_type(w.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel.each(num_segments(w.seg), [&](int64_t s) {
      std::vector<float> column(static_cast<size_t>(w.num_rows));
      for (int64_t i = 0; i < w.seg.seqused_k[s]; ++i) {
        const int64_t row = w.seg.cu_seqlens_k[s] + i;
        float sum = 0.0f;
        if (w.active[s / w.seg.num_kv_heads]) {
          attention_column<T>(w, s, row, column.data());
          for (int32_t r = p.first_row; r < w.num_rows; ++r) sum += column[r];
        }
        p.received[row] = sum;
      }
    });
  });
}

}  // namespace namm_ext::cpu
