// deep_recursion: all H x L passes of the network as one operation, with its backward by hand.
//
// The cycles before the last keep nothing. Of the last one policy `save` keeps what the backward
// reads, `light` the same without gate and up, `recompute` the input of each pass, which it runs
// again. Weight gradients are summed up in float over the passes. Source: Jolicoeur-Martineau 2025
// (arXiv 2510.04871), Algorithm 3.
//
// A build of the tests registers the same source for the CPU under another name: its logic is
// checked there, without a GPU.
//
// Dims: B batch, S tokens incl. prefix, D width, F inner width (F_t along the tokens), H heads, K
// head dim, P = L_cycles + 1 passes of a cycle.
#include <optional>

#include "network.h"

#ifndef TRM_RECURSION_NAMESPACE
#define TRM_RECURSION_NAMESPACE trm_fast_ext
#define TRM_RECURSION_KEY CUDA
#endif

namespace trm_fast {
namespace recursion {
using namespace aten;

struct Settings {
  bool mlp_t;
  int64_t H_cycles, L_cycles, heads;
  double eps;
  std::string policy;

  bool grads() const { return policy != "none"; }
  bool recompute() const { return policy == "recompute"; }
  size_t passes() const { return (size_t)L_cycles + 1; }
};

static void check_settings(const char* op, const Settings& s, bool backward) {
  const bool known = s.policy == "save" || s.policy == "light" || s.policy == "recompute";
  STD_TORCH_CHECK(known || (!backward && s.policy == "none"), op, ": policy is '", s.policy,
                  "', expected save, light or recompute", backward ? "" : ", or none");
  STD_TORCH_CHECK(s.H_cycles >= 1 && s.L_cycles >= 0 && s.heads >= 1, op,
                  ": H_cycles and heads must be at least 1, L_cycles at least 0");
}

// A weight in the dtype of the states or in float: its own dtype is what its gradient gets.
static void check_weight(const char* op, const char* name, const Tensor& t,
                         std::initializer_list<int64_t> shape, ScalarType dtype) {
  check_tensor(op, name, t, shape, t.scalar_type() == dtype ? dtype : ScalarType::Float);
}

// Checks every weight against states like `x`, and casts.
static Network pack(const char* op, const std::vector<Tensor>& weights, const Tensor& x,
                    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                    const Settings& s) {
  const ScalarType dtype = x.scalar_type();
  Network net{{}, x.size(0), x.size(1), x.size(2), s.heads, s.mlp_t, s.eps, cos, sin};
  const int64_t S = net.S, D = net.D;
  STD_TORCH_CHECK(!weights.empty() && weights.size() % WEIGHTS == 0, op, ": got ", weights.size(),
                  " weights, expected four a block");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin come together");
  for (size_t i = 0; i < weights.size(); i += WEIGHTS) {
    const Tensor &a = weights[i], &b = weights[i + 1], &gate_up = weights[i + 2],
                 &down = weights[i + 3];
    for (size_t j = 0; j < WEIGHTS; ++j)
      STD_TORCH_CHECK(weights[i + j].dim() == 2, op, ": a weight is ", shape_text(weights[i + j]),
                      ", expected a matrix");
    const int64_t inner = b.size(1), F = down.size(1);
    if (s.mlp_t) {
      check_weight(op, "the token mixer's gate_up", a, {2 * inner, S}, dtype);
      check_weight(op, "the token mixer's down", b, {S, inner}, dtype);
    } else {
      STD_TORCH_CHECK(inner % s.heads == 0, op, ": ", inner, " features do not make ", s.heads,
                      " heads");
      check_weight(op, "qkv", a, {3 * inner, D}, dtype);
      check_weight(op, "out", b, {D, inner}, dtype);
      for (const auto& table : {cos, sin})
        if (table)
          check_tensor(op, "cos or sin", *table, {S, inner / s.heads}, ScalarType::Float);
    }
    check_weight(op, "gate_up", gate_up, {2 * F, D}, dtype);
    check_weight(op, "down", down, {D, F}, dtype);
    const Tensor mixer_in = cast(a, dtype);
    net.blocks.push_back({s.mlp_t ? in_order(transposed(mixer_in)) : mixer_in, cast(b, dtype),
                          cast(gate_up, dtype), cast(down, dtype)});
  }
  return net;
}

// ---- what is saved: of each pass its input, then, unless recomputed, the tapes of its blocks

static std::vector<Tensor*> fields(Tape& tape, const Settings& s) {
  std::vector<Tensor*> found;
  if (!s.mlp_t) found = {&tape.qkv, &tape.attended, &tape.lse};
  for (Tensor* t : {&tape.mid, &tape.mid_rstd, &tape.out, &tape.out_rstd}) found.push_back(t);
  if (s.policy == "save") found.push_back(&tape.gu);
  return found;
}

struct Pass {
  Tensor input;  // [M, D]
  std::vector<Tape> tapes;
};

static void save(std::vector<Tensor>& saved, Pass& pass, const Settings& s) {
  saved.push_back(pass.input);
  if (s.recompute()) return;
  for (Tape& tape : pass.tapes)
    for (Tensor* t : fields(tape, s)) saved.push_back(*t);
}

static std::vector<Pass> passes_of(const char* op, const std::vector<Tensor>& saved,
                                   const Network& net, const Settings& s) {
  std::vector<Pass> passes(s.passes());
  size_t next = 0;
  const auto take = [&](Tensor& to) {
    STD_TORCH_CHECK(next < saved.size(), op, ": got ", saved.size(), " saved tensors, expected more");
    to = saved[next++];
    STD_TORCH_CHECK(to.is_contiguous(), op, ": a saved tensor is not contiguous");
  };
  for (Pass& pass : passes) {
    take(pass.input);
    check_tensor(op, "a saved state", pass.input, {net.B * net.S, net.D}, pass.input.scalar_type());
    pass.tapes.resize(net.blocks.size());
    if (s.recompute()) continue;
    for (size_t i = 0; i < net.blocks.size(); ++i) {
      Tape& tape = pass.tapes[i];
      for (Tensor* t : fields(tape, s)) take(*t);
      if (s.mlp_t) continue;
      const int64_t E = net.blocks[i].mixer_out.size(1);
      check_tensor(op, "saved qkv", tape.qkv, {net.B, net.S, 3 * E}, pass.input.scalar_type());
      check_tensor(op, "saved attention", tape.attended, {net.B, net.S, net.heads, E / net.heads},
                   pass.input.scalar_type());
      STD_TORCH_CHECK(tape.lse.dim() == 3, op, ": saved lse is ", shape_text(tape.lse));
      STD_TORCH_CHECK(tape.lse.size(2) >= net.S, op, ": saved lse is ", shape_text(tape.lse));
      check_tensor(op, "saved lse", tape.lse, {net.B, net.heads, tape.lse.size(2)},
                   ScalarType::Float);
    }
  }
  STD_TORCH_CHECK(next == saved.size(), op, ": got ", saved.size(), " saved tensors, expected ",
                  next);
  return passes;
}

// ---- memory layouts: states go in and out batch-major, [B, S, D]; results are memory of their own,
// neither an input's nor what is saved

static Tensor to_rows(const Network& net, const Tensor& t) {
  return viewed(net.mlp_t ? in_order(transposed(t)) : t, {net.B * net.S, net.D});
}

static Tensor to_states(const Network& net, const Tensor& t) {
  if (!net.mlp_t) return viewed(torch::stable::clone(t), {net.B, net.S, net.D});
  return in_order(transposed(viewed(t, {net.S, net.B, net.D})));
}

// z + (y + x), all [M, D]
static Tensor inject(const Tensor& z, const Tensor& y, const Tensor& x) {
  const Shape flat{1, x.size(0), x.size(1)};
  const Tensor sum =
      call("trm_fast_ext::inject", "", 1, viewed(z, flat), viewed(y, flat), viewed(x, flat))[0];
  return viewed(sum, {x.size(0), x.size(1)});
}

static std::tuple<Tensor, Tensor, std::vector<Tensor>> deep_recursion(
    const Tensor& x, const Tensor& y, const Tensor& z, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool mlp_t,
    int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps, std::string policy) {
  const char* op = "deep_recursion";
  const Settings s{mlp_t, H_cycles, L_cycles, heads, eps, policy};
  check_settings(op, s, false);
  STD_TORCH_CHECK(x.dim() == 3, op, ": x is ", shape_text(x), ", expected [B, S, D]");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"x", x}, {"y", y}, {"z", z}})
    check_tensor(op, name, t, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const Network net = pack(op, weights, x, cos, sin, s);
  std::vector<Tensor> saved;
  if (x.numel() == 0) return {torch::stable::empty_like(y), torch::stable::empty_like(z), saved};
  const Tensor question = to_rows(net, x);
  Tensor answer = to_rows(net, y), latent = to_rows(net, z);
  for (int64_t cycle = 0; cycle < H_cycles; ++cycle) {
    const bool keep = s.grads() && cycle + 1 == H_cycles;
    for (int64_t i = 0; i <= L_cycles; ++i) {
      Pass pass{i < L_cycles ? inject(latent, answer, question) : add(answer, latent), {}};
      const bool tapes = keep && !s.recompute();
      if (tapes) pass.tapes.resize(net.blocks.size());
      Tensor& state = i < L_cycles ? latent : answer;
      state = forward(net, pass.input, tapes ? pass.tapes.data() : nullptr, policy == "save");
      if (keep) save(saved, pass, s);
    }
  }
  return {to_states(net, answer), to_states(net, latent), saved};
}

static std::tuple<Tensor, std::vector<Tensor>> deep_recursion_bwd(
    const Tensor& grad, const std::vector<Tensor>& saved, const std::vector<Tensor>& weights,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, bool mlp_t,
    int64_t H_cycles, int64_t L_cycles, int64_t heads, double eps, std::string policy) {
  const char* op = "deep_recursion_bwd";
  const Settings s{mlp_t, H_cycles, L_cycles, heads, eps, policy};
  check_settings(op, s, true);
  STD_TORCH_CHECK(grad.dim() == 3, op, ": grad is ", shape_text(grad), ", expected [B, S, D]");
  check_tensor(op, "grad", grad, {grad.size(0), grad.size(1), grad.size(2)}, grad.scalar_type());
  const Network net = pack(op, weights, grad, cos, sin, s);
  std::vector<Tensor> d_weights;
  if (grad.numel() == 0) {
    for (const Tensor& w : weights) d_weights.push_back(zeros_like(w));
    return {zeros_like(grad), d_weights};
  }
  std::vector<Pass> passes = passes_of(op, saved, net, s);
  WeightGrads grads{std::vector<std::optional<Tensor>>(weights.size())};
  Tensor d = to_rows(net, grad);
  std::optional<Tensor> d_x;  // float: up to L_cycles terms
  for (size_t i = s.passes(); i-- > 0;) {
    Pass pass = std::move(passes[i]);
    if (s.recompute()) forward(net, pass.input, pass.tapes.data(), true);
    d = backward(net, std::move(d), pass.input, pass.tapes.data(), grads);
    if ((int64_t)i < L_cycles) d_x = d_x ? add(*d_x, d) : cast(d, ScalarType::Float);
  }
  for (size_t i = 0; i < weights.size(); ++i)
    d_weights.push_back(cast(*grads.sums[i], weights[i].scalar_type()));
  if (!d_x) return {zeros_like(grad), d_weights};
  return {to_states(net, cast(*d_x, grad.scalar_type())), d_weights};
}

}  // namespace recursion
}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(TRM_RECURSION_NAMESPACE, TRM_RECURSION_KEY, m) {
  m.impl("deep_recursion", TORCH_BOX(&trm_fast::recursion::deep_recursion));
  m.impl("deep_recursion_bwd", TORCH_BOX(&trm_fast::recursion::deep_recursion_bwd));
}
