// What the CPU bindings share: the process as the kernels see it, and dtypes.
//
// A binding checks its arguments (torch gives it any strides, dtypes and shapes), allocates results
// and calls one kernel. Files bind_*.cpp are compiled once, the others once per instruction set.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../common.h"
#include "kernels.h"

namespace trm_fast {

// Runs kernels on PyTorch's threads. Memory goes back to a pool when the operation is over: fresh
// pages cost more than what is computed in them.
class TorchHost : public Host {
 public:
  TorchHost();
  ~TorchHost();
  TorchHost(const TorchHost&) = delete;
  TorchHost& operator=(const TorchHost&) = delete;

 private:
  struct Block {
    void* start;
    size_t bytes;
  };
  std::vector<Block> taken_;

  static void* take(const Host* host, size_t bytes);
  friend class Pool;
};

inline const Kernels& kernels() {
  const Kernels* found = kernels_or_null();
  STD_TORCH_CHECK(found != nullptr, "trm_fast: this library was built for another CPU");
  return *found;
}

// An empty tensor from the pool, to which its memory goes back: for what is kept until the backward
// of every step, whose fresh pages would cost a tenth of the step.
Tensor new_pooled(std::vector<int64_t> shape, ScalarType dtype);

// A table of floats, or null where there is none.
inline const float* floats(const std::optional<Tensor>& t) {
  return t.has_value() ? (const float*)t->const_data_ptr() : nullptr;
}

inline DType dtype_of(const char* op, const Tensor& t) {
  const ScalarType given = t.scalar_type();
  STD_TORCH_CHECK(given == ScalarType::Float || given == ScalarType::BFloat16, op,
                  ": expected float32 or bfloat16, not ", dtype_text(given));
  return given == ScalarType::Float ? DType::f32 : DType::bf16;
}

}  // namespace trm_fast
