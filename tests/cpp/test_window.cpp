// spectrogram and attention_received on every instruction set of this CPU against double
// sums, without torch.
//
// Buffers end with the last live row, so that AddressSanitizer sees a read behind it; rooms inside
// are NaN, so is what inactive rows must not read. Built with NAMM_SANITIZE=address,undefined in
// CI.
#include <cmath>
#include <complex>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "scalar.h"

namespace {

using namespace namm_ext;

struct Shape {
  int num_kv_heads, num_groups, head_dim, num_rows, first_row;
  std::vector<int> lengths;  // one per segment
};

const Shape kShapes[] = {
    {2, 4, 128, 48, 16, {70, 1, 0, 49}}, {1, 3, 13, 32, 0, {65, 2}}, {1, 7, 40, 64, 20, {129}},
    {2, 1, 8, 80, 79, {33, 48, 31, 17}}, {1, 2, 256, 32, 5, {20}},   {1, 1, 1, 32, 32, {50}},
};

struct Errors {
  double spectrogram = 0.0, received = 0.0;
};

// 0: no bound.
double bounded(double logit, double softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

template <class T>
Errors run(const Shape& shape, DType dtype, float softcap) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int num_segments = static_cast<int>(shape.lengths.size());
  const int batch_size = num_segments / shape.num_kv_heads;
  const int heads = shape.num_kv_heads * shape.num_groups, room = 3;
  const int64_t dim = shape.head_dim, rows = shape.num_rows;
  std::vector<int32_t> cu{0}, used(shape.lengths.begin(), shape.lengths.end());
  for (int s = 0; s < num_segments; ++s) {
    cu.push_back(cu.back() + used[s] + (s + 1 < num_segments ? room : 0));
  }
  // The last batch row of several is inactive: its queries must not be read.
  std::vector<uint8_t> active(batch_size, 1);
  if (batch_size > 1) active.back() = 0;
  std::vector<T> k(cu.back() * dim), q(batch_size * heads * rows * dim);
  std::vector<int32_t> pos(cu.back(), std::numeric_limits<int32_t>::min());
  std::vector<float> state(size_t(cu.back()) * kNumBins, nan), lse(batch_size * heads * rows);
  for (T& x : k) cpu::store(&x, nan);
  std::vector<int32_t> pos_q(batch_size);
  for (int s = 0; s < num_segments; ++s) {
    for (int t = cu[s]; t < cu[s] + used[s]; ++t) {
      pos[t] = 2 * (t - cu[s]);
      for (int d = 0; d < dim; ++d) cpu::store(&k[t * dim + d], normal(generator));
      for (int i = 0; i < kNumBins; ++i) state[t * kNumBins + i] = std::fabs(normal(generator));
    }
  }
  for (int b = 0; b < batch_size; ++b) {
    pos_q[b] = 2 * shape.lengths[b * shape.num_kv_heads] - static_cast<int>(rows) + 5;
    for (int64_t i = b * heads * rows * dim; i < (b + 1) * heads * rows * dim; ++i) {
      cpu::store(&q[i], active[b] ? normal(generator) : nan);
    }
    for (int64_t i = b * heads * rows; i < (b + 1) * heads * rows; ++i) {
      lse[i] = active[b] ? 4.0f + normal(generator) : nan;
    }
  }
  std::vector<float> state_out(state.size(), nan), received(cu.back(), nan);

  Window w{};
  w.seg = {cu.data(), used.data(), batch_size, shape.num_kv_heads};
  w.q = q.data();
  w.lse = lse.data();
  w.k = k.data();
  w.pos = pos.data();
  w.pos_q = pos_q.data();
  w.active = active.data();
  w.q_strides[0] = heads * rows * dim, w.q_strides[1] = rows * dim, w.q_strides[2] = dim;
  w.lse_strides[0] = heads * rows, w.lse_strides[1] = rows;
  w.num_groups = shape.num_groups;
  w.head_dim = shape.head_dim;
  w.num_rows = shape.num_rows;
  w.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
  w.softcap = softcap;
  w.dtype = dtype;
  cpu::spectrogram({w, state.data(), state_out.data(), 0.99}, kSerial);
  cpu::attention_received({w, received.data(), shape.first_row}, kSerial);

  Errors worst;
  const auto keep = [](double* to, float got, double want) {
    const double e = std::fabs(got - want) / std::fmax(1.0, std::fabs(want));
    *to = e <= *to ? *to : e;  // NaN stays
  };
  const double pi = std::acos(-1.0), alpha = std::pow(0.99, kHop);
  for (int s = 0; s < num_segments; ++s) {
    const int b = s / shape.num_kv_heads, h = s % shape.num_kv_heads;
    for (int t = cu[s]; t < cu[s] + used[s]; ++t) {
      if (!active[b]) {
        keep(&worst.received, received[t], 0.0);
        for (int i = 0; i < kNumBins; ++i) {
          keep(&worst.spectrogram, state_out[t * kNumBins + i], state[t * kNumBins + i]);
        }
        continue;
      }
      std::vector<double> column(rows, 0.0);
      for (int i = 0; i < rows; ++i) {
        if (pos[t] > pos_q[b] + i) continue;
        for (int g = 0; g < shape.num_groups; ++g) {
          const int64_t row = (int64_t{b} * heads + h * shape.num_groups + g) * rows + i;
          double dot = 0.0;
          for (int d = 0; d < dim; ++d) {
            dot += double{cpu::load(q[row * dim + d])} * cpu::load(k[t * dim + d]);
          }
          column[i] +=
              std::exp(bounded(dot * w.softmax_scale, softcap) - lse[row]) / shape.num_groups;
        }
      }
      double sum = 0.0;
      for (int i = shape.first_row; i < rows; ++i) sum += column[i];
      keep(&worst.received, received[t], sum);
      for (int bin = 0; bin < kNumBins; ++bin) {
        double ema = state[t * kNumBins + bin];
        for (int f = 0; f + 1 < rows / kHop; ++f) {
          std::complex<double> x = 0.0;
          for (int m = 0; m < kNFft; ++m) {
            x += column[f * kHop + m] * 0.5 * (1.0 - std::cos(2.0 * pi * m / kNFft)) *
                 std::polar(1.0, -2.0 * pi * bin * m / kNFft);
          }
          ema = alpha * ema + (1.0 - alpha) * std::abs(x);
        }
        keep(&worst.spectrogram, state_out[t * kNumBins + bin], ema);
      }
    }
  }
  return worst;
}

}  // namespace

int main() {
  int failures = 0;
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!set_isa(isa)) continue;
    for (const float softcap : {0.0f, 1.5f}) {
      for (const Shape& shape : kShapes) {
        const Errors errors[3] = {run<float>(shape, DType::kFloat32, softcap),
                                  run<cpu::BFloat16>(shape, DType::kBFloat16, softcap),
                                  run<cpu::Half>(shape, DType::kFloat16, softcap)};
        for (int dtype = 0; dtype < 3; ++dtype) {
          const Errors& e = errors[dtype];
          if (e.spectrogram <= 3e-6 && e.received <= 3e-6) continue;
          std::printf("%s, D %d, rows %d, softcap %g, dtype %d: errors %g, %g\n", isa_name(isa),
                      shape.head_dim, shape.num_rows, softcap, dtype, e.spectrogram, e.received);
          ++failures;
        }
      }
    }
  }
  std::printf("window: %d failures\n", failures);
  return failures != 0;
}
