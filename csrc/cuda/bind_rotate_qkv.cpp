// rotate_qkv, for the recursion's driver.
#include <optional>

#include "bind.h"
#include "rotate_qkv.h"

namespace trm_fast {
namespace cuda {

static const float* table(const char* op, const char* name, const std::optional<Tensor>& t,
                          int64_t S, int64_t K, const Tensor& like) {
  if (!t) return nullptr;
  check_tensor(op, name, *t, {S, K}, ScalarType::Float, like);
  return (const float*)t->const_data_ptr();
}

static Tensor rotate_qkv(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t heads) {
  const char* op = "rotate_qkv";
  const DType dtype = dtype_of(op, qkv);
  check_dims(op, "qkv", qkv, 3, "[B, S, 3 H K]");
  STD_TORCH_CHECK(heads > 0 && qkv.size(2) % (6 * heads) == 0, op, ": ", qkv.size(2),
                  " features do not make q, k and v of ", heads, " heads of an even size");
  const int64_t B = qkv.size(0), S = qkv.size(1), K = qkv.size(2) / (3 * heads);
  check_tensor(op, "qkv", qkv, {B, S, 3 * heads * K}, qkv.scalar_type(), qkv);
  const float *c = table(op, "cos", cos, S, K, qkv), *s = table(op, "sin", sin, S, K, qkv);
  const Launch launch(qkv);
  Tensor out = torch::stable::empty_like(qkv);
  STD_CUDA_CHECK(rotate_qkv_fwd(dtype, qkv.const_data_ptr(), c, s, out.mutable_data_ptr(), B, S,
                                heads, K, launch.stream));
  return out;
}

static Tensor rotate_qkv_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                  const std::optional<Tensor>& cos,
                                  const std::optional<Tensor>& sin) {
  const char* op = "rotate_qkv_bwd";
  const DType dtype = dtype_of(op, dq);
  check_dims(op, "dq", dq, 4, "[B, S, H, K]");
  const int64_t B = dq.size(0), S = dq.size(1), H = dq.size(2), K = dq.size(3);
  STD_TORCH_CHECK(K % 2 == 0, op, ": heads have ", K, " elements, expected an even number");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin come together");
  check_tensor(op, "dq", dq, {B, S, H, K}, dq.scalar_type(), dq);
  check_tensor(op, "dk", dk, {B, S, H, K}, dq.scalar_type(), dq);
  check_tensor(op, "dv", dv, {B, S, H, K}, dq.scalar_type(), dq);
  const float *c = table(op, "cos", cos, S, K, dq), *s = table(op, "sin", sin, S, K, dq);
  const Launch launch(dq);
  Tensor out = torch::stable::new_empty(dq, std::vector<int64_t>{B, S, 3 * H * K});
  STD_CUDA_CHECK(rotate_qkv_bwd(dtype, dq.const_data_ptr(), dk.const_data_ptr(),
                                dv.const_data_ptr(), c, s, out.mutable_data_ptr(), B, S, H, K,
                                launch.stream));
  return out;
}

}  // namespace cuda
}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CUDA, m) {
  m.impl("rotate_qkv", TORCH_BOX(&trm_fast::cuda::rotate_qkv));
  m.impl("rotate_qkv_bwd", TORCH_BOX(&trm_fast::cuda::rotate_qkv_backward));
}
