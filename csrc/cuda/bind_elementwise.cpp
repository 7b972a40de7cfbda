// Operations without a matrix product: inject, swiglu, residual_rmsnorm, embed_reset.
#include <optional>
#include <tuple>

#include "bind.h"
#include "embed_reset.h"
#include "inject.h"
#include "residual_rmsnorm.h"
#include "swiglu.h"

namespace trm_fast {
namespace cuda {

static Tensor inject(const Tensor& z, const Tensor& y, const Tensor& x) {
  const char* op = "inject";
  const DType dtype = dtype_of(op, z);
  check_dims(op, "z", z, 3, "[B, S, D]");
  const int64_t B = z.size(0), S = z.size(1), D = z.size(2);
  check_tensor(op, "z", z, {B, S, D}, z.scalar_type(), z);
  check_tensor(op, "y", y, {B, S, D}, z.scalar_type(), z);
  check_tensor(op, "x", x, {B, S, D}, z.scalar_type(), z);
  const Launch launch(z);
  Tensor out = torch::stable::empty_like(z);
  STD_CUDA_CHECK(inject_fwd(dtype, z.const_data_ptr(), y.const_data_ptr(), x.const_data_ptr(),
                            out.mutable_data_ptr(), z.numel(), launch.stream));
  return out;
}

static Tensor swiglu(const Tensor& gate_up) {
  const char* op = "swiglu";
  const DType dtype = dtype_of(op, gate_up);
  check_dims(op, "gate_up", gate_up, 2, "[N, 2F]");
  const int64_t N = gate_up.size(0), F = gate_up.size(1) / 2;
  check_tensor(op, "gate_up", gate_up, {N, 2 * F}, gate_up.scalar_type(), gate_up);
  const Launch launch(gate_up);
  Tensor out = torch::stable::new_empty(gate_up, std::vector<int64_t>{N, F});
  STD_CUDA_CHECK(swiglu_fwd(dtype, gate_up.const_data_ptr(), out.mutable_data_ptr(), N, F,
                            launch.stream));
  return out;
}

static Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "swiglu_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 2, "[N, F]");
  const int64_t N = grad.size(0), F = grad.size(1);
  check_tensor(op, "grad", grad, {N, F}, grad.scalar_type(), grad);
  check_tensor(op, "gate_up", gate_up, {N, 2 * F}, grad.scalar_type(), grad);
  const Launch launch(grad);
  Tensor d = torch::stable::empty_like(gate_up);
  STD_CUDA_CHECK(swiglu_bwd(dtype, grad.const_data_ptr(), gate_up.const_data_ptr(),
                            d.mutable_data_ptr(), N, F, launch.stream));
  return d;
}

// Whether `axis` is that of the tokens; [B, S, D] is normed along it or the features.
static bool along_tokens(const char* op, int64_t axis) {
  STD_TORCH_CHECK(axis == 1 || axis == 2, op, ": axis is ", axis,
                  ", expected 1 (tokens) or 2 (features)");
  return axis == 1;
}

static std::tuple<Tensor, Tensor> residual_rmsnorm(const Tensor& h, const Tensor& u, int64_t axis,
                                                   double eps) {
  const char* op = "residual_rmsnorm";
  const DType dtype = dtype_of(op, h);
  const bool tokens = along_tokens(op, axis);
  check_dims(op, "h", h, 3, "[B, S, D]");
  const int64_t B = h.size(0), S = h.size(1), D = h.size(2);
  check_tensor(op, "h", h, {B, S, D}, h.scalar_type(), h);
  check_tensor(op, "u", u, {B, S, D}, h.scalar_type(), h);
  const Launch launch(h);
  Tensor out = torch::stable::empty_like(h), rstd = new_floats(h, {B, tokens ? D : S});
  const void *from = h.const_data_ptr(), *add = u.const_data_ptr();
  void* to = out.mutable_data_ptr();
  float* scales = (float*)rstd.mutable_data_ptr();
  STD_CUDA_CHECK(tokens ? rmsnorm_tokens_fwd(dtype, from, add, to, scales, B, S, D, (float)eps,
                                             launch.stream)
                        : rmsnorm_features_fwd(dtype, from, add, to, scales, B * S, D, (float)eps,
                                               launch.stream));
  return {out, rstd};
}

static Tensor residual_rmsnorm_bwd(const Tensor& grad, const Tensor& out, const Tensor& rstd,
                                   int64_t axis) {
  const char* op = "residual_rmsnorm_bwd";
  const DType dtype = dtype_of(op, grad);
  const bool tokens = along_tokens(op, axis);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type(), grad);
  check_tensor(op, "out", out, {B, S, D}, grad.scalar_type(), grad);
  check_tensor(op, "rstd", rstd, {B, tokens ? D : S}, ScalarType::Float, grad);
  const Launch launch(grad);
  Tensor d = torch::stable::empty_like(grad);
  const void *from = grad.const_data_ptr(), *normed = out.const_data_ptr();
  const float* scales = (const float*)rstd.const_data_ptr();
  void* to = d.mutable_data_ptr();
  STD_CUDA_CHECK(
      tokens ? rmsnorm_tokens_bwd(dtype, from, normed, scales, to, B, S, D, launch.stream)
             : rmsnorm_features_bwd(dtype, from, normed, scales, to, B * S, D, launch.stream));
  return d;
}

// A contiguous tensor of `shape`, float or of the dtype of `like`; none is as good as empty.
static Source source(const char* op, const char* name, const std::optional<Tensor>& t,
                     std::initializer_list<int64_t> shape, const Tensor& like) {
  if (!t) return {nullptr, DType::f32};
  const bool served = t->scalar_type() == like.scalar_type() || t->scalar_type() == ScalarType::Float;
  check_tensor(op, name, *t, shape, served ? t->scalar_type() : like.scalar_type(), like);
  return {t->const_data_ptr(), dtype_of(op, *t)};
}

static Tokens tokens_of(const char* op, const Tensor& t, int64_t B, int64_t L, const Tensor& like) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  check_tensor(op, "tokens", t, {B, L}, wide ? ScalarType::Long : ScalarType::Int, like);
  return {t.const_data_ptr(), wide};
}

static StateView state_view(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_device(op, name, t, like);
  check_dims(op, name, t, 3, "[B, S, D]");
  bool same = t.scalar_type() == like.scalar_type();
  for (int64_t i = 0; i < 3; ++i) same = same && t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " is ", shape_text(t), ", expected the shape ",
                  shape_text(like), " and dtype of y");
  STD_TORCH_CHECK(t.stride(2) == 1 || t.size(2) <= 1, op, ": ", name, " has rows in pieces");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

static std::tuple<Tensor, Tensor, Tensor> embed_reset(
    const Tensor& tokens, const std::optional<Tensor>& rows, const Tensor& embedding,
    const std::optional<Tensor>& positions, const Tensor& halted, const Tensor& y, const Tensor& z,
    const Tensor& y_init, const Tensor& z_init, double scale) {
  const char* op = "embed_reset";
  const DType dtype = dtype_of(op, y);
  check_dims(op, "y", y, 3, "[B, S, D]");
  check_dims(op, "tokens", tokens, 2, "[B, L]");
  check_dims(op, "embedding", embedding, 2, "[V, D]");
  const int64_t B = y.size(0), S = y.size(1), D = y.size(2), P = S - tokens.size(1);
  STD_TORCH_CHECK(P >= 0 && (P == 0 || rows), op, ": y has ", S, " tokens, expected ",
                  tokens.size(1), " and those of rows");
  EmbedReset in;
  in.tokens = tokens_of(op, tokens, B, S - P, y);
  in.rows = source(op, "rows", rows, {B, P, D}, y);
  in.embedding = source(op, "embedding", embedding, {embedding.size(0), D}, y);
  in.positions = source(op, "positions", positions, {S, D}, y);
  check_tensor(op, "halted", halted, {B}, ScalarType::Bool, y);
  in.halted = (const bool*)halted.const_data_ptr();
  in.y = state_view(op, "y", y, y);
  in.z = state_view(op, "z", z, y);
  in.y_init = source(op, "y_init", y_init, {D}, y);
  in.z_init = source(op, "z_init", z_init, {D}, y);
  in.scale = (float)scale;
  in.B = B, in.S = S, in.P = P, in.V = embedding.size(0), in.D = D;
  const Launch launch(y);
  const std::vector<int64_t> shape{B, S, D};
  Tensor new_x = torch::stable::new_empty(y, shape), new_y = torch::stable::new_empty(y, shape),
         new_z = torch::stable::new_empty(y, shape);
  STD_CUDA_CHECK(embed_reset_fwd(dtype, in, new_x.mutable_data_ptr(), new_y.mutable_data_ptr(),
                                 new_z.mutable_data_ptr(), launch.stream));
  return {new_x, new_y, new_z};
}

static Tensor embed_reset_backward(const Tensor& grad, const Tensor& tokens, int64_t vocabulary,
                                   double factor) {
  const char* op = "embed_reset_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  check_dims(op, "tokens", tokens, 2, "[B, L]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2), P = S - tokens.size(1);
  STD_TORCH_CHECK(P >= 0, op, ": grad has ", S, " tokens, expected at least ", tokens.size(1));
  STD_TORCH_CHECK(vocabulary >= 0, op, ": vocabulary is ", vocabulary);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type(), grad);
  const Tokens words = tokens_of(op, tokens, B, S - P, grad);
  const Launch launch(grad);
  const int64_t partials = embed_reset_partials(B, S, P, vocabulary, D);
  Tensor out = new_floats(grad, {vocabulary, D}), work = new_floats(grad, {partials, vocabulary, D});
  STD_CUDA_CHECK(embed_reset_bwd(dtype, grad.const_data_ptr(), words,
                                 (float*)work.mutable_data_ptr(), (float*)out.mutable_data_ptr(),
                                 B, S, P, vocabulary, D, (float)factor, launch.stream));
  return out;
}

static Tensor embed_reset_positions_backward(const Tensor& grad, double factor) {
  const char* op = "embed_reset_positions_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type(), grad);
  const Launch launch(grad);
  Tensor out = new_floats(grad, {S, D});
  STD_CUDA_CHECK(embed_reset_positions_bwd(dtype, grad.const_data_ptr(),
                                           (float*)out.mutable_data_ptr(), B, S, D, (float)factor,
                                           launch.stream));
  return out;
}

}  // namespace cuda
}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CUDA, m) {
  m.impl("inject", TORCH_BOX(&trm_fast::cuda::inject));
  m.impl("swiglu", TORCH_BOX(&trm_fast::cuda::swiglu));
  m.impl("swiglu_bwd", TORCH_BOX(&trm_fast::cuda::swiglu_backward));
  m.impl("residual_rmsnorm", TORCH_BOX(&trm_fast::cuda::residual_rmsnorm));
  m.impl("residual_rmsnorm_bwd", TORCH_BOX(&trm_fast::cuda::residual_rmsnorm_bwd));
  m.impl("embed_reset", TORCH_BOX(&trm_fast::cuda::embed_reset));
  m.impl("embed_reset_bwd", TORCH_BOX(&trm_fast::cuda::embed_reset_backward));
  m.impl("embed_reset_positions_bwd", TORCH_BOX(&trm_fast::cuda::embed_reset_positions_backward));
}
