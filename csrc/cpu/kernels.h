// What the CPU kernels look like from outside: no torch, no instruction set.
//
// Every file of this folder that includes vec.h is compiled once per instruction set, with TRM_ISA
// the name of its namespace, and table.cpp fills one Kernels per set. dispatch.cpp picks the best one
// that this CPU can run; the bindings check arguments, allocate, and call through it.
//
// Dims: B batch, S tokens incl. prefix, D width, F feed-forward width, H heads, K head dim, V
// vocabulary, N = B*S rows. Pointers to tensors are void: their type is the DType's, contiguous.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace trm_fast {

enum class DType : int { f32 = 0, bf16 = 1 };

// What a kernel asks of the process it runs in.
struct Host {
  int threads;
  // body(context, i) for every i < count, on up to `threads` threads; returns when all are done.
  void (*run)(int64_t count, void (*body)(void* context, int64_t index), void* context);
  // 64-byte aligned memory that lives until the operation returns; its content is undefined.
  void* (*allocate)(const Host* host, size_t bytes);
  void* owner;
};

// Weights of one block as the model has them: float, row-major.
//   mlp_t: mixer[0] gate_up [2 F_t, S], mixer[1] down [S, F_t]; else qkv [3 H K, D], out [D, H K].
struct BlockWeights {
  const float* mixer[2];
  const float* gate_up;  // [2 F, D]
  const float* down;     // [D, F]
};

// What the backward of deep_recursion is given; as trm_fast.ops says.
enum class Policy : int { none = 0, save = 1, light = 2, recompute = 3 };

// Everything about deep_recursion that is no tensor. F_t: inner width of the token MLP (mlp_t).
struct RecursionShape {
  int64_t B, S, D, F, F_t, heads, blocks, H_cycles, L_cycles;
  float eps;
  bool mlp_t;
  Policy policy;
};

// Each line: name, arguments. A function of the namespace and a pointer in the table.

#define TRM_ELEMENTWISE_KERNELS(X)

#define TRM_TRAINING_KERNELS(X)

#define TRM_LINEAR_KERNELS(X)                                                                      \
  /* out [N,D] = rms_norm(h + a w^T), rstd [N]; a [N,E], w [D,E] */                                \
  X(linear_rmsnorm_fwd, (const Host& host, DType dtype, const void* a, const void* w,              \
                         const void* h, void* out, float* rstd, int64_t N, int64_t D, int64_t E,   \
                         float eps))                                                               \
  /* da, dw, dh from dy and what the forward gave */                                               \
  X(linear_rmsnorm_bwd, (const Host& host, DType dtype, const void* dy, const void* a,             \
                         const void* w, const void* out, const float* rstd, void* da, void* dw,    \
                         void* dh, int64_t N, int64_t D, int64_t E))                               \
  /* out [N,D] = rms_norm(x + down(silu(g) * u)), rstd [N]; gu [N, 2 round_up(F, 16)] or null */   \
  X(swiglu_rmsnorm_fwd, (const Host& host, DType dtype, const void* x, const void* gate_up,        \
                         const void* down, void* out, void* gu, float* rstd, int64_t N, int64_t D, \
                         int64_t F, float eps))                                                    \
  X(swiglu_rmsnorm_bwd, (const Host& host, DType dtype, const void* dy, const void* x,             \
                         const void* gate_up, const void* down, const void* out, const void* gu,   \
                         const float* rstd, void* dx, void* d_gate_up, void* d_down, int64_t N,    \
                         int64_t D, int64_t F))

#define TRM_TOKEN_KERNELS(X)

#define TRM_ATTENTION_KERNELS(X)

#define TRM_RECURSION_KERNELS(X)

#define TRM_CPU_KERNELS(X)   \
  TRM_ELEMENTWISE_KERNELS(X) \
  TRM_TRAINING_KERNELS(X)    \
  TRM_LINEAR_KERNELS(X)      \
  TRM_TOKEN_KERNELS(X)       \
  TRM_ATTENTION_KERNELS(X)   \
  TRM_RECURSION_KERNELS(X)

struct Kernels {
  const char* name;
#define X(name, args) void(*name) args;
  TRM_CPU_KERNELS(X)
#undef X
};

// The table for this CPU; null where the library holds none that it can run.
const Kernels* kernels_or_null();

}  // namespace trm_fast
