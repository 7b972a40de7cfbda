// deep_recursion: all H x L passes of the network, and the backward of the last cycle.
//
// The cycles before the last keep nothing. Of the last one `save` keeps what the backward reads (but
// for what `kept_inner` leaves out), `light` the same without g and u of both SwiGLUs, `recompute` the
// state before each pass; the backward (deep_recursion_gradient.cpp) makes the rest again, pass by
// pass.
#include "engine.h"

namespace trm_fast {
namespace TRM_ISA {

template <class Mode, class Mixer>
static void forward(const Host& host, const RecursionShape& s, const void* x_, const void* y,
                    const void* z, const BlockWeights* weights, const float* cos, const float* sin,
                    void* new_y_, void* new_z_, void* const* saved) {
  using T = typename Mode::T;
  const Engine<Mode, Mixer> engine(host, s, weights, cos, sin, true, false, host);
  const T* x = (const T*)x_;
  T *new_y = (T*)new_y_, *new_z = (T*)new_z_;
  const int64_t n = engine.states();
  T *injected = allocate<T>(host, n), *state = allocate<T>(host, n);
  Tape<Mode>* latent = engine.work_tapes(s.B, false);
  Tape<Mode>* answer = allocate<Tape<Mode>>(host, s.blocks);
  for (int64_t l = 0; l < s.blocks; ++l) answer[l] = latent[l];
  latent[s.blocks - 1].out = new_z;
  answer[s.blocks - 1].out = new_y;
  const bool keeps_tapes = s.policy == Policy::save || s.policy == Policy::light;
  const Tape<Mode>* kept = keeps_tapes ? engine.saved_tapes(saved, true) : nullptr;
  const int64_t unkept = s.H_cycles - (s.policy != Policy::none);
  const auto work = [&](int64_t i) { return i < s.L_cycles ? latent : answer; };
  run_steps(host, s.B, [&](const auto& exec) {
    const T *now_y = (const T*)y, *now_z = (const T*)z;
    for (int64_t i = 0; i < unkept; ++i)
      engine.cycle(exec, x, now_y, now_z, injected, work, [&](int64_t) { return state; });
    if (s.policy == Policy::none) return;
    const auto states = [&](int64_t i) { return (T*)saved[i]; };
    if (!kept) return engine.cycle(exec, x, now_y, now_z, injected, work, states);
    engine.cycle(
        exec, x, now_y, now_z, injected, [&](int64_t i) { return kept + i * s.blocks; }, states);
    engine.copy(exec, now_y, new_y);
    engine.copy(exec, now_z, new_z);
  });
}

template <class Mode, class Mixer>
static int64_t tape_bytes(const RecursionShape& s, int64_t pass) {
  Layout layout{nullptr, 0, false};
  Engine<Mode, Mixer>::tape_of_block(s, s.B, layout, kept_inner(s, pass));
  return layout.bytes;
}

void deep_recursion_fwd(const Host& host, DType dtype, const RecursionShape& s, const void* x,
                        const void* y, const void* z, const BlockWeights* weights, const float* cos,
                        const float* sin, void* new_y, void* new_z, void* const* saved) {
  TRM_PICK(forward, host, s, x, y, z, weights, cos, sin, new_y, new_z, saved);
}
void deep_recursion_tape_bytes(DType dtype, const RecursionShape& s, int64_t pass, int64_t* bytes) {
  *bytes = TRM_PICK(tape_bytes, s, pass);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
