// inject: z + (y + x), the inner sum rounded first. Its gradients are that of the result.
#include "elements.h"

namespace trm_fast {
namespace TRM_ISA {

template <class T>
static void forward(const Host& host, const void* z_, const void* y_, const void* x_, void* out_,
                    int64_t count) {
  const T *z = (const T*)z_, *y = (const T*)y_, *x = (const T*)x_;
  T* out = (T*)out_;
  parallel_ranges(host, count, 1 << 14, [&](int64_t, int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t i, auto part) __attribute__((always_inline)) {
      const vf shown = rounded_to<T>(part.load(y + i) + part.load(x + i));
      part.store(out + i, part.load(z + i) + shown);
    });
  });
}

void inject_fwd(const Host& host, DType dtype, const void* z, const void* y, const void* x,
                void* out, int64_t count) {
  (dtype == DType::f32 ? forward<float> : forward<bf16>)(host, z, y, x, out, count);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
