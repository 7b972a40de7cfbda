// Vectors of one register, and what every kernel does with them.
//
// Compiled once per instruction set, in a namespace of its own (see kernels.h). GCC's and clang's
// vector extensions serve AVX2, AVX-512 and NEON from one source; intrinsics only where a conversion
// has an instruction of its own. Nothing of the standard library with linkage is used here: the
// linker would keep one copy of an inline function, and it might be another instruction set's.
//
// T is a type in memory, float or bf16; arithmetic is in float.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef TRM_ISA
#define TRM_ISA generic
#endif
#define INL __attribute__((always_inline)) inline
#define SEPARATE __attribute__((noinline, unused)) static  // compilers take long over large ones
#define UNROLL _Pragma("GCC unroll 16")

namespace trm_fast {
namespace TRM_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats of a vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

struct bf16 {
  uint16_t bits;
};

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));

template <class A>
INL A smaller(A a, A b) {
  return b < a ? b : a;
}
template <class A>
INL A larger(A a, A b) {
  return a < b ? b : a;
}
INL int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INL int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

INL vf splat(float x) { return x - vf{}; }
template <class To, class From>
INL To as(From v) {
  static_assert(sizeof(To) == sizeof(From), "as: equal sizes");
  To t;
  memcpy(&t, &v, sizeof t);
  return t;
}
INL vf select(vi mask, vf a, vf b) { return as<vf>((mask & as<vi>(a)) | (~mask & as<vi>(b))); }
// b where either is NaN. (The intrinsics without a mask draw false warnings from GCC 12.)
INL vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}
INL vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}

// ---- memory

INL vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INL void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

INL vf widen(vh h) {
#if defined(__AVX512F__)  // GCC 12 converts halves and joins them
  return as<vf>((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif defined(__AVX2__)
  return as<vf>((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return as<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

// Nearest, ties to even; a NaN stays one.
INL vh narrow(vf v) {
#if defined(__AVX512BF16__)
  return as<vh>(_mm512_cvtneps_pbh((__m512)v));
#else
  vu u = as<vu>(v);
  vu r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi nan = v != v;
  r = (r & ~as<vu>(nan)) | (as<vu>(nan) & 0x7fc0u);
  return __builtin_convertvector(r, vh);
#endif
}

INL vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}
INL void store(bf16* p, vf v) {
  vh h = narrow(v);
  memcpy(p, &h, sizeof h);
}

INL void set(float* p, float x) { *p = x; }
INL void set(bf16* p, float x) {
  uint32_t u = as<uint32_t>(x);
  uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = (uint16_t)(x != x ? 0x7fc0u : r);
}

// The first n < VL elements only; the others are zero, and memory beyond is neither read nor written.
template <class T>
INL vf load_first(const T* p, int64_t n) {
  T t[VL] = {};
  memcpy(t, p, (size_t)n * sizeof(T));
  return load(t);
}
template <class T>
INL void store_first(T* p, int64_t n, vf v) {
  T t[VL];
  store(t, v);
  memcpy(p, t, (size_t)n * sizeof(T));
}

// A value as it is after a trip through memory of type T.
INL vf rounded(const float*, vf v) { return v; }
INL vf rounded(const bf16*, vf v) { return widen(narrow(v)); }

// ---- across the lanes, always in the same order

// Halves are added to halves. (Written as a loop over lanes it goes through memory.)
INL float sum(vf v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 low = _mm512_extractf32x8_ps((__m512)v, 0);
  const __m256 eight = low + _mm512_extractf32x8_ps((__m512)v, 1);
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
#else
  static_assert(VL == 4, "sum: four lanes");
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
INL float largest(vf v) {
  float t[VL];
  store(t, v);
  float m = t[0];
  for (int i = 1; i < VL; ++i) m = larger(m, t[i]);
  return m;
}

// ---- functions

INL vf sqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < VL; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// exp(x), relative error below 2e-7; x is taken as at least -87.3 (1.2e-38) and at most 88.
INL vf exp(vf x) {
  x = min(max(x, splat(-87.3f)), splat(88.f));
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const vi exponent = (as<vi>(shifted) << 23);  // the low bits of `shifted` are n
  return as<vf>(as<vi>(p) + exponent);
}

// 1 / x for x in the normal range, to one ulp or two.
INL vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return y + y * (1.f - x * y);
#else
  return 1.f / x;
#endif
}

// 1 / (1 + exp(-x)); for a product that is rounded to T. Of bf16's 8 bits an error of 1.5e-4 hides.
template <class T = float>
INL vf sigmoid(vf x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const vf t = x * -1.44269504f;
    const vf r = (vf)_mm512_maskz_reduce_ps(0xffff, (__m512)t, 1);  // t - floor(t)
    vf p = splat(7.8024581e-2f);
    p = p * r + 2.2606721e-1f;
    p = p * r + 6.9583344e-1f;
    p = p * r + 9.9992524e-1f;
    p = (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)t);  // p 2^floor(t)
    return (vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)(1.f + p));
  }
#endif
  // Below what exp takes it would stay above 0, and a large x times that is no longer small.
  return select(x < -88.f, vf{}, reciprocal(1.f + exp(-x)));
}

// Gradients of h = silu(g) * u to g and u from dh, and h itself.
template <class T = float>
INL void swiglu_gradient(vf g, vf u, vf dh, vf& dg, vf& du, vf& h) {
  const vf s = sigmoid<T>(g), gs = g * s;
  h = gs * u;
  du = dh * gs;
  dg = dh * u * (gs * (1.f - s) + s);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
