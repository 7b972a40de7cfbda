// rotate_qkv: rotary embedding on queries and keys of packed qkv, and its backward, which packs.
//
// Formula, of the halves x1, x2 of a head: (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2).
#pragma once
#include "kernels.h"

namespace trm_fast {
namespace cuda {

// qkv [B,S,3*H*K] -> out, its q and k rotated; cos, sin [S,K]
cudaError_t rotate_qkv_fwd(DType dtype, const void* qkv, const float* cos, const float* sin,
                           void* out, int64_t B, int64_t S, int64_t H, int64_t K,
                           cudaStream_t stream);
// dq, dk, dv [B,S,H,K] -> out [B,S,3*H*K], dq and dk rotated back unless cos and sin are null
cudaError_t rotate_qkv_bwd(DType dtype, const void* dq, const void* dk, const void* dv,
                           const float* cos, const float* sin, void* out, int64_t B, int64_t S,
                           int64_t H, int64_t K, cudaStream_t stream);

}  // namespace cuda
}  // namespace trm_fast
