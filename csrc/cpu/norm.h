// RMS norm without weights, over a row: forward, and the gradient from what the forward gave.
#pragma once
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

// out = rms_norm(h + y) of a row of D, a multiple of VL; y is overwritten by the sum. Returns 1/rms.
template <class T>
INL float add_norm_row(const T* h, float* y, T* out, int64_t D, float eps) {
  vf squares = vf{};
  for (int64_t j = 0; j < D; j += VL) {
    const vf s = load(h + j) + load(y + j);
    store(y + j, s);
    squares += s * s;
  }
  const float rstd = 1.f / __builtin_sqrtf(sum(squares) / (float)D + eps);
  for (int64_t j = 0; j < D; j += VL) store(out + j, load(y + j) * rstd);
  return rstd;
}

// Gradient of the sum from dy, that of out = rms_norm(sum): rstd (dy - out mean(dy out)).
template <class T>
INL void norm_gradient_row(const T* dy, const T* out, float rstd, T* d, int64_t D) {
  vf products = vf{};
  for (int64_t j = 0; j < D; j += VL) products += load(dy + j) * load(out + j);
  const float mean = sum(products) / (float)D;
  for (int64_t j = 0; j < D; j += VL)
    store(d + j, (load(dy + j) - load(out + j) * mean) * rstd);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
