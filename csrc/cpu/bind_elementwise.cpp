// Operations without a matrix product: inject, swiglu, residual_rmsnorm, embed_reset.
#include <optional>
#include <tuple>

#include "bind.h"

namespace trm_fast {

static Tensor inject(const Tensor& z, const Tensor& y, const Tensor& x) {
  const char* op = "inject";
  const DType dtype = dtype_of(op, z);
  check_dims(op, "z", z, 3, "[B, S, D]");
  const int64_t B = z.size(0), S = z.size(1), D = z.size(2);
  check_tensor(op, "z", z, {B, S, D}, z.scalar_type());
  check_tensor(op, "y", y, {B, S, D}, z.scalar_type());
  check_tensor(op, "x", x, {B, S, D}, z.scalar_type());
  Tensor out = torch::stable::empty_like(z);
  const TorchHost host;
  kernels().inject_fwd(host, dtype, z.const_data_ptr(), y.const_data_ptr(), x.const_data_ptr(),
                       out.mutable_data_ptr(), z.numel());
  return out;
}

static Tensor swiglu(const Tensor& gate_up) {
  const char* op = "swiglu";
  const DType dtype = dtype_of(op, gate_up);
  check_dims(op, "gate_up", gate_up, 2, "[N, 2F]");
  const int64_t N = gate_up.size(0), F = gate_up.size(1) / 2;
  check_tensor(op, "gate_up", gate_up, {N, 2 * F}, gate_up.scalar_type());
  Tensor out = torch::stable::new_empty(gate_up, std::vector<int64_t>{N, F});
  const TorchHost host;
  kernels().swiglu_fwd(host, dtype, gate_up.const_data_ptr(), out.mutable_data_ptr(), N, F);
  return out;
}

static Tensor swiglu_bwd(const Tensor& grad, const Tensor& gate_up) {
  const char* op = "swiglu_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 2, "[N, F]");
  const int64_t N = grad.size(0), F = grad.size(1);
  check_tensor(op, "grad", grad, {N, F}, grad.scalar_type());
  check_tensor(op, "gate_up", gate_up, {N, 2 * F}, grad.scalar_type());
  Tensor d = torch::stable::empty_like(gate_up);
  const TorchHost host;
  kernels().swiglu_bwd(host, dtype, grad.const_data_ptr(), gate_up.const_data_ptr(),
                       d.mutable_data_ptr(), N, F);
  return d;
}

static bool along_tokens(const char* op, int64_t axis) {
  STD_TORCH_CHECK(axis == 1 || axis == 2, op, ": axis is ", axis, ", expected 1 or 2");
  return axis == 1;
}

static std::tuple<Tensor, Tensor> residual_rmsnorm(const Tensor& h, const Tensor& u, int64_t axis,
                                                   double eps) {
  const char* op = "residual_rmsnorm";
  const DType dtype = dtype_of(op, h);
  const bool tokens = along_tokens(op, axis);
  check_dims(op, "h", h, 3, "[B, S, D]");
  const int64_t B = h.size(0), S = h.size(1), D = h.size(2);
  check_tensor(op, "h", h, {B, S, D}, h.scalar_type());
  check_tensor(op, "u", u, {B, S, D}, h.scalar_type());
  Tensor out = torch::stable::empty_like(h), rstd = new_floats(h, {B, tokens ? D : S});
  const TorchHost host;
  kernels().residual_rmsnorm_fwd(host, dtype, h.const_data_ptr(), u.const_data_ptr(),
                                 out.mutable_data_ptr(), (float*)rstd.mutable_data_ptr(), B, S, D,
                                 tokens, (float)eps);
  return {out, rstd};
}

static Tensor residual_rmsnorm_bwd(const Tensor& grad, const Tensor& out, const Tensor& rstd,
                                   int64_t axis) {
  const char* op = "residual_rmsnorm_bwd";
  const DType dtype = dtype_of(op, grad);
  const bool tokens = along_tokens(op, axis);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type());
  check_tensor(op, "out", out, {B, S, D}, grad.scalar_type());
  check_tensor(op, "rstd", rstd, {B, tokens ? D : S}, ScalarType::Float);
  Tensor d = torch::stable::empty_like(grad);
  const TorchHost host;
  kernels().residual_rmsnorm_bwd(host, dtype, grad.const_data_ptr(), out.const_data_ptr(),
                                 (const float*)rstd.const_data_ptr(), d.mutable_data_ptr(), B, S, D,
                                 tokens);
  return d;
}

// ---- embed_reset

template <class Int>
static int64_t first_outside(const Int* tokens, int64_t count, int64_t V) {
  int64_t outside = 0;  // counted without a branch, so that the loop is vectorised
  for (int64_t i = 0; i < count; ++i) outside += (int64_t)(tokens[i] < 0) | (tokens[i] >= V);
  if (outside == 0) return -1;
  int64_t i = 0;
  while (tokens[i] >= 0 && tokens[i] < V) ++i;
  return i;
}

// Tokens [B, L], each below V.
static Tokens checked_tokens(const char* op, const Tensor& tokens, int64_t V) {
  check_dims(op, "tokens", tokens, 2, "[B, L]");
  const ScalarType given = tokens.scalar_type();
  const bool wide = given == ScalarType::Long;
  STD_TORCH_CHECK(wide || given == ScalarType::Int, op,
                  ": tokens are int32 or int64, not ", dtype_text(given));
  const int64_t B = tokens.size(0), L = tokens.size(1);
  check_tensor(op, "tokens", tokens, {B, L}, given);
  const void* data = tokens.const_data_ptr();
  const int64_t at = wide ? first_outside((const int64_t*)data, B * L, V)
                          : first_outside((const int32_t*)data, B * L, V);
  if (at >= 0) {
    const int64_t token = wide ? ((const int64_t*)data)[at] : ((const int32_t*)data)[at];
    STD_TORCH_CHECK(false, op, ": token ", token, " at [", at / L, ", ", at % L,
                    "] is outside the vocabulary of ", V);
  }
  return {data, wide};
}

static Source source(const char* op, const char* name, const Tensor& t,
                     std::initializer_list<int64_t> shape) {
  const DType dtype = dtype_of(op, t);
  check_tensor(op, name, t, shape, t.scalar_type());
  return {t.const_data_ptr(), dtype};
}

// A state of any layout whose rows are contiguous.
static StateView state_view(const char* op, const char* name, const Tensor& t, int64_t B, int64_t S,
                            int64_t D, ScalarType dtype) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == B && t.size(1) == S && t.size(2) == D, op, ": ",
                  name, " is ", shape_text(t), ", expected [", B, ", ", S, ", ", D, "]");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " has dtype ",
                  dtype_text(t.scalar_type()), ", expected ", dtype_text(dtype));
  check_device(op, name, t);
  STD_TORCH_CHECK(D <= 1 || t.stride(2) == 1, op, ": rows of ", name, " are not contiguous");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

static std::tuple<Tensor, Tensor, Tensor> embed_reset(
    const Tensor& tokens, const std::optional<Tensor>& rows, const Tensor& embedding,
    const std::optional<Tensor>& positions, const Tensor& halted, const Tensor& y, const Tensor& z,
    const Tensor& y_init, const Tensor& z_init, double scale) {
  const char* op = "embed_reset";
  const DType dtype = dtype_of(op, y);
  check_dims(op, "y", y, 3, "[B, S, D]");
  check_dims(op, "embedding", embedding, 2, "[V, D]");
  check_dims(op, "tokens", tokens, 2, "[B, L]");
  if (rows.has_value()) check_dims(op, "rows", *rows, 3, "[B, P, D]");
  EmbedReset in{};
  in.B = y.size(0), in.S = y.size(1), in.D = y.size(2);
  in.P = rows.has_value() ? rows->size(1) : 0;
  in.scale = (float)scale;
  in.V = embedding.size(0);
  in.embedding = source(op, "embedding", embedding, {in.V, in.D});
  if (rows.has_value()) in.rows = source(op, "rows", *rows, {in.B, in.P, in.D});
  if (positions.has_value()) in.positions = source(op, "positions", *positions, {in.S, in.D});
  in.tokens = checked_tokens(op, tokens, in.V);
  check_tensor(op, "tokens", tokens, {in.B, in.S - in.P}, tokens.scalar_type());
  check_tensor(op, "halted", halted, {in.B}, ScalarType::Bool);
  in.halted = (const bool*)halted.const_data_ptr();
  in.y = state_view(op, "y", y, in.B, in.S, in.D, y.scalar_type());
  in.z = state_view(op, "z", z, in.B, in.S, in.D, y.scalar_type());
  in.y_init = source(op, "y_init", y_init, {in.D});
  in.z_init = source(op, "z_init", z_init, {in.D});
  const std::vector<int64_t> shape{in.B, in.S, in.D};
  Tensor new_x = torch::stable::new_empty(y, shape), new_y = torch::stable::new_empty(y, shape),
         new_z = torch::stable::new_empty(y, shape);
  const TorchHost host;
  kernels().embed_reset_fwd(host, dtype, in, new_x.mutable_data_ptr(), new_y.mutable_data_ptr(),
                            new_z.mutable_data_ptr());
  return {new_x, new_y, new_z};
}

static Tensor embed_reset_bwd(const Tensor& grad, const Tensor& tokens, int64_t vocabulary,
                              double factor) {
  const char* op = "embed_reset_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type());
  STD_TORCH_CHECK(vocabulary >= 0, op, ": vocabulary is ", vocabulary);
  const Tokens checked = checked_tokens(op, tokens, vocabulary);
  const int64_t L = tokens.size(1);
  STD_TORCH_CHECK(tokens.size(0) == B && L <= S, op, ": tokens are ", shape_text(tokens),
                  ", expected [", B, ", at most ", S, "]");
  Tensor out = new_floats(grad, {vocabulary, D});
  const TorchHost host;
  kernels().embed_reset_bwd(host, dtype, grad.const_data_ptr(), checked,
                            (float*)out.mutable_data_ptr(), B, S, S - L, D, vocabulary,
                            (float)factor);
  return out;
}

static Tensor embed_reset_positions_bwd(const Tensor& grad, double factor) {
  const char* op = "embed_reset_positions_bwd";
  const DType dtype = dtype_of(op, grad);
  check_dims(op, "grad", grad, 3, "[B, S, D]");
  const int64_t B = grad.size(0), S = grad.size(1), D = grad.size(2);
  check_tensor(op, "grad", grad, {B, S, D}, grad.scalar_type());
  Tensor out = new_floats(grad, {S, D});
  const TorchHost host;
  kernels().embed_reset_positions_bwd(host, dtype, grad.const_data_ptr(),
                                      (float*)out.mutable_data_ptr(), B, S, D, (float)factor);
  return out;
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("inject", TORCH_BOX(&trm_fast::inject));
  m.impl("swiglu", TORCH_BOX(&trm_fast::swiglu));
  m.impl("swiglu_bwd", TORCH_BOX(&trm_fast::swiglu_bwd));
  m.impl("residual_rmsnorm", TORCH_BOX(&trm_fast::residual_rmsnorm));
  m.impl("residual_rmsnorm_bwd", TORCH_BOX(&trm_fast::residual_rmsnorm_bwd));
  m.impl("embed_reset", TORCH_BOX(&trm_fast::embed_reset));
  m.impl("embed_reset_bwd", TORCH_BOX(&trm_fast::embed_reset_bwd));
  m.impl("embed_reset_positions_bwd", TORCH_BOX(&trm_fast::embed_reset_positions_bwd));
}
