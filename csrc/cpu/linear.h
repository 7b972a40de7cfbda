// Rows times a weight: what linear_rmsnorm.cpp gives to the kernels that are built of it.
#pragma once
#include "gemm.h"
#include "host.h"
#include "int8.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t ROWS = 112;  // at a time: what was computed stays in L2

// Of one thread: the sums of ROWS rows of the output, and operands where they must be converted.
template <class Mode>
struct LinearScratch {
  float* y;
  typename Mode::E* a;
  Int8Rows int8;

  // One per thread, for outputs of width D and inputs of width E.
  static LinearScratch* make(const Host& host, int64_t D, int64_t E, bool int8 = false) {
    auto* all = allocate<LinearScratch>(host, host.threads);
    for (int i = 0; i < host.threads; ++i) {
      all[i].y = allocate<float>(host, ROWS * D);
      all[i].a = sizeof(typename Mode::T) == sizeof(typename Mode::E)
                     ? nullptr
                     : allocate<typename Mode::E>(host, ROWS * E);
      all[i].int8 = int8 ? Int8Rows::make(host, ROWS, E) : Int8Rows{};
    }
    return all;
  }
};

// Packed operand of h w^T from w [D, E], float or T, on all threads: words(E) * D words.
template <class Mode, class W>
void pack_linear(const Host& host, const W* w, int64_t D, int64_t E, word* out);
// Packed operand of d w from w [D, E]: words(D) * E words.
template <class Mode, class W>
void pack_linear_transposed(const Host& host, const W* w, int64_t D, int64_t E, word* out);

// out [rows, D] = rms_norm(h + a w^T) and 1/rms of each row; w packed by pack_linear.
template <class Mode>
void linear_rmsnorm_rows(const typename Mode::T* a, const word* w, const typename Mode::T* h,
                         typename Mode::T* out, float* rstd, int64_t rows, int64_t D, int64_t E,
                         float eps, const LinearScratch<Mode>& scratch);

// out [rows, D] = a w^T + residual, where that is not null. `scratch`: ROWS * E elements where T is
// not E.
template <class Mode>
void linear_rows(const typename Mode::T* a, const word* w, const typename Mode::T* residual,
                 typename Mode::T* out, int64_t rows, int64_t D, int64_t E,
                 typename Mode::E* scratch);

}  // namespace TRM_ISA
}  // namespace trm_fast
