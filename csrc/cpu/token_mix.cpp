// token_mix: packing, and rms_norm over tokens of s + W_down(silu(g) * u).
#include "token_mix.h"

namespace trm_fast {
namespace TRM_ISA {

template <class Mode>
TokenMix<Mode> TokenMix<Mode>::make(const Host& host, int64_t S, int64_t D, int64_t F,
                                    bool backward) {
  const int64_t vectors = D / VL;
  TokenMix w{};
  w.S = S, w.D = D, w.F = F;
  w.nv = MAX_NV == 4 && vectors % 2 && vectors % 3 == 0 ? 3 : 2;
  w.P = round_up(F, inner_rows(w.nv));
  w.V = round_up(F, 2 * VL);  // an even number of vectors: bf16 is transposed two by two
  const int64_t Sw = words<Mode>(S), Pw = words<Mode>(w.P);
  const int64_t rows = RowBlocks(S, token_rows(w.nv)).rows();
  w.gate_up = allocate<word>(host, 2 * w.P * Sw);
  w.down = allocate<word>(host, rows * Pw);
  if (backward) {
    w.down_back = allocate<word>(host, w.P * Sw);
    w.gate_up_back = allocate<word>(host, rows * 2 * Pw);
  }
  return w;
}

// `lanes` words of a row of `count`, whose end is not written over where `last`.
INL void store_words(word* to, vf v, int64_t lanes, bool last) {
  if (lanes == VL || !last)
    store(to, v);
  else
    store_first(to, lanes, v);
}

// A block of `count` rows as words (k, i) at out[k * count + i]: row i from row(i), a pointer to K
// elements, or null for zeros; zeros fill up to Kw words.
template <class Mode, class Row>
INL void pack_rows(Row row, int64_t count, int64_t K, int64_t Kw, word* out) {
  constexpr int PER = Mode::per_word;
  for (int64_t i0 = 0; i0 < count; i0 += VL) {
    const int64_t lanes = smaller<int64_t>(VL, count - i0);
    for (int64_t k = 0; k < Kw; k += VL) {
      vf v[VL];
      for (int i = 0; i < VL; ++i) {
        const auto* p = i < lanes ? row(i0 + i) : nullptr;
        const int64_t left = K - k * PER;
        v[i] = p && left > 0 ? row_words<Mode>(p + k * PER, left) : vf{};
      }
      transpose(v);
      for (int i = 0; i < VL && k + i < Kw; ++i)  // what is beyond `lanes` is written over later
        store_words(out + (k + i) * count + i0, v[i], lanes, count > VL || k + i == Kw - 1);
    }
  }
}

// The same from the transpose: row(k) points to element (k, row 0 of the block), or is null for
// zeros; `there` <= count rows are there.
template <class Mode, class Row>
INL void pack_columns(Row row, int64_t count, int64_t there, int64_t Kw, word* out) {
  const auto vector_of = [&](int64_t k, int64_t i0) __attribute__((always_inline)) {
    const auto* p = row(k);
    if (!p || i0 >= there) return vf{};
    return i0 + VL <= there ? load(p + i0) : load_first(p + i0, there - i0);
  };
  for (int64_t k = 0; k < Kw; ++k, out += count)
    for (int64_t i0 = 0; i0 < count; i0 += VL) {
      const int64_t lanes = smaller<int64_t>(VL, count - i0);
      vf v;
      if constexpr (Mode::pairs)
        v = pair_words(vector_of(2 * k, i0), vector_of(2 * k + 1, i0));
      else
        v = vector_of(k, i0);
      store_words(out + i0, v, lanes, count > VL || k == Kw - 1);
    }
}

template <class Mode, class W>
SEPARATE void pack_gate_up(const TokenMix<Mode>& w, const W* gate_up, int64_t block) {
  const int64_t MR = inner_rows(w.nv), Sw = words<Mode>(w.S);
  pack_rows<Mode>(
      [&](int64_t i) {
        bool up;
        const int64_t f = inner_of<Mode>(block * MR + i, up);
        return f < w.F ? gate_up + (f + (up ? w.F : 0)) * w.S : nullptr;
      },
      MR, w.S, Sw, w.gate_up + block * MR * Sw);
}

template <class Mode, class W>
SEPARATE void pack_down(const TokenMix<Mode>& w, const W* down, int64_t block) {
  const RowBlocks blocks(w.S, token_rows(w.nv));
  const int64_t first = blocks.first(block), Pw = words<Mode>(w.P);
  pack_rows<Mode>([&](int64_t i) { return first + i < w.S ? down + (first + i) * w.F : nullptr; },
                  blocks.first(block + 1) - first, w.F, Pw, w.down + first * Pw);
}

template <class Mode, class W>
SEPARATE void pack_down_back(const TokenMix<Mode>& w, const W* down, int64_t block) {
  const int64_t MR = inner_rows(w.nv), Sw = words<Mode>(w.S);
  pack_columns<Mode>([&](int64_t t) { return t < w.S ? down + t * w.F + block * MR : nullptr; }, MR,
                     larger<int64_t>(0, smaller(MR, w.F - block * MR)), Sw,
                     w.down_back + block * MR * Sw);
}

template <class Mode, class W>
SEPARATE void pack_gate_up_back(const TokenMix<Mode>& w, const W* gate_up, int64_t block) {
  const RowBlocks blocks(w.S, token_rows(w.nv));
  const int64_t first = blocks.first(block), rows = blocks.first(block + 1) - first;
  const int64_t Pw = words<Mode>(w.P);
  pack_columns<Mode>(
      [&](int64_t k) {
        const int64_t f = k < w.P ? k : k - w.P;
        return f < w.F ? gate_up + (k < w.P ? f : f + w.F) * w.S + first : nullptr;
      },
      rows, larger<int64_t>(0, smaller(rows, w.S - first)), 2 * Pw, w.gate_up_back + first * 2 * Pw);
}

template <class Mode>
template <class W>
void TokenMix<Mode>::pack(const Host& host, const W* from_gate_up, const W* from_down,
                          bool forward) const {
  const int64_t token_blocks = RowBlocks(S, token_rows(nv)).count, MR = inner_rows(nv);
  const bool backward = down_back;
  const int64_t counts[4] = {forward ? 2 * P / MR : 0, forward ? token_blocks : 0,
                             backward ? P / MR : 0, backward ? token_blocks : 0};
  const int64_t total = counts[0] + counts[1] + counts[2] + counts[3];
  const int64_t grain = larger<int64_t>(1, total * 16384 / (6 * P * S));  // for one thread's while
  parallel_ranges(host, total, grain, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t block = i, which = 0;
      for (; block >= counts[which]; ++which) block -= counts[which];
      if (which == 0) pack_gate_up(*this, from_gate_up, block);
      if (which == 1) pack_down(*this, from_down, block);
      if (which == 2) pack_down_back(*this, from_down, block);
      if (which == 3) pack_gate_up_back(*this, from_gate_up, block);
    }
  });
}

template <class Mode>
TokenScratch<Mode>* TokenScratch<Mode>::make(const Host& host, const TokenMix<Mode>& w,
                                             bool backward) {
  const int64_t N = w.nv * VL, Sw = words<Mode>(w.S), Pw = words<Mode>(w.P);
  auto* all = allocate<TokenScratch>(host, host.threads);
  for (int i = 0; i < host.threads; ++i) {
    all[i] = TokenScratch{};
    all[i].state = allocate<word>(host, Sw * N);
    all[i].inner = allocate<word>(host, (backward ? 3 : 1) * Pw * N);
    all[i].sums = allocate<float>(host, w.S * N);
    if (backward) {
      all[i].gu = allocate<typename Mode::T>(host, 2 * w.F * N);
      if (Mode::pairs) all[i].gradient = allocate<word>(host, Sw * N);
    }
  }
  return all;
}

// One panel, NV vectors of columns of s and out, rows D apart.
template <class Mode, int NV>
SEPARATE void forward_panel(const TokenMix<Mode>& w, const typename Mode::T* s,
                            typename Mode::T* out, typename Mode::T* gu, float* rstd, float eps,
                            const TokenScratch<Mode>& scratch) {
  constexpr int N = NV * VL;
  const int64_t S = w.S, D = w.D;
  pack_state<Mode, NV>(s, D, S, scratch.state);
  gate_up_panel<Mode, NV, true>(w, scratch.state, scratch.inner, gu);
  float* sums = scratch.sums;
  vf squares[NV] = {};
  token_product<Mode, NV>(w, w.down, scratch.inner, words<Mode>(w.P),
                          [&](int64_t m, auto& c) __attribute__((always_inline)) {
                            each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                              if (m + i >= S) return;
                              v += load(s + (m + i) * D + j * VL);
                              store(sums + (m + i) * N + j * VL, v);
                              squares[j] += v * v;
                            });
                          });
  UNROLL for (int j = 0; j < NV; ++j) {
    squares[j] = 1.f / sqrt(squares[j] * (1.f / (float)S) + eps);
    store(rstd + j * VL, squares[j]);
  }
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int j = 0; j < NV; ++j)
      store(out + t * D + j * VL, load(sums + t * N + j * VL) * squares[j]);
}

template <class Mode>
void token_mix_columns(const TokenMix<Mode>& w, const typename Mode::T* s, typename Mode::T* out,
                       typename Mode::T* gu, float* rstd, int64_t first, int64_t last, float eps,
                       const TokenScratch<Mode>& scratch) {
  token_panels(w, first, last, [&](int64_t v, auto width) {
    const int64_t n = v * VL;
    forward_panel<Mode, decltype(width)::value>(w, s + n, out + n, gu ? gu + n * 2 * w.F : nullptr,
                                                rstd + n, eps, scratch);
  });
}

template <class Mode>
static void forward(const Host& host, const void* s_, const void* gate_up, const void* down,
                    void* out_, void* gu_, float* rstd, int64_t B, int64_t S, int64_t D, int64_t F,
                    float eps) {
  using T = typename Mode::T;
  const T* s = (const T*)s_;
  T *out = (T*)out_, *gu = (T*)gu_;
  const auto w = TokenMix<Mode>::make(host, S, D, F, false);
  w.pack(host, (const T*)gate_up, (const T*)down);
  const auto* scratch = TokenScratch<Mode>::make(host, w, false);
  each_item_panel(host, w, B, [&](int64_t slot, int64_t b, int64_t first, int64_t last) {
    token_mix_columns<Mode>(w, s + b * S * D, out + b * S * D, gu ? gu + b * w.kept() : nullptr,
                            rstd + b * D, first, last, eps, scratch[slot]);
  });
}

#define TRM_INSTANTIATE(Mode)                                                                      \
  template struct TokenMix<Mode>;                                                                  \
  template struct TokenScratch<Mode>;                                                              \
  template void TokenMix<Mode>::pack<float>(const Host&, const float*, const float*, bool) const;  \
  template void token_mix_columns<Mode>(const TokenMix<Mode>&, const Mode::T*, Mode::T*, Mode::T*, \
                                        float*, int64_t, int64_t, float,                           \
                                        const TokenScratch<Mode>&);
TRM_INSTANTIATE(Float)
TRM_INSTANTIATE(Bfloat16)
template void TokenMix<Bfloat16>::pack<bf16>(const Host&, const bf16*, const bf16*, bool) const;

void token_mix_fwd(const Host& host, DType dtype, const void* s, const void* gate_up,
                   const void* down, void* out, void* gu, float* rstd, int64_t B, int64_t S,
                   int64_t D, int64_t F, float eps) {
  (dtype == DType::f32 ? forward<Float> : forward<Bfloat16>)(host, s, gate_up, down, out, gu, rstd,
                                                             B, S, D, F, eps);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
