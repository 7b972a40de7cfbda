#include "inject.h"

#include "inject.cuh"

namespace trm_fast {
namespace cuda {

template <class T, int VEC>
static cudaError_t launch(const void* z, const void* y, const void* x, void* out, int64_t count,
                          cudaStream_t stream) {
  constexpr int THREADS = 256;
  const unsigned blocks = blocks_for(count / VEC + count % VEC, THREADS);
  inject_fwd_kernel<T, VEC><<<blocks, THREADS, 0, stream>>>((const T*)z, (const T*)y, (const T*)x,
                                                            (T*)out, count);
  return cudaGetLastError();
}

cudaError_t inject_fwd(DType dtype, const void* z, const void* y, const void* x, void* out,
                       int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  return by_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    return aligned({z, y, x, out}) ? launch<T, WIDE<T>>(z, y, x, out, count, stream)
                                   : launch<T, 1>(z, y, x, out, count, stream);
  });
}

}  // namespace cuda
}  // namespace trm_fast
