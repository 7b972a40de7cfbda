// One access of each tensor per thread; the elements behind the last whole access, one per thread.
#pragma once
#include "vec.cuh"

namespace trm_fast {
namespace cuda {

template <class T, int VEC>
__device__ __forceinline__ void inject_at(const T* __restrict__ z, const T* __restrict__ y,
                                          const T* __restrict__ x, T* __restrict__ out, int64_t i) {
  const Floats<VEC> a = up(load<VEC>(z + i)), b = up(load<VEC>(y + i)), c = up(load<VEC>(x + i));
  store(out + i, down<T>(each<VEC>([&](int e) { return a[e] + rounded<T>(b[e] + c[e]); })));
}

template <class T, int VEC>
__global__ void inject_fwd_kernel(const T* __restrict__ z, const T* __restrict__ y,
                                  const T* __restrict__ x, T* __restrict__ out, int64_t count) {
  const int64_t i = thread_index(), whole = count / VEC;
  if (i < whole)
    inject_at<T, VEC>(z, y, x, out, i * VEC);
  else if (i - whole < count - whole * VEC)
    inject_at<T, 1>(z, y, x, out, whole * VEC + i - whole);
}

}  // namespace cuda
}  // namespace trm_fast
