// Products in eight bits: packing, and rows through the parts of a block.
#include "int8.h"

#include "channel.h"
#include "linear.h"
#include "norm.h"

namespace trm_fast {
namespace TRM_ISA {

// Whole numbers [K] of a column, zeros up to `words` words; -offset times their sum in front.
static void finish_column(const Int8::Weight* numbers, int64_t K, word* column) {
  int32_t start = 0;
  for (int64_t k = 0; k < K; ++k) start -= Int8::offset * numbers[k];
  memcpy(column, &start, sizeof start);
}

static Int8Weight new_weight(const Host& host, int64_t columns, int64_t depth) {
  const int64_t words = depth / Int8::per_word;
  return {allocate<word>(host, columns * (words + 1)), allocate<float>(host, columns), words};
}

// Panels of columns that lie one after another, words + 1 each.
static void pack_columns(const Host& host, const word* columns, int64_t count, const Int8Weight& w) {
  const int64_t parts = smaller<int64_t>(host.threads, ceil_div(count / VL, MAX_NV));
  parallel(host, parts, [&](int64_t part) {
    pack_transposed<Float>([&](int64_t n) { return columns + n * (w.words + 1); }, count,
                           w.words + 1, w.panels, panel_border(count / VL, part, parts),
                           panel_border(count / VL, part + 1, parts));
  });
}

template <class Row>
Int8Weight Int8Weight::make(const Host& host, Row row, int64_t columns, int64_t K, int64_t depth) {
  const Int8Weight w = new_weight(host, columns, depth);
  word* rows = allocate<word>(host, columns * (w.words + 1));
  parallel_ranges(host, columns, VL, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      word* column = rows + n * (w.words + 1);
      memset(column, 0, (size_t)(w.words + 1) * sizeof(word));
      const float* given = row(n);
      w.steps[n] = 0.f;
      if (!given) continue;
      auto* numbers = (Int8::Weight*)(void*)(column + 1);
      w.steps[n] = quantize_row(given, K, 0, numbers);
      finish_column(numbers, K, column);
    }
  });
  pack_columns(host, rows, columns, w);
  return w;
}

Int8Weight Int8Weight::make(const Host& host, const float* w, int64_t N, int64_t K) {
  return make(host, [&](int64_t n) { return w + n * K; }, N, K, K);
}

Int8Weight Int8Weight::of_numbers(const Host& host, const int8_t* w, int64_t N, int64_t K) {
  const Int8Weight made = new_weight(host, N, K);
  word* rows = allocate<word>(host, N * (made.words + 1));
  for (int64_t n = 0; n < N; ++n) {
    word* column = rows + n * (made.words + 1);
    auto* numbers = (Int8::Weight*)(void*)(column + 1);
    for (int64_t k = 0; k < K; ++k) numbers[k] = w[n * K + k];
    finish_column(numbers, K, column);
    made.steps[n] = 1.f;
  }
  pack_columns(host, rows, N, made);
  return made;
}

Int8Rows Int8Rows::make(const Host& host, int64_t count, int64_t K) {
  return {allocate<word>(host, count * K / Int8::per_word), allocate<float>(host, count)};
}

Int8Weight int8_gate_up(const Host& host, const float* w, int64_t D, int64_t F, int64_t P) {
  const auto row = [&](int64_t n) {
    const int64_t of = interleaved_row(n, F, P);
    return of < 0 ? (const float*)nullptr : w + of * D;
  };
  return Int8Weight::make(host, row, 2 * P, D, D);
}
Int8Weight int8_down(const Host& host, const float* w, int64_t D, int64_t F, int64_t P) {
  return Int8Weight::make(host, [&](int64_t n) { return w + n * F; }, D, F, P);
}

// `to` [count, N] = rows times w.
template <class T>
INL void store_product(const Int8Rows& rows, const Int8Weight& w, int64_t count, int64_t N, T* to) {
  product(rows, w, count, N, [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
    each(c, [&](int i, int j, vf sums) __attribute__((always_inline)) {
      store(to + (m + i) * N + n + j * VL, value(sums, w.steps + n + j * VL, rows.steps[m + i]));
    });
  });
}

template <class T>
void int8_linear_rows(const T* a, const Int8Weight& w, T* out, int64_t rows, int64_t D, int64_t E,
                      const Int8Rows& scratch) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    quantize_rows(a + first * E, count, E, scratch);
    store_product(scratch, w, count, D, out + first * D);
  }
}

template <class T>
void int8_linear_rmsnorm_rows(const T* a, const Int8Weight& w, const T* h, T* out, float* rstd,
                              int64_t rows, int64_t D, int64_t E, float eps, float* y,
                              const Int8Rows& scratch) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    quantize_rows(a + first * E, count, E, scratch);
    store_product(scratch, w, count, D, y);
    for (int64_t m = 0; m < count; ++m)
      rstd[first + m] =
          add_norm_row(h + (first + m) * D, y + m * D, out + (first + m) * D, D, eps);
  }
}

template <class T>
void int8_channel_rows(const Int8Weight& gate_up, const Int8Weight& down, const T* x, T* out,
                       float* rstd, int64_t rows, int64_t D, int64_t P, float eps, T* inner, float* y,
                       const Int8Rows& scratch) {
  for (int64_t first = 0; first < rows; first += ROWS) {
    const int64_t count = smaller(ROWS, rows - first);
    quantize_rows(x + first * D, count, D, scratch);
    product(scratch, gate_up, count, 2 * P,
            [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
              constexpr int half = sizeof(c[0]) / sizeof(vf) / 2;
              const float* steps = gate_up.steps + n;
              each(c, [&](int i, int j, vf sums) __attribute__((always_inline)) {
                if (j >= half) return;
                const float step = scratch.steps[m + i];
                const vf g = value(sums, steps + j * VL, step);
                const vf u = value(c[i][j + half], steps + (j + half) * VL, step);
                store(inner + (m + i) * P + n / 2 + j * VL, g * sigmoid<T>(g) * u);
              });
            });
    // The step of a row of the inner states is known only when the whole row is there.
    quantize_rows(inner, count, P, scratch);
    store_product(scratch, down, count, D, y);
    for (int64_t m = 0; m < count; ++m)
      rstd[first + m] = add_norm_row(x + (first + m) * D, y + m * D, out + (first + m) * D, D, eps);
  }
}

#define TRM_INSTANTIATE(T)                                                                         \
  template void int8_linear_rows<T>(const T*, const Int8Weight&, T*, int64_t, int64_t, int64_t,    \
                                    const Int8Rows&);                                              \
  template void int8_linear_rmsnorm_rows<T>(const T*, const Int8Weight&, const T*, T*, float*,     \
                                            int64_t, int64_t, int64_t, float, float*,              \
                                            const Int8Rows&);                                      \
  template void int8_channel_rows<T>(const Int8Weight&, const Int8Weight&, const T*, T*, float*,   \
                                     int64_t, int64_t, int64_t, float, T*, float*,                 \
                                     const Int8Rows&);
TRM_INSTANTIATE(float)
TRM_INSTANTIATE(bf16)

template <class T>
static void linear(const Host& host, const void* a_, const float* w, void* out, int64_t N, int64_t D,
                   int64_t E) {
  const Int8Weight packed = Int8Weight::make(host, w, D, E);
  const T* a = (const T*)a_;
  auto* scratch = allocate<Int8Rows>(host, host.threads);
  for (int i = 0; i < host.threads; ++i) scratch[i] = Int8Rows::make(host, ROWS, E);
  parallel_ranges(host, N, 16, [&](int64_t slot, int64_t begin, int64_t end) {
    int8_linear_rows(a + begin * E, packed, (T*)out + begin * D, end - begin, D, E, scratch[slot]);
  });
}

void int8_linear(const Host& host, DType dtype, const void* a, const float* w, void* out, int64_t N,
                 int64_t D, int64_t E) {
  (dtype == DType::f32 ? linear<float> : linear<bf16>)(host, a, w, out, N, D, E);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
