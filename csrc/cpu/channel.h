// The channel MLP of one block: what swiglu_rmsnorm.cpp gives to the recursion.
//
// y = rms_norm(x + W_down(silu(g) * u)), g and u the halves of W_gate_up x, row by row. Inner widths
// are padded to P = round_up(F, 16) with zeros, which change nothing.
#pragma once
#include "gemm.h"
#include "host.h"
#include "linear.h"
#include "weight_grad.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t INNER = 16;  // inner widths are padded to this, whatever the instruction set

// Packed operands. Forward: gate_up, with panels of half gates, half ups, and down. Backward:
// down_back of dh = ds W_down, gate_up_back of dx = dgu W_gate_up.
template <class Mode>
struct Channel {
  int64_t D, F, P;
  word *gate_up, *down, *down_back, *gate_up_back;

  // W is float or T: masters or weights of the states' type. forwards, backwards: what is needed.
  template <class W>
  static Channel make(const Host& host, const W* gate_up, const W* down, int64_t D, int64_t F,
                      bool forwards, bool backwards);
};

// Of one thread, for ROWS rows: h [P], y [D] and, where g and u are made again, gu [2 P].
template <class Mode>
struct ChannelScratch {
  typename Mode::E *h, *operand;
  float* y;
  typename Mode::T* gu;

  static ChannelScratch* make(const Host& host, int64_t D, int64_t P);
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
