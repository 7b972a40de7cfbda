#include "rotate_qkv.h"

#include "rotate_qkv.cuh"

namespace trm_fast {
namespace cuda {

template <bool BACK>
static cudaError_t rotate(DType dtype, const void* q, const void* k, const void* v,
                          const float* cos, const float* sin, void* out, int64_t B, int64_t S,
                          int64_t H, int64_t K, int64_t stride, cudaStream_t stream) {
  if (K % 2 != 0) return cudaErrorInvalidValue;
  if (B == 0 || S == 0 || H == 0 || K == 0) return cudaSuccess;
  constexpr int THREADS = 256;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const bool wide = K / 2 % WIDE<T> == 0 && aligned({q, k, v, cos, sin, out});
    const int64_t accesses = B * S * 3 * H * (K / 2) / (wide ? WIDE<T> : 1);
    const auto kernel =
        wide ? rotate_qkv_kernel<T, WIDE<T>, BACK> : rotate_qkv_kernel<T, 1, BACK>;
    kernel<<<blocks_for(accesses, THREADS), THREADS, 0, stream>>>(
        (const T*)q, (const T*)k, (const T*)v, cos, sin, (T*)out, B * S, S, H, K, stride);
    return cudaGetLastError();
  });
}

cudaError_t rotate_qkv_fwd(DType dtype, const void* qkv, const float* cos, const float* sin,
                           void* out, int64_t B, int64_t S, int64_t H, int64_t K,
                           cudaStream_t stream) {
  const int64_t size = dtype == DType::f32 ? 4 : 2;
  const char* q = (const char*)qkv;
  return rotate<false>(dtype, q, q + H * K * size, q + 2 * H * K * size, cos, sin, out, B, S, H, K,
                       3 * H * K, stream);
}

cudaError_t rotate_qkv_bwd(DType dtype, const void* dq, const void* dk, const void* dv,
                           const float* cos, const float* sin, void* out, int64_t B, int64_t S,
                           int64_t H, int64_t K, cudaStream_t stream) {
  return rotate<true>(dtype, dq, dk, dv, cos, sin, out, B, S, H, K, H * K, stream);
}

}  // namespace cuda
}  // namespace trm_fast
