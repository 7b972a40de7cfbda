// Argument checks shared by the bindings, over the libtorch stable ABI.
//
// Kept to what the headers of torch 2.11 have: later ones add names that TORCH_TARGET_VERSION does
// not hide (ArrayRef ==, STABLE_TORCH_ERROR_CODE_CHECK). Schemas, fake tensors and gradients are
// Python's (trm_fast/extension).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>
#include <vector>

// What went wrong in a call of PyTorch, from torch 2.13 on; null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace trm_fast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The result of PyTorch's `what`, by the C interface: an error with its reason where it failed.
inline void check_call(const char* what, int32_t code) {
  const char* why = code != 0 && torch_exception_get_what_without_backtrace
                        ? torch_exception_get_what_without_backtrace()
                        : "PyTorch printed the reason";
  STD_TORCH_CHECK(code == 0, what, ": ", why);
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return "number " + std::to_string((int)dtype);
  }
}

// `t` is on the kind of device that this library serves.
inline void check_device(const char* op, const char* name, const Tensor& t) {
#ifdef USE_CUDA
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", name, " is not on a GPU");
#else
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU");
#endif
}

inline void check_dims(const char* op, const char* name, const Tensor& t, int64_t dims,
                       const char* wanted) {
  STD_TORCH_CHECK(t.dim() == dims, op, ": ", name, " is ", shape_text(t), ", expected ", wanted);
}

// `t` is contiguous, of this shape and dtype, on the device kind that the library serves.
inline void check_tensor(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool same = t.dim() == (int64_t)shape.size();
  std::string wanted = "[";
  int64_t i = 0;
  for (int64_t size : shape) {
    wanted += (i ? ", " : "") + std::to_string(size);
    same = same && t.size(i) == size;
    ++i;
  }
  STD_TORCH_CHECK(same, op, ": ", name, " is ", shape_text(t), ", expected ", wanted, "]");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has dtype ",
                  dtype_text(t.scalar_type()), ", expected ", dtype_text(dtype));
  check_device(op, name, t);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous");
}

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), ScalarType::Float);
}

}  // namespace trm_fast
