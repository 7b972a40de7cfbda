// residual_rmsnorm: rms_norm(h + u) along the features or the tokens.
//
// Formula, t = h + u, r = 1 / sqrt(mean(t^2) + eps): y = r t, dt = r (dy - y mean(dy y)).
#pragma once
#include "kernels.h"

namespace trm_fast {
namespace cuda {

// h, u -> out [N,D], each row with its own scale rstd [N] float
cudaError_t rmsnorm_features_fwd(DType dtype, const void* h, const void* u, void* out, float* rstd,
                                 int64_t N, int64_t D, float eps, cudaStream_t stream);
// d [N,D], the gradient of h and of u
cudaError_t rmsnorm_features_bwd(DType dtype, const void* grad, const void* out, const float* rstd,
                                 void* d, int64_t N, int64_t D, cudaStream_t stream);
// h, u -> out [B,S,D], each column of an item with its own scale rstd [B,D] float
cudaError_t rmsnorm_tokens_fwd(DType dtype, const void* h, const void* u, void* out, float* rstd,
                               int64_t B, int64_t S, int64_t D, float eps, cudaStream_t stream);
// d [B,S,D]
cudaError_t rmsnorm_tokens_bwd(DType dtype, const void* grad, const void* out, const float* rstd,
                               void* d, int64_t B, int64_t S, int64_t D, cudaStream_t stream);

}  // namespace cuda
}  // namespace trm_fast
