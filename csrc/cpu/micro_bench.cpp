// The microkernels' rate beside the machine's: what bench/bench_micro.py holds against each other.
#include <time.h>

#include "gemm.h"
#include "host.h"
#include "int8.h"
#include "linear.h"

namespace trm_fast {
namespace TRM_ISA {

static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// `seconds` of each of `count` samples of `times` calls of f.
template <class F>
static void sample(double* seconds, int64_t count, int64_t times, const F& f) {
  f();
  for (int64_t i = 0; i < count; ++i) {
    const double begin = now();
    for (int64_t j = 0; j < times; ++j) f();
    seconds[i] = (now() - begin) / (double)times;
  }
}

// The compiler must take v for changed: what is multiplied stays inside the loop.
INL void touch(vf& v) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(v));
#else
  (void)v;
#endif
}

constexpr int CHAINS = most_rows(MAX_NV) * MAX_NV;  // as many accumulators as the microkernel has

// One step of the microkernel of a Mode.
template <class Mode>
INL vf add_step(Mode, vf c, vf a, vf b) {
  return multiply_add<Mode::pairs>(c, a, b);
}
INL vf add_step(Int8, vf c, vf a, vf b) { return add_products(c, a, b); }

template <class Mode>
SEPARATE float multiply_adds(int64_t steps, float a_, float b_) {
  vf a = splat(a_), b = splat(b_), c[CHAINS];
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; ++i) c[i] = splat((float)i);
  for (int64_t s = 0; s < steps; ++s) {
    touch(a);
    touch(b);
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; ++i) c[i] = add_step(Mode{}, c[i], a, b);
  }
  vf total = c[0];
#pragma GCC unroll 32
  for (int i = 1; i < CHAINS; ++i) total += c[i];
  return sum(total);
}

template <class Mode>
static void peak(int64_t steps, int64_t count, double* rates) {
  static volatile float given[2] = {1.f, 1e-3f}, kept;
  sample(rates, count, 1, [&] { kept = multiply_adds<Mode>(steps, given[0], given[1]); });
  (void)kept;  // of whole numbers it is meaningless
  const double flops = 2.0 * (double)steps * CHAINS * VL * Mode::per_word;
  for (int64_t i = 0; i < count; ++i) rates[i] = flops / rates[i];
}

template <class Mode>
SEPARATE void rows_product(const word* a, const word* b, typename Mode::T* out, int64_t M, int64_t N,
                           int64_t K) {
  const int64_t Kw = words<Mode>(K);
  for (int64_t first = 0; first < M; first += ROWS) {
    auto* to = out + first * N;
    product<Mode>(a + first * Kw, Kw, 1, b, smaller(ROWS, M - first), N / VL, Kw,
                  [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
                    each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                      store(to + (m + i) * N + n + j * VL, v);
                    });
                  });
  }
}

template <class Mode>
static void product_rate(const Host& host, const void* a_, const void* w_, void* out, int64_t M,
                         int64_t N, int64_t K, int64_t times, int64_t count, double* rates) {
  using T = typename Mode::T;
  word* packed = allocate<word>(host, words<Mode>(K) * N);
  pack_linear<Mode>(host, (const T*)w_, N, K, packed);
  auto* scratch = allocate<typename Mode::E>(host, M * K);
  const word* a = operand<Mode>((const T*)a_, M, K, scratch);
  sample(rates, count, times, [&] { rows_product<Mode>(a, packed, (T*)out, M, N, K); });
  for (int64_t i = 0; i < count; ++i) rates[i] = 2.0 * (double)(M * N * K) / rates[i];
}

SEPARATE void rows_product(const Int8Rows& a, const Int8Weight& b, float* out, int64_t M, int64_t N) {
  for (int64_t first = 0; first < M; first += ROWS) {
    const Int8Rows rows{a.rows + first * b.words, a.steps + first};
    product(rows, b, smaller(ROWS, M - first), N,
            [&](int64_t m, int, int64_t n, auto& c) __attribute__((always_inline)) {
              each(c, [&](int i, int j, vf sums) __attribute__((always_inline)) {
                store(out + (first + m + i) * N + n + j * VL,
                      value(sums, b.steps + n + j * VL, rows.steps[m + i]));
              });
            });
  }
}

void micro_rate_peak(DType dtype, int64_t steps, int64_t count, double* rates) {
  (dtype == DType::f32 ? peak<Float> : peak<Bfloat16>)(steps, count, rates);
}
void micro_rate_product(const Host& host, DType dtype, const void* a, const void* w, void* out,
                        int64_t M, int64_t N, int64_t K, int64_t times, int64_t count,
                        double* rates) {
  (dtype == DType::f32 ? product_rate<Float> : product_rate<Bfloat16>)(host, a, w, out, M, N, K,
                                                                       times, count, rates);
}

void int8_rate_peak(int64_t steps, int64_t count, double* rates) { peak<Int8>(steps, count, rates); }
void int8_rate_product(const Host& host, const int8_t* a, const int8_t* w, float* out, int64_t M,
                       int64_t N, int64_t K, int64_t times, int64_t count, double* rates) {
  const Int8Weight packed = Int8Weight::of_numbers(host, w, N, K);
  const Int8Rows rows = Int8Rows::make(host, M, K);
  auto* numbers = (Int8::Given*)(void*)rows.rows;
  for (int64_t i = 0; i < M * K; ++i) numbers[i] = (Int8::Given)(a[i] + Int8::offset);
  for (int64_t m = 0; m < M; ++m) rows.steps[m] = 1.f;
  sample(rates, count, times, [&] { rows_product(rows, packed, out, M, N); });
  for (int64_t i = 0; i < count; ++i) rates[i] = 2.0 * (double)(M * N * K) / rates[i];
}

}  // namespace TRM_ISA
}  // namespace trm_fast
