// bam_scores and mlp_scores on every instruction set of this CPU against the modules spelled out in
// double, without torch.
//
// Buffers end with the last live row, so that AddressSanitizer sees a read behind it; rooms inside
// are NaN. The last parameter set is so large that the anchor of bam_scores overflows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "dispatch.h"
#include "kernels.h"

namespace {

using namespace namm_ext;

std::vector<double> features(const ScoreParams& p, int row, int newest) {
  std::vector<double> x;
  for (const bool cosine : {false, true}) {
    for (int j = 0; j < kNumRecency / 2; ++j) {
      const double angle = (double{0} + newest - p.pos[row]) * std::pow(kRecencyMaxFreq, -j / 4.0);
      x.push_back(cosine ? std::cos(angle) : std::sin(angle));
    }
  }
  for (int i = 0; i < kNumBins; ++i) {
    double z = p.state[row * kNumBins + i];
    if (p.log_transform) z = std::log(z + p.log_eps);
    z = (z - p.mean[i]) / std::fmax(std::sqrt(double{p.var[i]}), kMinStd);
    if (p.log_transform) z = std::fmin(std::fmax(z, -kLogClamp), kLogClamp);
    x.push_back(z);
  }
  return x;
}

// Scores of one segment of n rows by the law of spec 6.1.
std::vector<double> bam(const std::vector<std::vector<double>>& x, const float* w) {
  const int n = static_cast<int>(x.size());
  std::vector<std::vector<double>> qkv(n, std::vector<double>(3 * kHidden));
  for (int t = 0; t < n; ++t) {
    for (int j = 0; j < 3 * kHidden; ++j) {
      qkv[t][j] = w[kOffsetB1 + j];
      for (int i = 0; i < kNumFeatures; ++i) {
        qkv[t][j] += x[t][i] * w[kOffsetW1 + i * 3 * kHidden + j];
      }
    }
  }
  std::vector<double> scores(n);
  for (int t = 0; t < n; ++t) {
    std::vector<double> logit(n), out(kHidden, 0.0);
    double most = -INFINITY, sum = 0.0;
    for (int j = t; j < n; ++j) {
      for (int d = 0; d < kHidden; ++d) logit[j] += qkv[t][d] * qkv[j][kHidden + d];
      logit[j] /= std::sqrt(double{kHidden});
      most = std::max(most, logit[j]);
    }
    for (int j = t; j < n; ++j) {
      const double e = std::exp(logit[j] - most);
      sum += e;
      for (int d = 0; d < kHidden; ++d) out[d] += e * qkv[j][2 * kHidden + d];
    }
    scores[t] = w[kOffsetB3];
    for (int i = 0; i < kNumFeatures; ++i) {
      double r = w[kOffsetB2 + i], m = w[kOffsetB2 + kNumFeatures + i];
      for (int d = 0; d < kHidden; ++d) {
        r += out[d] / sum * w[kOffsetW2 + d * 2 * kNumFeatures + i];
        m += out[d] / sum * w[kOffsetW2 + d * 2 * kNumFeatures + kNumFeatures + i];
      }
      scores[t] += (x[t][i] * (1.0 + m) + r) * w[kOffsetW3 + i];
    }
  }
  return scores;
}

// The largest error, in units of the largest score or 1.
double run(const std::vector<int>& lengths, bool log_transform, bool use_mlp, float gain) {
  std::mt19937 generator(2);
  std::normal_distribution<float> normal;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int num_segments = static_cast<int>(lengths.size()), num_candidates = 2;
  const int batch_size = num_segments, room = 2;
  const int num_params = use_mlp ? kNumFeatures : kNumBamParams;
  std::vector<int32_t> cu{0}, used(lengths.begin(), lengths.end()), index(batch_size);
  for (int s = 0; s < num_segments; ++s) {
    cu.push_back(cu.back() + used[s] + (s + 1 < num_segments ? room : 0));
    index[s] = s % num_candidates;
  }
  std::vector<uint8_t> active(batch_size, 1);
  if (batch_size > 2) active[1] = 0;
  std::vector<float> state(size_t(cu.back()) * kNumBins, nan), scores(cu.back(), nan);
  std::vector<int32_t> pos(cu.back(), -1);
  for (int s = 0; s < num_segments; ++s) {
    for (int t = cu[s]; t < cu[s] + used[s]; ++t) {
      pos[t] = 3 * (t - cu[s]);
      for (int i = 0; i < kNumBins; ++i) state[t * kNumBins + i] = std::fabs(normal(generator));
    }
  }
  std::vector<float> params(num_candidates * num_params), mean(kNumBins, 0.5f), var(kNumBins, 0.3f);
  for (float& x : params) x = 0.2f * gain * normal(generator);

  ScoreParams p{};
  p.seg = {cu.data(), used.data(), batch_size, 1};
  p.state = state.data();
  p.pos = pos.data();
  p.params = params.data();
  p.param_index = index.data();
  p.mean = mean.data();
  p.var = var.data();
  p.active = active.data();
  p.scores = scores.data();
  p.num_params = num_params;
  p.num_candidates = num_candidates;
  p.log_transform = log_transform;
  p.log_eps = 1e-6f;
  p.hidden = kNumFeatures;
  p.depth = 1;
  if (use_mlp) {
    cpu::mlp_scores(p, kSerial);
  } else {
    cpu::bam_scores(p, kSerial);
  }

  double worst = 0.0;
  for (int s = 0; s < num_segments; ++s) {
    std::vector<std::vector<double>> x;
    for (int t = cu[s]; t < cu[s] + used[s]; ++t) {
      x.push_back(features(p, t, pos[cu[s] + used[s] - 1]));
    }
    const float* w = &params[index[s] * num_params];
    std::vector<double> want(x.size(), 0.0);
    if (active[s] && use_mlp) {
      for (size_t t = 0; t < x.size(); ++t) {
        for (int i = 0; i < kNumFeatures; ++i) want[t] += x[t][i] * w[i];
      }
    } else if (active[s]) {
      want = bam(x, w);
    }
    double scale = 1.0;
    for (const double value : want) scale = std::fmax(scale, std::fabs(value));
    for (size_t t = 0; t < x.size(); ++t) {
      const double e = std::fabs(scores[cu[s] + t] - want[t]) / scale;
      worst = e <= worst ? worst : e;  // NaN stays
    }
  }
  return worst;
}

}  // namespace

int main() {
  const std::vector<int> kLengths[] = {{1}, {15, 16, 17}, {300, 5, 0, 64}, {65, 63, 129}};
  int failures = 0;
  for (int i = 0; i < kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!set_isa(isa)) continue;
    for (const std::vector<int>& lengths : kLengths) {
      for (const bool log_transform : {false, true}) {
        const double errors[] = {run(lengths, log_transform, false, 1.0f),
                                 run(lengths, log_transform, true, 1.0f),
                                 run(lengths, log_transform, false, 4.0f)};
        const double allowed[] = {1e-5, 2e-6, 1e-3};
        for (int kind = 0; kind < 3; ++kind) {
          if (errors[kind] <= allowed[kind]) continue;
          std::printf("%s, %zu segments of %d.., log %d, kind %d: error %g\n", isa_name(isa),
                      lengths.size(), lengths[0], log_transform, kind, errors[kind]);
          ++failures;
        }
      }
    }
  }
  std::printf("scores: %d failures\n", failures);
  return failures != 0;
}
