#include "swiglu.h"

#include "swiglu.cuh"

namespace trm_fast {
namespace cuda {

constexpr int THREADS = 256;

template <class T, int VEC>
static cudaError_t launch_fwd(const void* gate_up, void* out, int64_t N, int64_t F,
                              cudaStream_t stream) {
  swiglu_fwd_kernel<T, VEC><<<blocks_for(N * (F / VEC), THREADS), THREADS, 0, stream>>>(
      (const T*)gate_up, (T*)out, N, F);
  return cudaGetLastError();
}

template <class T, int VEC>
static cudaError_t launch_bwd(const void* grad, const void* gate_up, void* d, int64_t N, int64_t F,
                              cudaStream_t stream) {
  swiglu_bwd_kernel<T, VEC><<<blocks_for(N * (F / VEC), THREADS), THREADS, 0, stream>>>(
      (const T*)grad, (const T*)gate_up, (T*)d, N, F);
  return cudaGetLastError();
}

cudaError_t swiglu_fwd(DType dtype, const void* gate_up, void* out, int64_t N, int64_t F,
                       cudaStream_t stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = F % WIDE<T> == 0 && aligned({gate_up, out});
    return wide ? launch_fwd<T, WIDE<T>>(gate_up, out, N, F, stream)
                : launch_fwd<T, 1>(gate_up, out, N, F, stream);
  });
}

cudaError_t swiglu_bwd(DType dtype, const void* grad, const void* gate_up, void* d, int64_t N,
                       int64_t F, cudaStream_t stream) {
  if (N == 0 || F == 0) return cudaSuccess;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = F % WIDE<T> == 0 && aligned({grad, gate_up, d});
    return wide ? launch_bwd<T, WIDE<T>>(grad, gate_up, d, N, F, stream)
                : launch_bwd<T, 1>(grad, gate_up, d, N, F, stream);
  });
}

}  // namespace cuda
}  // namespace trm_fast
