// The two mixers over tokens, as steps of deep_recursion: the token MLP and attention.
#pragma once
#include "norm.h"
#include "recursion.h"
#include "rope_attention.h"
#include "token_mix.h"

namespace trm_fast {
namespace TRM_ISA {

// rms_norm(h + attention(h W_qkv^T) W_out^T), with rotary embedding where there are tables.
template <class Mode>
struct AttentionMixer {
  using T = typename Mode::T;

  // Gradients of the sum before the norm, of what was attended, of q, k, v; all items.
  struct Work {
    T *ds, *d_attended, *d_qkv;
  };

  static constexpr bool REMADE = false;  // in the backward, something that even `save` leaves out

  int64_t S, D, heads;
  float eps;
  const float *cos, *sin;
  word *qkv, *out, *qkv_back, *out_back;
  Int8Weight int8_qkv, int8_out;  // in place of the forward's, where panels is not null
  LinearScratch<Mode>* rows;
  AttentionScratch<Mode>* scratch;

  static AttentionMixer make(const Host& host, const RecursionShape& s, const BlockWeights& w,
                             const float* cos, const float* sin, bool forwards, bool backwards) {
    const int64_t D = s.D, size = words<Mode>(D) * D;
    AttentionMixer m{};
    m.S = s.S, m.D = D, m.heads = s.heads, m.eps = s.eps;
    m.cos = cos, m.sin = sin;
    if (forwards && s.int8) {
      m.int8_qkv = Int8Weight::make(host, w.mixer[0], 3 * D, D);
      m.int8_out = Int8Weight::make(host, w.mixer[1], D, D);
    } else if (forwards) {
      m.qkv = allocate<word>(host, 3 * size);
      m.out = allocate<word>(host, size);
      pack_linear<Mode>(host, w.mixer[0], 3 * D, D, m.qkv);
      pack_linear<Mode>(host, w.mixer[1], D, D, m.out);
    }
    if (backwards) {
      m.qkv_back = allocate<word>(host, 3 * size);
      m.out_back = allocate<word>(host, size);
      pack_linear_transposed<Mode>(host, w.mixer[0], 3 * D, D, m.qkv_back);
      pack_linear_transposed<Mode>(host, w.mixer[1], D, D, m.out_back);
    }
    return m;
  }
  static void make_scratch(const Host& host, const RecursionShape& s, bool backwards,
                           AttentionMixer* all) {
    auto* rows = LinearScratch<Mode>::make(host, s.D, 3 * s.D, s.int8);
    auto* scratch = AttentionScratch<Mode>::make(host, s.S, s.D / s.heads, backwards);
    for (int64_t l = 0; l < s.blocks; ++l) all[l].rows = rows, all[l].scratch = scratch;
  }

  // Scratch of the threads from `slot` on.
  void use_scratch(int64_t slot) { rows += slot, scratch += slot; }

  static void add_to_tape(const RecursionShape& s, int64_t items, Layout& layout, Tape<Mode>& t,
                          bool) {
    const int64_t N = items * s.S;
    t.qkv = layout.take<T>(N * 3 * s.D);
    t.attended = layout.take<T>(N * s.D);
    t.lse = layout.take<float>(N * s.heads);
    t.mixed_rstd = layout.take<float>(N);
  }
  static void shift(const RecursionShape& s, Tape<Mode>& t, int64_t item) {
    const int64_t N = item * s.S;
    t.qkv += N * 3 * s.D, t.attended += N * s.D, t.lse += N * s.heads, t.mixed_rstd += N;
  }

  template <class Exec>
  void forward(const Exec& exec, const T* in, const Tape<Mode>& t) const {
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(S, part, parts);
      const int64_t at = (item * S + r.begin) * D;
      if (int8_qkv.panels)
        return int8_linear_rows(in + at, int8_qkv, t.qkv + 3 * at, r.end - r.begin, 3 * D, D,
                                rows[slot].int8);
      linear_rows<Mode>(in + at, qkv, nullptr, t.qkv + 3 * at, r.end - r.begin, 3 * D, D,
                        rows[slot].a);
    });
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(heads, part, parts);
      for (int64_t head = r.begin; head < r.end; ++head)
        attention_head<Mode>(t.qkv + item * S * 3 * D, cos, sin, t.attended + item * S * D,
                             t.lse + item * heads * S, head, S, D / heads, heads, scratch[slot]);
    });
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(S, part, parts);
      const int64_t row = item * S + r.begin, at = row * D;
      if (int8_out.panels)
        return int8_linear_rmsnorm_rows(t.attended + at, int8_out, in + at, t.mixed + at,
                                        t.mixed_rstd + row, r.end - r.begin, D, D, eps, rows[slot].y,
                                        rows[slot].int8);
      linear_rmsnorm_rows<Mode>(t.attended + at, out, in + at, t.mixed + at, t.mixed_rstd + row,
                                r.end - r.begin, D, D, eps, rows[slot]);
    });
  }

  static int64_t weights(const RecursionShape& s) { return 4 * s.D * s.D; }
  static int64_t work_bytes(const RecursionShape& s) {
    return 5 * s.S * s.D * (int64_t)sizeof(T);
  }
  static Work work(const Host& host, int64_t items, const AttentionMixer* all) {
    const int64_t n = items * all[0].S * all[0].D;
    return {allocate<T>(host, n), allocate<T>(host, n), allocate<T>(host, 3 * n)};
  }

  // g, the gradient to t.mixed, becomes that to the block's input.
  template <class Exec>
  void gradient(const Exec& exec, T* g, const T*, const Tape<Mode>& t, const Work& w) const {
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(S, part, parts);
      const int64_t first = item * S + r.begin, end = item * S + r.end;
      for (int64_t m = first; m < end; ++m)
        norm_gradient_row(g + m * D, t.mixed + m * D, t.mixed_rstd[m], w.ds + m * D, D);
      linear_rows<Mode>(w.ds + first * D, out_back, nullptr, w.d_attended + first * D, end - first,
                        D, D, rows[slot].a);
    });
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(heads, part, parts);
      const int64_t at = item * S * D;
      for (int64_t head = r.begin; head < r.end; ++head)
        attention_head_gradient<Mode>(t.qkv + 3 * at, cos, sin, t.attended + at, w.d_attended + at,
                                      t.lse + item * heads * S, w.d_qkv + 3 * at, head, S, D / heads,
                                      heads, scratch[slot]);
    });
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(S, part, parts);
      const int64_t at = (item * S + r.begin) * D;
      linear_rows<Mode>(w.d_qkv + 3 * at, qkv_back, w.ds + at, g + at, r.end - r.begin, D, 3 * D,
                        rows[slot].a);
    });
  }

  static int64_t weight_grad_words(const RecursionShape& s, int64_t N, int threads) {
    return trm_fast::TRM_ISA::weight_grad_words<Mode>(N, s.D, threads);
  }
  // Where gradients add up: in what is given, or in memory of their own.
  void new_sums(const Host& host, float* const* given, float** sums) const {
    sums[0] = given ? given[0] : allocate<float>(host, 3 * D * D);
    sums[1] = given ? given[1] : allocate<float>(host, D * D);
  }
  void weight_grad(const Host& host, int64_t items, const T* in, const Tape<Mode>& t, const Work& w,
                   float* const* sums, bool add, word* memory) const {
    const int64_t N = items * S;
    trm_fast::TRM_ISA::weight_grad<Mode>(host, w.d_qkv, 3 * D, 3 * D, in, D, D, N, sums[0], D, add,
                                         memory);
    trm_fast::TRM_ISA::weight_grad<Mode>(host, w.ds, D, D, t.attended, D, D, N, sums[1], D, add,
                                         memory);
  }
  // Gradients from one part's sums, added to those of the parts before.
  void finish(const Host& host, float* const* sums, float* const* d_weights, bool in_place,
              bool add) const {
    if (in_place) return;
    add_floats(host, sums[0], d_weights[0], 3 * D * D, add);
    add_floats(host, sums[1], d_weights[1], D * D, add);
  }
};

// rms_norm over tokens of h + the token MLP of h.
template <class Mode>
struct TokenMixer {
  using T = typename Mode::T;

  struct Work {
    word* operands;  // of the weights' gradients, all items
  };

  static constexpr bool REMADE = true;

  TokenMix<Mode> w;
  float eps;
  TokenScratch<Mode>* scratch;

  static TokenMixer make(const Host& host, const RecursionShape& s, const BlockWeights& weights,
                         const float*, const float*, bool forwards, bool backwards) {
    TokenMixer m{};
    m.w = TokenMix<Mode>::make(host, s.S, s.D, s.F_t, backwards);
    m.w.pack(host, weights.mixer[0], weights.mixer[1], forwards);
    m.eps = s.eps;
    return m;
  }
  static void make_scratch(const Host& host, const RecursionShape& s, bool backwards,
                           TokenMixer* all) {
    auto* scratch = TokenScratch<Mode>::make(host, all[0].w, backwards);
    for (int64_t l = 0; l < s.blocks; ++l) all[l].scratch = scratch;
  }

  void use_scratch(int64_t slot) { scratch += slot; }

  static void add_to_tape(const RecursionShape& s, int64_t items, Layout& layout, Tape<Mode>& t,
                          bool with_gu) {
    t.mixed_rstd = layout.take<float>(items * s.D);
    t.mixer_gu = with_gu ? layout.take<T>(items * 2 * s.F_t * s.D) : nullptr;
  }
  static void shift(const RecursionShape& s, Tape<Mode>& t, int64_t item) {
    t.mixed_rstd += item * s.D;
    if (t.mixer_gu) t.mixer_gu += item * 2 * s.F_t * s.D;
  }

  template <class Exec>
  void forward(const Exec& exec, const T* in, const Tape<Mode>& t) const {
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(w.panels(), part, parts);
      const int64_t at = item * w.S * w.D;
      token_mix_columns<Mode>(w, in + at, t.mixed + at,
                              t.mixer_gu ? t.mixer_gu + item * w.kept() : nullptr,
                              t.mixed_rstd + item * w.D, w.border(r.begin), w.border(r.end), eps,
                              scratch[slot]);
    });
  }

  static int64_t weights(const RecursionShape& s) { return 3 * s.S * s.F_t; }
  static int64_t work_bytes(const RecursionShape& s) {
    return (3 * s.F_t + s.S) * s.D * (int64_t)sizeof(typename Mode::E);
  }
  static Work work(const Host& host, int64_t items, const TokenMixer* all) {
    return {allocate<word>(host, items * all[0].w.operand_words())};
  }

  // g, the gradient to t.mixed, becomes that to the block's input.
  template <class Exec>
  void gradient(const Exec& exec, T* g, const T* in, const Tape<Mode>& t, const Work& work) const {
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(w.panels(), part, parts);
      const int64_t at = item * w.S * w.D;
      token_mix_gradient_columns<Mode>(
          w, g + at, in + at, t.mixed + at, t.mixer_gu ? t.mixer_gu + item * w.kept() : nullptr,
          t.mixed_rstd + item * w.D, g + at, work.operands + item * w.operand_words(),
          w.border(r.begin), w.border(r.end), scratch[slot]);
    });
  }

  static int64_t weight_grad_words(const RecursionShape&, int64_t, int) { return 0; }
  void new_sums(const Host& host, float* const*, float** sums) const {
    sums[0] = allocate<float>(host, w.sums());  // in a layout of their own
  }
  void weight_grad(const Host& host, int64_t items, const T* in, const Tape<Mode>&, const Work& work,
                   float* const* sums, bool add, word*) const {
    token_mix_weight_sums<Mode>(host, w, in, work.operands, items, sums[0], add);
  }
  void finish(const Host& host, float* const* sums, float* const* d_weights, bool, bool add) const {
    token_mix_weight_grad<Mode>(host, w, sums[0], d_weights[0], d_weights[1], add);
  }
};

}  // namespace TRM_ISA
}  // namespace trm_fast
