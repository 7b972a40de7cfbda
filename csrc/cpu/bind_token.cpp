// Token mixing: SwiGLU and norm along the tokens.
#include <tuple>

#include "bind.h"

namespace trm_fast {

struct TokenSizes {
  int64_t B, S, D, F;
};

static TokenSizes token_sizes(const char* op, const Tensor& s, const Tensor& gate_up,
                              const Tensor& down) {
  STD_TORCH_CHECK(s.dim() == 3 && down.dim() == 2, op, ": s and down are [B, S, D] and [S, F]");
  const TokenSizes z{s.size(0), s.size(1), s.size(2), down.size(1)};
  STD_TORCH_CHECK(z.D % 16 == 0 && z.D > 0, op, ": the width must be a multiple of 16, not ", z.D);
  STD_TORCH_CHECK(z.S > 0 && z.F > 0, op, ": no tokens or no inner width: S=", z.S, ", F=", z.F);
  check_tensor(op, "s", s, {z.B, z.S, z.D}, s.scalar_type());
  check_tensor(op, "gate_up", gate_up, {2 * z.F, z.S}, s.scalar_type());
  check_tensor(op, "down", down, {z.S, z.F}, s.scalar_type());
  return z;
}

static std::tuple<Tensor, Tensor, Tensor> token_mix(const Tensor& s, const Tensor& gate_up,
                                                    const Tensor& down, double eps, bool keep) {
  const char* op = "token_mix";
  const DType dtype = dtype_of(op, s);
  const auto [B, S, D, F] = token_sizes(op, s, gate_up, down);
  const std::vector<int64_t> kept{keep ? B : 0, 2 * F, D};
  Tensor out = torch::stable::empty_like(s), rstd = new_floats(s, {B, D}),
         gu = torch::stable::new_empty(s, kept);
  const TorchHost host;
  kernels().token_mix_fwd(host, dtype, s.const_data_ptr(), gate_up.const_data_ptr(),
                          down.const_data_ptr(), out.mutable_data_ptr(),
                          keep ? gu.mutable_data_ptr() : nullptr, (float*)rstd.mutable_data_ptr(),
                          B, S, D, F, (float)eps);
  return {out, rstd, gu};
}

static std::tuple<Tensor, Tensor, Tensor> token_mix_bwd(const Tensor& grad, const Tensor& s,
                                                        const Tensor& gate_up, const Tensor& down,
                                                        const Tensor& out, const Tensor& rstd,
                                                        const Tensor& gu) {
  const char* op = "token_mix_bwd";
  const DType dtype = dtype_of(op, s);
  const auto [B, S, D, F] = token_sizes(op, s, gate_up, down);
  check_tensor(op, "grad", grad, {B, S, D}, s.scalar_type());
  check_tensor(op, "out", out, {B, S, D}, s.scalar_type());
  check_tensor(op, "rstd", rstd, {B, D}, ScalarType::Float);
  check_tensor(op, "gu", gu, {B, 2 * F, D}, s.scalar_type());
  Tensor ds = torch::stable::empty_like(s), d_gate_up = torch::stable::empty_like(gate_up),
         d_down = torch::stable::empty_like(down);
  const TorchHost host;
  kernels().token_mix_bwd(host, dtype, grad.const_data_ptr(), s.const_data_ptr(),
                          gate_up.const_data_ptr(), down.const_data_ptr(), out.const_data_ptr(),
                          gu.const_data_ptr(), (const float*)rstd.const_data_ptr(),
                          ds.mutable_data_ptr(), d_gate_up.mutable_data_ptr(),
                          d_down.mutable_data_ptr(), B, S, D, F);
  return {ds, d_gate_up, d_down};
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("token_mix", TORCH_BOX(&trm_fast::token_mix));
  m.impl("token_mix_bwd", TORCH_BOX(&trm_fast::token_mix_bwd));
}
