// Softmax attention and its backward by PyTorch's fused kernels.
//
// On CUDA FlashAttention for elements of 16 bits, the memory-efficient kernel for float. Where their
// backward divides the keys among blocks, the gradient to the queries is added up in whatever order
// these end, unless PyTorch is told to be deterministic.
//
// Both are called as PyTorch's own autograd calls them, past the dispatcher: an undefined tensor
// stands for "all sequences are of one length" and "no bias", and the random state, which only
// dropout reads, is memory that nobody has written to.
//
// Dims: B batch, S tokens, H heads, K head dim. q, k, v, out: [B, S, H, K], their heads contiguous.
#pragma once
#include "aten.h"

namespace trm_fast {
namespace aten {

inline Tensor heads_first(const Tensor& t) { return transposed(t, 1, 2); }
inline Tensor tokens_first(AtenTensorHandle t) { return in_order(transposed(Tensor(t), 1, 2)); }

struct Attended {
  Tensor out, lse;  // [B, S, H, K]; [B, H, >= S] float
};

inline Attended attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Tensor a = heads_first(q), b = heads_first(k), c = heads_first(v);
  AtenTensorHandle out = nullptr, lse = nullptr;
#ifdef USE_CUDA
  AtenTensorHandle rest[5] = {};
  int64_t most[2];
  if (q.scalar_type() == ScalarType::Float) {
    check_call("attention",
               aoti_torch_cuda__scaled_dot_product_efficient_attention(
        a.get(), b.get(), c.get(), nullptr, 1, 0.0, 0, nullptr, &out, &lse, &rest[0], &rest[1]));
  } else {
    check_call("attention",
               aoti_torch_cuda__scaled_dot_product_flash_attention(
        a.get(), b.get(), c.get(), 0.0, 0, 0, nullptr, &out, &lse, &rest[0], &rest[1], &most[0],
        &most[1], &rest[2], &rest[3], &rest[4]));
  }
  for (AtenTensorHandle unused : rest)
    if (unused) Tensor{unused};  // takes it over, and lets go of it
#else
  check_call("attention",
             aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu(
      a.get(), b.get(), c.get(), 0.0, 0, nullptr, nullptr, &out, &lse));
#endif
  return {tokens_first(out), in_order(Tensor(lse))};
}

// Gradients to q, k, v, each [B, S, H, K], from that to out.
inline std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& grad, const Tensor& q,
                                                        const Tensor& k, const Tensor& v,
                                                        const Tensor& out, const Tensor& lse) {
  const Tensor d = heads_first(grad), a = heads_first(q), b = heads_first(k), c = heads_first(v),
               o = heads_first(out);
  AtenTensorHandle dq = nullptr, dk = nullptr, dv = nullptr;
#ifdef USE_CUDA
  const Tensor none, seed = torch::stable::new_empty(lse, Shape{2}, ScalarType::Long);
  if (q.scalar_type() == ScalarType::Float) {
    const int32_t wanted[4] = {1, 1, 1, 0};
    AtenTensorHandle bias = nullptr;
    check_call("the gradient of attention",
               aoti_torch_cuda__scaled_dot_product_efficient_attention_backward(
        d.get(), a.get(), b.get(), c.get(), none.get(), o.get(), lse.get(), seed.get(), seed.get(),
        0.0, wanted, 4, 0, nullptr, &dq, &dk, &dv, &bias));
    if (bias) Tensor{bias};
  } else {
    const int64_t S = q.size(1);
    check_call("the gradient of attention",
               aoti_torch_cuda__scaled_dot_product_flash_attention_backward(
        d.get(), a.get(), b.get(), c.get(), o.get(), lse.get(), none.get(), none.get(), S, S, 0.0,
        0, seed.get(), seed.get(), nullptr, &dq, &dk, &dv));
  }
#else
  check_call("the gradient of attention",
             aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu_backward(
      d.get(), a.get(), b.get(), c.get(), o.get(), lse.get(), 0.0, 0, nullptr, nullptr, &dq, &dk,
      &dv));
#endif
  return {tokens_first(dq), tokens_first(dk), tokens_first(dv)};
}

}  // namespace aten
}  // namespace trm_fast
