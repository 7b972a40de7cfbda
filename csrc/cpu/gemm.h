// Operands and whole products: packing, and C = A B with an epilogue.
#pragma once
#include "micro.h"

namespace trm_fast {
namespace TRM_ISA {

// ---- transposition of VL x VL words

struct ShuffleTable {
  int32_t low[VL], high[VL];
};
// Lanes of two vectors whose rows are `s` apart: one step of the transposition.
template <int S>
struct Shuffle {
  static constexpr ShuffleTable make() {
    ShuffleTable t{};
    for (int j = 0; j < VL; ++j) {
      t.low[j] = j & S ? VL + j - S : j;
      t.high[j] = j & S ? VL + j : j + S;
    }
    return t;
  }
  alignas(64) static constexpr ShuffleTable table = make();
};
INL vf shuffle(vf a, vf b, const int32_t* lanes) {
#if defined(__clang__)
  float both[2 * VL], out[VL];
  store(both, a);
  store(both + VL, b);
  for (int j = 0; j < VL; ++j) out[j] = both[lanes[j]];
  return load(out);
#else
  vi mask;
  memcpy(&mask, lanes, sizeof mask);
  return __builtin_shuffle(a, b, mask);
#endif
}
template <int S>
INL void transpose_step(vf (&v)[VL]) {
  UNROLL for (int i = 0; i < VL; ++i) {
    if (i & S) continue;
    const vf a = v[i], b = v[i + S];
    v[i] = shuffle(a, b, Shuffle<S>::table.low);
    v[i + S] = shuffle(a, b, Shuffle<S>::table.high);
  }
}
SEPARATE void transpose(vf (&v)[VL]) {
  if constexpr (VL >= 16) transpose_step<8>(v);
  if constexpr (VL >= 8) transpose_step<4>(v);
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// ---- words from memory: VL words of a row, `left` elements of it from p on

template <class Mode, class From>
INL vf row_words(const From* p, int64_t left) {
  if constexpr (!Mode::pairs) {
    return left >= VL ? load(p) : load_first(p, larger<int64_t>(left, 0));
  } else if constexpr (sizeof(From) == 2) {
    if (left >= 2 * VL) return load((const float*)(const void*)p);
    bf16 t[2 * VL] = {};
    memcpy(t, p, (size_t)larger<int64_t>(left, 0) * 2);
    return load((const float*)(const void*)t);
  } else {
    bf16 t[2 * VL];
    store(t, left >= VL ? load(p) : load_first(p, larger<int64_t>(left, 0)));
    store(t + VL, left >= 2 * VL ? load(p + VL)
                                 : load_first(p + smaller<int64_t>(VL, larger<int64_t>(left, 0)),
                                              larger<int64_t>(left - VL, 0)));
    return load((const float*)(const void*)t);
  }
}
#if defined(__AVX512BF16__)
// Elements 0 to 15 of a register to the low halves of the lanes, 16 to 31 to the high ones.
INL vf interleave(vf halves) {
  alignas(64) static constexpr uint16_t order[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return as<vf>(_mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(order), as<__m512i>(halves)));
}
#endif
// VL words of two rows that are neighbours along k: the pair (low, high) in each lane.
INL vf pair_words(vh low, vh high) {
  return as<vf>(as<vu>(widen(low)) >> 16 | as<vu>(widen(high)));
}
INL vf pair_words(vf low, vf high) {
#if defined(__AVX512BF16__)
  return interleave(as<vf>(_mm512_cvtne2ps_pbh((__m512)high, (__m512)low)));
#else
  return pair_words(narrow(low), narrow(high));
#endif
}
INL vh load_halves(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return h;
}
INL vh load_halves(const float* p) { return narrow(load(p)); }

// f(first vector, NV): the panels that `vectors` vectors of columns are divided into.
template <class F>
INL void each_panel(int64_t vectors, F f) {
  for (int64_t v = 0; v < vectors;) {
    const int nv = panel_vectors(vectors - v);
    f(v, nv);
    v += nv;
  }
}

// Panels of B from its transpose: word (k, n) from row(n), a pointer to K elements along k, or null
// for zeros; `columns` is a multiple of VL. Column panels lie one after another, as deep as `depth`
// elements, zeros from K on; the vectors [begin, end) of columns are made, panel borders.
template <class Mode, class Row>
INL void pack_transposed(Row row, int64_t columns, int64_t K, word* out, int64_t begin, int64_t end,
                         int64_t depth = 0) {
  const int64_t Kw = words<Mode>(depth ? depth : K);
  each_panel(columns / VL, [&](int64_t first, int nv) {
    if (first < begin || first >= end) return;
    for (int64_t j = first; j < first + nv; ++j)
      for (int64_t k = 0; k < Kw; k += VL) {
        vf v[VL];
        for (int i = 0; i < VL; ++i) {
          const auto* p = row(j * VL + i);
          v[i] = p ? row_words<Mode>(p + k * Mode::per_word, K - k * Mode::per_word) : vf{};
        }
        transpose(v);
        word* to = out + first * VL * Kw + (j - first) * VL;
        for (int i = 0; i < VL && k + i < Kw; ++i) store(to + (k + i) * nv * VL, v[i]);
      }
  });
}

// `vectors` vectors of words per k, one after another, from row(k), a pointer to the columns, or null
// for zeros; `width` columns are there, zeros fill up.
template <class Mode, class Row>
INL void pack_straight_rows(Row row, int64_t width, int64_t vectors, int64_t K, word* out) {
  const auto vector_of = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    const auto* p = k < K ? row(k) : nullptr;
    if (!p || n >= width) return vf{};
    return n + VL <= width ? load(p + n) : load_first(p + n, width - n);
  };
  const int64_t Kw = words<Mode>(K), whole = smaller(width / VL, vectors);
  for (int64_t k = 0; k < Kw; ++k, out += vectors * VL) {
    int64_t j = 0;
    if constexpr (Mode::pairs) {
      const auto *low = row(2 * k), *high = 2 * k + 1 < K ? row(2 * k + 1) : nullptr;
      if (low && high)
        for (; j < whole; ++j)
          store(out + j * VL, pair_words(load_halves(low + j * VL), load_halves(high + j * VL)));
      for (; j < vectors; ++j)
        store(out + j * VL, pair_words(vector_of(2 * k, j * VL), vector_of(2 * k + 1, j * VL)));
    } else {
      if (const auto* p = row(k))
        for (; j < whole; ++j) store(out + j * VL, load(p + j * VL));
      for (; j < vectors; ++j) store(out + j * VL, vector_of(k, j * VL));
    }
  }
}

// Panels of B from B: word (k, n) from row(k), a pointer to the columns, or null for zeros.
// `width` columns are there, zeros fill up to `columns`, a multiple of VL.
template <class Mode, class Row>
INL void pack_straight(Row row, int64_t width, int64_t columns, int64_t K, word* out, int64_t begin,
                       int64_t end) {
  each_panel(columns / VL, [&](int64_t first, int nv) {
    if (first < begin || first >= end) return;
    const int64_t n = first * VL;
    const auto shifted = [&](int64_t k) __attribute__((always_inline)) {
      const auto* p = row(k);
      return p && n < width ? p + n : nullptr;
    };
    pack_straight_rows<Mode>(shifted, width - n, nv, K, out + n * words<Mode>(K));
  });
}

// Where vectors of columns divide among threads: `parts` borders that are panel borders.
INL int64_t panel_border(int64_t vectors, int64_t part, int64_t parts) {
  return part >= parts ? vectors : part * vectors / parts / MAX_NV * MAX_NV;
}

// A operand: rows of T as they are, or converted into `scratch` [rows, K] where T is not E.
template <class Mode>
INL const word* operand(const typename Mode::T* rows, int64_t count, int64_t K, typename Mode::E* scratch) {
  if constexpr (sizeof(typename Mode::T) == sizeof(typename Mode::E)) {
    return (const word*)(const void*)rows;
  } else {
    for (int64_t i = 0; i < count * K; i += VL) {  // K is a multiple of VL
      store(scratch + i, load(rows + i));
    }
    return (const word*)(const void*)scratch;
  }
}

// f(i, j, vector) for every vector of a block from row `skip` on.
template <int MR, int NV, class F>
INL void each(vf (&c)[MR][NV], F f, int skip = 0) {
  UNROLL for (int i = 0; i < MR; ++i)
    if (i >= skip) UNROLL for (int j = 0; j < NV; ++j) f(i, j, c[i][j]);
}

// Where the panels of B are: one after another, as pack_* makes them, or columns of a matrix in
// memory whose rows are `row` words apart.
struct Panels {
  const word* start;
  int64_t row;
  INL Panels(const word* start_, int64_t row_ = 0) : start(start_), row(row_) {}
};

// A [M, Kw words] against `vectors` vectors of columns: epilogue(row, skip, column, c).
template <class Mode, class Epilogue>
INL void product(const word* a, int64_t lda, int64_t step, Panels b, int64_t M, int64_t vectors,
                 int64_t Kw, const Epilogue& epilogue) {
  each_panel(vectors, [&](int64_t first, int nv) __attribute__((always_inline)) {
    const word* panel = b.start + first * VL * (b.row ? 1 : Kw);
    const int64_t n = first * VL, ldb = b.row ? b.row : nv * VL;
    const auto give = [&](int64_t m, int skip, auto& c) __attribute__((always_inline)) {
      epilogue(m, skip, n, c);
    };
    if constexpr (MAX_NV == 4) {
      if (nv == 4) return panel_rows<Mode, 4>(a, lda, step, panel, ldb, M, Kw, give);
      if (nv == 3) return panel_rows<Mode, 3>(a, lda, step, panel, ldb, M, Kw, give);
    }
    if (nv == 2) return panel_rows<Mode, 2>(a, lda, step, panel, ldb, M, Kw, give);
    return panel_rows<Mode, 1>(a, lda, step, panel, ldb, M, Kw, give);
  });
}

}  // namespace TRM_ISA
}  // namespace trm_fast
