// residual_rmsnorm: rms_norm(h + u) along the features or along the tokens, forward and backward.
//
// The sum is rounded, as the reference rounds it, and lies in `out` until its scale is known: one
// pass over memory, the second one finds it in the cache. The backward needs the result, which its
// reader keeps anyway, and 1/rms: r (dy - out mean(dy out)).
#include "elements.h"

namespace trm_fast {
namespace TRM_ISA {

// ---- along the features: a row at a time

// Sum over the lanes of the products first(j) * second(j), of all vectors of a row; several sums,
// because one would wait for itself.
template <class F>
INL float sum_row(int64_t D, const F& product) {
  vf sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * VL <= D; j += 4 * VL)
    UNROLL for (int i = 0; i < 4; ++i) sums[i] += product(j + i * VL, Whole{});
  each_vector(j, D, [&](int64_t k, auto part) __attribute__((always_inline)) {
    sums[0] += product(k, part);
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
static void norm_features(const T* h, const T* u, T* out, float* rstd, int64_t rows, int64_t D,
                          float eps) {
  for (int64_t m = 0; m < rows; ++m, h += D, u += D, out += D) {
    const float squares = sum_row(D, [&](int64_t j, auto part) __attribute__((always_inline)) {
      const vf s = rounded_to<T>(part.load(h + j) + part.load(u + j));
      part.store(out + j, s);
      return s * s;
    });
    const float scale = 1.f / __builtin_sqrtf(squares / (float)D + eps);
    rstd[m] = scale;
    each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
      part.store(out + j, part.load(out + j) * scale);
    });
  }
}

template <class T>
static void gradient_features(const T* grad, const T* out, const float* rstd, T* d, int64_t rows,
                              int64_t D) {
  for (int64_t m = 0; m < rows; ++m, grad += D, out += D, d += D) {
    const float products = sum_row(D, [&](int64_t j, auto part) __attribute__((always_inline)) {
      return part.load(grad + j) * part.load(out + j);
    });
    const float mean = products / (float)D, scale = rstd[m];
    each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
      part.store(d + j, (part.load(grad + j) - part.load(out + j) * mean) * scale);
    });
  }
}

// ---- along the tokens: NV vectors of columns of one item, S rows that are D apart

template <class T, int NV, class P>
INL void norm_columns(const T* h, const T* u, T* out, float* rstd, int64_t S, int64_t D, float eps,
                      P part) {
  vf squares[NV] = {};
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int i = 0; i < NV; ++i) {
      const int64_t at = t * D + i * VL;
      const vf s = rounded_to<T>(part.load(h + at) + part.load(u + at));
      part.store(out + at, s);
      squares[i] += s * s;
    }
  vf scale[NV];
  UNROLL for (int i = 0; i < NV; ++i) {
    scale[i] = 1.f / sqrt(squares[i] / (float)S + eps);
    part.store(rstd + i * VL, scale[i]);
  }
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int i = 0; i < NV; ++i) {
      T* at = out + t * D + i * VL;
      part.store(at, part.load(at) * scale[i]);
    }
}

template <class T, int NV, class P>
INL void gradient_columns(const T* grad, const T* out, const float* rstd, T* d, int64_t S,
                          int64_t D, P part) {
  vf mean[NV] = {}, scale[NV];
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int i = 0; i < NV; ++i) {
      const int64_t at = t * D + i * VL;
      mean[i] += part.load(grad + at) * part.load(out + at);
    }
  UNROLL for (int i = 0; i < NV; ++i) {
    mean[i] /= (float)S;
    scale[i] = part.load(rstd + i * VL);
  }
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int i = 0; i < NV; ++i) {
      const int64_t at = t * D + i * VL;
      part.store(d + at, (part.load(grad + at) - part.load(out + at) * mean[i]) * scale[i]);
    }
}

constexpr int COLUMNS = 8;  // vectors at a time: one sum each in a register

template <int NV>
struct Count {
  static constexpr int value = NV;
};

// f(first column, Count<vectors>, Whole or Part) for all columns of every item.
template <class F>
INL void each_columns(const Host& host, int64_t B, int64_t D, const F& f) {
  const int64_t blocks = ceil_div(D, COLUMNS * VL);
  parallel_ranges(host, B * blocks, 1, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = i / blocks;
      int64_t n = i % blocks * COLUMNS * VL;
      const int64_t last = smaller(D, n + COLUMNS * VL);
      for (; n + 8 * VL <= last; n += 8 * VL) f(item, n, Count<8>{}, Whole{});
      for (; n + 4 * VL <= last; n += 4 * VL) f(item, n, Count<4>{}, Whole{});
      for (; n + 3 * VL <= last; n += 3 * VL) f(item, n, Count<3>{}, Whole{});
      for (; n + 2 * VL <= last; n += 2 * VL) f(item, n, Count<2>{}, Whole{});
      for (; n + VL <= last; n += VL) f(item, n, Count<1>{}, Whole{});
      if (n < last) f(item, n, Count<1>{}, Part{last - n});
    }
  });
}

template <class T>
static void forward(const Host& host, const void* h_, const void* u_, void* out_, float* rstd,
                    int64_t B, int64_t S, int64_t D, bool tokens, float eps) {
  const T *h = (const T*)h_, *u = (const T*)u_;
  T* out = (T*)out_;
  if (!tokens)
    return parallel_rows(host, B * S, D, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * D;
      norm_features(h + at, u + at, out + at, rstd + begin, end - begin, D, eps);
    });
  if (S == 0) {  // no rows to take a mean of
    if (B * D > 0) memset(rstd, 0, (size_t)(B * D) * sizeof(float));
    return;
  }
  each_columns(host, B, D, [&](int64_t item, int64_t n, auto count, auto part) {
    const int64_t at = item * S * D + n;
    norm_columns<T, decltype(count)::value>(h + at, u + at, out + at, rstd + item * D + n, S, D, eps, part);
  });
}

template <class T>
static void backward(const Host& host, const void* grad_, const void* out_, const float* rstd,
                     void* d_, int64_t B, int64_t S, int64_t D, bool tokens) {
  const T *grad = (const T*)grad_, *out = (const T*)out_;
  T* d = (T*)d_;
  if (!tokens)
    return parallel_rows(host, B * S, D, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * D;
      gradient_features(grad + at, out + at, rstd + begin, d + at, end - begin, D);
    });
  if (S == 0) return;
  each_columns(host, B, D, [&](int64_t item, int64_t n, auto count, auto part) {
    const int64_t at = item * S * D + n;
    gradient_columns<T, decltype(count)::value>(grad + at, out + at, rstd + item * D + n, d + at, S, D, part);
  });
}

void residual_rmsnorm_fwd(const Host& host, DType dtype, const void* h, const void* u, void* out,
                          float* rstd, int64_t B, int64_t S, int64_t D, bool tokens, float eps) {
  (dtype == DType::f32 ? forward<float> : forward<bf16>)(host, h, u, out, rstd, B, S, D, tokens, eps);
}
void residual_rmsnorm_bwd(const Host& host, DType dtype, const void* grad, const void* out,
                          const float* rstd, void* d, int64_t B, int64_t S, int64_t D,
                          bool tokens) {
  (dtype == DType::f32 ? backward<float> : backward<bf16>)(host, grad, out, rstd, d, B, S, D, tokens);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
