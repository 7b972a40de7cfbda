// inject: z + (y + x), how the recursion shows the latent state the question and the answer.
#pragma once
#include "kernels.h"

namespace trm_fast {
namespace cuda {

// z, y, x, out: `count` elements.
cudaError_t inject_fwd(DType dtype, const void* z, const void* y, const void* x, void* out,
                       int64_t count, cudaStream_t stream);

}  // namespace cuda
}  // namespace trm_fast
