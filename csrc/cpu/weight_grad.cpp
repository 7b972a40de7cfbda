// weight_grad: over tiles of the weight, each summed over all rows in order.
#include "weight_grad.h"

namespace trm_fast {
namespace TRM_ISA {

// Words (k, i) of a strip of `width` <= STRIP columns at out[k * STRIP + i].
template <class Mode, class G>
INL void pack_strip(const G* g, int64_t ldg, int64_t width, int64_t K, word* out) {
  const auto vector_of = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    if (k >= K || n >= width) return vf{};
    const G* p = g + k * ldg + n;
    return n + VL <= width ? load(p) : load_first(p, width - n);
  };
  for (int64_t k = 0; k < words<Mode>(K); ++k, out += STRIP)
    for (int64_t n = 0; n < STRIP; n += VL) {
      if constexpr (Mode::pairs)
        store(out + n, pair_words(vector_of(2 * k, n), vector_of(2 * k + 1, n)));
      else
        store(out + n, vector_of(k, n));
    }
}

template <class Mode, class G, class X>
void weight_grad(const Host& host, const G* g, int64_t ldg, int64_t N1, const X* x, int64_t ldx,
                 int64_t N2, int64_t M, float* C, int64_t ldc, bool accumulate, word* memory) {
  if (M == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < N1; ++i) memset(C + i * ldc, 0, (size_t)N2 * sizeof(float));
    return;
  }
  const int64_t columns = round_up(N2, VL), chunk = CHUNK_WORDS * Mode::per_word;
  const int64_t chunks = ceil_div(M, chunk);
  word* packed = memory;
  word* strips_of = memory + round_up(words<Mode>(M) * columns, VL);
  const int64_t parts = smaller<int64_t>(host.threads, ceil_div(columns / VL, MAX_NV));
  parallel(host, parts * chunks, [&](int64_t i) {
    const int64_t first = i / parts * chunk, part = i % parts, vectors = columns / VL;
    pack_straight<Mode>([&](int64_t k) { return x + (first + k) * ldx; }, N2, columns,
                        smaller(chunk, M - first), packed + first / Mode::per_word * columns,
                        panel_border(vectors, part, parts), panel_border(vectors, part + 1, parts));
  });
  const int64_t strips = ceil_div(N1, STRIP);
  parallel_ranges(host, strips, 1, [&](int64_t slot, int64_t begin, int64_t end) {
    word* strip = strips_of + slot * CHUNK_WORDS * STRIP;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t n1 = s * STRIP, rows = smaller(STRIP, N1 - n1);
      for (int64_t first = 0; first < M; first += chunk) {
        const int64_t depth = smaller(chunk, M - first), Kw = words<Mode>(depth);
        pack_strip<Mode>(g + first * ldg + n1, ldg, rows, depth, strip);
        const bool add = accumulate || first > 0;
        product<Mode>(strip, 1, STRIP, packed + first / Mode::per_word * columns, rows, columns / VL,
                      Kw, [&](int64_t m, int skip, int64_t n, auto& c) __attribute__((always_inline)) {
                        each(c, [&](int i, int j, vf v) __attribute__((always_inline)) {
                          float* to = C + (n1 + m + i) * ldc + n + j * VL;
                          const int64_t left = N2 - n - j * VL;
                          if (left >= VL) {
                            store(to, add ? load(to) + v : v);
                          } else if (left > 0) {
                            store_first(to, left, add ? load_first(to, left) + v : v);
                          }
                        }, skip);
                      });
      }
    }
  });
}


#define TRM_INSTANTIATE(Mode, G, X)                                                             \
  template void weight_grad<Mode, G, X>(const Host&, const G*, int64_t, int64_t, const X*,      \
                                        int64_t, int64_t, int64_t, float*, int64_t, bool, word*);
TRM_INSTANTIATE(Float, float, float)
TRM_INSTANTIATE(Bfloat16, bf16, bf16)
#if !defined(__AVX512BF16__)  // operands of Bfloat16 are floats
TRM_INSTANTIATE(Bfloat16, float, bf16)
TRM_INSTANTIATE(Bfloat16, bf16, float)
#endif

}  // namespace TRM_ISA
}  // namespace trm_fast
