// Scratch memory of one thread, kept between calls and aligned for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace namm_ext::cpu {

class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment)));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace namm_ext::cpu
