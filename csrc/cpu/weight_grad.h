// dW = G^T X: the gradient of a weight from those of its outputs and its inputs.
#pragma once
#include "gemm.h"
#include "host.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t STRIP = 4 * VL;      // columns of G per task
constexpr int64_t CHUNK_WORDS = 512;   // of M per pass over C: the packed panels stay in L2

// Words of memory that one call needs.
template <class Mode>
INL int64_t weight_grad_words(int64_t M, int64_t N2, int threads) {
  return round_up(words<Mode>(M) * round_up(N2, VL), VL) + threads * CHUNK_WORDS * STRIP;
}

// C [N1, N2] float (+)= sum over m of G[m, N1]^T X[m, N2]; rows of G and X are ldg and ldx elements
// apart, those of C ldc. Sums are made in chunks of M, in order, whatever the threads. `memory`:
// weight_grad_words.
template <class Mode, class G, class X>
void weight_grad(const Host& host, const G* g, int64_t ldg, int64_t N1, const X* x, int64_t ldx,
                 int64_t N2, int64_t M, float* C, int64_t ldc, bool accumulate, word* memory);

}  // namespace TRM_ISA
}  // namespace trm_fast
