// Norms along rows: a warp holds a row in its registers, or a block reads it twice. Norms along
// columns: a block owns 32 accesses of columns, its warps share the rows; they hold them, or read
// them twice. What is held is packed as in memory: half the registers of floats.
#pragma once
#include "vec.cuh"

namespace trm_fast {
namespace cuda {

constexpr int ROW_WARPS = 4;      // rows of a block where a warp holds one
constexpr int ROW_THREADS = 256;  // of a block that reads a row twice
constexpr int COLUMN_WARPS = 16;  // that share the rows of a block of columns

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> total_of(const T* __restrict__ h, const T* __restrict__ u) {
  const Floats<VEC> a = up(load<VEC>(h)), b = up(load<VEC>(u));
  return down<T>(each<VEC>([&](int e) { return a[e] + b[e]; }));
}

template <class T, int VEC>
__device__ __forceinline__ float dot(const Pack<T, VEC>& a, const Pack<T, VEC>& b, float sum) {
  const Floats<VEC> left = up(a), right = up(b);
#pragma unroll
  for (int e = 0; e < VEC; ++e) sum = fmaf(left[e], right[e], sum);
  return sum;
}

template <int VEC>
__device__ __forceinline__ Floats<VEC> same(float v) {
  return each<VEC>([&](int) { return v; });
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> scaled(const Pack<T, VEC>& t, const Floats<VEC>& scale) {
  const Floats<VEC> v = up(t);
  return down<T>(each<VEC>([&](int e) { return v[e] * scale[e]; }));
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> projected(const Pack<T, VEC>& grad, const Pack<T, VEC>& out,
                                                  const Floats<VEC>& projection,
                                                  const Floats<VEC>& scale) {
  const Floats<VEC> g = up(grad), y = up(out);
  return down<T>(each<VEC>([&](int e) { return (g[e] - y[e] * projection[e]) * scale[e]; }));
}

// D is a multiple of VEC, at most CHUNKS accesses of a warp.
template <class T, int VEC, int CHUNKS>
__global__ void __launch_bounds__(ROW_WARPS* WARP)
    features_fwd_kernel(const T* __restrict__ h, const T* __restrict__ u, T* __restrict__ out,
                        float* __restrict__ rstd, int64_t N, int D, float eps) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP, first = row * D;
  if (row >= N) return;
  Pack<T, VEC> total[CHUNKS];
  float ssq = 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * VEC;
    if (column < D) {
      total[c] = total_of<T, VEC>(h + first + column, u + first + column);
      ssq = dot(total[c], total[c], ssq);
    }
  }
  const float scale = rsqrtf(warp_sum(ssq) / D + eps);
  if (lane == 0) rstd[row] = scale;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * VEC;
    if (column < D) store(out + first + column, scaled(total[c], same<VEC>(scale)));
  }
}

template <class T, int VEC, int CHUNKS>
__global__ void __launch_bounds__(ROW_WARPS* WARP)
    features_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ out,
                        const float* __restrict__ rstd, T* __restrict__ d, int64_t N, int D) {
  const int lane = threadIdx.x % WARP;
  const int64_t row = (int64_t)blockIdx.x * ROW_WARPS + threadIdx.x / WARP, first = row * D;
  if (row >= N) return;
  Pack<T, VEC> g[CHUNKS], y[CHUNKS];
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * VEC;
    if (column < D) {
      g[c] = load<VEC>(grad + first + column);
      y[c] = load<VEC>(out + first + column);
      sum = dot(g[c], y[c], sum);
    }
  }
  const float projection = warp_sum(sum) / D, scale = rstd[row];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = (c * WARP + lane) * VEC;
    if (column < D) store(d + first + column, projected(g[c], y[c], same<VEC>(projection), same<VEC>(scale)));
  }
}

// The sum over a block of ROW_THREADS, in every thread, always added in the same order.
__device__ __forceinline__ float block_sum(float v) {
  __shared__ float partial[ROW_THREADS / WARP];
  v = warp_sum(v);
  if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = v;
  __syncthreads();
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < ROW_THREADS / WARP; ++w) sum += partial[w];
  return sum;
}

// Rows of any width, one per block.
template <class T, int VEC>
__global__ void __launch_bounds__(ROW_THREADS)
    long_features_fwd_kernel(const T* __restrict__ h, const T* __restrict__ u, T* __restrict__ out,
                             float* __restrict__ rstd, int64_t D, float eps) {
  const int64_t first = (int64_t)blockIdx.x * D;
  float ssq = 0.f;
  for (int64_t i = threadIdx.x * VEC; i < D; i += ROW_THREADS * VEC) {
    const Pack<T, VEC> total = total_of<T, VEC>(h + first + i, u + first + i);
    ssq = dot(total, total, ssq);
  }
  const float scale = rsqrtf(block_sum(ssq) / (float)D + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
  for (int64_t i = threadIdx.x * VEC; i < D; i += ROW_THREADS * VEC)
    store(out + first + i, scaled(total_of<T, VEC>(h + first + i, u + first + i), same<VEC>(scale)));
}

template <class T, int VEC>
__global__ void __launch_bounds__(ROW_THREADS)
    long_features_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ out,
                             const float* __restrict__ rstd, T* __restrict__ d, int64_t D) {
  const int64_t first = (int64_t)blockIdx.x * D;
  float sum = 0.f;
  for (int64_t i = threadIdx.x * VEC; i < D; i += ROW_THREADS * VEC)
    sum = dot(load<VEC>(grad + first + i), load<VEC>(out + first + i), sum);
  const float projection = block_sum(sum) / (float)D, scale = rstd[blockIdx.x];
  for (int64_t i = threadIdx.x * VEC; i < D; i += ROW_THREADS * VEC)
    store(d + first + i, projected(load<VEC>(grad + first + i), load<VEC>(out + first + i),
                                   same<VEC>(projection), same<VEC>(scale)));
}

// The columns of a thread: those of its lane in the block's, and its warp's rows.
template <int VEC>
struct Columns {
  int64_t item, column, first;  // `first` element of the columns in the item's first row
  bool inside;
  __device__ __forceinline__ Columns(int64_t S, int64_t D) {
    const int64_t tiles = (D + WARP * VEC - 1) / (WARP * VEC);
    const Place at = place(blockIdx.x, tiles);
    item = at.row;
    column = at.column * WARP * VEC + threadIdx.x * VEC;
    first = item * S * D + column;
    inside = column < D;
  }
};

// sums[e], added up over the warps in their order; every thread gets its columns'.
template <int VEC>
__device__ __forceinline__ void sum_warps(Floats<VEC>& sums) {
  __shared__ float partial[COLUMN_WARPS][VEC][WARP];
#pragma unroll
  for (int e = 0; e < VEC; ++e) partial[threadIdx.y][e][threadIdx.x] = sums[e];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < VEC; ++e) {
    float sum = 0.f;
#pragma unroll 4
    for (int w = 0; w < COLUMN_WARPS; ++w) sum += partial[w][e][threadIdx.x];
    sums[e] = sum;
  }
}

template <class T, int VEC>
__device__ __forceinline__ void add_products(const Pack<T, VEC>& a, const Pack<T, VEC>& b,
                                             Floats<VEC>& sums) {
  const Floats<VEC> left = up(a), right = up(b);
#pragma unroll
  for (int e = 0; e < VEC; ++e) sums[e] = fmaf(left[e], right[e], sums[e]);
}

// f(i, s) for the warp's rows s < S: HELD of them, unrolled, or any number if HELD is 0.
template <int HELD, class F>
__device__ __forceinline__ void warp_rows(int64_t S, const F& f) {
  if constexpr (HELD > 0) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int s = i * COLUMN_WARPS + threadIdx.y;
      if (s < S) f(i, (int64_t)s);
    }
  } else {
#pragma unroll 1
    for (int64_t s = threadIdx.y; s < S; s += COLUMN_WARPS) f(0, s);
  }
}

// HELD rows of a warp in registers, S <= HELD * COLUMN_WARPS; or 0: any number, read twice. Told how
// many blocks share a multiprocessor: left alone the compiler aims at more, and spills.
template <class T, int VEC, int HELD>
__global__ void __launch_bounds__(COLUMN_WARPS* WARP, HELD > 0 ? 1 : 2)
    tokens_fwd_kernel(const T* __restrict__ h, const T* __restrict__ u, T* __restrict__ out,
                      float* __restrict__ rstd, int64_t S, int64_t D, float eps) {
  const Columns<VEC> at(S, D);
  Pack<T, VEC> held[HELD > 0 ? HELD : 1];
  Floats<VEC> sums = same<VEC>(0.f);
  if (at.inside) {
    warp_rows<HELD>(S, [&](int i, int64_t s) {
      held[i] = total_of<T, VEC>(h + at.first + s * D, u + at.first + s * D);
      add_products(held[i], held[i], sums);
    });
  }
  sum_warps(sums);
  if (!at.inside) return;
  const float share = 1.f / (float)S;
  const Floats<VEC> scale = each<VEC>([&](int e) { return rsqrtf(sums[e] * share + eps); });
  if (threadIdx.y == 0) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) rstd[at.item * D + at.column + e] = scale[e];
  }
  warp_rows<HELD>(S, [&](int i, int64_t s) {
    const int64_t row = at.first + s * D;
    store(out + row, scaled(HELD ? held[i] : total_of<T, VEC>(h + row, u + row), scale));
  });
}

template <class T, int VEC, int HELD>
__global__ void __launch_bounds__(COLUMN_WARPS* WARP, HELD > 0 ? 1 : 2)
    tokens_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ out,
                      const float* __restrict__ rstd, T* __restrict__ d, int64_t S, int64_t D) {
  const Columns<VEC> at(S, D);
  Pack<T, VEC> g[HELD > 0 ? HELD : 1], y[HELD > 0 ? HELD : 1];
  Floats<VEC> sums = same<VEC>(0.f);
  if (at.inside) {
    warp_rows<HELD>(S, [&](int i, int64_t s) {
      g[i] = load<VEC>(grad + at.first + s * D);
      y[i] = load<VEC>(out + at.first + s * D);
      add_products(g[i], y[i], sums);
    });
  }
  sum_warps(sums);
  if (!at.inside) return;
  const float share = 1.f / (float)S;
  const Floats<VEC> projection = each<VEC>([&](int e) { return sums[e] * share; });
  const float* scales = rstd + at.item * D + at.column;
  const Floats<VEC> scale = each<VEC>([&](int e) { return __ldg(scales + e); });
  warp_rows<HELD>(S, [&](int i, int64_t s) {
    const int64_t row = at.first + s * D;
    store(d + row, HELD ? projected(g[i], y[i], projection, scale)
                        : projected(load<VEC>(grad + row), load<VEC>(out + row), projection, scale));
  });
}

}  // namespace cuda
}  // namespace trm_fast
