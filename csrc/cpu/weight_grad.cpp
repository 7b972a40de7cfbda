// weight_grad: over tiles of the weight, each summed over all rows in order.
#include "weight_grad.h"

namespace trm_fast {
namespace TRM_ISA {

// Words (k, i) of a strip of `width` <= STRIP columns at out[k * STRIP + i].
template <class Mode, class G>
INL void pack_strip(const G* g, int64_t ldg, int64_t width, int64_t K, word* out) {
  pack_straight_rows<Mode>([&](int64_t k) { return g + k * ldg; }, width, STRIP / VL, K, out);
}

template <class Mode, class G, class X>
void weight_grad(const Host& host, const G* g, int64_t ldg, int64_t N1, const X* x, int64_t ldx,
                 int64_t N2, int64_t M, float* C, int64_t ldc, bool accumulate, word* memory) {
  if (M == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < N1; ++i) memset(C + i * ldc, 0, (size_t)N2 * sizeof(float));
    return;
  }
  const int64_t columns = round_up(N2, VL), vectors = columns / VL, per = Mode::per_word;
  const int64_t chunk = CHUNK_WORDS * per, chunks = ceil_div(M, chunk);
  word* packed = memory;
  word* strips_of = memory + round_up(words<Mode>(M) * columns, VL);
  // Floats are operands as they lie in memory: packing pays where many panels meet each of them.
  constexpr bool floats = !Mode::pairs && sizeof(G) == sizeof(word) && sizeof(X) == sizeof(word);
  const bool direct = floats && N2 == columns && vectors <= 2 * MAX_NV;
  const int64_t parts = smaller<int64_t>(host.threads, ceil_div(vectors, MAX_NV));
  if (!direct)
    parallel(host, parts * chunks, [&](int64_t i) {
      const int64_t first = i / parts * chunk, part = i % parts;
      pack_straight<Mode>([&](int64_t k) { return x + (first + k) * ldx; }, N2, columns,
                          smaller(chunk, M - first), packed + first / per * columns,
                          panel_border(vectors, part, parts),
                          panel_border(vectors, part + 1, parts));
    });
  parallel_ranges(host, ceil_div(N1, STRIP), 1, [&](int64_t slot, int64_t begin, int64_t end) {
    word* strip = strips_of + slot * CHUNK_WORDS * STRIP;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t n1 = s * STRIP, rows = smaller(STRIP, N1 - n1);
      for (int64_t first = 0; first < M; first += chunk) {
        const int64_t depth = smaller(chunk, M - first);
        const G* from = g + first * ldg + n1;
        const word* a = (const word*)(const void*)from;
        Panels b{(const word*)(const void*)(x + first * ldx), ldx};
        if (!direct) {
          pack_strip<Mode>(from, ldg, rows, depth, strip);
          a = strip;
          b = packed + first / per * columns;
        }
        const bool add = accumulate || first > 0;
        product<Mode>(a, 1, direct ? ldg : STRIP, b, rows, vectors, words<Mode>(depth),
                      [&](int64_t m, int skip, int64_t n, auto& c) __attribute__((always_inline)) {
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
