// What the parts of deep_recursion share: its settings, what is kept of a pass, and how steps run.
//
// A step is a function of (slot, item, part, parts): the slot's scratch is its own, and parts of one
// item's step do not depend on each other. With enough items a thread takes whole items through all
// steps, and there is no barrier; with few, the parts of every step are divided among the threads.
// Either way each number is computed by the same operations in the same order.
#pragma once
#include "channel.h"

namespace trm_fast {
namespace TRM_ISA {

// What one block of one pass keeps, over all items; pointers into saved tensors or work memory.
template <class Mode>
struct Tape {
  using T = typename Mode::T;
  T *mixed, *out;               // [B, S, D]: after the mixer, after the channel MLP
  float *mixed_rstd, *out_rstd; // [B, D] or [B, S] (the mixer's own), [B, S]
  T *mixer_gu, *gu;             // g and u of both SwiGLUs, or null; gu [B, S, 2 P]
  T *qkv, *attended;            // [B, S, 3 D], [B, S, D]; attention only
  float* lse;                   // [B, H, S]
};

// Whether a tape has g and u, of the mixer's and of the channel SwiGLU.
struct HasInner {
  bool mixer, channel;
};

// The last pass does without the mixer's: the backward begins with it, and to make them again there
// costs little next to their size, twice F_t rows of the state's width.
INL HasInner kept_inner(const RecursionShape& s, int64_t pass) {
  const bool save = s.policy == Policy::save;
  return {save && pass < s.L_cycles, save};
}

// One thread runs the steps of one item.
struct OneItem {
  int64_t slot, item;
  template <class F>
  INL void step(const F& f) const {
    f(slot, item, 0, 1);
  }
};

// Each step runs for all items on all threads before the next one begins.
struct AllItems {
  const Host& host;
  int64_t items, parts;
  template <class F>
  INL void step(const F& f) const {
    parallel_ranges(host, items * parts, 1, [&](int64_t slot, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(slot, i / parts, i % parts, parts);
    });
  }
};

// steps(executor), all steps for all items, by whichever keeps the threads busy.
template <class Steps>
INL void run_steps(const Host& host, int64_t items, const Steps& steps) {
  const int64_t threads = host.threads;
  if (threads == 1 || items % threads == 0 || items >= 8 * threads) {
    parallel_ranges(host, items, 1, [&](int64_t slot, int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) steps(OneItem{slot, item});
    });
  } else {
    steps(AllItems{host, items, threads});
  }
}

// [begin, end) of `count` things that a part takes.
struct Range {
  int64_t begin, end;
};
INL Range share(int64_t count, int64_t part, int64_t parts) {
  return {part * count / parts, (part + 1) * count / parts};
}

// Memory laid out in one buffer: first counted, with no buffer, then taken. `clears`: the gaps, so
// that equal steps keep equal bytes.
struct Layout {
  char* start;
  int64_t bytes;
  bool clears;
  template <class A>
  INL A* take(int64_t count) {
    const int64_t size = count * (int64_t)sizeof(A), taken = round_up(size, 64);
    char* p = start ? start + bytes : nullptr;
    if (p && clears) memset(p + size, 0, (size_t)(taken - size));
    bytes += taken;
    return (A*)(void*)p;
  }
};

}  // namespace TRM_ISA
}  // namespace trm_fast
