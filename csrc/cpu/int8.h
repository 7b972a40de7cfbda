// Products in eight bits, for passes without a gradient: exact sums of whole numbers.
//
// A row of activations and a row of a weight (one output channel) each become whole numbers from -127
// to 127, in steps of their largest magnitude / 127. Their products are summed in int32, exactly, and
// a sum times both steps is the result: the same bits on every instruction set and in
// trm_fast/quantize.py. A row of zeros, or below SMALLEST, has the step 0; one with an infinity or a
// NaN the step NaN, which all of its results become.
//
// Words: four bytes, activations + 128 without a sign and weights with one, where the CPU has
// vpdpbusd; else two int16. Panels are those of gemm.h with one row more at their start, what the
// sums begin with: -128 times the sums of the weights, or 0.
#pragma once
#include "gemm.h"
#include "host.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trm_fast {
namespace TRM_ISA {

struct Int8 {
#if defined(__AVX512VNNI__)
  using Given = uint8_t;
  using Weight = int8_t;
  static constexpr int per_word = 4, offset = 128;
#else
  using Given = int16_t;
  using Weight = int16_t;
  static constexpr int per_word = 2, offset = 0;
#endif
};
constexpr float SMALLEST = 1e-30f;

// c + the products of a's and b's bytes or halves; c holds int32.
//
// In assembly: GCC 12 spills these accumulators around its own intrinsic, to half the rate.
INL vf add_products(vf c, vf a, vf b) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
  return c;
#elif defined(__AVX512F__)
  return as<vf>(as<vi>(c) + as<vi>(_mm512_madd_epi16(as<__m512i>(a), as<__m512i>(b))));
#elif defined(__AVX2__)
  return as<vf>(as<vi>(c) + as<vi>(_mm256_madd_epi16(as<__m256i>(a), as<__m256i>(b))));
#elif defined(__SSE2__)
  return as<vf>(as<vi>(c) + as<vi>(_mm_madd_epi16(as<__m128i>(a), as<__m128i>(b))));
#else
  const auto low = [](vf v) { return as<vi>(as<vu>(v) << 16) >> 16; };
  const auto high = [](vf v) { return as<vi>(v) >> 16; };
  return as<vf>(as<vi>(c) + low(a) * low(b) + high(a) * high(b));
#endif
}

// The same with b in memory.
INL vf add_products(vf c, vf a, const word* b) {
#if defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "m"(*(const vu*)(const void*)b));
  return c;
#else
  return add_products(c, a, load(b));
#endif
}

// c = what the panel begins with + A B over the other K - 1 rows of words.
template <int MR, int NV>
INL void block(Int8, const word* a, int64_t lda, int64_t step, const word* b, int64_t ldb, int64_t K,
               vf (&c)[MR][NV]) {
  UNROLL for (int j = 0; j < NV; ++j) {
    const vf start = load(b + j * VL);
    UNROLL for (int i = 0; i < MR; ++i) c[i][j] = start;
  }
  // Only its operand with a sign can vpdpbusd take from memory for all lanes: `ai` needs a register.
  // With 7 x 4 sums that is one too many, and the last column stays in memory.
  constexpr int HELD = MR * NV + NV < 32 ? NV : NV - 1;
  for (int64_t k = 1; k < K; ++k) {
    b += ldb;
    vf row[NV];
    UNROLL for (int j = 0; j < HELD; ++j) row[j] = load(b + j * VL);
    UNROLL for (int i = 0; i < MR; ++i) {
      int32_t bits;
      memcpy(&bits, a + i * lda, sizeof bits);
      const vf ai = as<vf>(bits - vi{});
      UNROLL for (int j = 0; j < HELD; ++j) c[i][j] = add_products(c[i][j], ai, row[j]);
      if constexpr (HELD < NV) c[i][HELD] = add_products(c[i][HELD], ai, b + HELD * VL);
    }
    a += step;
  }
}

// A weight [N, K]: panels as deep as `words` words and one, and the steps of its rows.
struct Int8Weight {
  word* panels;
  float* steps;
  int64_t words;

  // row(n), n < columns: K floats, or null for zeros. `columns` is a multiple of VL; zeros fill up
  // from K to `depth`, a multiple of 16.
  template <class Row>
  static Int8Weight make(const Host& host, Row row, int64_t columns, int64_t K, int64_t depth);

  // [N, K] row by row, K a multiple of 16.
  static Int8Weight make(const Host& host, const float* w, int64_t N, int64_t K);
  // The same of whole numbers from -127 to 127, in steps of 1.
  static Int8Weight of_numbers(const Host& host, const int8_t* w, int64_t N, int64_t K);
};

// The weights of a channel MLP, as channel.h has them: P is F padded.
Int8Weight int8_gate_up(const Host& host, const float* w, int64_t D, int64_t F, int64_t P);
Int8Weight int8_down(const Host& host, const float* w, int64_t D, int64_t F, int64_t P);

// Of one thread: up to `count` rows of K activations.
struct Int8Rows {
  word* rows;
  float* steps;

  static Int8Rows make(const Host& host, int64_t count, int64_t K);
};

// ---- from floats

// Nearest whole number, ties to even, of magnitudes far below 2^31.
INL vi nearest(vf v) {
#if defined(__AVX512F__)
  return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtps_epi32((__m256)v);
#else
  for (int i = 0; i < VL; ++i) v[i] = __builtin_rintf(v[i]);
  return __builtin_convertvector(v, vi);
#endif
}

// The largest of all lanes, none negative.
INL int32_t largest(vi v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256i eight = _mm256_max_epi32(_mm512_extracti32x8_epi32((__m512i)v, 0),
                                         _mm512_extracti32x8_epi32((__m512i)v, 1));
#else
  const __m256i eight = (__m256i)v;
#endif
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
#else
  int32_t m = v[0];
  for (int i = 1; i < VL; ++i) m = larger(m, v[i]);
  return m;
#endif
}

// x [K] as whole numbers plus `offset`; returns their step.
template <class E, class T>
INL float quantize_row(const T* x, int64_t K, int offset, E* out) {
  typedef E narrow_vector __attribute__((vector_size(VL * sizeof(E))));
  constexpr int32_t INFINITE = 0x7f800000;
  const int64_t whole = K / VL * VL, rest = K - whole;
  // Magnitudes are compared as integers: there a NaN is the largest.
  vi top = vi{};
  const auto take = [&](vf v) {
    const vi magnitude = as<vi>(v) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  };
  for (int64_t i = 0; i < whole; i += VL) take(load(x + i));
  if (rest) take(load_first(x + whole, rest));
  const int32_t bits = largest(top);
  const float most = as<float>(bits);
  if (bits >= INFINITE || most < SMALLEST) {
    for (int64_t i = 0; i < K; ++i) out[i] = (E)offset;
    return bits >= INFINITE ? as<float>(0x7fc00000) : 0.f;
  }
  const float inverse = 127.f / most;
  const auto made = [&](vf v) {
    return __builtin_convertvector(nearest(v * inverse) + offset, narrow_vector);
  };
  for (int64_t i = 0; i < whole; i += VL) {
    const narrow_vector q = made(load(x + i));
    memcpy(out + i, &q, sizeof q);
  }
  if (rest) {
    const narrow_vector q = made(load_first(x + whole, rest));
    memcpy(out + whole, &q, (size_t)rest * sizeof(E));
  }
  return most / 127.f;
}

// x [count, K] into `to`; K is a multiple of 16.
template <class T>
INL void quantize_rows(const T* x, int64_t count, int64_t K, const Int8Rows& to) {
  for (int64_t m = 0; m < count; ++m)
    to.steps[m] = quantize_row(x + m * K, K, Int8::offset, (Int8::Given*)(void*)to.rows + m * K);
}

// Rows against a weight: epilogue(row, skip, column, c), sums of whole numbers in each lane of c.
template <class Epilogue>
INL void product(const Int8Rows& a, const Int8Weight& w, int64_t count, int64_t columns,
                 const Epilogue& epilogue) {
  product<Int8>(a.rows, w.words, 1, w.panels, count, columns / VL, w.words + 1, epilogue);
}

// The value of sums, from the steps of their columns and of their row.
INL vf value(vf sums, const float* columns, float row) {
  return __builtin_convertvector(as<vi>(sums), vf) * load(columns) * row;
}

// ---- the parts of a block, as linear.h and channel.h have them

// out [rows, D] = a [rows, E] w^T.
template <class T>
void int8_linear_rows(const T* a, const Int8Weight& w, T* out, int64_t rows, int64_t D, int64_t E,
                      const Int8Rows& scratch);

// out [rows, D] = rms_norm(h + a w^T) and 1/rms of each row. y: ROWS * D.
template <class T>
void int8_linear_rmsnorm_rows(const T* a, const Int8Weight& w, const T* h, T* out, float* rstd,
                              int64_t rows, int64_t D, int64_t E, float eps, float* y,
                              const Int8Rows& scratch);

// out [rows, D] = rms_norm(x + W_down(silu(g) * u)), P the padded inner width. inner: ROWS * P;
// y: ROWS * D.
template <class T>
void int8_channel_rows(const Int8Weight& gate_up, const Int8Weight& down, const T* x, T* out,
                       float* rstd, int64_t rows, int64_t D, int64_t P, float eps, T* inner, float* y,
                       const Int8Rows& scratch);

}  // namespace TRM_ISA
}  // namespace trm_fast
