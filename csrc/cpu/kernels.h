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

#include "../types.h"

namespace trm_fast {

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
  bool int8;  // products with weights in eight bits (int8.h); with the policy none only
};

// One parameter of an optimizer step, and what belongs to it: each of `count` elements and of its
// own dtype. The average and the copy may be missing: null.
struct StepTensor {
  void* data;
  DType dtype;
};
struct StepTensors {
  StepTensor param, grad, exp_avg, exp_avg_sq, ema, copy;
  int64_t count;
};
struct StepSettings {
  float weight1, weight2;  // of the gradient and its square in their averages
  float scale;             // of the gradient
  float decay, rate;       // p * decay - rate * atan2(...)
  float correction2;       // 1 - beta2^step
  float ema_weight;        // of the parameter in its average
};

// Each line: name, arguments. A function of the namespace and a pointer in the table.

#define TRM_ELEMENTWISE_KERNELS(X)                                                                 \
  /* z + (y + x), of `count` elements */                                                           \
  X(inject_fwd, (const Host& host, DType dtype, const void* z, const void* y, const void* x,       \
                 void* out, int64_t count))                                                        \
  /* out [N,F] = silu(gate) up of gate_up [N,2F]; d, its gradient, from that of out */             \
  X(swiglu_fwd, (const Host& host, DType dtype, const void* gate_up, void* out, int64_t N,         \
                 int64_t F))                                                                       \
  X(swiglu_bwd, (const Host& host, DType dtype, const void* grad, const void* gate_up, void* d,    \
                 int64_t N, int64_t F))                                                            \
  /* out [B,S,D] = rms_norm(h + u) along D, or S if `tokens`; rstd [B,S], or [B,D] */              \
  X(residual_rmsnorm_fwd, (const Host& host, DType dtype, const void* h, const void* u, void* out, \
                           float* rstd, int64_t B, int64_t S, int64_t D, bool tokens, float eps))  \
  /* d, the gradient of h and of u */                                                              \
  X(residual_rmsnorm_bwd, (const Host& host, DType dtype, const void* grad, const void* out,       \
                           const float* rstd, void* d, int64_t B, int64_t S, int64_t D,            \
                           bool tokens))                                                           \
  /* x, y, z [B,S,D] */                                                                            \
  X(embed_reset_fwd, (const Host& host, DType dtype, const EmbedReset& in, void* x, void* y,       \
                      void* z))                                                                    \
  /* out [V,D] = factor * the sums of grad [B,S,D] over the places of each token, [B,S-P] */       \
  X(embed_reset_bwd, (const Host& host, DType dtype, const void* grad, Tokens tokens, float* out,  \
                      int64_t B, int64_t S, int64_t P, int64_t D, int64_t V, float factor))        \
  /* out [S,D] = factor * the sum of grad [B,S,D] over the items */                                \
  X(embed_reset_positions_bwd, (const Host& host, DType dtype, const void* grad, float* out,       \
                                int64_t B, int64_t S, int64_t D, float factor))

#define TRM_TRAINING_KERNELS(X)                                                                    \
  /* loss, preds, correct [N] of logits [N,V], labels [N] in [0,V) or -100: int64 or int32 */      \
  X(stablemax_loss_fwd, (const Host& host, DType dtype, const void* logits, const void* labels,    \
                         bool long_labels, float* loss, int64_t* preds, uint8_t* correct,          \
                         int64_t N, int64_t V))                                                    \
  /* d [N,V] from that of the loss, grad [N] */                                                    \
  X(stablemax_loss_bwd, (const Host& host, DType dtype, const float* grad, const void* logits,     \
                         const void* labels, bool long_labels, void* d, int64_t N, int64_t V))     \
  /* one optimizer step of all tensors, in place */                                                \
  X(adam_atan2_ema_step, (const Host& host, const StepTensors* tensors, int64_t count,             \
                          const StepSettings& settings))

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

#define TRM_TOKEN_KERNELS(X)                                                                       \
  /* out [B,S,D] = rms_norm over tokens of s + W_down(silu(g) * u), rstd [B,D]; gu [B,2F,D] or */  \
  /* null; gate_up [2F,S], down [S,F] */                                                           \
  X(token_mix_fwd, (const Host& host, DType dtype, const void* s, const void* gate_up,             \
                    const void* down, void* out, void* gu, float* rstd, int64_t B, int64_t S,      \
                    int64_t D, int64_t F, float eps))                                              \
  X(token_mix_bwd, (const Host& host, DType dtype, const void* dy, const void* s,                  \
                    const void* gate_up, const void* down, const void* out, const void* gu,        \
                    const float* rstd, void* ds, void* d_gate_up, void* d_down, int64_t B,         \
                    int64_t S, int64_t D, int64_t F))

#define TRM_ATTENTION_KERNELS(X)                                                                   \
  /* out [B,S,HK], lse [B,H,S] of qkv [B,S,3HK]; cos and sin [S,K], or null */                     \
  X(rope_attention_fwd, (const Host& host, DType dtype, const void* qkv, const float* cos,         \
                         const float* sin, void* out, float* lse, int64_t B, int64_t S, int64_t H, \
                         int64_t K))                                                               \
  X(rope_attention_bwd, (const Host& host, DType dtype, const void* grad, const void* qkv,         \
                         const void* out, const float* lse, const float* cos, const float* sin,    \
                         void* d_qkv, int64_t B, int64_t S, int64_t H, int64_t K))

#define TRM_INT8_KERNELS(X)                                                                        \
  /* out [N,D] = a w^T by eight bits, a [N,E], w [D,E] float */                                    \
  X(int8_linear, (const Host& host, DType dtype, const void* a, const float* w, void* out,         \
                  int64_t N, int64_t D, int64_t E))

#define TRM_RECURSION_KERNELS(X)                                                                   \
  /* saved: L+1 states [B,S,D], and per pass and block the bytes that deep_recursion_tape_bytes */ \
  /* tells (save and light only); null with the policy none. cos, sin [S,K] float or null */       \
  X(deep_recursion_fwd, (const Host& host, DType dtype, const RecursionShape& s, const void* x,    \
                         const void* y, const void* z, const BlockWeights* weights,                \
                         const float* cos, const float* sin, void* new_y, void* new_z,             \
                         void* const* saved))                                                      \
  /* d_weights: four per block, float, of the weights' shapes */                                   \
  X(deep_recursion_bwd, (const Host& host, DType dtype, const RecursionShape& s, const void* grad, \
                         void* const* saved, const BlockWeights* weights, const float* cos,        \
                         const float* sin, void* dx, float* const* d_weights))                     \
  X(deep_recursion_tape_bytes, (DType dtype, const RecursionShape& s, int64_t pass, int64_t* bytes))

#define TRM_BENCH_KERNELS(X)                                                                       \
  /* rates [count] FLOP/s: multiply-adds in registers; and out [M,N] = a w^T, a [M,K], w [N,K] */  \
  X(micro_rate_peak, (DType dtype, int64_t steps, int64_t count, double* rates))                   \
  X(micro_rate_product, (const Host& host, DType dtype, const void* a, const void* w, void* out,   \
                         int64_t M, int64_t N, int64_t K, int64_t times, int64_t count,            \
                         double* rates))                                                           \
  /* the same of whole numbers: int8.h */                                                          \
  X(int8_rate_peak, (int64_t steps, int64_t count, double* rates))                                 \
  X(int8_rate_product, (const Host& host, const int8_t* a, const int8_t* w, float* out, int64_t M, \
                        int64_t N, int64_t K, int64_t times, int64_t count, double* rates))

#define TRM_CPU_KERNELS(X)   \
  TRM_ELEMENTWISE_KERNELS(X) \
  TRM_TRAINING_KERNELS(X)    \
  TRM_LINEAR_KERNELS(X)      \
  TRM_TOKEN_KERNELS(X)       \
  TRM_ATTENTION_KERNELS(X)   \
  TRM_INT8_KERNELS(X)        \
  TRM_RECURSION_KERNELS(X)   \
  TRM_BENCH_KERNELS(X)

struct Kernels {
  const char* name;
#define X(name, args) void(*name) args;
  TRM_CPU_KERNELS(X)
#undef X
};

// The table for this CPU; null where the library holds none that it can run.
const Kernels* kernels_or_null();

}  // namespace trm_fast
