// PyTorch's operations as the recursion's driver calls them: through the dispatcher, or through the C
// interface where one takes a number (the dispatcher's stable calls cannot pass a Scalar).
//
// The same source serves CUDA and, in a build of the tests without USE_CUDA, the CPU.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#ifdef USE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define TRM_DEVICE_SHIM(name) aoti_torch_cuda_##name
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define TRM_DEVICE_SHIM(name) aoti_torch_cpu_##name
#endif

#include <tuple>
#include <vector>

#include "../common.h"

namespace trm_fast {
namespace aten {

using Shape = std::vector<int64_t>;

// The results of a registered operation, `count` tensors.
template <class... Args>
std::vector<Tensor> call(const char* name, const char* overload, size_t count, const Args&... args) {
  std::vector<StableIValue> stack{torch::stable::detail::from(args)...};
  if (stack.size() < count) stack.resize(count);
  check_call(name, torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> results;
  for (size_t i = 0; i < count; ++i)
    results.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return results;
}

inline Tensor viewed(const Tensor& t, const Shape& shape) { return torch::stable::view(t, shape); }

inline Tensor transposed(const Tensor& t, int64_t a = 0, int64_t b = 1) {
  return torch::stable::transpose(t, a, b);
}

inline Tensor in_order(const Tensor& t) { return torch::stable::contiguous(t); }

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor slice(Tensor t, int64_t axis, int64_t start, int64_t length) {
  return torch::stable::narrow(t, axis, start, length);
}

inline Tensor zeros_like(const Tensor& t) {
  Tensor made = torch::stable::empty_like(t);
  return torch::stable::zero_(made);
}

// a + b, in the wider dtype of the two.
inline Tensor add(const Tensor& a, const Tensor& b) {
  AtenTensorHandle sum = nullptr;
  check_call("add", aoti_torch_aten_subtract_Tensor(a.get(), b.get(), -1.0, &sum));
  return Tensor(sum);
}

inline Tensor mm(const Tensor& a, const Tensor& b) { return call("aten::mm", "", 1, a, b)[0]; }

// a @ b + c, rounded once.
inline Tensor mm_add(const Tensor& a, const Tensor& b, const Tensor& c) {
  Tensor out = torch::stable::empty_like(c);
  check_call("addmm",
             TRM_DEVICE_SHIM(addmm_out)(out.get(), c.get(), a.get(), b.get(), 1.0, 1.0));
  return out;
}

// a @ b in float, of factors in any dtype.
inline Tensor mm_float(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float) return mm(a, b);
#ifdef USE_CUDA
  return call("aten::mm", "dtype", 1, a, b, ScalarType::Float)[0];
#else
  return mm(cast(a, ScalarType::Float), cast(b, ScalarType::Float));
#endif
}

}  // namespace aten
}  // namespace trm_fast
