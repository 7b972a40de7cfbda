// The channel MLP of one block: what swiglu_rmsnorm.cpp gives to the recursion.
//
// y = rms_norm(x + W_down(silu(g) * u)), g and u the halves of W_gate_up x, row by row. Inner widths
// are padded to P = round_up(F, 16) with zeros, which change nothing.
#pragma once
#include "gemm.h"
#include "host.h"
#include "int8.h"
#include "linear.h"
#include "weight_grad.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t INNER = 16;  // inner widths are padded to this, whatever the instruction set

// Which row of gate_up [2 F, D] column n of the packed operand is: half of each panel are gates, the
// other half the ups that belong to them. -1 for padding.
INL int64_t interleaved_row(int64_t n, int64_t F, int64_t P) {
  const int64_t v = n / VL, panel = v / MAX_NV * MAX_NV;
  const int64_t half = panel_vectors(2 * P / VL - panel) / 2, j = v - panel;
  const int64_t f = (panel / 2 + j % half) * VL + n % VL;
  return f < F ? f + (j < half ? 0 : F) : -1;
}

// Packed operands. Forward: gate_up, with panels of half gates, half ups, and down. Backward:
// down_back of dh = ds W_down, gate_up_back of dx = dgu W_gate_up.
template <class Mode>
struct Channel {
  int64_t D, F, P;
  word *gate_up, *down, *down_back, *gate_up_back;
  Int8Weight int8_gate_up, int8_down;  // in place of the forward's, where panels is not null

  // W is float or T: masters or weights of the states' type. forwards, backwards: what is needed.
  template <class W>
  static Channel make(const Host& host, const W* gate_up, const W* down, int64_t D, int64_t F,
                      bool forwards, bool backwards);
  // For a forward in eight bits, which keeps no g and u.
  static Channel make_int8(const Host& host, const float* gate_up, const float* down, int64_t D,
                           int64_t F);
};

// Of one thread, for ROWS rows: h [P], y [D] and, where g and u are made again, gu [2 P].
template <class Mode>
struct ChannelScratch {
  typename Mode::E *h, *operand;
  float* y;
  typename Mode::T* gu;
  Int8Rows int8;  // [D] or [P]

  static ChannelScratch* make(const Host& host, int64_t D, int64_t P, bool int8 = false);
};

// out [rows, D], rstd [rows] of x [rows, D]; gu [rows, 2 P], g then u, where it is not null.
template <class Mode>
void channel_rows(const Channel<Mode>& w, const typename Mode::T* x, typename Mode::T* out,
                  typename Mode::T* gu, float* rstd, int64_t rows, float eps,
                  const ChannelScratch<Mode>& scratch);

// Gradient to x [rows, D] from dy, and what the weights' gradients are made of: ds [rows, D] of the
// sum, dgu [rows, 2 P], h [rows, P]. gu is what the forward kept, or null: made again from x. dx may
// be dy.
template <class Mode>
void channel_gradient_rows(const Channel<Mode>& w, const typename Mode::T* dy,
                           const typename Mode::T* x, const typename Mode::T* out,
                           const typename Mode::T* gu, const float* rstd, typename Mode::T* ds,
                           typename Mode::E* dgu, typename Mode::E* h, typename Mode::T* dx,
                           int64_t rows, const ChannelScratch<Mode>& scratch);

// d_gate_up [2 F, D] and d_down [D, F] (+)= from the above and x, over N rows.
template <class Mode>
void channel_weight_grad(const Host& host, const Channel<Mode>& w, const typename Mode::T* x,
                         const typename Mode::T* ds, const typename Mode::E* dgu,
                         const typename Mode::E* h, int64_t N, float* d_gate_up, float* d_down,
                         bool accumulate, word* memory);

// Words of `memory`.
template <class Mode>
INL int64_t channel_weight_grad_words(int64_t N, int64_t D, int64_t F, int threads) {
  return weight_grad_words<Mode>(N, larger(D, F), threads);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
