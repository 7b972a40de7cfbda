// deep_recursion: checks, what is kept for the backward, and one call for all of it.
#include <optional>
#include <tuple>

#include "bind.h"

namespace trm_fast {

namespace {

constexpr int64_t WEIGHTS = 4;  // of a block: two of the mixer, gate_up, down

Policy policy_of(const char* op, const std::string& name) {
  if (name == "none") return Policy::none;
  if (name == "save") return Policy::save;
  if (name == "light") return Policy::light;
  STD_TORCH_CHECK(name == "recompute", op, ": policy is ", name,
                  ", expected none, save, light or recompute");
  return Policy::recompute;
}

// The shape of a recursion on states like `like`; every weight and table is checked.
RecursionShape shape_of(const char* op, const Tensor& like, const std::vector<Tensor>& weights,
                        const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                        bool mlp_t, int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps,
                        const std::string& policy) {
  STD_TORCH_CHECK(like.dim() == 3, op, ": states are [B, S, D]");
  STD_TORCH_CHECK(!weights.empty() && weights.size() % WEIGHTS == 0, op,
                  ": four weights per block are expected, not ", weights.size(), " in all");
  STD_TORCH_CHECK(H_cycles > 0 && L_cycles > 0 && heads > 0, op,
                  ": H_cycles, L_cycles and heads must be positive");
  RecursionShape s{};
  s.B = like.size(0), s.S = like.size(1), s.D = like.size(2);
  STD_TORCH_CHECK(s.S > 0 && s.D > 0 && s.D % 16 == 0, op,
                  ": the width must be a multiple of 16, not ", s.D);
  s.heads = heads, s.blocks = (int64_t)weights.size() / WEIGHTS;
  s.H_cycles = H_cycles, s.L_cycles = L_cycles, s.eps = (float)eps, s.mlp_t = mlp_t;
  s.policy = policy_of(op, policy);
  for (const Tensor& w : weights) STD_TORCH_CHECK(w.dim() == 2, op, ": weights are matrices");
  s.F = weights[3].size(1);
  s.F_t = mlp_t ? weights[1].size(1) : 0;
  STD_TORCH_CHECK(s.F > 0 && (!mlp_t || s.F_t > 0), op, ": inner widths must be positive");
  for (int64_t l = 0; l < s.blocks; ++l) {
    const Tensor* w = &weights[l * WEIGHTS];
    if (mlp_t) {
      check_tensor(op, "token gate_up", w[0], {2 * s.F_t, s.S}, ScalarType::Float);
      check_tensor(op, "token down", w[1], {s.S, s.F_t}, ScalarType::Float);
    } else {
      check_tensor(op, "qkv", w[0], {3 * s.D, s.D}, ScalarType::Float);
      check_tensor(op, "out", w[1], {s.D, s.D}, ScalarType::Float);
    }
    check_tensor(op, "gate_up", w[2], {2 * s.F, s.D}, ScalarType::Float);
    check_tensor(op, "down", w[3], {s.D, s.F}, ScalarType::Float);
  }
  if (!mlp_t) {
    const int64_t K = s.D / heads;
    STD_TORCH_CHECK(s.D % heads == 0 && K % 16 == 0 && K <= 128, op,
                    ": the head dimension must be a multiple of 16 up to 128, not ", s.D, " / ",
                    heads);
    STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin come together");
    if (cos.has_value()) {
      check_tensor(op, "cos", *cos, {s.S, K}, ScalarType::Float);
      check_tensor(op, "sin", *sin, {s.S, K}, ScalarType::Float);
    }
  }
  return s;
}

std::vector<BlockWeights> pointers(const std::vector<Tensor>& weights) {
  std::vector<BlockWeights> all;
  for (size_t i = 0; i < weights.size(); i += WEIGHTS) {
    const auto at = [&](size_t j) { return (const float*)weights[i + j].const_data_ptr(); };
    all.push_back({{at(0), at(1)}, at(2), at(3)});
  }
  return all;
}

// Bytes of each saved tape: one per pass and block, with the policies that keep them.
std::vector<int64_t> tape_bytes(DType dtype, const RecursionShape& s) {
  std::vector<int64_t> bytes;
  if (s.policy != Policy::save && s.policy != Policy::light) return bytes;
  for (int64_t pass = 0; pass <= s.L_cycles; ++pass) {
    int64_t size = 0;
    kernels().deep_recursion_tape_bytes(dtype, s, pass, &size);
    bytes.insert(bytes.end(), (size_t)s.blocks, size);
  }
  return bytes;
}

// A sum of 127 * 127 must fit an int32.
void check_int8_width(const char* op, int64_t width) {
  STD_TORCH_CHECK(width <= 131072, op, ": eight bits serve widths up to 131072, not ", width);
}

}  // namespace

static std::tuple<Tensor, Tensor, std::vector<Tensor>> deep_recursion(
    const Tensor& x, const Tensor& y, const Tensor& z, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool mlp_t,
    int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps, const std::string& policy) {
  const char* op = "deep_recursion";
  const DType dtype = dtype_of(op, x);
  const RecursionShape s =
      shape_of(op, x, weights, cos, sin, mlp_t, H_cycles, L_cycles, heads, eps, policy);
  check_tensor(op, "x", x, {s.B, s.S, s.D}, x.scalar_type());
  check_tensor(op, "y", y, {s.B, s.S, s.D}, x.scalar_type());
  check_tensor(op, "z", z, {s.B, s.S, s.D}, x.scalar_type());
  Tensor new_y = torch::stable::empty_like(y), new_z = torch::stable::empty_like(z);
  std::vector<Tensor> saved;
  std::vector<void*> places;
  if (s.policy != Policy::none)
    for (int64_t i = 0; i <= L_cycles; ++i)
      saved.push_back(new_pooled({s.B, s.S, s.D}, x.scalar_type()));
  for (const int64_t bytes : tape_bytes(dtype, s))
    saved.push_back(new_pooled({bytes}, ScalarType::Byte));
  for (const Tensor& t : saved) places.push_back(t.mutable_data_ptr());
  if (s.B > 0) {
    const auto blocks = pointers(weights);
    const TorchHost host;
    kernels().deep_recursion_fwd(host, dtype, s, x.const_data_ptr(), y.const_data_ptr(),
                                 z.const_data_ptr(), blocks.data(), floats(cos), floats(sin),
                                 new_y.mutable_data_ptr(), new_z.mutable_data_ptr(), places.data());
  }
  return {new_y, new_z, saved};
}

// The same without a gradient, products with weights in eight bits.
static std::tuple<Tensor, Tensor> deep_recursion_int8(
    const Tensor& x, const Tensor& y, const Tensor& z, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool mlp_t,
    int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps) {
  const char* op = "deep_recursion_int8";
  const DType dtype = dtype_of(op, x);
  RecursionShape s =
      shape_of(op, x, weights, cos, sin, mlp_t, H_cycles, L_cycles, heads, eps, "none");
  s.int8 = true;
  check_int8_width(op, s.D), check_int8_width(op, s.F);
  for (const auto& [name, t] : {std::pair{"x", x}, std::pair{"y", y}, std::pair{"z", z}})
    check_tensor(op, name, t, {s.B, s.S, s.D}, x.scalar_type());
  Tensor new_y = torch::stable::empty_like(y), new_z = torch::stable::empty_like(z);
  if (s.B > 0) {
    const auto blocks = pointers(weights);
    const TorchHost host;
    kernels().deep_recursion_fwd(host, dtype, s, x.const_data_ptr(), y.const_data_ptr(),
                                 z.const_data_ptr(), blocks.data(), floats(cos), floats(sin),
                                 new_y.mutable_data_ptr(), new_z.mutable_data_ptr(), nullptr);
  }
  return {new_y, new_z};
}

// a [N, E], w [D, E] float -> a w^T by eight bits.
static Tensor int8_linear(const Tensor& a, const Tensor& w) {
  const char* op = "int8_linear";
  const DType dtype = dtype_of(op, a);
  STD_TORCH_CHECK(a.dim() == 2 && w.dim() == 2, op, ": a and w are [N, E] and [D, E]");
  const int64_t N = a.size(0), D = w.size(0), E = w.size(1);
  STD_TORCH_CHECK(D > 0 && E > 0 && D % 16 == 0 && E % 16 == 0, op,
                  ": widths must be positive multiples of 16");
  check_int8_width(op, E);
  check_tensor(op, "a", a, {N, E}, a.scalar_type());
  check_tensor(op, "w", w, {D, E}, ScalarType::Float);
  Tensor out = torch::stable::new_empty(a, std::vector<int64_t>{N, D}, a.scalar_type());
  const TorchHost host;
  if (N > 0)
    kernels().int8_linear(host, dtype, a.const_data_ptr(), (const float*)w.const_data_ptr(),
                          out.mutable_data_ptr(), N, D, E);
  return out;
}

static std::tuple<Tensor, std::vector<Tensor>> deep_recursion_bwd(
    const Tensor& grad, const std::vector<Tensor>& saved, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool mlp_t,
    int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps, const std::string& policy) {
  const char* op = "deep_recursion_bwd";
  const DType dtype = dtype_of(op, grad);
  const RecursionShape s =
      shape_of(op, grad, weights, cos, sin, mlp_t, H_cycles, L_cycles, heads, eps, policy);
  STD_TORCH_CHECK(s.policy != Policy::none, op, ": nothing was kept with the policy none");
  check_tensor(op, "grad", grad, {s.B, s.S, s.D}, grad.scalar_type());
  const std::vector<int64_t> bytes = tape_bytes(dtype, s);
  const size_t states = (size_t)L_cycles + 1;
  STD_TORCH_CHECK(saved.size() == states + bytes.size(), op, ": ", saved.size(),
                  " saved tensors, expected ", states + bytes.size());
  std::vector<void*> places;
  for (size_t i = 0; i < saved.size(); ++i) {
    if (i < states)
      check_tensor(op, "a saved state", saved[i], {s.B, s.S, s.D}, grad.scalar_type());
    else
      check_tensor(op, "a saved tape", saved[i], {bytes[i - states]}, ScalarType::Byte);
    places.push_back(const_cast<void*>(saved[i].const_data_ptr()));
  }
  Tensor dx = torch::stable::empty_like(grad);
  std::vector<Tensor> d_weights;
  std::vector<float*> targets;
  for (const Tensor& w : weights) {
    d_weights.push_back(torch::stable::empty_like(w));
    targets.push_back((float*)d_weights.back().mutable_data_ptr());
  }
  if (s.B > 0) {
    const auto blocks = pointers(weights);
    const TorchHost host;
    kernels().deep_recursion_bwd(host, dtype, s, grad.const_data_ptr(), places.data(),
                                 blocks.data(), floats(cos), floats(sin), dx.mutable_data_ptr(),
                                 targets.data());
  } else {
    for (Tensor& d : d_weights) torch::stable::zero_(d);
  }
  return {dx, d_weights};
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("deep_recursion", TORCH_BOX(&trm_fast::deep_recursion));
  m.impl("deep_recursion_int8", TORCH_BOX(&trm_fast::deep_recursion_int8));
  m.impl("int8_linear", TORCH_BOX(&trm_fast::int8_linear));
  m.impl("deep_recursion_bwd", TORCH_BOX(&trm_fast::deep_recursion_bwd));
}
