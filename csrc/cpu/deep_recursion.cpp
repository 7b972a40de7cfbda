// deep_recursion: all H x L passes of the network, and the backward of the last cycle.
//
// The cycles before the last keep nothing. Of the last one `save` keeps what the backward reads,
// `light` the same without g and u of both SwiGLUs, `recompute` the state before each pass; the
// backward makes the rest again, pass by pass. A pass of the backward goes through its blocks from
// the last to the first: first the gradients to the states, item by item, then those to the block's
// weights, over tiles of them.
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

  // forwards, backwards: which operands to pack.
  Engine(const Host& host, const RecursionShape& s, const BlockWeights* weights, const float* cos,
         const float* sin, bool forwards, bool backwards)
      : host(host), s(s) {
    channels = allocate<Channel<Mode>>(host, s.blocks);
    mixers = allocate<Mixer>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      channels[l] = Channel<Mode>::make(host, weights[l].gate_up, weights[l].down, s.D, s.F, forwards,
                                        backwards);
      mixers[l] = Mixer::make(host, s, weights[l], cos, sin, forwards, backwards);
    }
    scratch = ChannelScratch<Mode>::make(host, s.D, channels[0].P);
    Mixer::make_scratch(host, s, backwards, mixers);
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
    for (int64_t l = 0; l < s.blocks; ++l) {
      const Tape<Mode>& tape = tapes[l];
      mixers[l].forward(exec, l ? tapes[l - 1].out : state, tape);
      exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
        const Range rows = share(s.S, part, parts);
        const int64_t row = item * s.S + rows.begin;
        channel_rows<Mode>(channels[l], tape.mixed + row * s.D, tape.out + row * s.D,
                           tape.gu ? tape.gu + row * 2 * channels[l].P : nullptr,
                           tape.out_rstd + row, rows.end - rows.begin, s.eps, scratch[slot]);
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

  // What one pass keeps, laid out in memory: of block l, and before block 0 the state.
  static Tape<Mode> tape_of_block(const RecursionShape& s, Layout& layout, bool with_gu) {
    const int64_t N = s.B * s.S, P = round_up(s.F, INNER);
    Tape<Mode> t{};
    t.mixed = layout.take<T>(N * s.D);
    t.out = layout.take<T>(N * s.D);
    t.out_rstd = layout.take<float>(N);
    t.gu = with_gu ? layout.take<T>(N * 2 * P) : nullptr;
    Mixer::add_to_tape(s, layout, t, with_gu);
    return t;
  }

  // Tapes of one pass in fresh memory; where nothing is kept, all blocks may share one.
  Tape<Mode>* work_tapes(bool kept) const {
    auto* tapes = allocate<Tape<Mode>>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      if (l && !kept) {
        tapes[l] = tapes[0];
        continue;
      }
      Layout size{nullptr, 0, false};
      tape_of_block(s, size, kept);
      Layout layout{allocate<char>(host, size.bytes), 0, false};
      tapes[l] = tape_of_block(s, layout, kept);
    }
    return tapes;
  }

  // Where pass i is kept, in the saved tensors.
  Tape<Mode>* saved_tapes(void* const* saved, bool fresh) const {
    const int64_t passes = s.L_cycles + 1;
    auto* tapes = allocate<Tape<Mode>>(host, passes * s.blocks);
    for (int64_t i = 0; i < passes * s.blocks; ++i) {
      Layout layout{(char*)saved[passes + i], 0, fresh};
      tapes[i] = tape_of_block(s, layout, s.policy == Policy::save);
    }
    return tapes;
  }

  void forward(const T* x, const T* y, const T* z, T* new_y, T* new_z, void* const* saved) const {
    const int64_t n = states();
    T *injected = allocate<T>(host, n), *state = allocate<T>(host, n);
    Tape<Mode>* latent = work_tapes(false);
    Tape<Mode>* answer = allocate<Tape<Mode>>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) answer[l] = latent[l];
    latent[s.blocks - 1].out = new_z;
    answer[s.blocks - 1].out = new_y;
    const bool keeps_tapes = s.policy == Policy::save || s.policy == Policy::light;
    const Tape<Mode>* kept = keeps_tapes ? saved_tapes(saved, true) : nullptr;
    const int64_t unkept = s.H_cycles - (s.policy != Policy::none);
    const auto work = [&](int64_t i) { return i < s.L_cycles ? latent : answer; };
    run_steps(host, s.B, [&](const auto& exec) {
      const T *now_y = y, *now_z = z;
      for (int64_t i = 0; i < unkept; ++i)
        cycle(exec, x, now_y, now_z, injected, work, [&](int64_t) { return state; });
      if (s.policy == Policy::none) return;
      const auto states = [&](int64_t i) { return (T*)saved[i]; };
      if (!kept) return cycle(exec, x, now_y, now_z, injected, work, states);
      cycle(exec, x, now_y, now_z, injected, [&](int64_t i) { return kept + i * s.blocks; }, states);
      copy(exec, now_y, new_y);
      copy(exec, now_z, new_z);
    });
  }

  void backward(const T* grad, void* const* saved, T* dx, float* const* d_weights) const {
    const int64_t n = states(), N = s.B * s.S, P = channels[0].P;
    T *g = allocate<T>(host, n), *ds = allocate<T>(host, n);
    E *dgu = allocate<E>(host, N * 2 * P), *h = allocate<E>(host, N * P);
    float* sum = allocate<float>(host, n);
    word* memory = allocate<word>(
        host, larger(channel_weight_grad_words<Mode>(N, s.D, s.F, host.threads),
                     Mixer::weight_grad_words(s, host.threads)));
    const auto work = Mixer::work(host, s, mixers);
    const bool again = s.policy == Policy::recompute;
    const Tape<Mode>* kept = again ? work_tapes(true) : saved_tapes(saved, false);
    memcpy(g, grad, (size_t)n * sizeof(T));
    memset(sum, 0, (size_t)n * sizeof(float));
    for (int64_t i = s.L_cycles; i >= 0; --i) {
      const T* state = (const T*)saved[i];
      const Tape<Mode>* tapes = again ? kept : kept + i * s.blocks;
      const bool add = i < s.L_cycles;
      if (again) run_steps(host, s.B, [&](const auto& exec) { pass(exec, state, tapes); });
      for (int64_t l = s.blocks - 1; l >= 0; --l) {
        const Tape<Mode>& tape = tapes[l];
        const T* in = l ? tapes[l - 1].out : state;
        run_steps(host, s.B, [&](const auto& exec) {
          exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t parts) {
            const Range rows = share(s.S, part, parts);
            const int64_t row = item * s.S + rows.begin, at = row * s.D;
            channel_gradient_rows<Mode>(channels[l], g + at, tape.mixed + at, tape.out + at,
                                        tape.gu ? tape.gu + row * 2 * P : nullptr,
                                        tape.out_rstd + row, ds + at, dgu + row * 2 * P, h + row * P,
                                        g + at, rows.end - rows.begin, scratch[slot]);
          });
          mixers[l].gradient(exec, g, in, tape, work);
          if (l == 0 && add) add_gradient(exec, g, sum);
        });
        channel_weight_grad<Mode>(host, channels[l], tape.mixed, ds, dgu, h, N,
                                  d_weights[4 * l + 2], d_weights[4 * l + 3], add, memory);
        mixers[l].weight_grad(host, s.B, in, tape, work, d_weights[4 * l], d_weights[4 * l + 1], add,
                              i == 0, memory);
      }
    }
    copy_floats(host, sum, dx, n);
  }

  template <class Exec>
  void add_gradient(const Exec& exec, const T* g, float* sum) const {
    exec.step([&](int64_t, int64_t item, int64_t part, int64_t parts) {
      const Range rows = share(s.S, part, parts);
      const int64_t begin = (item * s.S + rows.begin) * s.D, end = (item * s.S + rows.end) * s.D;
      for (int64_t i = begin; i < end; i += VL) store(sum + i, load(sum + i) + load(g + i));
    });
  }
};

template <class Mode, class Mixer>
static void forward(const Host& host, const RecursionShape& s, const void* x, const void* y,
                    const void* z, const BlockWeights* weights, const float* cos, const float* sin,
                    void* new_y, void* new_z, void* const* saved) {
  using T = typename Mode::T;
  const Engine<Mode, Mixer> engine(host, s, weights, cos, sin, true, false);
  engine.forward((const T*)x, (const T*)y, (const T*)z, (T*)new_y, (T*)new_z, saved);
}
template <class Mode, class Mixer>
static void backward(const Host& host, const RecursionShape& s, const void* grad,
                     void* const* saved, const BlockWeights* weights, const float* cos,
                     const float* sin, void* dx, float* const* d_weights) {
  using T = typename Mode::T;
  const Engine<Mode, Mixer> engine(host, s, weights, cos, sin, s.policy != Policy::save, true);
  engine.backward((const T*)grad, saved, (T*)dx, d_weights);
}
template <class Mode, class Mixer>
static int64_t tape_bytes(const RecursionShape& s) {
  Layout layout{nullptr, 0, false};
  Engine<Mode, Mixer>::tape_of_block(s, layout, s.policy == Policy::save);
  return layout.bytes;
}

// function<Mode, Mixer>(...) for the dtype and the mixer.
#define TRM_PICK(function, ...)                                                              \
  (dtype == DType::f32                                                                       \
       ? (s.mlp_t ? function<Float, TokenMixer<Float>> : function<Float, AttentionMixer<Float>>) \
       : (s.mlp_t ? function<Bfloat16, TokenMixer<Bfloat16>>                                 \
                  : function<Bfloat16, AttentionMixer<Bfloat16>>))(__VA_ARGS__)

void deep_recursion_fwd(const Host& host, DType dtype, const RecursionShape& s, const void* x,
                        const void* y, const void* z, const BlockWeights* weights, const float* cos,
                        const float* sin, void* new_y, void* new_z, void* const* saved) {
  TRM_PICK(forward, host, s, x, y, z, weights, cos, sin, new_y, new_z, saved);
}
void deep_recursion_bwd(const Host& host, DType dtype, const RecursionShape& s, const void* grad,
                        void* const* saved, const BlockWeights* weights, const float* cos,
                        const float* sin, void* dx, float* const* d_weights) {
  TRM_PICK(backward, host, s, grad, saved, weights, cos, sin, dx, d_weights);
}
void deep_recursion_tape_bytes(DType dtype, const RecursionShape& s, int64_t* bytes) {
  *bytes = TRM_PICK(tape_bytes, s);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
