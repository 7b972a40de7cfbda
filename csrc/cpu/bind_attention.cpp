// rope_attention: checks and results.
#include <optional>
#include <tuple>

#include "bind.h"

namespace trm_fast {

using Table = std::optional<Tensor>;

struct AttentionShape {
  int64_t B, S, H, K;
};

// What qkv [B, S, 3 H K] is; the tables fit it, or both are missing.
static AttentionShape attention_shape(const char* op, const Tensor& qkv, const Table& cos,
                                      const Table& sin, int64_t heads) {
  STD_TORCH_CHECK(qkv.dim() == 3, op, ": qkv is ", shape_text(qkv), ", expected [B, S, 3*H*K]");
  const int64_t width = qkv.size(2);
  STD_TORCH_CHECK(heads > 0 && width % heads == 0 && width / heads % 48 == 0 &&
                      width / heads >= 48 && width / heads <= 3 * 128,
                  op, ": qkv has ", width, " features, expected 3*", heads,
                  " heads of a multiple of 16 up to 128");
  const int64_t B = qkv.size(0), S = qkv.size(1), K = width / heads / 3;
  check_tensor(op, "qkv", qkv, {B, S, width}, qkv.scalar_type());
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin, or neither");
  if (cos.has_value()) {
    check_tensor(op, "cos", *cos, {S, K}, ScalarType::Float);
    check_tensor(op, "sin", *sin, {S, K}, ScalarType::Float);
  }
  return {B, S, heads, K};
}

static std::tuple<Tensor, Tensor> rope_attention(const Tensor& qkv, const Table& cos,
                                                 const Table& sin, int64_t heads) {
  const char* op = "rope_attention";
  const DType dtype = dtype_of(op, qkv);
  const auto [B, S, H, K] = attention_shape(op, qkv, cos, sin, heads);
  Tensor out = torch::stable::new_empty(qkv, std::vector<int64_t>{B, S, H * K}, qkv.scalar_type());
  Tensor lse = new_floats(qkv, {B, H, S});
  const TorchHost host;
  kernels().rope_attention_fwd(host, dtype, qkv.const_data_ptr(), floats(cos), floats(sin),
                               out.mutable_data_ptr(), (float*)lse.mutable_data_ptr(), B, S, H, K);
  return {out, lse};
}

static Tensor rope_attention_bwd(const Tensor& grad, const Tensor& qkv, const Tensor& out,
                                 const Tensor& lse, const Table& cos, const Table& sin,
                                 int64_t heads) {
  const char* op = "rope_attention_bwd";
  const DType dtype = dtype_of(op, qkv);
  const auto [B, S, H, K] = attention_shape(op, qkv, cos, sin, heads);
  check_tensor(op, "grad", grad, {B, S, H * K}, qkv.scalar_type());
  check_tensor(op, "out", out, {B, S, H * K}, qkv.scalar_type());
  check_tensor(op, "lse", lse, {B, H, S}, ScalarType::Float);
  Tensor d = torch::stable::empty_like(qkv);
  const TorchHost host;
  kernels().rope_attention_bwd(host, dtype, grad.const_data_ptr(), qkv.const_data_ptr(),
                               out.const_data_ptr(), (const float*)lse.const_data_ptr(),
                               floats(cos), floats(sin), d.mutable_data_ptr(), B, S, H, K);
  return d;
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("rope_attention", TORCH_BOX(&trm_fast::rope_attention));
  m.impl("rope_attention_bwd", TORCH_BOX(&trm_fast::rope_attention_bwd));
}
