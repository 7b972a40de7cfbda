// adam_atan2_ema_: one optimizer step, the moving average and the low-precision copies, in place.
//
// Each element is read once and written once. All tensors count as one row of numbers, so that
// threads share out large and small ones alike. Formula, bc_i = 1 - beta_i^step: m, v <- their
// moving averages, p <- p (1 - lr wd) - lr / bc1 atan2(m, sqrt(v / bc2)).
// Source: https://arxiv.org/abs/2407.05872, section 5.
#include "host.h"
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int64_t STEP_GRAIN = 1 << 14;  // elements: the least that another thread is worth

// atan2(m, s) of s >= 0, within 2 units in the last place; 0 for two zeros.
INL vf atan2(vf m, vf s) {
  const vf height = max(m, -m);
  const vi steep = height > s;
  // Comparisons of which a NaN fails each: it comes out again.
  const vf small = select(steep, s, height), large = select(steep, height, s);
  // Two infinities lie on the diagonal, two zeros on the axis.
  const vf equal = select(small == 0.f, vf{}, splat(1.f));
  const vf t = select(small == large, equal, small / large);
  // atan(t) = t + t u q(u) on [0, 1], u = t^2; q minimises the largest relative error, 1.7e-8.
  const vf u = t * t;
  vf q = splat(0.0029206923208f);
  q = q * u - 0.0163679290563f;
  q = q * u + 0.0432118624449f;
  q = q * u - 0.0755221471190f;
  q = q * u + 0.1066600456834f;
  q = q * u - 0.1421105563641f;
  q = q * u + 0.1999377310276f;
  q = q * u - 0.3333315253258f;
  vf angle = t + t * (u * q);
  // pi / 2 in two parts: what float lacks of it counts.
  angle = select(steep, 1.5707963267948966f - (angle + 4.371139000186241e-08f), angle);
  return select(m < 0.f, -angle, angle);
}

// a + weight (b - a) computed from the nearer end, as torch.lerp does: exact at both.
INL vf lerp(vf a, vf b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.f - weight);
}

// One of the lists' tensors from some element on; its type is known at run time.
struct StepStream {
  char* start;
  bool wide;

  INL StepStream(const StepTensor& t, int64_t first)
      : start((char*)t.data + first * (t.dtype == DType::f32 ? 4 : 2)),
        wide(t.dtype == DType::f32) {}
  INL vf read(int64_t i, int64_t n) const {
    const float* f = (const float*)start + i;
    const bf16* h = (const bf16*)start + i;
    if (n == VL) return wide ? load(f) : load(h);
    return wide ? load_first(f, n) : load_first(h, n);
  }
  // Returns what is in memory then.
  INL vf write(int64_t i, int64_t n, vf v) const {
    float* f = (float*)start + i;
    bf16* h = (bf16*)start + i;
    if (n == VL)
      wide ? store(f, v) : store(h, v);
    else
      wide ? store_first(f, n, v) : store_first(h, n, v);
    return wide ? v : rounded(h, v);
  }
  INL vf rounded_as_here(vf v) const { return wide ? v : rounded((const bf16*)start, v); }
};

// Elements [begin, end) of one parameter.
static void step_range(const StepTensors& t, const StepSettings& set, int64_t begin, int64_t end) {
  const StepStream p(t.param, begin), grad(t.grad, begin), m(t.exp_avg, begin),
      v(t.exp_avg_sq, begin), ema(t.ema, begin), copy(t.copy, begin);
  const bool has_ema = t.ema.data != nullptr, has_copy = t.copy.data != nullptr;
  const float inverse2 = 1.f / set.correction2;
  // What each result was rounded to is what the next is computed from.
  const auto step = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf g = m.rounded_as_here(grad.read(i, n)) * set.scale;
    const vf m1 = m.write(i, n, lerp(m.read(i, n), g, set.weight1));
    const vf v1 = v.write(i, n, lerp(v.read(i, n), v.rounded_as_here(g * g), set.weight2));
    const vf moved = p.read(i, n) * set.decay - set.rate * atan2(m1, sqrt(v1 * inverse2));
    const vf p1 = p.write(i, n, moved);
    if (has_ema) ema.write(i, n, lerp(ema.read(i, n), p1, set.ema_weight));
    if (has_copy) copy.write(i, n, p1);
  };
  const int64_t count = end - begin, whole = count / VL * VL;
  for (int64_t i = 0; i < whole; i += VL) step(i, VL);
  if (whole < count) step(whole, count - whole);
}

void adam_atan2_ema_step(const Host& host, const StepTensors* tensors, int64_t count,
                         const StepSettings& settings) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += tensors[i].count;
  parallel_ranges(host, total, STEP_GRAIN, [&](int64_t, int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < count && first < end; first += tensors[i++].count) {
      const int64_t from = larger(begin - first, (int64_t)0);
      const int64_t to = smaller(end - first, tensors[i].count);
      if (from < to) step_range(tensors[i], settings, from, to);
    }
  });
}

}  // namespace TRM_ISA
}  // namespace trm_fast
