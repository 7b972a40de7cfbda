// linear_rmsnorm: rms_norm(h + a w^T), forward and backward.
#include "gemm.h"
#include "host.h"
#include "linear.h"
#include "norm.h"
#include "weight_grad.h"

namespace trm_fast {
namespace TRM_ISA {

template <class Mode, class W>
void pack_linear(const Host& host, const W* w, int64_t D, int64_t E, word* out) {
  const int64_t parts = smaller<int64_t>(host.threads, ceil_div(D / VL, MAX_NV));
  parallel(host, parts, [&](int64_t part) {
    pack_transposed<Mode>([&](int64_t n) { return w + n * E; }, D, E, out,
                          panel_border(D / VL, part, parts), panel_border(D / VL, part + 1, parts));
  });
}
template <class Mode, class W>
void pack_linear_transposed(const Host& host, const W* w, int64_t D, int64_t E, word* out) {
  const int64_t parts = smaller<int64_t>(host.threads, ceil_div(E / VL, MAX_NV));
  parallel(host, parts, [&](int64_t part) {
    pack_straight<Mode>([&](int64_t k) { return w + k * E; }, E, E, D, out,
                        panel_border(E / VL, part, parts), panel_border(E / VL, part + 1, parts));
  });
}

template <class Mode>
void linear_rmsnorm_rows(const typename Mode::T* a, const word* w, const typename Mode::T* h,
                         typename Mode::T* out, float* rstd, int64_t rows, int64_t D, int64_t E,
                         float eps, const LinearScratch<Mode>& scratch) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    float* y = scratch.y;
    product<Mode>(operand<Mode>(a + first * E, count, E, scratch.a), words<Mode>(E), 1, w, count,
                  D / VL, words<Mode>(E),
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                      store(y + (m + i) * D + n + j * VL, v);
                    });
                  });
    for (int64_t m = 0; m < count; ++m)
      rstd[first + m] =
          add_norm_row(h + (first + m) * D, y + m * D, out + (first + m) * D, D, eps);
  }
}

template <class Mode>
void linear_rows(const typename Mode::T* a, const word* w, const typename Mode::T* residual,
                 typename Mode::T* out, int64_t rows, int64_t D, int64_t E,
                 typename Mode::E* scratch) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    auto* to = out + first * D;
    const auto* add = residual ? residual + first * D : nullptr;
    product<Mode>(operand<Mode>(a + first * E, count, E, scratch), words<Mode>(E), 1, w, count,
                  D / VL, words<Mode>(E),
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                      const int64_t at = (m + i) * D + n + j * VL;
                      store(to + at, add ? v + load(add + at) : v);
                    });
                  });
  }
}

template <class Mode>
static void forward(const Host& host, const void* a_, const void* w_, const void* h_, void* out_,
                    float* rstd, int64_t N, int64_t D, int64_t E, float eps) {
  using T = typename Mode::T;
  const T *a = (const T*)a_, *w = (const T*)w_, *h = (const T*)h_;
  word* packed = allocate<word>(host, words<Mode>(E) * D);
  pack_linear<Mode>(host, w, D, E, packed);
  auto* scratch = LinearScratch<Mode>::make(host, D, E);
  parallel_ranges(host, N, 16, [&](int64_t slot, int64_t begin, int64_t end) {
    linear_rmsnorm_rows<Mode>(a + begin * E, packed, h + begin * D, (T*)out_ + begin * D,
                              rstd + begin, end - begin, D, E, eps, scratch[slot]);
  });
}

template <class Mode>
static void backward(const Host& host, const void* dy_, const void* a_, const void* w_,
                     const void* out_, const float* rstd, void* da_, void* dw_, void* dh_, int64_t N,
                     int64_t D, int64_t E) {
  using T = typename Mode::T;
  const T *dy = (const T*)dy_, *a = (const T*)a_, *w = (const T*)w_, *out = (const T*)out_;
  T *dh = (T*)dh_, *da = (T*)da_, *dw = (T*)dw_;
  word* packed = allocate<word>(host, words<Mode>(D) * E);
  pack_linear_transposed<Mode>(host, w, D, E, packed);
  auto* scratch = LinearScratch<Mode>::make(host, E, D);
  parallel_ranges(host, N, 16, [&](int64_t slot, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m)
      norm_gradient_row(dy + m * D, out + m * D, rstd[m], dh + m * D, D);
    linear_rows<Mode>(dh + begin * D, packed, nullptr, da + begin * E, end - begin, E, D, scratch[slot].a);
  });
  float* sum = allocate<float>(host, D * E);
  word* memory = allocate<word>(host, weight_grad_words<Mode>(N, E, host.threads));
  weight_grad<Mode>(host, dh, D, D, a, E, E, N, sum, E, false, memory);
  copy_floats(host, sum, dw, D * E);
}

#define TRM_INSTANTIATE(Mode)                                                                      \
  template void linear_rmsnorm_rows<Mode>(const Mode::T*, const word*, const Mode::T*, Mode::T*,   \
                                          float*, int64_t, int64_t, int64_t, float,               \
                                          const LinearScratch<Mode>&);                             \
  template void linear_rows<Mode>(const Mode::T*, const word*, const Mode::T*, Mode::T*, int64_t,  \
                                  int64_t, int64_t, Mode::E*);
TRM_INSTANTIATE(Float)
TRM_INSTANTIATE(Bfloat16)

#define TRM_INSTANTIATE_PACKING(Mode, W)                                                          \
  template void pack_linear<Mode, W>(const Host&, const W*, int64_t, int64_t, word*);             \
  template void pack_linear_transposed<Mode, W>(const Host&, const W*, int64_t, int64_t, word*);
TRM_INSTANTIATE_PACKING(Float, float)
TRM_INSTANTIATE_PACKING(Bfloat16, float)
TRM_INSTANTIATE_PACKING(Bfloat16, bf16)

void linear_rmsnorm_fwd(const Host& host, DType dtype, const void* a, const void* w, const void* h,
                        void* out, float* rstd, int64_t N, int64_t D, int64_t E, float eps) {
  (dtype == DType::f32 ? forward<Float> : forward<Bfloat16>)(host, a, w, h, out, rstd, N, D, E, eps);
}
void linear_rmsnorm_bwd(const Host& host, DType dtype, const void* dy, const void* a, const void* w,
                        const void* out, const float* rstd, void* da, void* dw, void* dh, int64_t N,
                        int64_t D, int64_t E) {
  (dtype == DType::f32 ? backward<Float> : backward<Bfloat16>)(host, dy, a, w, out, rstd, da, dw, dh,
                                                               N, D, E);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
