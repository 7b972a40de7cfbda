// swiglu: silu(gate) * up of rows whose first half is the gate, forward and backward.
//
// In float in between, rounded once.
#include "elements.h"

namespace trm_fast {
namespace TRM_ISA {

template <class T>
static void forward(const Host& host, const void* gate_up_, void* out_, int64_t N, int64_t F) {
  const T* gate_up = (const T*)gate_up_;
  T* out = (T*)out_;
  parallel_rows(host, N, F, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T *gate = gate_up + m * 2 * F, *up = gate + F;
      T* to = out + m * F;
      each_vector(0, F, [&](int64_t j, auto part) __attribute__((always_inline)) {
        const vf g = part.load(gate + j);
        part.store(to + j, g * sigmoid(g) * part.load(up + j));
      });
    }
  });
}

template <class T>
static void backward(const Host& host, const void* grad_, const void* gate_up_, void* d_, int64_t N,
                     int64_t F) {
  const T *grad = (const T*)grad_, *gate_up = (const T*)gate_up_;
  T* d = (T*)d_;
  parallel_rows(host, N, F, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T *gate = gate_up + m * 2 * F, *up = gate + F, *dh = grad + m * F;
      T *d_gate = d + m * 2 * F, *d_up = d_gate + F;
      each_vector(0, F, [&](int64_t j, auto part) __attribute__((always_inline)) {
        vf dg, du, h;
        swiglu_gradient(part.load(gate + j), part.load(up + j), part.load(dh + j), dg, du, h);
        part.store(d_gate + j, dg);
        part.store(d_up + j, du);
      });
    }
  });
}

void swiglu_fwd(const Host& host, DType dtype, const void* gate_up, void* out, int64_t N,
                int64_t F) {
  (dtype == DType::f32 ? forward<float> : forward<bf16>)(host, gate_up, out, N, F);
}
void swiglu_bwd(const Host& host, DType dtype, const void* grad, const void* gate_up, void* d,
                int64_t N, int64_t F) {
  (dtype == DType::f32 ? backward<float> : backward<bf16>)(host, grad, gate_up, d, N, F);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
