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

  int64_t S, D, heads;
  float eps;
  const float *cos, *sin;
  word *qkv, *out, *qkv_back, *out_back;
  LinearScratch<Mode>* rows;
  AttentionScratch<Mode>* scratch;

  static AttentionMixer make(const Host& host, const RecursionShape& s, const BlockWeights& w,
                             const float* cos, const float* sin, bool forwards, bool backwards) {
    const int64_t D = s.D, size = words<Mode>(D) * D;
    AttentionMixer m{};
    m.S = s.S, m.D = D, m.heads = s.heads, m.eps = s.eps;
    m.cos = cos, m.sin = sin;
    if (forwards) {
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
    auto* rows = LinearScratch<Mode>::make(host, s.D, 3 * s.D);
    auto* scratch = AttentionScratch<Mode>::make(host, s.S, s.D / s.heads, backwards);
    for (int64_t l = 0; l < s.blocks; ++l) all[l].rows = rows, all[l].scratch = scratch;
  }

  static void add_to_tape(const RecursionShape& s, Layout& layout, Tape<Mode>& t, bool) {
    const int64_t N = s.B * s.S;
    t.qkv = layout.take<T>(N * 3 * s.D);
    t.attended = layout.take<T>(N * s.D);
    t.lse = layout.take<float>(N * s.heads);
    t.mixed_rstd = layout.take<float>(N);
  }

  template <class Exec>
  void forward(const Exec& exec, const T* in, const Tape<Mode>& t) const {
    exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
      const Range r = share(S, part, parts);
      const int64_t at = (item * S + r.begin) * D;
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
      linear_rmsnorm_rows<Mode>(t.attended + at, out, in + at, t.mixed + at, t.mixed_rstd + row,
                                r.end - r.begin, D, D, eps, rows[slot]);
    });
  }

  static Work work(const Host& host, const RecursionShape& s, const AttentionMixer*) {
    const int64_t n = s.B * s.S * s.D;
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

  static int64_t weight_grad_words(const RecursionShape& s, int threads) {
    return trm_fast::TRM_ISA::weight_grad_words<Mode>(s.B * s.S, s.D, threads);
  }
  void weight_grad(const Host& host, int64_t items, const T* in, const Tape<Mode>& t, const Work& w,
                   float* d_qkv, float* d_out, bool accumulate, bool, word* memory) const {
    const int64_t N = items * S;
    trm_fast::TRM_ISA::weight_grad<Mode>(host, w.d_qkv, 3 * D, 3 * D, in, D, D, N, d_qkv, D,
                                         accumulate, memory);
    trm_fast::TRM_ISA::weight_grad<Mode>(host, w.ds, D, D, t.attended, D, D, N, d_out, D, accumulate,
                                         memory);
  }
};

// rms_norm over tokens of h + the token MLP of h.
template <class Mode>
struct TokenMixer {
  using T = typename Mode::T;

  struct Work {
    word* operands;  // of the weights' gradients, all items
  };

  TokenMix<Mode> w;
  float eps;
  float* sums;  // of the weights' gradients, over the passes
  TokenScratch<Mode>* scratch;

  static TokenMixer make(const Host& host, const RecursionShape& s, const BlockWeights& weights,
                         const float*, const float*, bool forwards, bool backwards) {
    TokenMixer m{};
    m.w = TokenMix<Mode>::make(host, s.S, s.D, s.F_t, backwards);
    m.w.pack(host, weights.mixer[0], weights.mixer[1], forwards);
    m.eps = s.eps;
    if (backwards) m.sums = allocate<float>(host, m.w.sums());
    return m;
  }
  static void make_scratch(const Host& host, const RecursionShape& s, bool backwards,
                           TokenMixer* all) {
    auto* scratch = TokenScratch<Mode>::make(host, all[0].w, backwards);
    for (int64_t l = 0; l < s.blocks; ++l) all[l].scratch = scratch;
  }

  static void add_to_tape(const RecursionShape& s, Layout& layout, Tape<Mode>& t, bool with_gu) {
    t.mixed_rstd = layout.take<float>(s.B * s.D);
    t.mixer_gu = with_gu ? layout.take<T>(s.B * 2 * s.F_t * s.D) : nullptr;
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

  static Work work(const Host& host, const RecursionShape& s, const TokenMixer* all) {
    return {allocate<word>(host, s.B * all[0].w.operand_words())};
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

  static int64_t weight_grad_words(const RecursionShape&, int) { return 0; }
  // Adds one pass; the last one gives the gradients.
  void weight_grad(const Host& host, int64_t items, const T* in, const Tape<Mode>&, const Work& work,
                   float* d_gate_up, float* d_down, bool accumulate, bool last, word*) const {
    token_mix_weight_sums<Mode>(host, w, in, work.operands, items, sums, accumulate);
    if (last) token_mix_weight_grad<Mode>(host, w, sums, d_gate_up, d_down, false);
  }
};

}  // namespace TRM_ISA
}  // namespace trm_fast
