// One pass of the network forward and backward, by hand: matrix products and attention by PyTorch,
// everything between them by this library's operations, called through the dispatcher.
//
// States are [M, D], M = B*S rows: of attention batch-major; of token mixing token-major, so that
// [S, B*D] is the same memory and no product needs a transposed copy. The token mixer's first weight
// is kept as [S, 2 F_t]: then the contiguous axis of every operand is a multiple of 8 long whatever
// S is, as fast products ask.
//
// Dims: B batch, S tokens incl. prefix, D width, F inner width (F_t along the tokens), H heads, K
// head dim, M = B*S rows.
#pragma once
#include "attention.h"

namespace trm_fast {
namespace recursion {

constexpr size_t WEIGHTS = 4;  // of a block: the mixer's two, gate_up, down

struct Block {
  Tensor mixer_in;   // token mixing: [S, 2 F_t]; attention: q, k, v [3 H K, D]
  Tensor mixer_out;  // [S, F_t]; [D, H K]
  Tensor gate_up;    // [2 F, D]
  Tensor down;       // [D, F]
};

struct Network {
  std::vector<Block> blocks;
  int64_t B, S, D, heads;
  bool mlp_t;
  double eps;
  std::optional<Tensor> cos, sin;
};

// What the backward of one block reads beside the block's input; fields in the order of saving.
struct Tape {
  Tensor qkv, attended, lse;  // attention only: [B, S, 3 H K] rotated, [B, S, H K], [B, H, S]
  Tensor mid, mid_rstd;       // the mixer's normed output [M, D], its scales
  Tensor out, out_rstd;       // the block's [M, D]
  Tensor gu;                  // gate and up [M, 2 F]; policy light computes it again
};

// Network(h); `tapes`, one per block, take what `backward` reads, if given. `keep_gu`: gate and up too.
Tensor forward(const Network& net, Tensor h, Tape* tapes, bool keep_gu);

// Gradients of the weights, four a block, summed up in float; undefined before the first.
struct WeightGrads {
  std::vector<std::optional<Tensor>> sums;
  void add(size_t index, const Tensor& a, const Tensor& b);
};

// The gradient of the pass's input `h` [M, D] from that of its output; adds to `grads`.
Tensor backward(const Network& net, Tensor grad, const Tensor& h, const Tape* tapes,
                WeightGrads& grads);

}  // namespace recursion
}  // namespace trm_fast
