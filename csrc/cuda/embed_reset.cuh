// Forward: one access of each result per thread. The gradient to the embedding: each thread of a
// block adds one access of columns of a chunk of tokens into its own sums in shared memory, one
// for each word; then the chunks are added up in their order. No two threads add to one sum.
#pragma once
#include "embed_reset.h"
#include "vec.cuh"

namespace trm_fast {
namespace cuda {

constexpr int CHUNK_THREADS = 64;  // a row of 512 elements of 16 bits
constexpr int CHUNK_BYTES = 48 << 10;
constexpr int AHEAD = 8;          // tokens whose gradients are loaded before the first is added
constexpr int SUM_WARPS = 16;     // that share the rows of a sum over rows

// Words whose sums a block holds at once.
template <int VEC>
constexpr int WORDS = CHUNK_BYTES / (int)sizeof(float) / (CHUNK_THREADS * VEC);

__device__ __forceinline__ int64_t token_at(Tokens tokens, int64_t i) {
  return tokens.wide ? static_cast<const int64_t*>(tokens.data)[i]
                     : static_cast<const int32_t*>(tokens.data)[i];
}

// Elements of a source as they are in the states' dtype T.
template <class T, int VEC>
__device__ __forceinline__ Floats<VEC> load_as(Source from, int64_t i) {
  if (from.dtype == DType::f32 && sizeof(T) != sizeof(float)) {
    const Floats<VEC> f = up(load<VEC>(static_cast<const float*>(from.data) + i));
    return each<VEC>([&](int e) { return rounded<T>(f[e]); });
  }
  return up(load<VEC>(static_cast<const T*>(from.data) + i));
}

// What the reference multiplies by `scale`, at token s of item b, columns from d.
template <class T, int VEC>
__device__ __forceinline__ Floats<VEC> question(const EmbedReset& in, int64_t b, int64_t s,
                                                int64_t d) {
  Floats<VEC> x;
  if (s < in.P) {
    x = load_as<T, VEC>(in.rows, (b * in.P + s) * in.D + d);
  } else {
    const int64_t token = token_at(in.tokens, b * (in.S - in.P) + s - in.P);
    if (token >= 0 && token < in.V)
      x = load_as<T, VEC>(in.embedding, token * in.D + d);
    else
      x = each<VEC>([](int) { return __int_as_float(0x7fc00000); });
  }
  if (in.positions.data == nullptr) return x;
  const Floats<VEC> p = load_as<T, VEC>(in.positions, s * in.D + d);
  return each<VEC>([&](int e) { return rounded<T>(rounded<T>(x[e] + p[e]) * POSITION_SCALE); });
}

// What is thrown away is not read.
template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> restarted(bool reset, const StateView& state, Source init,
                                                  int64_t b, int64_t s, int64_t d) {
  if (reset) return down<T>(load_as<T, VEC>(init, d));
  return load<VEC>(static_cast<const T*>(state.data) + b * state.item + s * state.token + d);
}

template <class T, int VEC>
__global__ void embed_reset_fwd_kernel(const EmbedReset in, T* __restrict__ x, T* __restrict__ y,
                                       T* __restrict__ z) {
  const int64_t i = thread_index(), columns = in.D / VEC;
  if (i >= in.B * in.S * columns) return;
  const Place row = place(i, columns), item = place(row.row, in.S);
  const int64_t b = item.row, s = item.column, d = row.column * VEC;
  const Floats<VEC> q = question<T, VEC>(in, b, s, d);
  store(x + i * VEC, down<T>(each<VEC>([&](int e) { return q[e] * in.scale; })));
  const bool reset = in.halted[b];
  store(y + i * VEC, restarted<T, VEC>(reset, in.y, in.y_init, b, s, d));
  store(z + i * VEC, restarted<T, VEC>(reset, in.z, in.z_init, b, s, d));
}

// partials [chunks, V, D]: block (chunk, tile of columns, tile of words).
template <class T, int VEC>
__global__ void __launch_bounds__(CHUNK_THREADS)
    embedding_bwd_kernel(const T* __restrict__ grad, Tokens tokens, float* __restrict__ partials,
                         int64_t count, int64_t chunk, int64_t S, int64_t P, int64_t V, int64_t D) {
  extern __shared__ float sums[];  // [words][VEC][CHUNK_THREADS]
  const int64_t first_word = (int64_t)blockIdx.z * WORDS<VEC>;
  const int words = (int)min((int64_t)WORDS<VEC>, V - first_word);
  const int64_t column = ((int64_t)blockIdx.y * CHUNK_THREADS + threadIdx.x) * VEC;
  if (column >= D) return;
  float* own = sums + threadIdx.x;
  for (int i = 0; i < words * VEC; ++i) own[i * CHUNK_THREADS] = 0.f;
  const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, count), L = S - P;
  for (int64_t n = begin; n < end; n += AHEAD) {
    Pack<T, VEC> ahead[AHEAD];
    int word[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      word[a] = -1;
      if (n + a >= end) continue;
      const int64_t token = token_at(tokens, n + a) - first_word;
      if (token < 0 || token >= words) continue;
      word[a] = (int)token;
      const Place at = place(n + a, L);
      ahead[a] = load<VEC>(grad + (at.row * S + P + at.column) * D + column);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (word[a] < 0) continue;
      const Floats<VEC> g = up(ahead[a]);
#pragma unroll
      for (int e = 0; e < VEC; ++e) own[(word[a] * VEC + e) * CHUNK_THREADS] += g[e];
    }
  }
  float* to = partials + ((int64_t)blockIdx.x * V + first_word) * D + column;
  for (int w = 0; w < words; ++w)
#pragma unroll
    for (int e = 0; e < VEC; ++e) to[w * D + e] = own[(w * VEC + e) * CHUNK_THREADS];
}

// out [C] = factor * the sum of the rows of in [R,C]: each warp of a block every SUM_WARPS-th row
// of 32 accesses of columns, then the warps in their order.
template <class T, int VEC>
__global__ void __launch_bounds__(SUM_WARPS* WARP)
    sum_rows_kernel(const T* __restrict__ in, float* __restrict__ out, int64_t R, int64_t C,
                    float factor) {
  __shared__ float partial[SUM_WARPS][VEC][WARP];
  const int64_t column = ((int64_t)blockIdx.x * WARP + threadIdx.x) * VEC;
  Floats<VEC> sum = each<VEC>([](int) { return 0.f; });
  if (column < C) {
#pragma unroll 4
    for (int64_t r = threadIdx.y; r < R; r += SUM_WARPS) {
      const Floats<VEC> v = up(load<VEC>(in + r * C + column));
      sum = each<VEC>([&](int e) { return sum[e] + v[e]; });
    }
  }
#pragma unroll
  for (int e = 0; e < VEC; ++e) partial[threadIdx.y][e][threadIdx.x] = sum[e];
  __syncthreads();
  if (threadIdx.y != 0 || column >= C) return;
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    float total = 0.f;
#pragma unroll 4
    for (int w = 0; w < SUM_WARPS; ++w) total += partial[w][e][threadIdx.x];
    out[column + e] = total * factor;
  }
}

}  // namespace cuda
}  // namespace trm_fast
