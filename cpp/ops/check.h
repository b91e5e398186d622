// The vocabulary of the prepare functions: each line checks one fact of one argument and says
// "op: argument must be X, got Y".
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <string>

#include "namm_ext/params.h"

namespace namm_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// [2, 3]; -1 reads *.
template <class Sizes>
std::string to_string(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator;
    if (size < 0) {
      text << "*";
    } else {
      text << size;
    }
    separator = ", ";
  }
  text << (sizes.size() == 0 ? "[]" : "]");
  return text.str();
}

inline std::string device_name(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

template <class T>
const T* input(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* output(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

class Check {
 public:
  // anchor: the argument whose device all others must share.
  Check(const char* op, const Tensor& anchor, const char* anchor_name)
      : op_(op), anchor_(anchor), anchor_name_(anchor_name) {}

  // A tensor of this dtype and shape (-1: any size) on the device of the anchor.
  void tensor(const Tensor& t, const char* name, ScalarType dtype,
              std::initializer_list<int64_t> shape) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, op_, ": ", name, " must be ", dtype_name(dtype),
                    ", got ", dtype_name(t.scalar_type()));
    this->shape(t, name, shape);
    device(t, name);
  }

  // The same, without gaps in memory.
  void dense(const Tensor& t, const char* name, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    tensor(t, name, dtype, shape);
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous, got strides ",
                    to_string(t.strides()));
  }

  // The same, with the last dimension contiguous and the others as they like.
  void rows(const Tensor& t, const char* name, ScalarType dtype,
            std::initializer_list<int64_t> shape) const {
    tensor(t, name, dtype, shape);
    const int64_t last = t.dim() - 1;
    STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op_, ": ", name,
                    " must be contiguous in its last dimension, got strides ",
                    to_string(t.strides()));
  }

  void shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    bool equal = t.dim() == static_cast<int64_t>(shape.size());
    int64_t i = 0;
    for (const int64_t size : shape) {
      equal = equal && (size < 0 || t.size(i) == size);
      ++i;
    }
    STD_TORCH_CHECK(equal, op_, ": ", name, " must have shape ", to_string(shape), ", got ",
                    to_string(t.sizes()));
  }

  void device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(
        t.is_cuda() == anchor_.is_cuda() && t.get_device_index() == anchor_.get_device_index(), op_,
        ": ", name, " must be on the device of ", anchor_name_, " (", device_name(anchor_),
        "), got ", device_name(t));
  }

  // Storage type of keys, values and queries.
  DType cache_dtype(const Tensor& t, const char* name) const {
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        STD_TORCH_CHECK(false, op_, ": ", name, " must be float32, bfloat16 or float16, got ",
                        dtype_name(t.scalar_type()));
    }
    return DType::kFloat32;
  }

  // A number that a kernel keeps in 32 bits.
  int32_t size(int64_t value, const char* name, int64_t least = 1) const {
    STD_TORCH_CHECK(value >= least && value <= INT32_MAX, op_, ": ", name, " must be in [", least,
                    ", ", INT32_MAX, "], got ", value);
    return static_cast<int32_t>(value);
  }

  float finite(double value, const char* name) const {
    STD_TORCH_CHECK(std::isfinite(static_cast<float>(value)), op_, ": ", name,
                    " must be finite, got ", value);
    return static_cast<float>(value);
  }

  // A bound of logits; 0 for none.
  float softcap(double value) const {
    STD_TORCH_CHECK(value >= 0.0, op_, ": softcap must not be negative, got ", value);
    return finite(value, "softcap");
  }

  // cu_seqlens_k [S + 1] and seqused_k [S] of batch_size rows. capacity: rows of the store.
  Segments segments(const Tensor& cu_seqlens_k, const Tensor& seqused_k, int64_t batch_size,
                    int64_t capacity) const {
    STD_TORCH_CHECK(batch_size >= 1, op_, ": the batch must have at least 1 row, got ", batch_size);
    STD_TORCH_CHECK(capacity <= INT32_MAX, op_, ": the store must have at most ", INT32_MAX,
                    " rows, got ", capacity);
    dense(seqused_k, "seqused_k", ScalarType::Int, {-1});
    const int64_t num_segments = seqused_k.size(0);
    STD_TORCH_CHECK(num_segments >= 1 && num_segments % batch_size == 0, op_,
                    ": seqused_k must have a positive multiple of ", batch_size,
                    " (batch_size) elements, got ", num_segments);
    dense(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, {num_segments + 1});
    return {input<int32_t>(cu_seqlens_k), input<int32_t>(seqused_k), size(batch_size, "batch_size"),
            size(num_segments / batch_size, "num_kv_heads")};
  }

  const char* op() const { return op_; }

 private:
  const char* op_;
  const Tensor& anchor_;
  const char* anchor_name_;
};

inline void copy_strides(const Tensor& t, int count, int64_t* strides) {
  for (int i = 0; i < count; ++i) strides[i] = t.stride(i);
}

}  // namespace namm_ext
