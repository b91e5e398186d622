// attend on every instruction set of this CPU against a double sum, without torch.
//
// Buffers end with the last live row, so that AddressSanitizer sees a read behind it; rooms inside
// are NaN. Built with NAMM_SANITIZE=address,undefined in CI.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "scalar.h"

namespace {

using namespace namm_ext;

struct Shape {
  int num_kv_heads, num_groups, head_dim, head_dim_v, num_new;
  std::vector<int> lengths;  // one per segment, the new rows included
};

const Shape kShapes[] = {
    {2, 4, 128, 128, 1, {300, 1, 0, 129}},
    {1, 3, 13, 7, 2, {65, 2}},
    {1, 7, 40, 24, 1, {2500}},
    {2, 2, 32, 32, 40, {300, 41, 40, 90}},
    {1, 5, 8, 200, 37, {333}},
    {1, 4, 64, 64, 150, {150}},
    {1, 3, 33, 51, 20, {70}},
};

// 0: no bound.
double bounded(double logit, double softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

template <class T>
std::vector<T> normal(size_t n, std::mt19937* generator) {
  std::normal_distribution<float> distribution;
  std::vector<T> x(n);
  for (T& value : x) cpu::store(&value, distribution(*generator));
  return x;
}

// The largest error of out and lse.
template <class T>
double run(const Shape& shape, DType dtype, float softcap) {
  std::mt19937 generator(1);
  const int num_segments = static_cast<int>(shape.lengths.size());
  const int batch_size = num_segments / shape.num_kv_heads;
  const int heads = shape.num_kv_heads * shape.num_groups, room = 3;
  std::vector<int32_t> cu{0}, used(shape.lengths.begin(), shape.lengths.end());
  for (int s = 0; s < num_segments; ++s) {
    cu.push_back(cu.back() + used[s] + (s + 1 < num_segments ? room : 0));
  }
  std::vector<T> k = normal<T>(size_t(cu.back()) * shape.head_dim, &generator);
  std::vector<T> v = normal<T>(size_t(cu.back()) * shape.head_dim_v, &generator);
  std::vector<T> q =
      normal<T>(size_t(batch_size) * heads * shape.num_new * shape.head_dim, &generator);
  std::vector<int32_t> pos(cu.back(), -1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Two positions per row; the newest row stands at the last query.
  const int last = 2 * *std::max_element(used.begin(), used.end());
  for (int s = 0; s < num_segments; ++s) {
    for (int t = cu[s]; t < cu[s + 1]; ++t) {
      pos[t] = last - 2 * (used[s] - 1 - (t - cu[s]));
      if (t < cu[s] + used[s]) continue;
      pos[t] = -1;
      for (int d = 0; d < shape.head_dim; ++d) cpu::store(&k[size_t(t) * shape.head_dim + d], nan);
      for (int d = 0; d < shape.head_dim_v; ++d)
        cpu::store(&v[size_t(t) * shape.head_dim_v + d], nan);
    }
  }
  std::vector<int32_t> first(batch_size, 0), count(batch_size, shape.num_new);
  std::vector<int32_t> pos_first(batch_size, last - shape.num_new + 1);
  std::vector<T> out(size_t(batch_size) * shape.num_new * heads * shape.head_dim_v);
  std::vector<float> lse(size_t(batch_size) * heads * shape.num_new, nan);

  AttendParams p{};
  p.seg = {cu.data(), used.data(), batch_size, shape.num_kv_heads};
  p.q = q.data();
  p.k = k.data();
  p.v = v.data();
  p.pos = pos.data();
  p.first = first.data();
  p.num_new = count.data();
  p.pos_first = pos_first.data();
  p.out = out.data();
  p.lse = lse.data();
  const int64_t dim = shape.head_dim, dim_v = shape.head_dim_v, cols = shape.num_new;
  p.q_strides[0] = heads * cols * dim, p.q_strides[1] = cols * dim, p.q_strides[2] = dim;
  p.out_strides[0] = cols * heads * dim_v, p.out_strides[1] = heads * dim_v,
  p.out_strides[2] = dim_v;
  p.lse_strides[0] = heads * cols, p.lse_strides[1] = cols, p.lse_strides[2] = 1;
  p.num_groups = shape.num_groups;
  p.head_dim = shape.head_dim;
  p.head_dim_v = shape.head_dim_v;
  p.num_cols = shape.num_new;
  p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
  p.softcap = softcap;
  p.dtype = dtype;
  cpu::attend(p, kSerial);

  double worst = 0.0;
  const auto error = [&](float got, double want) {
    const double e = want == got ? 0.0 : std::fabs(got - want);
    worst = e <= worst ? worst : e;  // NaN stays
  };
  for (int s = 0; s < num_segments; ++s) {
    const int b = s / shape.num_kv_heads, h = s % shape.num_kv_heads;
    for (int g = 0; g < shape.num_groups; ++g) {
      for (int i = 0; i < cols; ++i) {
        const int64_t head = h * shape.num_groups + g;
        const T* query = &q[((b * heads + head) * cols + i) * dim];
        double sum = 0.0;
        std::vector<double> want(dim_v, 0.0);
        for (int t = cu[s]; t < cu[s] + used[s] && pos[t] <= pos_first[b] + i; ++t) {
          double dot = 0.0;
          for (int d = 0; d < dim; ++d)
            dot += double(cpu::load(query[d])) * cpu::load(k[t * dim + d]);
          const double e = std::exp(bounded(dot * p.softmax_scale, softcap));
          sum += e;
          for (int d = 0; d < dim_v; ++d) want[d] += e * cpu::load(v[t * dim_v + d]);
        }
        for (int d = 0; d < dim_v; ++d) {
          error(cpu::load(out[((b * cols + i) * heads + head) * dim_v + d]),
                sum > 0 ? want[d] / sum : 0.0);
        }
        error(lse[(b * heads + head) * cols + i], std::log(sum));
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
        const double errors[3] = {run<float>(shape, DType::kFloat32, softcap),
                                  run<cpu::BFloat16>(shape, DType::kBFloat16, softcap),
                                  run<cpu::Half>(shape, DType::kFloat16, softcap)};
        const double allowed[3] = {2e-6, 2e-2, 2e-3};
        for (int dtype = 0; dtype < 3; ++dtype) {
          if (errors[dtype] <= allowed[dtype]) continue;
          std::printf("%s, D %d, new %d, softcap %g, dtype %d: error %g\n", isa_name(isa),
                      shape.head_dim, shape.num_new, softcap, dtype, errors[dtype]);
          ++failures;
        }
      }
    }
  }
  std::printf("attend: %d failures\n", failures);
  return failures != 0;
}
