// The fused blocks: a matrix product or several with everything elementwise around them.
#include <tuple>

#include "bind.h"

namespace trm_fast {

static std::tuple<Tensor, Tensor> linear_rmsnorm(const Tensor& a, const Tensor& w, const Tensor& h,
                                                 double eps) {
  const char* op = "linear_rmsnorm";
  const DType dtype = dtype_of(op, h);
  STD_TORCH_CHECK(a.dim() == 2 && h.dim() == 2, op, ": a and h are [N, E] and [N, D]");
  const int64_t N = h.size(0), D = h.size(1), E = a.size(1);
  STD_TORCH_CHECK(D % 16 == 0 && E % 16 == 0 && D > 0 && E > 0, op, ": widths must be multiples of 16, not ", D, " and ", E);
  check_tensor(op, "a", a, {N, E}, h.scalar_type());
  check_tensor(op, "w", w, {D, E}, h.scalar_type());
  check_tensor(op, "h", h, {N, D}, h.scalar_type());
  Tensor out = torch::stable::empty_like(h), rstd = new_floats(h, {N});
  const TorchHost host;
  kernels().linear_rmsnorm_fwd(host, dtype, a.const_data_ptr(), w.const_data_ptr(),
                               h.const_data_ptr(), out.mutable_data_ptr(),
                               (float*)rstd.mutable_data_ptr(), N, D, E, (float)eps);
  return {out, rstd};
}

static std::tuple<Tensor, Tensor, Tensor> linear_rmsnorm_bwd(const Tensor& grad, const Tensor& a,
                                                             const Tensor& w, const Tensor& out,
                                                             const Tensor& rstd) {
  const char* op = "linear_rmsnorm_bwd";
  const DType dtype = dtype_of(op, grad);
  STD_TORCH_CHECK(a.dim() == 2 && grad.dim() == 2, op, ": a and grad are [N, E] and [N, D]");
  const int64_t N = grad.size(0), D = grad.size(1), E = a.size(1);
  STD_TORCH_CHECK(D % 16 == 0 && E % 16 == 0 && D > 0 && E > 0, op, ": widths must be multiples of 16, not ", D, " and ", E);
  check_tensor(op, "grad", grad, {N, D}, grad.scalar_type());
  check_tensor(op, "a", a, {N, E}, grad.scalar_type());
  check_tensor(op, "w", w, {D, E}, grad.scalar_type());
  check_tensor(op, "out", out, {N, D}, grad.scalar_type());
  check_tensor(op, "rstd", rstd, {N}, ScalarType::Float);
  Tensor da = torch::stable::empty_like(a), dw = torch::stable::empty_like(w),
         dh = torch::stable::empty_like(grad);
  const TorchHost host;
  kernels().linear_rmsnorm_bwd(host, dtype, grad.const_data_ptr(), a.const_data_ptr(),
                               w.const_data_ptr(), out.const_data_ptr(),
                               (const float*)rstd.const_data_ptr(), da.mutable_data_ptr(),
                               dw.mutable_data_ptr(), dh.mutable_data_ptr(), N, D, E);
  return {da, dw, dh};
}

static std::tuple<Tensor, Tensor, Tensor> swiglu_rmsnorm(const Tensor& x, const Tensor& gate_up,
                                                         const Tensor& down, double eps,
                                                         bool keep) {
  const char* op = "swiglu_rmsnorm";
  const DType dtype = dtype_of(op, x);
  STD_TORCH_CHECK(x.dim() == 2 && down.dim() == 2, op, ": x and down are [N, D] and [D, F]");
  const int64_t N = x.size(0), D = x.size(1), F = down.size(1);
  STD_TORCH_CHECK(D % 16 == 0 && D > 0 && F > 0, op, ": the width must be a multiple of 16, not ", D);
  check_tensor(op, "x", x, {N, D}, x.scalar_type());
  check_tensor(op, "gate_up", gate_up, {2 * F, D}, x.scalar_type());
  check_tensor(op, "down", down, {D, F}, x.scalar_type());
  const std::vector<int64_t> kept{keep ? N : 0, 2 * ((F + 15) / 16 * 16)};
  Tensor out = torch::stable::empty_like(x), rstd = new_floats(x, {N}),
         gu = torch::stable::new_empty(x, kept);
  const TorchHost host;
  kernels().swiglu_rmsnorm_fwd(host, dtype, x.const_data_ptr(), gate_up.const_data_ptr(),
                               down.const_data_ptr(), out.mutable_data_ptr(),
                               keep ? gu.mutable_data_ptr() : nullptr,
                               (float*)rstd.mutable_data_ptr(), N, D, F, (float)eps);
  return {out, rstd, gu};
}

static std::tuple<Tensor, Tensor, Tensor> swiglu_rmsnorm_bwd(
    const Tensor& grad, const Tensor& x, const Tensor& gate_up, const Tensor& down,
    const Tensor& out, const Tensor& rstd, const Tensor& gu) {
  const char* op = "swiglu_rmsnorm_bwd";
  const DType dtype = dtype_of(op, grad);
  STD_TORCH_CHECK(grad.dim() == 2 && down.dim() == 2, op, ": grad and down are [N, D] and [D, F]");
  const int64_t N = grad.size(0), D = grad.size(1), F = down.size(1);
  STD_TORCH_CHECK(D % 16 == 0 && D > 0 && F > 0, op, ": the width must be a multiple of 16, not ", D);
  check_tensor(op, "grad", grad, {N, D}, grad.scalar_type());
  check_tensor(op, "x", x, {N, D}, grad.scalar_type());
  check_tensor(op, "gate_up", gate_up, {2 * F, D}, grad.scalar_type());
  check_tensor(op, "down", down, {D, F}, grad.scalar_type());
  check_tensor(op, "out", out, {N, D}, grad.scalar_type());
  check_tensor(op, "rstd", rstd, {N}, ScalarType::Float);
  check_tensor(op, "gu", gu, {N, 2 * ((F + 15) / 16 * 16)}, grad.scalar_type());
  Tensor dx = torch::stable::empty_like(grad), d_gate_up = torch::stable::empty_like(gate_up),
         d_down = torch::stable::empty_like(down);
  const TorchHost host;
  kernels().swiglu_rmsnorm_bwd(host, dtype, grad.const_data_ptr(), x.const_data_ptr(),
                               gate_up.const_data_ptr(), down.const_data_ptr(),
                               out.const_data_ptr(), gu.const_data_ptr(),
                               (const float*)rstd.const_data_ptr(), dx.mutable_data_ptr(),
                               d_gate_up.mutable_data_ptr(), d_down.mutable_data_ptr(), N, D, F);
  return {dx, d_gate_up, d_down};
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("linear_rmsnorm", TORCH_BOX(&trm_fast::linear_rmsnorm));
  m.impl("linear_rmsnorm_bwd", TORCH_BOX(&trm_fast::linear_rmsnorm_bwd));
  m.impl("swiglu_rmsnorm", TORCH_BOX(&trm_fast::swiglu_rmsnorm));
  m.impl("swiglu_rmsnorm_bwd", TORCH_BOX(&trm_fast::swiglu_rmsnorm_bwd));
}
