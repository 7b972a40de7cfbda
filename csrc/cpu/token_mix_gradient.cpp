// Gradients of token_mix: to the state, panel by panel, and to the weights, over the whole batch.
#include "token_mix.h"

namespace trm_fast {
namespace TRM_ISA {

// Vectors of a panel of the weights' gradients. (With four, one sum of 28 does not stay in a register.)
constexpr int SUM_NV = 2;

// Operands of one item for the weights' gradients, within w.operand_words():
//   dgu: panels of B, K = columns of the item, 2 V features wide;  h: the same, V wide;
//   d: rows [S, D] of the gradient of the sum;  s: the rows of s, where they must be converted.
template <class Mode>
struct Operands {
  using E = typename Mode::E;
  static constexpr bool converts = sizeof(typename Mode::T) != sizeof(E);
  word *dgu, *h;
  E *d, *s;

  INL Operands(const TokenMix<Mode>& w, word* item) {
    const int64_t Dw = words<Mode>(w.D);
    dgu = item;
    h = item + 2 * w.V * Dw;
    d = (E*)(void*)(item + 3 * w.V * Dw);
    s = converts ? d + w.S * w.D : nullptr;
  }
};

// The gradient d of the sum, in float, as words where those differ, and as rows for the weights.
template <class Mode, int NV>
INL void sum_gradient(const TokenMix<Mode>& w, const typename Mode::T* dy,
                      const typename Mode::T* out, const float* rstd, typename Mode::E* rows,
                      const TokenScratch<Mode>& scratch) {
  constexpr int N = NV * VL;
  const int64_t S = w.S, D = w.D;
  vf mean[NV] = {}, scale[NV];
  for (int64_t t = 0; t < S; ++t)
    UNROLL for (int j = 0; j < NV; ++j)
      mean[j] += load(dy + t * D + j * VL) * load(out + t * D + j * VL);
  UNROLL for (int j = 0; j < NV; ++j) {
    scale[j] = load(rstd + j * VL);
    mean[j] *= scale[j] * (1.f / (float)S);
  }
  const auto gradient = [&](int64_t t, int j) __attribute__((always_inline)) {
    const int64_t at = t * D + j * VL;
    const vf d = load(dy + at) * scale[j] - load(out + at) * mean[j];
    store(scratch.sums + t * N + j * VL, d);
    if (rows) store(rows + at, d);
    return d;
  };
  for (int64_t t = 0; t < S; t += Mode::per_word)
    UNROLL for (int j = 0; j < NV; ++j) {
      const vf low = gradient(t, j);
      if constexpr (Mode::pairs)
        store(scratch.gradient + t / 2 * N + j * VL,
              pair_words(low, t + 1 < S ? gradient(t + 1, j) : vf{}));
    }
}

// dg, du and h as words, P rows each, from d and what was kept of g and u [2F, N].
template <class Mode, int NV>
INL void inner_gradient(const TokenMix<Mode>& w, const word* d, const typename Mode::T* gu,
                        word* inner) {
  using T = typename Mode::T;
  constexpr int MR = inner_rows(NV), N = NV * VL, PER = Mode::per_word;
  const int64_t Sw = words<Mode>(w.S), size = words<Mode>(w.P) * N;
  const word* a = w.down_back;
  for (int64_t f = 0; f < w.P; f += MR, a += MR * Sw) {
    vf c[MR][NV];
    micro<Mode::pairs, MR, NV>(a, 1, MR, d, N, Sw, c);
    UNROLL for (int i = 0; i < MR; i += PER)
      UNROLL for (int j = 0; j < NV; ++j) {
        vf dg[PER] = {}, du[PER] = {}, h[PER] = {};
        UNROLL for (int e = 0; e < PER; ++e) {
          const T* kept = gu + (f + i + e) * N + j * VL;
          if (f + i + e < w.F)
            swiglu_gradient<T>(load(kept), load(kept + w.F * N), c[i + e][j], dg[e], du[e], h[e]);
        }
        word* to = inner + (f + i) / PER * N + j * VL;
        if constexpr (Mode::pairs) {
          store(to, pair_words(dg[0], dg[1]));
          store(to + size, pair_words(du[0], du[1]));
          store(to + 2 * size, pair_words(h[0], h[1]));
        } else {
          store(to, dg[0]);
          store(to + size, du[0]);
          store(to + 2 * size, h[0]);
        }
      }
  }
}

// Lanes of the words of two neighbours along the columns: words of the first half of the lanes'
// features, or of the second.
#if defined(__AVX512BF16__)
template <int HALF>
INL vf neighbours(vf a, vf b) {
  struct Table {
    uint16_t lanes[32];
    constexpr Table() : lanes() {
      for (int i = 0; i < 32; ++i) lanes[i] = (uint16_t)(HALF * 16 + i / 2 + (i % 2) * 32);
    }
  };
  alignas(64) static constexpr Table table;
  return as<vf>(_mm512_permutex2var_epi16(as<__m512i>(a), _mm512_load_si512(table.lanes),
                                          as<__m512i>(b)));
}
#endif

// `kinds` times Pw rows of words [Pw, NV * VL], transposed: to panels of B whose K are the columns
// (of which these are those from `column` words on), and whose columns are the kinds' features, V
// each.
template <class Mode, int NV>
SEPARATE void transpose_panel(const TokenMix<Mode>& w, const word* rows, int64_t kinds,
                              int64_t column, word* out) {
  constexpr int N = NV * VL, PER = Mode::per_word;
  const int64_t Pw = words<Mode>(w.P), Dw = words<Mode>(w.D), each_kind = w.V / VL;
  for (int64_t first = 0; first < kinds * each_kind; first += SUM_NV) {
    word* panel = out + first * VL * Dw + column * SUM_NV * VL;
    for (int j = 0; j < SUM_NV; j += PER) {
      const int64_t vector = first + j, kind = vector / each_kind;
      const int64_t k = (vector - kind * each_kind) * VL / PER;
      for (int n = 0; n < NV; ++n) {
        const word* from = rows + (kind * Pw + k) * N + n * VL;
        vf v[VL];
        if (k + VL <= Pw) {
          UNROLL for (int i = 0; i < VL; ++i) v[i] = load(from + i * N);
        } else {
          UNROLL for (int i = 0; i < VL; ++i) v[i] = k + i < Pw ? load(from + i * N) : vf{};
        }
        if constexpr (VL >= 16) transpose_step<8>(v);
        if constexpr (VL >= 8) transpose_step<4>(v);
        transpose_step<2>(v);
        transpose_step<1>(v);
        word* to = panel + n * (VL / PER) * SUM_NV * VL + j * VL;
#if defined(__AVX512BF16__)
        if constexpr (Mode::pairs) {
          UNROLL for (int i = 0; i < VL; i += 2, to += SUM_NV * VL) {
            store(to, neighbours<0>(v[i], v[i + 1]));
            store(to + VL, neighbours<1>(v[i], v[i + 1]));
          }
          continue;
        }
#endif
        UNROLL for (int i = 0; i < VL; ++i, to += SUM_NV * VL) store(to, v[i]);
      }
    }
  }
}

template <class Mode, int NV>
SEPARATE void gradient_panel(const TokenMix<Mode>& w, const typename Mode::T* dy,
                             const typename Mode::T* s, const typename Mode::T* out,
                             const typename Mode::T* gu, const float* rstd, typename Mode::T* ds,
                             word* item, int64_t n, const TokenScratch<Mode>& scratch) {
  constexpr int N = NV * VL;
  const int64_t S = w.S, D = w.D, Pw = words<Mode>(w.P), column = n / Mode::per_word;
  const Operands<Mode> operands(w, item);
  if (!gu) {
    pack_state<Mode, NV>(s + n, D, S, scratch.state);
    gate_up_panel<Mode, NV, false>(w, scratch.state, nullptr, scratch.gu);
    gu = scratch.gu;
  }
  sum_gradient<Mode, NV>(w, dy + n, out + n, rstd + n, item ? operands.d + n : nullptr, scratch);
  inner_gradient<Mode, NV>(w, Mode::pairs ? scratch.gradient : scratch.sums, gu, scratch.inner);
  token_product<Mode, NV>(w, w.gate_up_back, scratch.inner, 2 * Pw,
                          [&](int64_t m, auto& c) __attribute__((always_inline)) {
                            each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                              if (m + i >= S) return;
                              store(ds + (m + i) * D + n + j * VL,
                                    v + load(scratch.sums + (m + i) * N + j * VL));
                            });
                          });
  if (!item) return;
  transpose_panel<Mode, NV>(w, scratch.inner, 2, column, operands.dgu);
  transpose_panel<Mode, NV>(w, scratch.inner + 2 * Pw * N, 1, column, operands.h);
  if constexpr (Operands<Mode>::converts)
    for (int64_t t = 0; t < S; ++t)
      for (int j = 0; j < NV; ++j)
        store(operands.s + t * D + n + j * VL, load(s + t * D + n + j * VL));
}

template <class Mode>
void token_mix_gradient_columns(const TokenMix<Mode>& w, const typename Mode::T* dy,
                                const typename Mode::T* s, const typename Mode::T* out,
                                const typename Mode::T* gu, const float* rstd,
                                typename Mode::T* ds, word* operands, int64_t first, int64_t last,
                                const TokenScratch<Mode>& scratch) {
  token_panels(w, first, last, [&](int64_t v, auto width) {
    const int64_t n = v * VL;
    gradient_panel<Mode, decltype(width)::value>(w, dy, s, out, gu ? gu + n * 2 * w.F : nullptr,
                                                 rstd, ds, operands, n, scratch);
  });
}

// ---- gradients of the weights: rows of tokens times columns of features, summed over items

// Rows of A and panels of B of consecutive items, and how far apart those are, in words.
struct Items {
  const word *a, *b;
  int64_t a_step, b_step, count, depth;  // depth: words of K of one item
};

template <class Mode, int MR, int NV>
INL void sum_block(const Items& items, int64_t m, int skip, float* sums, int64_t ld, bool add) {
  vf c[MR][NV];
  clear(c);
  const word *a = items.a + m * items.depth, *b = items.b;
  for (int64_t i = 0; i < items.count; ++i, a += items.a_step, b += items.b_step)
    micro_add<Mode::pairs, MR, NV>(a, items.depth, 1, b, NV * VL, items.depth, c);
  each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
    float* to = sums + (m + i) * ld + j * VL;
    store(to, add ? load(to) + v : v);
  }, skip);
}

// Rows [begin, end) of the sums of one panel.
template <class Mode>
SEPARATE void sum_panel(const Items& items, int64_t begin, int64_t end, float* sums, int64_t ld,
                        bool add) {
  constexpr int MOST = most_rows(SUM_NV);
  if (end - begin < MOST - 1) {
    for (int64_t m = begin; m < end; ++m) sum_block<Mode, 1, SUM_NV>(items, m, 0, sums, ld, add);
    return;
  }
  const RowBlocks blocks(end - begin, MOST);
  int64_t done = begin;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t rows = i < blocks.longer ? MOST : MOST - 1;
    const int64_t m = smaller(done, end - rows);  // rows that are done already are skipped
    if (rows == MOST)
      sum_block<Mode, MOST, SUM_NV>(items, m, (int)(done - m), sums, ld, add);
    else
      sum_block<Mode, MOST - 1, SUM_NV>(items, m, (int)(done - m), sums, ld, add);
    done = m + rows;
  }
}

template <class Mode>
void token_mix_weight_sums(const Host& host, const TokenMix<Mode>& w, const typename Mode::T* s,
                           const word* operands, int64_t B, float* sums, bool accumulate) {
  const int64_t S = w.S, Dw = words<Mode>(w.D), V = w.V, size = w.operand_words();
  const int64_t gates = 2 * V / VL / SUM_NV, panels = gates + V / VL / SUM_NV;
  // Rows are divided too where panels are few; a sum does not depend on it.
  const int64_t parts = smaller<int64_t>(ceil_div(2 * host.threads, panels), ceil_div(S, 28));
  const int64_t chunk = w.items_per_sum();
  const Operands<Mode> first_item(w, const_cast<word*>(operands));
  parallel(host, panels * (host.threads > 1 ? parts : 1), [&](int64_t task) {
    const int64_t pieces = host.threads > 1 ? parts : 1, part = task % pieces;
    const int64_t begin = part * S / pieces, end = (part + 1) * S / pieces;
    const bool gate = task / pieces < gates;
    const int64_t vector = (task / pieces - (gate ? 0 : gates)) * SUM_NV;
    const int64_t ld = gate ? 2 * V : V;
    float* to = sums + (gate ? 0 : S * 2 * V) + vector * VL;
    const word* rows = (const word*)(const void*)(gate ? first_item.s : first_item.d);
    Items items{rows, (gate ? first_item.dgu : first_item.h) + vector * VL * Dw, size, size, 0, Dw};
    if (gate && !Operands<Mode>::converts) {
      items.a = (const word*)(const void*)s;
      items.a_step = S * Dw;
    }
    if (B == 0 && !accumulate)
      for (int64_t m = begin; m < end; ++m) memset(to + m * ld, 0, SUM_NV * VL * sizeof(float));
    for (int64_t b = 0; b < B; b += items.count) {
      items.count = smaller(chunk, B - b);
      sum_panel<Mode>(items, begin, end, to, ld, accumulate || b > 0);
      items.a += items.count * items.a_step;
      items.b += items.count * items.b_step;
    }
  });
}

template <class Mode, class G>
void token_mix_weight_grad(const Host& host, const TokenMix<Mode>& w, const float* sums,
                           G* d_gate_up, G* d_down, bool accumulate) {
  const int64_t S = w.S, F = w.F, V = w.V, grain = larger<int64_t>(1, (1 << 13) / S);
  const auto put = [&](G* to, vf v, int64_t left) __attribute__((always_inline)) {
    if (left >= VL) {
      store(to, accumulate ? load(to) + v : v);
    } else {
      store_first(to, left, accumulate ? load_first(to, left) + v : v);
    }
  };
  parallel_ranges(host, ceil_div(F, VL), ceil_div(grain, VL), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t kind = 0; kind < 2; ++kind)
      for (int64_t f = begin * VL; f < smaller(end * VL, F); f += VL)
        for (int64_t t = 0; t < S; t += VL) {
          vf v[VL];
          for (int i = 0; i < VL; ++i)
            v[i] = t + i < S ? load(sums + (t + i) * 2 * V + kind * V + f) : vf{};
          transpose(v);
          for (int i = 0; i < VL && f + i < F; ++i)
            put(d_gate_up + (kind * F + f + i) * S + t, v[i], S - t);
        }
    for (int64_t t = 0; t < S; ++t)
      for (int64_t f = begin * VL; f < smaller(end * VL, F); f += VL)
        put(d_down + t * F + f, load(sums + 2 * S * V + t * V + f), F - f);
  });
}

constexpr int64_t WORKSPACE = 4 << 20;  // bytes of operands at a time and thread, or a little more

template <class Mode>
static void backward(const Host& host, const void* dy_, const void* s_, const void* gate_up,
                     const void* down, const void* out_, const void* gu_, const float* rstd,
                     void* ds_, void* d_gate_up, void* d_down, int64_t B, int64_t S, int64_t D,
                     int64_t F) {
  using T = typename Mode::T;
  const T *dy = (const T*)dy_, *s = (const T*)s_, *out = (const T*)out_, *gu = (const T*)gu_;
  T* ds = (T*)ds_;
  const auto w = TokenMix<Mode>::make(host, S, D, F, true);
  w.pack(host, (const T*)gate_up, (const T*)down, false);
  const auto* scratch = TokenScratch<Mode>::make(host, w, true);
  const int64_t size = w.operand_words(), item = S * D;
  const int64_t chunk = w.items_per_sum(), bytes = size * (int64_t)sizeof(word);
  const int64_t most = chunk * larger<int64_t>(1, host.threads * WORKSPACE / (bytes * chunk));
  word* operands = allocate<word>(host, smaller(most, B) * size);
  float* sums = allocate<float>(host, w.sums());
  for (int64_t done = 0; done == 0 || done < B; done += most) {
    const int64_t count = smaller(most, B - done);
    each_item_panel(host, w, count, [&](int64_t slot, int64_t i, int64_t first, int64_t last) {
      const int64_t b = done + i;
      token_mix_gradient_columns<Mode>(w, dy + b * item, s + b * item, out + b * item,
                                       gu + b * w.kept(), rstd + b * D, ds + b * item,
                                       operands + i * size, first, last, scratch[slot]);
    });
    token_mix_weight_sums<Mode>(host, w, s + done * item, operands, count, sums, done > 0);
  }
  token_mix_weight_grad<Mode>(host, w, sums, (T*)d_gate_up, (T*)d_down, false);
}

#define TRM_INSTANTIATE(Mode)                                                                      \
  template void token_mix_gradient_columns<Mode>(                                                  \
      const TokenMix<Mode>&, const Mode::T*, const Mode::T*, const Mode::T*, const Mode::T*,       \
      const float*, Mode::T*, word*, int64_t, int64_t, const TokenScratch<Mode>&);                 \
  template void token_mix_weight_sums<Mode>(const Host&, const TokenMix<Mode>&, const Mode::T*,    \
                                            const word*, int64_t, float*, bool);                   \
  template void token_mix_weight_grad<Mode, float>(const Host&, const TokenMix<Mode>&,             \
                                                   const float*, float*, float*, bool);
TRM_INSTANTIATE(Float)
TRM_INSTANTIATE(Bfloat16)

void token_mix_bwd(const Host& host, DType dtype, const void* dy, const void* s,
                   const void* gate_up, const void* down, const void* out, const void* gu,
                   const float* rstd, void* ds, void* d_gate_up, void* d_down, int64_t B, int64_t S,
                   int64_t D, int64_t F) {
  (dtype == DType::f32 ? backward<Float> : backward<Bfloat16>)(
      host, dy, s, gate_up, down, out, gu, rstd, ds, d_gate_up, d_down, B, S, D, F);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
