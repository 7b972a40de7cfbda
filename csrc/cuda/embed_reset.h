// embed_reset: question states from tokens, puzzle rows and positions; states that start anew; and
// the gradients to the embedding and the positions.
#pragma once
#include "dtype.h"

namespace trm_fast {
namespace cuda {

// A contiguous tensor of any of the dtypes; data is null where there is none.
struct Source {
  const void* data;
  DType dtype;
};
// Identifiers of tokens, int32 or int64.
struct Tokens {
  const void* data;
  bool wide;
};
// A state whose rows are contiguous: elements from one item and one token to the next.
struct StateView {
  const void* data;
  int64_t item, token;
};
// Of P puzzle rows and then S - P tokens: tokens [B, S - P], rows [B, P, D] or none, embedding
// [V, D], positions [S, D] or none, halted [B], y and z [B, S, D], y_init and z_init [D]. The
// sources are float or of the states' dtype. A token outside the vocabulary shows as NaN.
struct EmbedReset {
  Tokens tokens;
  Source rows, embedding, positions;
  const bool* halted;
  StateView y, z;
  Source y_init, z_init;
  float scale;
  int64_t B, S, P, V, D;
};

// x, y, z [B,S,D]
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
