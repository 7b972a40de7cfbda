#include "residual_rmsnorm.h"

#include <type_traits>

#include "residual_rmsnorm.cuh"

namespace trm_fast {
namespace cuda {

constexpr int HELD_ROWS = 8;  // of each warp: norms along up to 128 tokens read their input once

// f(std::integral_constant<int, CHUNKS>) for the fewest chunks of a warp's accesses that hold a row;
// 0 where a row is too long for registers.
template <class F>
static cudaError_t by_chunks(int64_t accesses, const F& f) {
  if (accesses <= WARP) return f(std::integral_constant<int, 1>{});
  if (accesses <= 2 * WARP) return f(std::integral_constant<int, 2>{});
  if (accesses <= 4 * WARP) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 0>{});
}

// f(Type, VEC, CHUNKS) as types, for how a row of D elements is read.
template <class F>
static cudaError_t by_row(DType dtype, bool aligned, int64_t D, const F& f) {
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (!aligned || D % WIDE<T> != 0)
      return f(type, std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
    return by_chunks(D / WIDE<T>, [&](auto chunks) {
      return f(type, std::integral_constant<int, WIDE<T>>{}, chunks);
    });
  });
}

cudaError_t rmsnorm_features_fwd(DType dtype, const void* h, const void* u, void* out, float* rstd,
                                 int64_t N, int64_t D, float eps, cudaStream_t stream) {
  if (N == 0) return cudaSuccess;
  return by_row(dtype, aligned({h, u, out}), D, [&](auto type, auto vec, auto chunks) {
    using T = decltype(type);
    constexpr int VEC = decltype(vec)::value, CHUNKS = decltype(chunks)::value;
    if constexpr (CHUNKS > 0)
      features_fwd_kernel<T, VEC, CHUNKS>
          <<<blocks_for(N, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(
              (const T*)h, (const T*)u, (T*)out, rstd, N, (int)D, eps);
    else
      long_features_fwd_kernel<T, VEC><<<(unsigned)N, ROW_THREADS, 0, stream>>>(
          (const T*)h, (const T*)u, (T*)out, rstd, D, eps);
    return cudaGetLastError();
  });
}

cudaError_t rmsnorm_features_bwd(DType dtype, const void* grad, const void* out, const float* rstd,
                                 void* d, int64_t N, int64_t D, cudaStream_t stream) {
  if (N == 0 || D == 0) return cudaSuccess;
  return by_row(dtype, aligned({grad, out, d}), D, [&](auto type, auto vec, auto chunks) {
    using T = decltype(type);
    constexpr int VEC = decltype(vec)::value, CHUNKS = decltype(chunks)::value;
    if constexpr (CHUNKS > 0)
      features_bwd_kernel<T, VEC, CHUNKS>
          <<<blocks_for(N, ROW_WARPS), ROW_WARPS * WARP, 0, stream>>>(
              (const T*)grad, (const T*)out, rstd, (T*)d, N, (int)D);
    else
      long_features_bwd_kernel<T, VEC><<<(unsigned)N, ROW_THREADS, 0, stream>>>(
          (const T*)grad, (const T*)out, rstd, (T*)d, D);
    return cudaGetLastError();
  });
}

// f(Type, VEC, HELD) as types, for how columns of S rows are read.
template <class F>
static cudaError_t by_column(DType dtype, bool aligned, int64_t S, int64_t D, const F& f) {
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (!aligned || D % WIDE<T> != 0)
      return f(type, std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
    constexpr std::integral_constant<int, WIDE<T>> vec;
    if (S <= HELD_ROWS * COLUMN_WARPS)
      return f(type, vec, std::integral_constant<int, HELD_ROWS>{});
    return f(type, vec, std::integral_constant<int, 0>{});
  });
}

cudaError_t rmsnorm_tokens_fwd(DType dtype, const void* h, const void* u, void* out, float* rstd,
                               int64_t B, int64_t S, int64_t D, float eps, cudaStream_t stream) {
  if (B == 0 || D == 0) return cudaSuccess;
  return by_column(dtype, aligned({h, u, out}), S, D, [&](auto type, auto vec, auto held) {
    using T = decltype(type);
    constexpr int VEC = decltype(vec)::value, HELD = decltype(held)::value;
    const unsigned blocks = (unsigned)(B * blocks_for(D, WARP * VEC));
    tokens_fwd_kernel<T, VEC, HELD><<<blocks, dim3(WARP, COLUMN_WARPS), 0, stream>>>(
        (const T*)h, (const T*)u, (T*)out, rstd, S, D, eps);
    return cudaGetLastError();
  });
}

cudaError_t rmsnorm_tokens_bwd(DType dtype, const void* grad, const void* out, const float* rstd,
                               void* d, int64_t B, int64_t S, int64_t D, cudaStream_t stream) {
  if (B == 0 || S == 0 || D == 0) return cudaSuccess;
  return by_column(dtype, aligned({grad, out, d}), S, D, [&](auto type, auto vec, auto held) {
    using T = decltype(type);
    constexpr int VEC = decltype(vec)::value, HELD = decltype(held)::value;
    const unsigned blocks = (unsigned)(B * blocks_for(D, WARP * VEC));
    tokens_bwd_kernel<T, VEC, HELD><<<blocks, dim3(WARP, COLUMN_WARPS), 0, stream>>>(
        (const T*)grad, (const T*)out, rstd, (T*)d, S, D);
    return cudaGetLastError();
  });
}

}  // namespace cuda
}  // namespace trm_fast
