#include "embed_reset.h"

#include <algorithm>

#include "embed_reset.cuh"

namespace trm_fast {
namespace cuda {

constexpr int THREADS = 256;
constexpr int64_t CHUNK = 128;                  // tokens: a few blocks for every multiprocessor
constexpr int64_t PARTIAL_BYTES = 64ll << 20;  // at most, unless one sum alone is larger

template <class T, int VEC>
static cudaError_t launch_fwd(const EmbedReset& in, void* x, void* y, void* z,
                              cudaStream_t stream) {
  const unsigned blocks = blocks_for(in.B * in.S * (in.D / VEC), THREADS);
  embed_reset_fwd_kernel<T, VEC><<<blocks, THREADS, 0, stream>>>(in, (T*)x, (T*)y, (T*)z);
  return cudaGetLastError();
}

cudaError_t embed_reset_fwd(DType dtype, const EmbedReset& in, void* x, void* y, void* z,
                            cudaStream_t stream) {
  if (in.B == 0 || in.S == 0 || in.D == 0) return cudaSuccess;
  for (const Source& source : {in.rows, in.embedding, in.positions, in.y_init, in.z_init})
    if (source.data && source.dtype != dtype && source.dtype != DType::f32)
      return cudaErrorInvalidValue;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t strides = in.y.item | in.y.token | in.z.item | in.z.token;
    const bool wide = (in.D | strides) % WIDE<T> == 0 &&
                      aligned({in.rows.data, in.embedding.data, in.positions.data, in.y.data,
                               in.z.data, in.y_init.data, in.z_init.data, x, y, z});
    return wide ? launch_fwd<T, WIDE<T>>(in, x, y, z, stream)
                : launch_fwd<T, 1>(in, x, y, z, stream);
  });
}

template <class T, int VEC>
static cudaError_t launch_sum(const void* in, float* out, int64_t R, int64_t C, float factor,
                              cudaStream_t stream) {
  sum_rows_kernel<T, VEC><<<blocks_for(C, WARP * VEC), dim3(WARP, SUM_WARPS), 0, stream>>>(
      (const T*)in, out, R, C, factor);
  return cudaGetLastError();
}

static cudaError_t sum_rows(DType dtype, const void* in, float* out, int64_t R, int64_t C,
                            float factor, cudaStream_t stream) {
  if (C == 0) return cudaSuccess;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return C % WIDE<T> == 0 && aligned({in}) ? launch_sum<T, WIDE<T>>(in, out, R, C, factor, stream)
                                             : launch_sum<T, 1>(in, out, R, C, factor, stream);
  });
}

cudaError_t embed_reset_positions_bwd(DType dtype, const void* grad, float* out, int64_t B,
                                      int64_t S, int64_t D, float factor, cudaStream_t stream) {
  return sum_rows(dtype, grad, out, B, S * D, factor, stream);
}

int64_t embed_reset_partials(int64_t B, int64_t S, int64_t P, int64_t V, int64_t D) {
  const int64_t bytes = std::max<int64_t>(1, V * D * (int64_t)sizeof(float));
  const int64_t chunks = (B * (S - P) + CHUNK - 1) / CHUNK;
  return std::min(chunks, std::max<int64_t>(1, PARTIAL_BYTES / bytes));
}

template <class T, int VEC>
static cudaError_t launch_chunks(const void* grad, Tokens tokens, float* partials, int64_t count,
                                 int64_t chunks, int64_t S, int64_t P, int64_t V, int64_t D,
                                 cudaStream_t stream) {
  const dim3 blocks((unsigned)chunks, blocks_for(D, CHUNK_THREADS * VEC),
                    blocks_for(V, WORDS<VEC>));
  const int64_t words = std::min<int64_t>(V, WORDS<VEC>);
  const size_t bytes = (size_t)words * CHUNK_THREADS * VEC * sizeof(float);
  embedding_bwd_kernel<T, VEC><<<blocks, CHUNK_THREADS, bytes, stream>>>(
      (const T*)grad, tokens, partials, count, (count + chunks - 1) / chunks, S, P, V, D);
  return cudaGetLastError();
}

cudaError_t embed_reset_bwd(DType dtype, const void* grad, Tokens tokens, float* partials,
                            float* out, int64_t B, int64_t S, int64_t P, int64_t V, int64_t D,
                            float factor, cudaStream_t stream) {
  const int64_t chunks = embed_reset_partials(B, S, P, V, D), count = B * (S - P);
  if (V == 0 || D == 0) return cudaSuccess;
  if (chunks > 0) {
    const cudaError_t error = by_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      const bool wide = D % WIDE<T> == 0 && aligned({grad});
      return wide ? launch_chunks<T, WIDE<T>>(grad, tokens, partials, count, chunks, S, P, V, D,
                                              stream)
                  : launch_chunks<T, 1>(grad, tokens, partials, count, chunks, S, P, V, D, stream);
    });
    if (error != cudaSuccess) return error;
  }
  return sum_rows(DType::f32, partials, out, chunks, V * D, factor, stream);
}

}  // namespace cuda
}  // namespace trm_fast
