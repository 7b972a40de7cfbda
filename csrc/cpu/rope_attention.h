// Attention of one head of one item: what rope_attention.cpp gives to the recursion.
//
// out = softmax(q k^T / sqrt(K)) v, not causal; q and k are turned by the rotary tables cos, sin
// [S, K] as they are read and rounded once, or, without tables (null), taken as they are:
// y = x cos + (-x2, x1) sin for the halves x1, x2 of a head. A head's rows lie in qkv [S, 3 H K]: the
// heads of q, those of k, those of v.
//
// Everything is computed for blocks of queries, whole columns of scores S^T = k q^T at a time: the
// softmax of a query runs along the rows, so that neither its maximum nor its sum crosses lanes, and
// P^T is an operand of what follows without being transposed. K is a multiple of 16.
#pragma once
#include "gemm.h"
#include "host.h"

namespace trm_fast {
namespace TRM_ISA {

// Of one thread. Words unless said otherwise; Kw = words(K), Q: queries of a block at most.
template <class Mode>
struct AttentionScratch {
  word *keys, *values;          // rows [S, Kw]; values for the gradient only
  word *straight;               // panels of v, in the gradient of k: [words(S), K]
  word *queries;                // rows [Q, Kw]
  word *across, *grad_across;   // panels of q^T and of the result's gradient: [Kw, Q]
  word *query_panels, *grad_panels;  // panels of q and of the result's gradient: [words(Q), K]
  word *scores;                 // S^T, then P^T: [S, Q]; in the gradient rows of E along queries
  word *grads, *grad_pairs;     // dS^T likewise, and in pairs of keys [words(S), Q]
  float *top, *total;           // [Q]; the lse and rowsum(d out) in the gradient
  float *d_keys, *d_values;     // [S, K] float
  float *d_queries;             // [Q, K] float

  // One per thread, for the forward, or for the gradient and the forward.
  static AttentionScratch* make(const Host& host, int64_t S, int64_t K, bool gradient = true);
};

// Head `head` of out [S, H K] and of lse [H, S], the base 2 logarithms of the softmax's sums.
template <class Mode>
void attention_head(const typename Mode::T* qkv, const float* cos, const float* sin,
                    typename Mode::T* out, float* lse, int64_t head, int64_t S, int64_t K, int64_t H,
                    const AttentionScratch<Mode>& scratch);

// Head `head` of d_qkv [S, 3 H K] from grad [S, H K] and what the forward gave. d_qkv may be qkv.
template <class Mode>
void attention_head_gradient(const typename Mode::T* qkv, const float* cos, const float* sin,
                             const typename Mode::T* out, const typename Mode::T* grad,
                             const float* lse, typename Mode::T* d_qkv, int64_t head, int64_t S,
                             int64_t K, int64_t H, const AttentionScratch<Mode>& scratch);

}  // namespace TRM_ISA
}  // namespace trm_fast
