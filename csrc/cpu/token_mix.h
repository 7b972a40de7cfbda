// Token mixing of one block: what token_mix.cpp and token_mix_gradient.cpp give to the recursion.
//
// y = rms_norm over tokens of s + W_down(silu(g) * u), where g and u are the halves of W_gate_up s,
// for every batch item s [S, D]. Weights are the row operands, packed in blocks of rows, word after
// word; the state is the column operand. Columns (of D) never meet: a panel of `nv` vectors of them
// goes from s to y, and back from dy to ds, in L1 and L2 without a transposition. Only the gradient
// of the weights sums over columns: for it g, u and h are transposed once, in registers.
//
// Nothing here allocates but the functions called make.
//
// Sizes: S tokens, D width (a multiple of 16), F inner width, B batch items;
//   P = F rounded up to whole blocks of rows; zeros fill up;  V = F rounded up to whole vectors.
#pragma once
#include "gemm.h"
#include "host.h"

namespace trm_fast {
namespace TRM_ISA {

// Rows per block of the products with F rows, for panels of nv vectors.
constexpr int inner_rows(int nv) { return MAX_NV < 4 ? 6 : nv == 3 ? 8 : 12; }
// The most rows per block of those with S rows; the others have one less.
constexpr int token_rows(int nv) { return most_rows(nv == 1 ? 2 : nv); }

// How S rows are divided into blocks of `most` or `most` - 1; the last may reach beyond S.
struct RowBlocks {
  int64_t most, count, longer;

  INL RowBlocks(int64_t S, int64_t most_)
      : most(most_),
        count(ceil_div(S, most_)),
        longer(larger<int64_t>(0, S - ceil_div(S, most_) * (most_ - 1))) {}
  INL int64_t first(int64_t block) const {
    return block * (most - 1) + smaller(block, longer);
  }
  INL int64_t rows() const { return first(count); }
};

// Packed operands. Forward: gate_up (2P rows of S), down (S rows of P). Backward: down_back of
// dh = W_down^T d, gate_up_back of ds = W_gate_up^T dgu.
template <class Mode>
struct TokenMix {
  using T = typename Mode::T;
  using E = typename Mode::E;

  int64_t S, D, F, P, V;
  int nv;
  word *gate_up, *down, *down_back, *gate_up_back;

  // Memory for the operands: `backward`: for those of the gradient too.
  static TokenMix make(const Host& host, int64_t S, int64_t D, int64_t F, bool backward);

  // Operands from gate_up [2F, S] and down [S, F], float or T, on all threads; the backward ones
  // where there is memory for them, the forward ones where `forward`.
  template <class W>
  void pack(const Host& host, const W* gate_up, const W* down, bool forward = true) const;

  INL int64_t vectors() const { return D / VL; }
  INL int64_t panels() const { return ceil_div(vectors(), nv); }
  // Vector at which panel i begins: ranges of columns begin and end there.
  INL int64_t border(int64_t i) const { return smaller(i * nv, vectors()); }

  // Elements of T of g and u of one item, in a layout of their own: 2 F D.
  INL int64_t kept() const { return 2 * F * D; }
  // Words of the weight gradients' operands of one item (below): 3 V D and S D elements, the latter
  // twice where they must be converted.
  INL int64_t operand_words() const {
    return words<Mode>(D) * (3 * V + (sizeof(T) == sizeof(E) ? 1 : 2) * S);
  }
  // Items of a batch whose products are summed before they are added to the others'.
  INL int64_t items_per_sum() const { return larger<int64_t>(1, 512 / words<Mode>(D)); }
  // Floats of the sums of the weight gradients: 3 S V.
  INL int64_t sums() const { return 3 * S * V; }
};

// Of one thread, for a panel of N = nv * VL columns: the state as words [S, N], the sums [S, N] in
// float, h or dgu and h as words [3 P, N], g and u [2 F, N] of T where they are made again, and of
// bf16 the gradient of the sums as words [S, N]. About 0.2 MB (bf16) and 0.4 MB at S=97, F=512.
template <class Mode>
struct TokenScratch {
  word *state, *inner, *gradient;
  float* sums;
  typename Mode::T* gu;

  // One per thread.
  static TokenScratch* make(const Host& host, const TokenMix<Mode>& w, bool backward);
};

// out [S, D] and rstd [D] of one item s [S, D], columns of the vectors [first, last), panel borders;
// gu: w.kept() elements for the gradient, or null.
template <class Mode>
void token_mix_columns(const TokenMix<Mode>& w, const typename Mode::T* s, typename Mode::T* out,
                       typename Mode::T* gu, float* rstd, int64_t first, int64_t last, float eps,
                       const TokenScratch<Mode>& scratch);

// ds [S, D] of one item from dy [S, D] and what the forward gave, the path past the mixing included;
// ds may be dy. gu is what the forward kept, or null: made again from s, to the same bits, for which
// the forward operands must be packed. `operands`: w.operand_words(), written for the weight
// gradients, or null where those are not wanted.
template <class Mode>
void token_mix_gradient_columns(const TokenMix<Mode>& w, const typename Mode::T* dy,
                                const typename Mode::T* s, const typename Mode::T* out,
                                const typename Mode::T* gu, const float* rstd,
                                typename Mode::T* ds, word* operands, int64_t first, int64_t last,
                                const TokenScratch<Mode>& scratch);

// The weights' gradients over B items s [B, S, D], with their operands one after another, into
// `sums` (or added to them): w.sums() floats in a layout of their own. A batch may be divided into
// calls: at multiples of w.items_per_sum() items that changes no bit, as threads never do. One call's
// workspace is then B w.operand_words() words: 1.7 MB (bf16) or 3.3 MB an item at S=97, D=512, F=512.
template <class Mode>
void token_mix_weight_sums(const Host& host, const TokenMix<Mode>& w, const typename Mode::T* s,
                           const word* operands, int64_t B, float* sums, bool accumulate);

// d_gate_up [2F, S] and d_down [S, F] from the sums; floats may be added to. G is float or T.
template <class Mode, class G>
void token_mix_weight_grad(const Host& host, const TokenMix<Mode>& w, const float* sums,
                           G* d_gate_up, G* d_down, bool accumulate);

// f(first vector, width) for every panel of a range; width is a constant.
template <int N>
struct PanelWidth {
  static constexpr int value = N;
};
template <class Mode, class F>
INL void token_panels(const TokenMix<Mode>& w, int64_t first, int64_t last, F f) {
  for (int64_t v = first; v < last; v += w.nv) {
    const int64_t width = smaller<int64_t>(w.nv, w.vectors() - v);
    if constexpr (MAX_NV == 4)
      if (width == 3) {
        f(v, PanelWidth<3>{});
        continue;
      }
    if (width == 2)
      f(v, PanelWidth<2>{});
    else
      f(v, PanelWidth<1>{});
  }
}

// f(slot, item, first, last) for all columns of B items, divided among threads at panel borders.
template <class Mode, class F>
INL void each_item_panel(const Host& host, const TokenMix<Mode>& w, int64_t B, F f) {
  const int64_t panels = w.panels();
  parallel_ranges(host, B * panels, 1, [&](int64_t slot, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / panels, last = smaller(end, (b + 1) * panels);
      f(slot, b, w.border(i - b * panels), w.border(last - b * panels));
      i = last;
    }
  });
}

// Where rows of g and u are among the rows of the packed gate_up: 2 per_word of them by turns.
template <class Mode>
INL int64_t inner_of(int64_t row, bool& up) {
  constexpr int per = Mode::per_word;
  up = row / per % 2;
  return row / (2 * per) * per + row % per;
}

// Panels of the state: words [S, NV * VL] from s, rows D apart.
template <class Mode, int NV>
INL void pack_state(const typename Mode::T* s, int64_t D, int64_t S, word* out) {
  for (int64_t t = 0; t < S; t += Mode::per_word)
    for (int j = 0; j < NV; ++j, out += VL) {
      const auto* p = s + t * D + j * VL;
      if constexpr (Mode::pairs)
        store(out, pair_words(load_halves(p), t + 1 < S ? load_halves(p + D) : vh{}));
      else
        store(out, load(p));
    }
}

// g and u of one panel: h as words where `hidden`, and g, u [2F, NV * VL] where gu is not null.
template <class Mode, int NV, bool HIDDEN>
INL void gate_up_panel(const TokenMix<Mode>& w, const word* state, word* h, typename Mode::T* gu) {
  using T = typename Mode::T;
  constexpr int MR = inner_rows(NV), N = NV * VL, PER = Mode::per_word;
  const int64_t Sw = words<Mode>(w.S);
  const word* a = w.gate_up;
  for (int64_t f = 0; f < w.P; f += MR / 2, a += MR * Sw) {
    vf c[MR][NV];
    micro<Mode::pairs, MR, NV>(a, 1, MR, state, N, Sw, c);
    UNROLL for (int i = 0; i < MR; i += 2 * PER) {
      if (gu) UNROLL for (int e = 0; e < PER; ++e) {
        T* to = gu + (f + i / 2 + e) * N;
        if (f + i / 2 + e < w.F) UNROLL for (int j = 0; j < NV; ++j) {
          store(to + j * VL, c[i + e][j]);
          store(to + w.F * N + j * VL, c[i + PER + e][j]);
        }
      }
      if constexpr (HIDDEN) UNROLL for (int j = 0; j < NV; ++j) {
        const auto hidden = [&](int e) __attribute__((always_inline)) {
          const vf g = c[i + e][j];
          return g * sigmoid<T>(g) * c[i + PER + e][j];
        };
        word* to = h + (f + i / 2) / PER * N + j * VL;
        if constexpr (Mode::pairs)
          store(to, pair_words(hidden(0), hidden(1)));
        else
          store(to, hidden(0));
      }
    }
  }
}

// S rows of a packed operand against a panel of Kw words: epilogue(first row, c).
template <class Mode, int NV, class Epilogue>
INL void token_product(const TokenMix<Mode>& w, const word* a, const word* b, int64_t Kw,
                       const Epilogue& epilogue) {
  constexpr int MOST = token_rows(NV), N = NV * VL;
  const RowBlocks blocks(w.S, MOST);
  int64_t m = 0;
  for (int64_t i = 0; i < blocks.count; ++i) {
    if (i < blocks.longer) {
      vf c[MOST][NV];
      micro<Mode::pairs, MOST, NV>(a, 1, MOST, b, N, Kw, c);
      epilogue(m, c);
      a += MOST * Kw;
      m += MOST;
    } else {
      vf c[MOST - 1][NV];
      micro<Mode::pairs, MOST - 1, NV>(a, 1, MOST - 1, b, N, Kw, c);
      epilogue(m, c);
      a += (MOST - 1) * Kw;
      m += MOST - 1;
    }
  }
}

}  // namespace TRM_ISA
}  // namespace trm_fast
