// swiglu: silu(gate) * up, of rows whose first half is the gate.
#pragma once
#include "kernels.h"

namespace trm_fast {
namespace cuda {

// gate_up [N,2F] -> out [N,F]
cudaError_t swiglu_fwd(DType dtype, const void* gate_up, void* out, int64_t N, int64_t F,
                       cudaStream_t stream);
// d [N,2F], the gradient of gate_up, from that of the result, grad [N,F]
cudaError_t swiglu_bwd(DType dtype, const void* grad, const void* gate_up, void* d, int64_t N,
                       int64_t F, cudaStream_t stream);

}  // namespace cuda
}  // namespace trm_fast
