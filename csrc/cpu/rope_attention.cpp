// rope_attention: rotary embedding and softmax attention of packed qkv, forward and backward.
//
// Backward, P the softmax, recomputed from lse: dv = P^T d, dS = P (d v^T - rowsum(d out)),
// dq = dS k / sqrt(K), dk = dS^T q / sqrt(K), dq and dk turned back.
#include "rope_attention.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr float LOG2E = 1.44269504f;
constexpr int64_t QUERIES = 64;        // of a block: its scores stay in L2
constexpr int64_t FEW_QUERIES = 128;   // up to these a gradient takes one block: no sums in memory

INL int64_t most_queries(int64_t S, bool gradient) {
  return gradient && S <= FEW_QUERIES ? round_up(S, VL) : smaller(QUERIES, round_up(S, VL));
}
// Queries of the next block where `left` are left; a multiple of VL but for the last block's.
INL int64_t block_queries(int64_t left, int64_t most) {
  if (left <= most) return left;
  // What is left after it is a panel too, not a single vector.
  return MAX_NV == 4 && ceil_div(left, VL) == 5 ? 3 * VL : most;
}

template <class Mode>
AttentionScratch<Mode>* AttentionScratch<Mode>::make(const Host& host, int64_t S, int64_t K,
                                                     bool gradient) {
  const int64_t Kw = trm_fast::TRM_ISA::words<Mode>(K), Sw = trm_fast::TRM_ISA::words<Mode>(S);
  const int64_t Q = larger(most_queries(S, false), gradient ? most_queries(S, true) : 0);
  const int64_t Qw = trm_fast::TRM_ISA::words<Mode>(Q), g = gradient;
  auto* all = allocate<AttentionScratch>(host, host.threads);
  for (int i = 0; i < host.threads; ++i) {
    const auto take = [&](int64_t count) { return allocate<word>(host, round_up(count, VL)); };
    all[i] = {take(S * Kw),     take(g * S * Kw),       take(Sw * K),     take(Q * Kw),
              take(Q * Kw),     take(g * Q * Kw),       take(g * Qw * K), take(g * Qw * K),
              take((S + 1) * Q), take(g * S * Q),       take(g * Sw * Q), take(Q),
              take(Q),          take(g * S * K),        take(g * S * K),  take(g * Q * K)};
  }
  return all;
}

// ---- functions

// 2^x for x <= 127, 2^-126 below that; the error is below that of Mode's type. A NaN stays one.
template <class Mode>
INL vf power_of_two(vf x) {
  const vf least = splat(-126.f), magic = splat(12582912.f);  // 1.5 * 2^23: rounds to a whole number
  x = x < least ? least : x;
  const vf shifted = x + magic;
  const vf r = x - (shifted - magic);
  vf p;
  if constexpr (sizeof(typename Mode::T) == 2) {
    p = splat(9.570101276e-3f);
    p = p * r + 5.591785908e-2f;
    p = p * r + 2.402474433e-1f;
    p = p * r + 6.931217909e-1f;
  } else {
    p = splat(1.327647129e-3f);
    p = p * r + 9.675540961e-3f;
    p = p * r + 5.550713092e-2f;
    p = p * r + 2.402212024e-1f;
    p = p * r + 6.931469440e-1f;
  }
  p = p * r + 1.f;
  return select(x == x, as<vf>(as<vi>(p) + (as<vi>(shifted) << 23)), x);
}

// The logarithm to base 2 of a positive normal x, to an ulp or two.
INL vf logarithm(vf x) {
  const vi e = (as<vi>(x) - 0x3f3504f3) >> 23;  // 2^-0.5 <= m < 2^0.5
  const vf m = as<vf>(as<vi>(x) - (e << 23));
  const vf f = m - 1.f, s = f / (f + 2.f), z = s * s;
  vf r = z * 0.24279078841f + 0.28498786688f;
  r = r * z + 0.40000972152f;
  r = r * z + 0.66666662693f;
  const vf half = f * f * 0.5f;
  return (f - (half - s * (half + r * z))) * LOG2E + __builtin_convertvector(e, vf);
}

// f(j, the largest of each lane) for every vector of columns of a block.
template <int MR, int NV, class F>
INL void each_column(vf (&c)[MR][NV], F f) {
  UNROLL for (int j = 0; j < NV; ++j) {
    vf t = c[0][j];
    UNROLL for (int i = 1; i < MR; ++i) t = c[i][j] > t ? c[i][j] : t;
    f(j, t);
  }
}

// ---- rows of one head

// One row of K turned by its angles, or, BACK, the gradient of that; all of it times `scale`.
template <bool BACK, class From, class To>
INL void turn_row(const From* x, const float* cos, const float* sin, float scale, To* y, int64_t K) {
  const int64_t half = K / 2;
  const auto both = [&](vf a, vf b, vf c1, vf c2, vf s1, vf s2, vf& y1, vf& y2)
      __attribute__((always_inline)) {
    a *= scale;
    b *= scale;
    y1 = BACK ? a * c1 + b * s2 : a * c1 - b * s1;
    y2 = BACK ? b * c2 - a * s1 : b * c2 + a * s2;
  };
  vf y1, y2;
  int64_t j = 0;
  for (; j + VL <= half; j += VL) {
    const float *c = cos + j, *s = sin + j;
    both(load(x + j), load(x + half + j), load(c), load(c + half), load(s), load(s + half), y1, y2);
    store(y + j, y1);
    store(y + half + j, y2);
  }
  if (j < half) {  // half a vector: K is a multiple of 16
    constexpr int64_t n = VL / 2;
    const float *c = cos + j, *s = sin + j;
    both(load_first(x + j, n), load_first(x + half + j, n), load_first(c, n),
         load_first(c + half, n), load_first(s, n), load_first(s + half, n), y1, y2);
    store_first(y + j, n, y1);
    store_first(y + half + j, n, y2);
  }
}

// `count` rows from row `first` of q or k, `ld` apart, as an operand: turned, and rounded as they
// would be in memory.
template <class Mode>
SEPARATE void turned_rows(const typename Mode::T* x, int64_t ld, const float* cos, const float* sin, int64_t first,
                          int64_t count, int64_t K, word* out) {
  auto* to = (typename Mode::E*)(void*)out;
  x += first * ld;
  for (int64_t i = 0; i < count; ++i, x += ld, to += K) {
    if (cos) {
      turn_row<false>(x, cos + (first + i) * K, sin + (first + i) * K, 1.f, to, K);
    } else {
      for (int64_t j = 0; j < K; j += VL) store(to + j, load(x + j));
    }
  }
}

// Gradients of q or k as they go to memory: rows of `sums` times `scale`, turned back.
template <class T>
SEPARATE void back_rows(const float* sums, const float* cos, const float* sin, int64_t first, int64_t count, int64_t K,
                        float scale, T* out, int64_t ld) {
  out += first * ld;
  for (int64_t i = 0; i < count; ++i, sums += K, out += ld) {
    if (cos) {
      turn_row<true>(sums, cos + (first + i) * K, sin + (first + i) * K, scale, out, K);
    } else {
      for (int64_t j = 0; j < K; j += VL) store(out + j, load(sums + j) * scale);
    }
  }
}

// Panels of B with the words of `count` rows of K elements across: word (k, i) of row i.
template <class Mode, class From>
SEPARATE void pack_across(const From* rows, int64_t ld, int64_t count, int64_t K, word* out) {
  const int64_t columns = round_up(count, VL);
  pack_transposed<Mode>([&](int64_t i) { return i < count ? rows + i * ld : nullptr; }, columns, K,
                        out, 0, columns / VL);
}
// Panels of B with these rows along k.
template <class Mode, class From>
SEPARATE void pack_rows(const From* rows, int64_t ld, int64_t count, int64_t K, word* out) {
  pack_straight<Mode>([&](int64_t i) { return rows + i * ld; }, K, K, count, out, 0, K / VL);
}

// ---- forward

// P^T from S^T, in place, in words of two keys where Mode pairs them; total [Q] becomes 1 / the sums
// of P, and lse the logarithms of the sums of exp(S).
template <class Mode>
SEPARATE void softmax_columns(word* scores, int64_t S, int64_t Q, float scale, const float* top,
                              float* total, float* lse) {
  const float scale2 = scale * LOG2E;
  for (int64_t j = 0; j < Q; j += VL) {
    const vf most = load(top + j) * scale2;
    const auto p_of = [&](int64_t row) __attribute__((always_inline)) {
      return power_of_two<Mode>(load(scores + row * Q + j) * scale2 - most);
    };
    vf sums = vf{};
    int64_t i = 0;
    if constexpr (Mode::pairs) {
      vf odd = vf{};
      for (; i + 2 <= S; i += 2) {
        const vf a = p_of(i), b = p_of(i + 1);
        sums += a;
        odd += b;
        store(scores + i / 2 * Q + j, pair_words(a, b));
      }
      sums += odd;
      if (i < S) {
        const vf a = p_of(i);
        sums += a;
        store(scores + i / 2 * Q + j, pair_words(a, vf{}));
      }
    } else {
      for (; i < S; ++i) {
        const vf a = p_of(i);
        sums += a;
        store(scores + i * Q + j, a);
      }
    }
    store(total + j, 1.f / sums);
    store(lse + j, most + logarithm(sums));
  }
}

template <class Mode>
void attention_head(const typename Mode::T* qkv, const float* cos, const float* sin,
                    typename Mode::T* out, float* lse, int64_t head, int64_t S, int64_t K, int64_t H,
                    const AttentionScratch<Mode>& scratch) {
  using E = typename Mode::E;
  const int64_t D = H * K, ld = 3 * D, Kw = words<Mode>(K), most = most_queries(S, false);
  const float scale = 1.f / __builtin_sqrtf((float)K);
  const auto *q = qkv + head * K, *k = q + D, *v = k + D;
  turned_rows<Mode>(k, ld, cos, sin, 0, S, K, scratch.keys);
  pack_rows<Mode>(v, ld, S, K, scratch.straight);
  lse += head * S;
  for (int64_t first = 0, count; first < S; first += count) {
    count = block_queries(S - first, most);
    const int64_t Q = round_up(count, VL);
    turned_rows<Mode>(q, ld, cos, sin, first, count, K, scratch.queries);
    pack_across<Mode>((const E*)(const void*)scratch.queries, K, count, K, scratch.across);
    word* scores = scratch.scores;
    float *top = scratch.top, *total = scratch.total;
    for (int64_t j = 0; j < Q; j += VL) store(top + j, splat(-3e38f));
    product<Mode>(scratch.keys, Kw, 1, scratch.across, S, Q / VL, Kw,
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf s) __attribute__((always_inline)) {
                      store(scores + (m + i) * Q + n + j * VL, s);
                    });
                    each_column(c, [&](int j, vf s) __attribute__((always_inline)) {
                      const vf t = load(top + n + j * VL);
                      store(top + n + j * VL, s > t ? s : t);
                    });
                  });
    float logarithms[QUERIES];
    softmax_columns<Mode>(scores, S, Q, scale, top, total, logarithms);
    memcpy(lse + first, logarithms, (size_t)count * sizeof(float));
    auto* to = out + first * D + head * K;
    product<Mode>(scores, 1, Q, scratch.straight, count, K / VL, words<Mode>(S),
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf o) __attribute__((always_inline)) {
                      store(to + (m + i) * D + n + j * VL, o * total[m + i]);
                    });
                  });
  }
}

// ---- backward

// delta = rowsum(grad out) of `count` rows, zeros behind them up to Q.
template <class T>
SEPARATE void row_products(const T* grad, const T* out, int64_t ld, int64_t count, int64_t K,
                           float* delta) {
  for (int64_t first = 0; first < count; first += VL) {
    vf sums[VL];
    for (int i = 0; i < VL; ++i) {
      sums[i] = vf{};
      if (first + i >= count) continue;
      const int64_t row = (first + i) * ld;
      for (int64_t j = 0; j < K; j += VL) sums[i] += load(grad + row + j) * load(out + row + j);
    }
    transpose(sums);
    vf all = vf{};
    for (int i = 0; i < VL; ++i) all += sums[i];
    store(delta + first, all);
  }
}

// Words of two rows (keys) from rows of E: the operand of sums over keys.
INL void pair_rows(const bf16* rows, int64_t ld, int64_t count, word* out) {
  for (int64_t i = 0; i < count; i += 2, rows += 2 * ld, out += ld)
    for (int64_t j = 0; j < ld; j += VL) {
      const bf16* p = rows + j;
      store(out + j, pair_words(load_halves(p), i + 1 < count ? load_halves(p + ld) : vh{}));
    }
}

// P^T and dS^T, rows of E, [S, Q] each: both products of a block of keys and a panel of queries while
// the first is at hand.
template <class Mode>
SEPARATE void score_gradients(const AttentionScratch<Mode>& scratch, int64_t S, int64_t Q, int64_t Kw,
                              float scale) {
  using E = typename Mode::E;
  E *p = (E*)(void*)scratch.scores, *d = (E*)(void*)scratch.grads;
  const float *lse = scratch.top, *delta = scratch.total, scale2 = scale * LOG2E;
  product<Mode>(
      scratch.keys, Kw, 1, scratch.across, S, Q / VL, Kw,
      [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
        constexpr int MR = sizeof c / sizeof c[0], NV = sizeof c[0] / sizeof(vf);
        alignas(64) float tile[MR * NV * VL];
        each(c, [&](int i, int j, vf s) __attribute__((always_inline)) {
          const vf a = power_of_two<Mode>(s * scale2 - load(lse + n + j * VL));
          store(tile + (i * NV + j) * VL, a);
          store(p + (m + i) * Q + n + j * VL, a);
        });
        micro<Mode::pairs, MR, NV>(scratch.values + m * Kw, Kw, 1, scratch.grad_across + n * Kw,
                                   NV * VL, Kw, c);
        each(c, [&](int i, int j, vf s) __attribute__((always_inline)) {
          store(d + (m + i) * Q + n + j * VL,
                load(tile + (i * NV + j) * VL) * (s - load(delta + n + j * VL)));
        });
      });
}

// C [M, K] (+)= A B, rows of C `ld` apart.
template <class Mode, class To>
SEPARATE void key_sums(const word* a, int64_t lda, int64_t step, const word* b, int64_t M, int64_t K,
                       int64_t depth, To* out, int64_t ld, bool add) {
  product<Mode>(a, lda, step, b, M, K / VL, depth,
                [&](int64_t m, int skip, int64_t n, auto& c) __attribute__((always_inline)) {
                  each(c, [&](int i, int j, vf s) __attribute__((always_inline)) {
                    To* to = out + (m + i) * ld + n + j * VL;
                    store(to, add ? load(to) + s : s);
                  }, skip);
                });
}

template <class Mode>
void attention_head_gradient(const typename Mode::T* qkv, const float* cos, const float* sin,
                             const typename Mode::T* out, const typename Mode::T* grad,
                             const float* lse, typename Mode::T* d_qkv, int64_t head, int64_t S,
                             int64_t K, int64_t H, const AttentionScratch<Mode>& scratch) {
  using E = typename Mode::E;
  const int64_t D = H * K, ld = 3 * D, Kw = words<Mode>(K), most = most_queries(S, true);
  const float scale = 1.f / __builtin_sqrtf((float)K);
  const auto *q = qkv + head * K, *k = q + D, *v = k + D;
  auto *dq = d_qkv + head * K, *dk = dq + D, *dv = dk + D;
  grad += head * K;
  out += head * K;
  turned_rows<Mode>(k, ld, cos, sin, 0, S, K, scratch.keys);
  turned_rows<Mode>(v, ld, nullptr, nullptr, 0, S, K, scratch.values);
  pack_rows<Mode>((const E*)(const void*)scratch.keys, K, S, K, scratch.straight);
  for (int64_t first = 0, count; first < S; first += count) {
    count = block_queries(S - first, most);
    const int64_t Q = round_up(count, VL), Qw = words<Mode>(count);
    const auto* g = grad + first * D;
    const E* rows = (const E*)(const void*)scratch.queries;
    turned_rows<Mode>(q, ld, cos, sin, first, count, K, scratch.queries);
    pack_across<Mode>(rows, K, count, K, scratch.across);
    pack_rows<Mode>(rows, K, count, K, scratch.query_panels);
    pack_across<Mode>(g, D, count, K, scratch.grad_across);
    pack_rows<Mode>(g, D, count, K, scratch.grad_panels);
    row_products(g, out + first * D, D, count, K, scratch.total);
    store(scratch.top + Q - VL, vf{});
    memcpy(scratch.top, lse + head * S + first, (size_t)count * sizeof(float));
    score_gradients<Mode>(scratch, S, Q, Kw, scale);
    const bool add = first > 0, last = first + count == S;
    const int64_t row = words<Mode>(Q);
    key_sums<Mode>(scratch.scores, row, 1, scratch.grad_panels, S, K, Qw, scratch.d_values, K, add);
    key_sums<Mode>(scratch.grads, row, 1, scratch.query_panels, S, K, Qw, scratch.d_keys, K, add);
    const word* pairs = scratch.grads;
    if constexpr (Mode::pairs) {
      pair_rows((const bf16*)(const void*)scratch.grads, Q, S, scratch.grad_pairs);
      pairs = scratch.grad_pairs;
    }
    key_sums<Mode>(pairs, 1, Q, scratch.straight, count, K, words<Mode>(S), scratch.d_queries, K,
                   false);
    back_rows(scratch.d_queries, cos, sin, first, count, K, scale, dq, ld);
    if (last) {
      back_rows(scratch.d_keys, cos, sin, 0, S, K, scale, dk, ld);
      back_rows(scratch.d_values, nullptr, nullptr, 0, S, K, 1.f, dv, ld);
    }
  }
}

// ---- the op

template <class Mode>
static void forward(const Host& host, const void* qkv, const float* cos, const float* sin, void* out,
                    float* lse, int64_t B, int64_t S, int64_t H, int64_t K) {
  using T = typename Mode::T;
  const auto* scratch = AttentionScratch<Mode>::make(host, S, K, false);
  parallel_ranges(host, B * H, 1, [&](int64_t slot, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H;
      attention_head<Mode>((const T*)qkv + b * S * 3 * H * K, cos, sin, (T*)out + b * S * H * K,
                           lse + b * H * S, i % H, S, K, H, scratch[slot]);
    }
  });
}

template <class Mode>
static void backward(const Host& host, const void* grad, const void* qkv, const void* out,
                     const float* lse, const float* cos, const float* sin, void* d_qkv, int64_t B,
                     int64_t S, int64_t H, int64_t K) {
  using T = typename Mode::T;
  const auto* scratch = AttentionScratch<Mode>::make(host, S, K, true);
  parallel_ranges(host, B * H, 1, [&](int64_t slot, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, one = b * S * H * K;
      attention_head_gradient<Mode>((const T*)qkv + 3 * one, cos, sin, (const T*)out + one,
                                    (const T*)grad + one, lse + b * H * S, (T*)d_qkv + 3 * one, i % H,
                                    S, K, H, scratch[slot]);
    }
  });
}

#define TRM_INSTANTIATE(Mode)                                                                      \
  template struct AttentionScratch<Mode>;                                                          \
  template void attention_head<Mode>(const Mode::T*, const float*, const float*, Mode::T*, float*, \
                                     int64_t, int64_t, int64_t, int64_t,                           \
                                     const AttentionScratch<Mode>&);                               \
  template void attention_head_gradient<Mode>(                                                     \
      const Mode::T*, const float*, const float*, const Mode::T*, const Mode::T*, const float*,    \
      Mode::T*, int64_t, int64_t, int64_t, int64_t, const AttentionScratch<Mode>&);
TRM_INSTANTIATE(Float)
TRM_INSTANTIATE(Bfloat16)

void rope_attention_fwd(const Host& host, DType dtype, const void* qkv, const float* cos,
                        const float* sin, void* out, float* lse, int64_t B, int64_t S, int64_t H,
                        int64_t K) {
  (dtype == DType::f32 ? forward<Float> : forward<Bfloat16>)(host, qkv, cos, sin, out, lse, B, S, H,
                                                             K);
}
void rope_attention_bwd(const Host& host, DType dtype, const void* grad, const void* qkv,
                        const void* out, const float* lse, const float* cos, const float* sin,
                        void* d_qkv, int64_t B, int64_t S, int64_t H, int64_t K) {
  (dtype == DType::f32 ? backward<Float> : backward<Bfloat16>)(host, grad, qkv, out, lse, cos, sin,
                                                               d_qkv, B, S, H, K);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
