// The threads a kernel may use, without knowing whose they are.
//
// cpp/ops passes torch's own pool; a unit test passes kSerial. Kernels never start threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace namm_ext {

class Parallel {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Calls body on disjoint ranges that cover [0, n), each at least grain long but for the last.
  using Run = void (*)(int64_t n, int64_t grain, Body body, void* context);

  constexpr Parallel(Run run, int num_threads) : run_(run), num_threads_(num_threads) {}

  // f(begin, end) on disjoint ranges of [0, n). How n is cut depends on the number of threads, so
  // the value of a result must not depend on the ranges.
  template <class F>
  void operator()(int64_t n, int64_t grain, F&& f) const {
    if (n <= 0) return;
    if (num_threads_ <= 1 || n <= grain) {
      f(int64_t{0}, n);
      return;
    }
    auto body = [](void* context, int64_t begin, int64_t end) {
      (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
    };
    run_(n, grain, body, const_cast<void*>(static_cast<const void*>(&f)));
  }

  // f(i) for i in [0, n), handed out one by one: for items of unequal size.
  template <class F>
  void each(int64_t n, F&& f) const {
    if (num_threads_ <= 1 || n <= 1) {
      for (int64_t i = 0; i < n; ++i) f(i);
      return;
    }
    int64_t next = 0;
    auto worker = [&](int64_t begin, int64_t end) {
      // One turn per range element would hand out too much: a thread stops when nothing is left.
      for (int64_t turn = begin; turn < end; ++turn) {
        for (;;) {
          const int64_t i = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
          if (i >= n) break;
          f(i);
        }
      }
    };
    (*this)(num_threads_ < n ? num_threads_ : n, 1, worker);
  }

  int num_threads() const { return num_threads_; }

 private:
  Run run_;
  int num_threads_;
};

constexpr Parallel kSerial{nullptr, 1};

}  // namespace namm_ext
