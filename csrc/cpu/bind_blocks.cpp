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
  STD_TORCH_CHECK(D % 16 == 0 && E % 16 == 0, op, ": widths must be multiples of 16");
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
  STD_TORCH_CHECK(D % 16 == 0 && E % 16 == 0, op, ": widths must be multiples of 16");
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

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("linear_rmsnorm", TORCH_BOX(&trm_fast::linear_rmsnorm));
  m.impl("linear_rmsnorm_bwd", TORCH_BOX(&trm_fast::linear_rmsnorm_bwd));
}
