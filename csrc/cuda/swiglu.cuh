// One access of gate and one of up per thread. Rounds where the reference does.
//
// Formula, s = sigmoid(g): d gate = d up s (1 + g (1 - s)), d up = d silu(g), d the gradient.
#pragma once
#include "vec.cuh"

namespace trm_fast {
namespace cuda {

// Two units in the last place, on the special function unit whatever the compiler's flags.
__device__ __forceinline__ float sigmoid(float v) { return __fdividef(1.f, 1.f + __expf(-v)); }

template <class T, int VEC>
__global__ void swiglu_fwd_kernel(const T* __restrict__ gate_up, T* __restrict__ out, int64_t N,
                                  int64_t F) {
  const int64_t i = thread_index(), columns = F / VEC;
  if (i >= N * columns) return;
  const Place at = place(i, columns);
  const T* from = gate_up + at.row * 2 * F + at.column * VEC;
  const Floats<VEC> g = up(load<VEC>(from)), u = up(load<VEC>(from + F));
  store(out + i * VEC,
        down<T>(each<VEC>([&](int e) { return rounded<T>(g[e] * sigmoid(g[e])) * u[e]; })));
}

template <class T, int VEC>
__global__ void swiglu_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ gate_up,
                                  T* __restrict__ d, int64_t N, int64_t F) {
  const int64_t i = thread_index(), columns = F / VEC;
  if (i >= N * columns) return;
  const Place at = place(i, columns);
  const int64_t offset = at.row * 2 * F + at.column * VEC;
  const Floats<VEC> dy = up(load<VEC>(grad + i * VEC)), g = up(load<VEC>(gate_up + offset)),
                    u = up(load<VEC>(gate_up + offset + F));
  const Floats<VEC> s = each<VEC>([&](int e) { return sigmoid(g[e]); });
  store(d + offset, down<T>(each<VEC>([&](int e) {
          return rounded<T>(dy[e] * u[e]) * s[e] * (1.f + g[e] * (1.f - s[e]));
        })));
  store(d + offset + F,
        down<T>(each<VEC>([&](int e) { return dy[e] * rounded<T>(g[e] * s[e]); })));
}

}  // namespace cuda
}  // namespace trm_fast
