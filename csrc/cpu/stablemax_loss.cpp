// stablemax_loss: cross entropy of s(x) = 1 + x or 1 / (1 - x), predictions, correctness.
//
// With rest the sum of s over the other classes, loss = log(1 + rest / s_label). A vector holds one
// class of VL answers: rows of a dozen classes would fill no vector, and the sums, the logarithm and
// the predictions need nothing across lanes. Rows become columns on the way through a small tile.
//
// Dims: N answers, V vocabulary.
#include "host.h"
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

constexpr int32_t IGNORED = -100;  // the label of an answer that costs nothing
constexpr int64_t CLASSES = 64;    // classes of a tile
constexpr int64_t ANSWERS = 512;   // the least that another thread is worth

// log(1 + u) for u >= 0, relative error below 3e-7 however small u is.
INL vf log1p(vf u) {
  const vf w = 1.f + u;
  const vf lost = select(u < 1.f, u - (w - 1.f), vf{});  // of u, in the sum
  // w = 2^n m with m in [sqrt(1/2), sqrt(2)); log(m) by Cephes' polynomial in m - 1.
  const vi bits = as<vi>(w) - 0x3f3504f3;
  const vf n = __builtin_convertvector(bits >> 23, vf);
  const vf f = as<vf>((bits & 0x007fffff) + 0x3f3504f3) - 1.f;
  vf p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf square = f * f;
  vf log = f * square * p + n * -2.12194440e-4f;
  log = log - 0.5f * square;
  log = (log + (f + lost / w)) + n * 0.693359375f;
  return select(u < __builtin_inff(), log, u);  // infinity and NaN are their own
}

// VL answers: their labels, and CLASSES of their logits, class by class.
template <class T>
struct StablemaxTile {
  T x[CLASSES * VL];
  int32_t labels[VL];

  template <class Label>
  INL void read_labels(const Label* from, int64_t count) {
    for (int64_t i = 0; i < VL; ++i) labels[i] = i < count ? (int32_t)from[i] : IGNORED;
  }
  INL void read(const T* logits, int64_t count, int64_t V, int64_t first, int64_t classes) {
    if (count < VL) memset(x, 0, sizeof x);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < classes; ++v) x[v * VL + i] = logits[i * V + first + v];
  }
  INL void write(T* d, int64_t count, int64_t V, int64_t first, int64_t classes) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t v = 0; v < classes; ++v) d[i * V + first + v] = x[v * VL + i];
  }
};

// What the loss of VL answers is made of.
struct StablemaxSums {
  vf s_label = vf{}, rest = vf{}, lost = vf{}, top = vf{};
  vi best = vi{};

  // 1 + |x| inverted, and s(x).
  static INL void s(vf x, vf& inverse, vf& value) {
    const vf size = 1.f + max(x, -x);
    inverse = 1.f / size;
    value = select(x < 0.f, inverse, size);
  }
  template <bool PREDICT, class T>
  INL void add(const StablemaxTile<T>& tile, vi label, int64_t first, int64_t classes) {
    vf others = vf{};
    for (int64_t v = 0; v < classes; ++v) {
      const vf x = load(tile.x + v * VL);
      vf inverse, value;
      s(x, inverse, value);
      const vi here = vi{} + (int32_t)(first + v), is_label = label == here;
      s_label = select(is_label, value, s_label);
      others += select(is_label, vf{}, value);
      if (PREDICT) {
        // As torch.argmax: the first of equals, and a NaN is larger than every number.
        const vi larger = (x > top) | ((x != x) & (top == top));
        const vi takes = first + v == 0 ? ~vi{} : larger;
        top = select(takes, x, top);
        best = (takes & here) | (~takes & best);
      }
    }
    // Tiles are added without loss, so that vocabularies of any size are summed alike.
    const vf before = rest, exact = others - lost;
    rest = before + exact;
    const vf error = (rest - before) - exact;
    lost = select(error == error, error, vf{});  // infinities have no error
  }
};

template <class T, class Label>
static void loss_rows(const T* logits, const Label* labels, float* loss, int64_t* preds,
                      uint8_t* correct, int64_t count, int64_t V) {
  StablemaxTile<T> tile;
  for (int64_t row = 0; row < count; row += VL) {
    const int64_t rows = smaller<int64_t>(VL, count - row);
    tile.read_labels(labels + row, rows);
    vi label;
    memcpy(&label, tile.labels, sizeof label);
    StablemaxSums sums;
    for (int64_t first = 0; first < V; first += CLASSES) {
      const int64_t classes = smaller(CLASSES, V - first);
      tile.read(logits + row * V, rows, V, first, classes);
      sums.add<true>(tile, label, first, classes);
    }
    const vf value = select(label == IGNORED, vf{}, log1p(sums.rest / sums.s_label));
    if (rows == VL)
      store(loss + row, value);
    else
      store_first(loss + row, rows, value);
    int32_t best[VL];
    memcpy(best, &sums.best, sizeof best);
    for (int64_t i = 0; i < rows; ++i) {
      preds[row + i] = best[i];
      correct[row + i] = best[i] == tile.labels[i];  // no prediction is IGNORED
    }
  }
}

template <class T, class Label>
static void gradient_rows(const float* grad, const T* logits, const Label* labels, T* d,
                          int64_t count, int64_t V) {
  StablemaxTile<T> tile;
  for (int64_t row = 0; row < count; row += VL) {
    const int64_t rows = smaller<int64_t>(VL, count - row);
    const vf scale = rows == VL ? load(grad + row) : load_first(grad + row, rows);
    tile.read_labels(labels + row, rows);
    vi label;
    memcpy(&label, tile.labels, sizeof label);
    StablemaxSums sums;
    for (int64_t first = 0; first < V; first += CLASSES) {
      const int64_t classes = smaller(CLASSES, V - first);
      tile.read(logits + row * V, rows, V, first, classes);
      sums.add<false>(tile, label, first, classes);
    }
    const vf total = sums.s_label + sums.rest;
    const vi valid = label != IGNORED;
    for (int64_t first = 0; first < V; first += CLASSES) {
      const int64_t classes = smaller(CLASSES, V - first);
      if (V > CLASSES) tile.read(logits + row * V, rows, V, first, classes);
      for (int64_t v = 0; v < classes; ++v) {
        vf inverse, value;
        StablemaxSums::s(load(tile.x + v * VL), inverse, value);
        value = select(label == vi{} + (int32_t)(first + v), -sums.rest, value);
        store(tile.x + v * VL, select(valid, value / total * inverse, vf{}) * scale);
      }
      tile.write(d + row * V, rows, V, first, classes);
    }
  }
}

template <class T, class Label>
static void forward(const Host& host, const void* logits, const void* labels, float* loss,
                    int64_t* preds, uint8_t* correct, int64_t N, int64_t V) {
  parallel_ranges(host, N, ANSWERS, [&](int64_t, int64_t begin, int64_t end) {
    loss_rows((const T*)logits + begin * V, (const Label*)labels + begin, loss + begin,
              preds + begin, correct + begin, end - begin, V);
  });
}

template <class T, class Label>
static void backward(const Host& host, const float* grad, const void* logits, const void* labels,
                     void* d, int64_t N, int64_t V) {
  parallel_ranges(host, N, ANSWERS, [&](int64_t, int64_t begin, int64_t end) {
    gradient_rows(grad + begin, (const T*)logits + begin * V, (const Label*)labels + begin,
                  (T*)d + begin * V, end - begin, V);
  });
}

void stablemax_loss_fwd(const Host& host, DType dtype, const void* logits, const void* labels,
                        bool long_labels, float* loss, int64_t* preds, uint8_t* correct, int64_t N,
                        int64_t V) {
  auto* f = dtype == DType::f32
                ? (long_labels ? forward<float, int64_t> : forward<float, int32_t>)
                : (long_labels ? forward<bf16, int64_t> : forward<bf16, int32_t>);
  f(host, logits, labels, loss, preds, correct, N, V);
}
void stablemax_loss_bwd(const Host& host, DType dtype, const float* grad, const void* logits,
                        const void* labels, bool long_labels, void* d, int64_t N, int64_t V) {
  auto* f = dtype == DType::f32
                ? (long_labels ? backward<float, int64_t> : backward<float, int32_t>)
                : (long_labels ? backward<bf16, int64_t> : backward<bf16, int32_t>);
  f(host, grad, logits, labels, d, N, V);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
