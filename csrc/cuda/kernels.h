// What the CUDA kernels look like from outside: no torch, raw pointers and a stream.
//
// Each <op>.h declares functions that launch and return; pointers to tensors are void, their type is
// the DType's, contiguous unless said. Nothing is allocated and nothing waits.
//
// Dims: B batch, S tokens incl. prefix, P puzzle-prefix tokens, D width, F feed-forward width, V
// vocabulary, N rows. All sizes and offsets are 64 bits wide; any of them may be 0.
#pragma once
#include <cuda_runtime_api.h>

#include "../types.h"
