// Register-blocked matrix products: what every fused kernel is built of.
//
// C[i][j] = sum_k A[i][k] B[k][j], accumulated in float, k in ascending order in one accumulator: so
// a result has the same bits however rows and columns are divided among calls or threads.
//
// Word: what one lane multiplies per step: a float, or where the CPU multiplies pairs of bf16
// (vdpbf16ps) two of them, neighbours along k. Operand A is row-major in memory, as it is; B lies in
// panels of NV vectors, [panel][K words][NV * VL words], which `pack_*` makes. Mode says which.
//
// Compilers spill accumulators silently, and the kernel then runs at half its rate: every loop over
// them is unrolled completely, epilogues are always inlined, and bench/bench_micro.py holds the rate
// against the machine's peak.
#pragma once
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

using word = float;

// T: the type of tensors in memory. E: of an operand's elements, `per_word` of them in a word.
struct Float {
  using T = float;
  using E = float;
  static constexpr bool pairs = false;
  static constexpr int per_word = 1;
};
struct Bfloat16 {
  using T = bf16;
#if defined(__AVX512BF16__)
  using E = bf16;
  static constexpr bool pairs = true;
  static constexpr int per_word = 2;
#else  // bf16 in memory, converted to operands in float
  using E = float;
  static constexpr bool pairs = false;
  static constexpr int per_word = 1;
#endif
};

template <class Mode>
INL int64_t words(int64_t k) {
  return ceil_div(k, Mode::per_word);
}

// Rows of A per block for panels of NV vectors. A block has MOST or MOST - 1 rows, so that any count
// of rows from MOST * (MOST - 1) on divides into blocks without waste.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MAX_NV = 4;
#if defined(__clang__)  // broadcasts into registers: GCC's 28 sums and 4 operands leave it none
constexpr int most_rows(int nv) { return nv == 4 ? 6 : nv == 3 ? 9 : 14; }
#else
constexpr int most_rows(int nv) { return nv == 4 ? 7 : nv == 3 ? 9 : 14; }
#endif
#else
constexpr int MAX_NV = 2;  // 16 registers
constexpr int most_rows(int nv) { return nv == 2 ? 6 : 8; }
#endif

// Vectors of the next panel where `left` vectors of columns are left.
INL int panel_vectors(int64_t left) {
  if (MAX_NV == 2) return left >= 2 ? 2 : 1;
  if (left == 5) return 3;
  return (int)smaller<int64_t>(left, 4);
}

// Rows of bf16 are read as words too: they need not be aligned as such.
INL word load_word(const word* p) {
  word w;
  memcpy(&w, p, sizeof w);
  return w;
}

template <bool PAIRS>
INL vf multiply_add(vf c, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
#endif
  return c + a * b;
}

template <int MR, int NV>
INL void clear(vf (&c)[MR][NV]) {
  UNROLL for (int i = 0; i < MR; ++i)
    UNROLL for (int j = 0; j < NV; ++j) c[i][j] = vf{};
}

// c += A B over K words; word (i, k) of A at a[i * lda + k * step], word (k, j) of B at b[k * ldb + j].
template <bool PAIRS, int MR, int NV>
INL void micro_add(const word* a, int64_t lda, int64_t step, const word* b, int64_t ldb, int64_t K,
                   vf (&c)[MR][NV]) {
  for (int64_t k = 0; k < K; ++k) {
    vf row[NV];
    UNROLL for (int j = 0; j < NV; ++j) row[j] = load(b + j * VL);
    UNROLL for (int i = 0; i < MR; ++i) {
      const vf ai = splat(load_word(a + i * lda));
      UNROLL for (int j = 0; j < NV; ++j) c[i][j] = multiply_add<PAIRS>(c[i][j], ai, row[j]);
    }
    a += step;
    b += ldb;
  }
}

// c = A B.
template <bool PAIRS, int MR, int NV>
INL void micro(const word* a, int64_t lda, int64_t step, const word* b, int64_t ldb, int64_t K,
               vf (&c)[MR][NV]) {
  clear(c);
  micro_add<PAIRS, MR, NV>(a, lda, step, b, ldb, K, c);
}

// c = A B by the operands of a Mode; int8.h has its own.
template <class Mode, int MR, int NV>
INL void block(Mode, const word* a, int64_t lda, int64_t step, const word* b, int64_t ldb, int64_t K,
               vf (&c)[MR][NV]) {
  micro<Mode::pairs, MR, NV>(a, lda, step, b, ldb, K, c);
}

// One panel against M rows of A: `epilogue(first row, skip, c)` gets each block of sums, MR x NV
// vectors; its first `skip` rows were given before (only where M is small).
template <class Mode, int NV, class Epilogue>
SEPARATE void panel_rows(const word* a, int64_t lda, int64_t step, const word* b, int64_t ldb,
                         int64_t M, int64_t K, const Epilogue& epilogue) {
  constexpr int MOST = most_rows(NV);
  if (M < MOST - 1) {  // too few for a block
    for (int64_t m = 0; m < M; ++m) {
      vf c[1][NV];
      block(Mode{}, a + m * lda, lda, step, b, ldb, K, c);
      epilogue(m, 0, c);
    }
    return;
  }
  const int64_t blocks = ceil_div(M, MOST);
  int64_t smaller_ones = blocks * MOST - M;  // blocks of MOST - 1 rows
  if (smaller_ones > blocks) smaller_ones = blocks;
  int64_t done = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t rows = i < blocks - smaller_ones ? MOST : MOST - 1;
    const int64_t m = smaller<int64_t>(done, M - rows);
    if (rows == MOST) {
      vf c[MOST][NV];
      block(Mode{}, a + m * lda, lda, step, b, ldb, K, c);
      epilogue(m, (int)(done - m), c);
    } else {
      vf c[MOST - 1][NV];
      block(Mode{}, a + m * lda, lda, step, b, ldb, K, c);
      epilogue(m, (int)(done - m), c);
    }
    done = m + rows;
  }
}
}  // namespace TRM_ISA
}  // namespace trm_fast
