// What the CUDA bindings share: devices, streams and dtypes.
//
// A binding checks its arguments (torch gives it any strides, dtypes, shapes and devices), makes the
// tensors' device the current one, allocates results and launches on the current stream.
#pragma once
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common.h"
#include "kernels.h"

namespace trm_fast {
namespace cuda {

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16, not ",
                      dtype_text(t.scalar_type()));
  }
}

// `t` is on the GPU of `like`: the dispatcher looks at one argument only.
inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name,
                  " is on another device than the other arguments");
}

inline void check_tensor(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> shape, ScalarType dtype,
                         const Tensor& like) {
  check_device(op, name, t, like);
  trm_fast::check_tensor(op, name, t, shape, dtype);
}

// The GPU of `t` is the current one while this lives; `stream` is PyTorch's there.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    check_call("the current stream",
               aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace cuda
}  // namespace trm_fast
