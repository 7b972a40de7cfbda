// One pass of the network, and where its states are: what both directions of deep_recursion share.
#pragma once
#include "mixers.h"

namespace trm_fast {
namespace TRM_ISA {

template <class Mode, class Mixer>
struct Engine {
  using T = typename Mode::T;
  using E = typename Mode::E;

  const Host& host;
  const RecursionShape& s;
  Channel<Mode>* channels;
  Mixer* mixers;
  ChannelScratch<Mode>* scratch;

  // forwards, backwards: which operands to pack. `users`: as many threads as use scratch.
  Engine(const Host& host_, const RecursionShape& s_, const BlockWeights* weights, const float* cos,
         const float* sin, bool forwards, bool backwards, const Host& users)
      : host(host_), s(s_) {
    channels = allocate<Channel<Mode>>(host, s.blocks);
    mixers = allocate<Mixer>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      channels[l] = s.int8 ? Channel<Mode>::make_int8(host, weights[l].gate_up, weights[l].down, s.D,
                                                      s.F)
                           : Channel<Mode>::make(host, weights[l].gate_up, weights[l].down, s.D, s.F,
                                                 forwards, backwards);
      mixers[l] = Mixer::make(host, s, weights[l], cos, sin, forwards || Mixer::REMADE, backwards);
    }
    scratch = ChannelScratch<Mode>::make(users, s.D, channels[0].P, s.int8);
    Mixer::make_scratch(users, s, backwards, mixers);
  }

  int64_t states() const { return s.B * s.S * s.D; }

  // out [rows of the part] = a + b, rounded.
  template <class Exec>
  void add(const Exec& exec, const T* a, const T* b, T* out) const {
    exec.step([&](int64_t, int64_t item, int64_t part, int64_t parts) {
      const Range rows = share(s.S, part, parts);
      const int64_t begin = (item * s.S + rows.begin) * s.D, end = (item * s.S + rows.end) * s.D;
      for (int64_t i = begin; i < end; i += VL) store(out + i, load(a + i) + load(b + i));
    });
  }

  // The network on `state`, into the tapes of the blocks; the last one's `out` is the result.
  template <class Exec>
  void pass(const Exec& exec, const T* state, const Tape<Mode>* tapes) const {
    pass(exec, state, tapes, mixers, scratch);
  }
  template <class Exec>
  void pass(const Exec& exec, const T* state, const Tape<Mode>* tapes, const Mixer* by,
            const ChannelScratch<Mode>* in) const {
    for (int64_t l = 0; l < s.blocks; ++l) {
      const Tape<Mode>& tape = tapes[l];
      by[l].forward(exec, l ? tapes[l - 1].out : state, tape);
      exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
        const Range rows = share(s.S, part, parts);
        const int64_t row = item * s.S + rows.begin;
        channel_rows<Mode>(channels[l], tape.mixed + row * s.D, tape.out + row * s.D,
                           tape.gu ? tape.gu + row * 2 * channels[l].P : nullptr,
                           tape.out_rstd + row, rows.end - rows.begin, s.eps, in[slot]);
      });
    }
  }

  // The latent L times, the answer once: y and z are where the states are, and tell where the new
  // ones are. tapes(pass) and state(pass): where pass 0..L is kept.
  template <class Exec, class Tapes, class States>
  void cycle(const Exec& exec, const T* x, const T*& y, const T*& z, T* injected, const Tapes& tapes,
             const States& state) const {
    add(exec, y, x, injected);
    for (int64_t i = 0; i <= s.L_cycles; ++i) {
      add(exec, z, i < s.L_cycles ? injected : y, state(i));
      pass(exec, state(i), tapes(i));
      (i < s.L_cycles ? z : y) = tapes(i)[s.blocks - 1].out;
    }
  }

  template <class Exec>
  void copy(const Exec& exec, const T* from, T* to) const {
    exec.step([&](int64_t, int64_t item, int64_t part, int64_t parts) {
      const Range rows = share(s.S, part, parts);
      const int64_t begin = (item * s.S + rows.begin) * s.D;
      memcpy(to + begin, from + begin, (size_t)((rows.end - rows.begin) * s.D) * sizeof(T));
    });
  }

  // What block l of one pass keeps of `items` items, laid out in memory.
  static Tape<Mode> tape_of_block(const RecursionShape& s, int64_t items, Layout& layout,
                                  HasInner inner) {
    const int64_t N = items * s.S, P = round_up(s.F, INNER);
    Tape<Mode> t{};
    t.mixed = layout.take<T>(N * s.D);
    t.out = layout.take<T>(N * s.D);
    t.out_rstd = layout.take<float>(N);
    t.gu = inner.channel ? layout.take<T>(N * 2 * P) : nullptr;
    Mixer::add_to_tape(s, items, layout, t, inner.mixer);
    return t;
  }

  // The tape from an item on.
  Tape<Mode> from(Tape<Mode> t, int64_t item) const {
    const int64_t N = item * s.S;
    t.mixed += N * s.D;
    t.out += N * s.D;
    t.out_rstd += N;
    if (t.gu) t.gu += N * 2 * channels[0].P;
    Mixer::shift(s, t, item);
    return t;
  }

  // Tapes of one pass in fresh memory; where nothing is kept, all blocks may share one.
  Tape<Mode>* work_tapes(int64_t items, bool kept) const {
    auto* tapes = allocate<Tape<Mode>>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      if (l && !kept) {
        tapes[l] = tapes[0];
        continue;
      }
      Layout size{nullptr, 0, false};
      tape_of_block(s, items, size, {kept, kept});
      Layout layout{allocate<char>(host, size.bytes), 0, false};
      tapes[l] = tape_of_block(s, items, layout, {kept, kept});
    }
    return tapes;
  }

  // Where pass i is kept, in the saved tensors.
  Tape<Mode>* saved_tapes(void* const* saved, bool fresh) const {
    const int64_t passes = s.L_cycles + 1;
    auto* tapes = allocate<Tape<Mode>>(host, passes * s.blocks);
    for (int64_t i = 0; i < passes * s.blocks; ++i) {
      Layout layout{(char*)saved[passes + i], 0, fresh};
      tapes[i] = tape_of_block(s, s.B, layout, kept_inner(s, i / s.blocks));
    }
    return tapes;
  }
};

// function<Mode, Mixer>(...) for the dtype and the mixer.
#define TRM_PICK(function, ...)                                                              \
  (dtype == DType::f32                                                                       \
       ? (s.mlp_t ? function<Float, TokenMixer<Float>> : function<Float, AttentionMixer<Float>>) \
       : (s.mlp_t ? function<Bfloat16, TokenMixer<Bfloat16>>                                 \
                  : function<Bfloat16, AttentionMixer<Bfloat16>>))(__VA_ARGS__)

}  // namespace TRM_ISA
}  // namespace trm_fast
