// swiglu_rmsnorm: rms_norm(h + W_down(silu(g) * u)) over rows, forward and backward.
#include "channel.h"
#include "norm.h"

namespace trm_fast {
namespace TRM_ISA {

template <class Mode>
template <class W>
Channel<Mode> Channel<Mode>::make(const Host& host, const W* gate_up, const W* down, int64_t D,
                                  int64_t F, bool forwards, bool backwards) {
  const int64_t P = round_up(F, INNER), per = Mode::per_word;
  Channel c{};
  c.D = D, c.F = F, c.P = P;
  if (forwards) {
    c.gate_up = allocate<word>(host, D / per * 2 * P);
    c.down = allocate<word>(host, P / per * D);
  }
  if (backwards) {
    c.down_back = allocate<word>(host, D / per * P);
    c.gate_up_back = allocate<word>(host, 2 * P / per * D);
  }
  const int64_t parts = host.threads, wide = 2 * P / VL, inner = P / VL, out = D / VL;
  const auto row_or_null = [](const W* w, bool there) { return there ? w : (const W*)nullptr; };
  parallel(host, parts, [&](int64_t i) {
    if (forwards) {
      pack_transposed<Mode>(
          [&](int64_t n) {
            const int64_t row = interleaved_row(n, F, P);
            return row_or_null(gate_up + row * D, row >= 0);
          },
          2 * P, D, c.gate_up, panel_border(wide, i, parts), panel_border(wide, i + 1, parts));
      pack_transposed<Mode>([&](int64_t n) { return down + n * F; }, D, F, c.down,
                            panel_border(out, i, parts), panel_border(out, i + 1, parts), P);
    }
    if (backwards) {
      pack_straight<Mode>([&](int64_t k) { return down + k * F; }, F, P, D, c.down_back,
                          panel_border(inner, i, parts), panel_border(inner, i + 1, parts));
      pack_straight<Mode>(
          [&](int64_t k) {
            return row_or_null(gate_up + (k < P ? k : k - P + F) * D, (k < P ? k : k - P) < F);
          },
          D, D, 2 * P, c.gate_up_back, panel_border(out, i, parts),
          panel_border(out, i + 1, parts));
    }
  });
  return c;
}

template <class Mode>
Channel<Mode> Channel<Mode>::make_int8(const Host& host, const float* gate_up, const float* down,
                                       int64_t D, int64_t F) {
  const int64_t P = round_up(F, INNER);
  Channel c{};
  c.D = D, c.F = F, c.P = P;
  c.int8_gate_up = trm_fast::TRM_ISA::int8_gate_up(host, gate_up, D, F, P);
  c.int8_down = trm_fast::TRM_ISA::int8_down(host, down, D, F, P);
  return c;
}

template <class Mode>
ChannelScratch<Mode>* ChannelScratch<Mode>::make(const Host& host, int64_t D, int64_t P, bool int8) {
  using E = typename Mode::E;
  constexpr bool converts = sizeof(typename Mode::T) != sizeof(E);
  auto* all = allocate<ChannelScratch>(host, host.threads);
  for (int i = 0; i < host.threads; ++i) {
    all[i].h = allocate<E>(host, ROWS * P);
    all[i].operand = converts ? allocate<E>(host, ROWS * D) : nullptr;
    all[i].y = allocate<float>(host, ROWS * D);
    all[i].gu = allocate<typename Mode::T>(host, ROWS * 2 * P);
    all[i].int8 = int8 ? Int8Rows::make(host, ROWS, larger(D, P)) : Int8Rows{};
  }
  return all;
}

// h and, where not null, gu of `count` rows.
template <class Mode>
static void gate_up_rows(const Channel<Mode>& w, const typename Mode::T* x, typename Mode::E* h,
                         typename Mode::T* gu, int64_t count, typename Mode::E* scratch) {
  const int64_t P = w.P, Dw = words<Mode>(w.D);
  product<Mode>(
      operand<Mode>(x, count, w.D, scratch), Dw, 1, w.gate_up, count, 2 * P / VL, Dw,
      [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
        constexpr int half = sizeof(c[0]) / sizeof(vf) / 2;
        each(c, [&](int i, int j, vf g) __attribute__((always_inline)) {
          if (j >= half) return;
          const vf u = c[i][j + half];
          const int64_t f = n / 2 + j * VL;
          if (h) store(h + (m + i) * P + f, g * sigmoid(g) * u);
          if (gu) {
            store(gu + (m + i) * 2 * P + f, g);
            store(gu + (m + i) * 2 * P + P + f, u);
          }
        });
      });
}

template <class Mode>
void channel_rows(const Channel<Mode>& w, const typename Mode::T* x, typename Mode::T* out,
                  typename Mode::T* gu, float* rstd, int64_t rows, float eps,
                  const ChannelScratch<Mode>& scratch) {
  const int64_t D = w.D, P = w.P, Pw = words<Mode>(P);
  if (w.int8_down.panels)
    return int8_channel_rows(w.int8_gate_up, w.int8_down, x, out, rstd, rows, D, P, eps, scratch.gu,
                             scratch.y, scratch.int8);
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    gate_up_rows<Mode>(w, x + first * D, scratch.h, gu ? gu + first * 2 * P : nullptr, count,
                       scratch.operand);
    float* y = scratch.y;
    product<Mode>((const word*)(const void*)scratch.h, Pw, 1, w.down, count, D / VL, Pw,
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                      store(y + (m + i) * D + n + j * VL, v);
                    });
                  });
    for (int64_t m = 0; m < count; ++m)
      rstd[first + m] = add_norm_row(x + (first + m) * D, y + m * D, out + (first + m) * D, D, eps);
  }
}

template <class Mode>
void channel_gradient_rows(const Channel<Mode>& w, const typename Mode::T* dy,
                           const typename Mode::T* x, const typename Mode::T* out,
                           const typename Mode::T* gu, const float* rstd, typename Mode::T* ds,
                           typename Mode::E* dgu, typename Mode::E* h, typename Mode::T* dx,
                           int64_t rows, const ChannelScratch<Mode>& scratch) {
  using T = typename Mode::T;
  const int64_t D = w.D, P = w.P, Dw = words<Mode>(D), Pw = words<Mode>(2 * P);
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    for (int64_t m = first; m < first + count; ++m)
      norm_gradient_row(dy + m * D, out + m * D, rstd[m], ds + m * D, D);
    const T* kept = gu ? gu + first * 2 * P : scratch.gu;
    if (!gu) gate_up_rows<Mode>(w, x + first * D, nullptr, scratch.gu, count, scratch.operand);
    auto* d = dgu + first * 2 * P;
    auto* inner = h + first * P;
    product<Mode>(operand<Mode>(ds + first * D, count, D, scratch.operand), Dw, 1, w.down_back,
                  count, P / VL, Dw,
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf dh) __attribute__((always_inline)) {
                      const int64_t g = (m + i) * 2 * P + n + j * VL;
                      vf dg, du, value;
                      swiglu_gradient(load(kept + g), load(kept + g + P), dh, dg, du, value);
                      store(d + g, dg);
                      store(d + g + P, du);
                      store(inner + (m + i) * P + n + j * VL, value);
                    });
                  });
    const T* residual = ds + first * D;
    T* to = dx + first * D;
    product<Mode>((const word*)(const void*)d, Pw, 1, w.gate_up_back, count, D / VL, Pw,
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                      const int64_t at = (m + i) * D + n + j * VL;
                      store(to + at, v + load(residual + at));
                    });
                  });
  }
}

template <class Mode>
void channel_weight_grad(const Host& host, const Channel<Mode>& w, const typename Mode::T* x,
                         const typename Mode::T* ds, const typename Mode::E* dgu,
                         const typename Mode::E* h, int64_t N, float* d_gate_up, float* d_down,
                         bool accumulate, word* memory) {
  const int64_t D = w.D, F = w.F, P = w.P;
  if (F == P) {
    weight_grad<Mode>(host, dgu, 2 * P, 2 * F, x, D, D, N, d_gate_up, D, accumulate, memory);
  } else {  // the padding between gates and ups is left out
    for (int half = 0; half < 2; ++half)
      weight_grad<Mode>(host, dgu + half * P, 2 * P, F, x, D, D, N, d_gate_up + half * F * D, D,
                        accumulate, memory);
  }
  weight_grad<Mode>(host, ds, D, D, h, P, F, N, d_down, F, accumulate, memory);
}

template <class Mode>
static void forward(const Host& host, const void* x_, const void* gate_up, const void* down,
                    void* out_, void* gu_, float* rstd, int64_t N, int64_t D, int64_t F, float eps) {
  using T = typename Mode::T;
  const auto w = Channel<Mode>::make(host, (const T*)gate_up, (const T*)down, D, F, true, false);
  const auto* scratch = ChannelScratch<Mode>::make(host, D, w.P);
  const T* x = (const T*)x_;
  T *out = (T*)out_, *gu = (T*)gu_;
  parallel_ranges(host, N, 16, [&](int64_t slot, int64_t begin, int64_t end) {
    channel_rows<Mode>(w, x + begin * D, out + begin * D, gu ? gu + begin * 2 * w.P : nullptr,
                       rstd + begin, end - begin, eps, scratch[slot]);
  });
}

template <class Mode>
static void backward(const Host& host, const void* dy_, const void* x_, const void* gate_up,
                     const void* down, const void* out_, const void* gu_, const float* rstd,
                     void* dx_, void* d_gate_up_, void* d_down_, int64_t N, int64_t D, int64_t F) {
  using T = typename Mode::T;
  using E = typename Mode::E;
  const auto w = Channel<Mode>::make(host, (const T*)gate_up, (const T*)down, D, F, false, true);
  const auto* scratch = ChannelScratch<Mode>::make(host, D, w.P);
  const T *dy = (const T*)dy_, *x = (const T*)x_, *out = (const T*)out_, *gu = (const T*)gu_;
  T *dx = (T*)dx_, *ds = allocate<T>(host, N * D);
  E *dgu = allocate<E>(host, N * 2 * w.P), *h = allocate<E>(host, N * w.P);
  parallel_ranges(host, N, 16, [&](int64_t slot, int64_t begin, int64_t end) {
    channel_gradient_rows<Mode>(w, dy + begin * D, x + begin * D, out + begin * D,
                                gu + begin * 2 * w.P, rstd + begin, ds + begin * D,
                                dgu + begin * 2 * w.P, h + begin * w.P, dx + begin * D, end - begin,
                                scratch[slot]);
  });
  float *d_gate_up = allocate<float>(host, 2 * F * D), *d_down = allocate<float>(host, F * D);
  word* memory = allocate<word>(host, channel_weight_grad_words<Mode>(N, D, F, host.threads));
  channel_weight_grad<Mode>(host, w, x, ds, dgu, h, N, d_gate_up, d_down, false, memory);
  copy_floats(host, d_gate_up, (T*)d_gate_up_, 2 * F * D);
  copy_floats(host, d_down, (T*)d_down_, F * D);
}

#define TRM_INSTANTIATE(Mode)                                                                       \
  template Channel<Mode> Channel<Mode>::make<float>(const Host&, const float*, const float*,       \
                                                    int64_t, int64_t, bool, bool);                  \
  template Channel<Mode> Channel<Mode>::make_int8(const Host&, const float*, const float*, int64_t, \
                                                  int64_t);                                         \
  template ChannelScratch<Mode>* ChannelScratch<Mode>::make(const Host&, int64_t, int64_t, bool);   \
  template void channel_rows<Mode>(const Channel<Mode>&, const Mode::T*, Mode::T*, Mode::T*,        \
                                   float*, int64_t, float, const ChannelScratch<Mode>&);            \
  template void channel_gradient_rows<Mode>(                                                        \
      const Channel<Mode>&, const Mode::T*, const Mode::T*, const Mode::T*, const Mode::T*,         \
      const float*, Mode::T*, Mode::E*, Mode::E*, Mode::T*, int64_t, const ChannelScratch<Mode>&);  \
  template void channel_weight_grad<Mode>(const Host&, const Channel<Mode>&, const Mode::T*,        \
                                          const Mode::T*, const Mode::E*, const Mode::E*, int64_t,  \
                                          float*, float*, bool, word*);
TRM_INSTANTIATE(Float)
TRM_INSTANTIATE(Bfloat16)

void swiglu_rmsnorm_fwd(const Host& host, DType dtype, const void* x, const void* gate_up,
                        const void* down, void* out, void* gu, float* rstd, int64_t N, int64_t D,
                        int64_t F, float eps) {
  (dtype == DType::f32 ? forward<Float> : forward<Bfloat16>)(host, x, gate_up, down, out, gu, rstd,
                                                             N, D, F, eps);
}
void swiglu_rmsnorm_bwd(const Host& host, DType dtype, const void* dy, const void* x,
                        const void* gate_up, const void* down, const void* out, const void* gu,
                        const float* rstd, void* dx, void* d_gate_up, void* d_down, int64_t N,
                        int64_t D, int64_t F) {
  (dtype == DType::f32 ? backward<Float> : backward<Bfloat16>)(
      host, dy, x, gate_up, down, out, gu, rstd, dx, d_gate_up, d_down, N, D, F);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
