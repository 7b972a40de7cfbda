#include "network.h"

#include <optional>

namespace trm_fast {
namespace recursion {
using namespace aten;

constexpr int64_t TOKENS = 1, FEATURES = 2;  // axes of a norm

// ---- this library's operations

static Tensor swiglu(const Tensor& gate_up) {
  return call("trm_fast_ext::swiglu", "", 1, gate_up)[0];
}

static Tensor swiglu_bwd(const Tensor& grad, const Tensor& gate_up) {
  return call("trm_fast_ext::swiglu_bwd", "", 1, grad, gate_up)[0];
}

struct Normed {
  Tensor out, rstd;
};

// States as the norms see them: along the tokens one item of width B*D.
static Tensor for_norm(const Network& net, const Tensor& t, int64_t axis) {
  return viewed(t, axis == TOKENS ? Shape{1, net.S, net.B * net.D} : Shape{1, net.B * net.S, net.D});
}

static Tensor rows(const Network& net, const Tensor& t) { return viewed(t, {net.B * net.S, net.D}); }

static Normed residual_rmsnorm(const Network& net, const Tensor& h, const Tensor& u, int64_t axis) {
  const auto results = call("trm_fast_ext::residual_rmsnorm", "", 2, for_norm(net, h, axis),
                            for_norm(net, u, axis), axis, net.eps);
  return {rows(net, results[0]), results[1]};
}

static Tensor residual_rmsnorm_bwd(const Network& net, const Tensor& grad, const Tensor& out,
                                   const Tensor& rstd, int64_t axis) {
  return rows(net, call("trm_fast_ext::residual_rmsnorm_bwd", "", 1, for_norm(net, grad, axis),
                        for_norm(net, out, axis), rstd, axis)[0]);
}

// ---- token mixing: h [M, D] as [S, B*D]; gate and up [2 F_t, B*D], in memory one row of both halves

static Tensor by_token(const Network& net, const Tensor& t) {
  return viewed(t, {net.S, net.B * net.D});
}

static Tensor token_gate_up(const Network& net, const Block& block, const Tensor& h) {
  return mm(transposed(block.mixer_in), by_token(net, h));
}

static Tensor one_row(const Tensor& t) { return viewed(t, {1, t.numel()}); }

static Tensor token_swiglu(const Network& net, const Block& block, const Tensor& gate_up) {
  return viewed(swiglu(one_row(gate_up)), {block.mixer_out.size(1), net.B * net.D});
}

static Normed token_mix(const Network& net, const Block& block, const Tensor& h) {
  const Tensor a = token_swiglu(net, block, token_gate_up(net, block, h));
  return residual_rmsnorm(net, h, mm(block.mixer_out, a), TOKENS);
}

static Tensor token_mix_bwd(const Network& net, size_t i, const Tensor& grad, const Tensor& h,
                            const Tape& tape, WeightGrads& grads) {
  const Block& block = net.blocks[i];
  const Tensor d = residual_rmsnorm_bwd(net, grad, tape.mid, tape.mid_rstd, TOKENS);
  const Tensor d_u = by_token(net, d), gate_up = token_gate_up(net, block, h);
  grads.add(WEIGHTS * i + 1, d_u, transposed(token_swiglu(net, block, gate_up)));
  const Tensor d_gate_up =
      viewed(swiglu_bwd(one_row(mm(transposed(block.mixer_out), d_u)), one_row(gate_up)),
             {block.mixer_in.size(1), net.B * net.D});
  grads.add(WEIGHTS * i, d_gate_up, transposed(by_token(net, h)));
  return rows(net, mm_add(block.mixer_in, d_gate_up, d_u));
}

// ---- attention

struct Heads {
  Tensor q, k, v;  // [B, S, H, K], views of qkv
};

static Heads heads_of(const Network& net, const Tensor& qkv) {
  const int64_t H = net.heads, K = qkv.size(2) / (3 * H);
  const Tensor t = viewed(qkv, {net.B, net.S, 3 * H, K});
  return {slice(t, 2, 0, H), slice(t, 2, H, H), slice(t, 2, 2 * H, H)};
}

static Normed mix_by_attention(const Network& net, const Block& block, const Tensor& h,
                               Tape* tape) {
  Tensor qkv = viewed(mm(h, transposed(block.mixer_in)), {net.B, net.S, block.mixer_in.size(0)});
  if (net.cos)
    qkv = call("trm_fast_ext::rotate_qkv", "", 1, qkv, *net.cos, *net.sin, net.heads)[0];
  const Heads at = heads_of(net, qkv);
  const Attended found = attention(at.q, at.k, at.v);
  if (tape) tape->qkv = qkv, tape->attended = found.out, tape->lse = found.lse;
  const Tensor flat = viewed(found.out, {net.B * net.S, block.mixer_out.size(1)});
  return residual_rmsnorm(net, h, mm(flat, transposed(block.mixer_out)), FEATURES);
}

static Tensor attention_block_bwd(const Network& net, size_t i, const Tensor& grad, const Tensor& h,
                                  const Tape& tape, WeightGrads& grads) {
  const Block& block = net.blocks[i];
  const int64_t M = net.B * net.S, E = block.mixer_out.size(1);
  const Tensor d = residual_rmsnorm_bwd(net, grad, tape.mid, tape.mid_rstd, FEATURES);
  grads.add(WEIGHTS * i + 1, transposed(d), viewed(tape.attended, {M, E}));
  const Heads at = heads_of(net, tape.qkv);
  const Shape shape{net.B, net.S, net.heads, E / net.heads};
  const auto [dq, dk, dv] = attention_bwd(viewed(mm(d, block.mixer_out), shape), at.q, at.k, at.v,
                                          viewed(tape.attended, shape), tape.lse);
  const Tensor d_qkv =
      viewed(call("trm_fast_ext::rotate_qkv_bwd", "", 1, dq, dk, dv, net.cos, net.sin)[0],
           {M, 3 * E});
  grads.add(WEIGHTS * i, transposed(d_qkv), h);
  return mm_add(d_qkv, block.mixer_in, d);
}

// ---- the channel SwiGLU

// What it makes is gone before the mixer's backward begins.
static Tensor channel_bwd(const Network& net, size_t i, const Tensor& grad, const Tape& tape,
                          WeightGrads& grads) {
  const Block& block = net.blocks[i];
  const Tensor d = residual_rmsnorm_bwd(net, grad, tape.out, tape.out_rstd, FEATURES);
  const Tensor gu = tape.gu.defined() ? tape.gu : mm(tape.mid, transposed(block.gate_up));
  grads.add(WEIGHTS * i + 3, transposed(d), swiglu(gu));
  const Tensor d_gu = swiglu_bwd(mm(d, block.down), gu);
  grads.add(WEIGHTS * i + 2, transposed(d_gu), tape.mid);
  return mm_add(d_gu, block.gate_up, d);
}

// ---- passes

Tensor forward(const Network& net, Tensor h, Tape* tapes, bool keep_gu) {
  for (size_t i = 0; i < net.blocks.size(); ++i) {
    const Block& block = net.blocks[i];
    Tape* tape = tapes ? &tapes[i] : nullptr;
    const Normed mid =
        net.mlp_t ? token_mix(net, block, h) : mix_by_attention(net, block, h, tape);
    const Tensor gu = mm(mid.out, transposed(block.gate_up));
    const Normed out =
        residual_rmsnorm(net, mid.out, mm(swiglu(gu), transposed(block.down)), FEATURES);
    if (tape) {
      tape->mid = mid.out, tape->mid_rstd = mid.rstd;
      tape->out = out.out, tape->out_rstd = out.rstd;
      if (keep_gu) tape->gu = gu;
    }
    h = out.out;
  }
  return h;
}

void WeightGrads::add(size_t index, const Tensor& a, const Tensor& b) {
  const Tensor product = mm_float(a, b);
  sums[index] = sums[index] ? aten::add(*sums[index], product) : product;
}

Tensor backward(const Network& net, Tensor grad, const Tensor& h, const Tape* tapes,
                WeightGrads& grads) {
  for (size_t i = net.blocks.size(); i-- > 0;) {
    const Tape& tape = tapes[i];
    grad = channel_bwd(net, i, grad, tape, grads);
    const Tensor& input = i ? tapes[i - 1].out : h;
    grad = net.mlp_t ? token_mix_bwd(net, i, grad, input, tape, grads)
                     : attention_block_bwd(net, i, grad, input, tape, grads);
  }
  return grad;
}

}  // namespace recursion
}  // namespace trm_fast
