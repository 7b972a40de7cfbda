// embed_reset: question states from tokens, puzzle rows and positions; states that start anew; and
// the gradients to the embedding and the positions.
#pragma once
#include "kernels.h"

namespace trm_fast {
namespace cuda {

// x, y, z [B,S,D]. A token outside the vocabulary shows as NaN.
cudaError_t embed_reset_fwd(DType dtype, const EmbedReset& in, void* x, void* y, void* z,
                            cudaStream_t stream);

// How many partial sums [V,D] embed_reset_bwd needs memory for; of the sizes alone.
int64_t embed_reset_partials(int64_t B, int64_t S, int64_t P, int64_t V, int64_t D);
// out [V,D] = factor * the sums of grad [B,S,D] over the places of each token, [B, S - P], always
// added in the same order. Tokens outside the vocabulary are left out.
cudaError_t embed_reset_bwd(DType dtype, const void* grad, Tokens tokens, float* partials,
                            float* out, int64_t B, int64_t S, int64_t P, int64_t V, int64_t D,
                            float factor, cudaStream_t stream);
// out [S,D] = factor * the sum of grad [B,S,D] over the items
cudaError_t embed_reset_positions_bwd(DType dtype, const void* grad, float* out, int64_t B,
                                      int64_t S, int64_t D, float factor, cudaStream_t stream);

}  // namespace cuda
}  // namespace trm_fast
