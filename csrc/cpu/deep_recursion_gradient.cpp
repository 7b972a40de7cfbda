// The backward of deep_recursion's last cycle.
//
// A pass goes through its blocks from the last to the first: gradients to the states, item by item,
// then those to the block's weights. Large weights take theirs over all items at once, divided among
// the threads by tiles of the weight. Small ones would wait for memory that way: there the batch is
// cut into PARTS, always the same ones, each with sums of its own, and goes through all passes a few
// items at a time, which stay in L2; the parts are added up in order.
#include "engine.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t PARTS = 8;
constexpr int64_t SMALL_WEIGHTS = 1 << 18;  // floats in all blocks: sums of 1 MB per part
constexpr int64_t GROUP_BYTES = 1 << 19;    // of a group's gradients: what L2 holds

// Host of a part: what runs within one thread.
INL Host serial(const Host& host) {
  Host one = host;
  one.threads = 1;
  one.run = [](int64_t count, void (*body)(void*, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
  };
  return one;
}

template <class Mode, class Mixer>
struct Backward {
  using T = typename Mode::T;
  using E = typename Mode::E;

  // What one part works in, for `group` items at a time.
  struct Part {
    Host host;
    Mixer* mixers;  // with scratch of the part's own
    const ChannelScratch<Mode>* scratch;
    T *g, *ds;
    E *dgu, *h;
    float* sum;
    word* memory;
    typename Mixer::Work work;
    Tape<Mode>* tapes;  // of the items at hand
    float** sums;       // four per block
  };

  const Engine<Mode, Mixer>& engine;
  const RecursionShape& s;
  const Host& host;
  int64_t parts, group;
  Part* all;

  explicit Backward(const Engine<Mode, Mixer>& e, float* const* d_weights)
      : engine(e), s(e.s), host(e.host) {
    const int64_t P = e.channels[0].P, weights = s.blocks * (3 * s.D * s.F + Mixer::weights(s));
    parts = weights <= SMALL_WEIGHTS && s.B >= 2 * PARTS ? PARTS : 1;
    const int64_t bytes = (3 * P * s.S + 3 * s.S * s.D) * (int64_t)sizeof(E) + Mixer::work_bytes(s);
    group = parts == 1 ? s.B : larger<int64_t>(1, GROUP_BYTES / bytes);
    group = smaller(group, ceil_div(s.B, parts));
    all = allocate<Part>(host, parts);
    for (int64_t v = 0; v < parts; ++v) all[v] = make(v, P, d_weights);
  }

  Part make(int64_t v, int64_t P, float* const* d_weights) const {
    const int64_t N = group * s.S, n = N * s.D;
    Part p{};
    p.host = parts == 1 ? host : serial(host);
    p.mixers = allocate<Mixer>(host, s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      p.mixers[l] = engine.mixers[l];
      p.mixers[l].use_scratch(v);
    }
    p.scratch = engine.scratch + v;
    p.g = allocate<T>(host, n), p.ds = allocate<T>(host, n);
    p.dgu = allocate<E>(host, N * 2 * P), p.h = allocate<E>(host, N * P);
    p.sum = allocate<float>(host, n);
    p.memory = allocate<word>(
        host, larger(channel_weight_grad_words<Mode>(N, s.D, s.F, p.host.threads),
                     Mixer::weight_grad_words(s, N, p.host.threads)));
    p.work = Mixer::work(host, group, engine.mixers);
    p.tapes = s.policy == Policy::recompute ? engine.work_tapes(group, true)
                                            : allocate<Tape<Mode>>(host, s.blocks);
    p.sums = allocate<float*>(host, 4 * s.blocks);
    for (int64_t l = 0; l < s.blocks; ++l) {
      float** to = p.sums + 4 * l;
      engine.mixers[l].new_sums(host, parts == 1 ? d_weights + 4 * l : nullptr, to);
      to[2] = parts == 1 ? d_weights[4 * l + 2] : allocate<float>(host, 2 * s.F * s.D);
      to[3] = parts == 1 ? d_weights[4 * l + 3] : allocate<float>(host, s.F * s.D);
    }
    return p;
  }

  void run(const T* grad, void* const* saved, T* dx, float* const* d_weights) const {
    const Tape<Mode>* kept =
        s.policy == Policy::recompute ? nullptr : engine.saved_tapes(saved, false);
    parallel(host, parts, [&](int64_t v) {
      const int64_t begin = v * s.B / parts, end = (v + 1) * s.B / parts;
      for (int64_t first = begin; first < end; first += group)
        items(all[v], first, smaller(group, end - first), grad, saved, kept, dx, first > begin);
    });
    for (int64_t l = 0; l < s.blocks; ++l)
      for (int64_t v = 0; v < parts; ++v)
        engine.mixers[l].finish(host, all[v].sums + 4 * l, d_weights + 4 * l, parts == 1, v > 0);
    if (parts > 1)
      for (int64_t l = 0; l < s.blocks; ++l) {
        add_up(4 * l + 2, 2 * s.F * s.D, d_weights);
        add_up(4 * l + 3, s.F * s.D, d_weights);
      }
  }

  // d_weights[i] = the parts' sums, in order.
  void add_up(int64_t i, int64_t count, float* const* d_weights) const {
    for (int64_t v = 0; v < parts; ++v) add_floats(host, all[v].sums[i], d_weights[i], count, v > 0);
  }

  // All passes for `count` items from `first` on; `add`: to the part's sums.
  void items(const Part& p, int64_t first, int64_t count, const T* grad, void* const* saved,
             const Tape<Mode>* kept, T* dx, bool add) const {
    const int64_t at = first * s.S * s.D, n = count * s.S * s.D;
    memcpy(p.g, grad + at, (size_t)n * sizeof(T));
    memset(p.sum, 0, (size_t)n * sizeof(float));
    for (int64_t i = s.L_cycles; i >= 0; --i) {
      const T* state = (const T*)saved[i] + at;
      if (kept) {
        for (int64_t l = 0; l < s.blocks; ++l) p.tapes[l] = engine.from(kept[i * s.blocks + l], first);
      } else {
        run_steps(p.host, count, [&](const auto& exec) {
          engine.pass(exec, state, p.tapes, p.mixers, p.scratch);
        });
      }
      for (int64_t l = s.blocks - 1; l >= 0; --l)
        block(p, l, count, state, i < s.L_cycles, add || i < s.L_cycles);
    }
    copy_floats(p.host, p.sum, dx + at, n);
  }

  void block(const Part& p, int64_t l, int64_t count, const T* state, bool latent, bool add) const {
    const Channel<Mode>& w = engine.channels[l];
    const Tape<Mode>& tape = p.tapes[l];
    const T* in = l ? p.tapes[l - 1].out : state;
    const int64_t P = w.P, D = s.D, N = count * s.S;
    run_steps(p.host, count, [&](const auto& exec) {
      exec.step([&](int64_t slot, int64_t item, int64_t part, int64_t of) {
        const Range rows = share(s.S, part, of);
        const int64_t row = item * s.S + rows.begin, at = row * D;
        channel_gradient_rows<Mode>(w, p.g + at, tape.mixed + at, tape.out + at,
                                    tape.gu ? tape.gu + row * 2 * P : nullptr, tape.out_rstd + row,
                                    p.ds + at, p.dgu + row * 2 * P, p.h + row * P, p.g + at,
                                    rows.end - rows.begin, p.scratch[slot]);
      });
      p.mixers[l].gradient(exec, p.g, in, tape, p.work);
      if (l == 0 && latent)
        exec.step([&](int64_t, int64_t item, int64_t part, int64_t of) {
          const Range rows = share(s.S, part, of);
          const int64_t begin = (item * s.S + rows.begin) * D, end = (item * s.S + rows.end) * D;
          for (int64_t i = begin; i < end; i += VL)
            store(p.sum + i, load(p.sum + i) + load(p.g + i));
        });
    });
    channel_weight_grad<Mode>(p.host, w, tape.mixed, p.ds, p.dgu, p.h, N, p.sums[4 * l + 2],
                              p.sums[4 * l + 3], add, p.memory);
    p.mixers[l].weight_grad(p.host, count, in, tape, p.work, p.sums + 4 * l, add, p.memory);
  }
};

template <class Mode, class Mixer>
static void backward(const Host& host, const RecursionShape& s, const void* grad,
                     void* const* saved, const BlockWeights* weights, const float* cos,
                     const float* sin, void* dx, float* const* d_weights) {
  using T = typename Mode::T;
  Host wide = host;  // scratch for every part
  wide.threads = (int)larger<int64_t>(host.threads, PARTS);
  const Engine<Mode, Mixer> engine(host, s, weights, cos, sin, s.policy != Policy::save, true, wide);
  const Backward<Mode, Mixer> all(engine, d_weights);
  all.run((const T*)grad, saved, (T*)dx, d_weights);
}

void deep_recursion_bwd(const Host& host, DType dtype, const RecursionShape& s, const void* grad,
                        void* const* saved, const BlockWeights* weights, const float* cos,
                        const float* sin, void* dx, float* const* d_weights) {
  TRM_PICK(backward, host, s, grad, saved, weights, cos, sin, dx, d_weights);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
