// embed_reset: question states from tokens, puzzle rows and positions; states that start anew; and
// the gradients to the embedding and the positions.
//
// Rounds where the reference does. The bindings have checked every token.
#include "elements.h"

namespace trm_fast {
namespace TRM_ISA {

INL int64_t token_at(Tokens tokens, int64_t n) {
  return tokens.wide ? ((const int64_t*)tokens.data)[n] : ((const int32_t*)tokens.data)[n];
}

// A vector of a master weight or of a state, as it is in dtype T.
template <class T, class P>
INL vf load_as(Source from, int64_t i, P part) {
  const vf v = from.dtype == DType::f32 ? part.load((const float*)from.data + i)
                                        : part.load((const bf16*)from.data + i);
  return rounded_to<T>(v);
}

// Row `row` of `from`, and of `positions` if there are any, scaled.
template <class T>
INL void question_row(Source from, int64_t row, Source positions, int64_t s, float scale, T* x,
                      int64_t D) {
  if (positions.data == nullptr) {
    each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
      part.store(x + j, load_as<T>(from, row * D + j, part) * scale);
    });
    return;
  }
  each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
    const vf v = load_as<T>(from, row * D + j, part) + load_as<T>(positions, s * D + j, part);
    part.store(x + j, rounded_to<T>(rounded_to<T>(v) * POSITION_SCALE) * scale);
  });
}

template <class T>
INL void state_row(bool reset, Source start, const T* state, T* out, int64_t D) {
  if (!reset) {
    memcpy(out, state, (size_t)D * sizeof(T));
    return;
  }
  each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
    part.store(out + j, load_as<T>(start, j, part));
  });
}

template <class T>
static void forward(const Host& host, const EmbedReset& in, void* x, void* y, void* z) {
  const int64_t D = in.D, L = in.S - in.P;
  parallel_rows(host, in.B * in.S, D, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / in.S, s = n % in.S;
      T* to = (T*)x + n * D;
      if (s < in.P)
        question_row<T>(in.rows, b * in.P + s, in.positions, s, in.scale, to, D);
      else
        question_row<T>(in.embedding, token_at(in.tokens, b * L + s - in.P), in.positions, s,
                        in.scale, to, D);
      const bool reset = in.halted[b] != 0;
      state_row(reset, in.y_init, (const T*)in.y.data + b * in.y.item + s * in.y.token,
                (T*)y + n * D, D);
      state_row(reset, in.z_init, (const T*)in.z.data + b * in.z.item + s * in.z.token,
                (T*)z + n * D, D);
    }
  });
}

// out[v] = factor * the sum of grad over the places of v. Chunks of places are added up separately,
// then in order: how many there are depends on the sizes only.
template <class T>
static void embedding_gradient(const Host& host, const void* grad_, Tokens tokens, float* out,
                               int64_t B, int64_t S, int64_t P, int64_t D, int64_t V, float factor) {
  const T* grad = (const T*)grad_;
  const int64_t L = S - P, count = B * L, table = V * D;
  if (table == 0) return;
  // Not so many that their tables cost more than the sums.
  const int64_t chunk = larger(larger<int64_t>(256, 4 * V), ceil_div(count, 32));
  const int64_t chunks = larger<int64_t>(1, ceil_div(count, chunk));
  float* partial = chunks == 1 ? out : allocate<float>(host, chunks * table);
  parallel_ranges(host, chunks, 1, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      float* sums = partial + c * table;
      memset(sums, 0, (size_t)table * sizeof(float));
      for (int64_t n = c * chunk; n < smaller(count, (c + 1) * chunk); ++n) {
        float* to = sums + token_at(tokens, n) * D;
        const T* from = grad + (n / L * S + P + n % L) * D;
        each_vector(0, D, [&](int64_t j, auto part) __attribute__((always_inline)) {
          part.store(to + j, part.load(to + j) + part.load(from + j));
        });
      }
    }
  });
  parallel_ranges(host, table, 1 << 12, [&](int64_t, int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t i, auto part) __attribute__((always_inline)) {
      vf total = part.load(partial + i);
      for (int64_t c = 1; c < chunks; ++c) total += part.load(partial + c * table + i);
      part.store(out + i, total * factor);
    });
  });
}

// out[s] = factor * the sum of grad over the items.
template <class T>
static void position_gradient(const Host& host, const void* grad_, float* out, int64_t B, int64_t S,
                              int64_t D, float factor) {
  const T* grad = (const T*)grad_;
  parallel_ranges(host, S * D, 1 << 10, [&](int64_t, int64_t begin, int64_t end) {
    each_vector(begin, end, [&](int64_t i, auto part) __attribute__((always_inline)) {
      vf total = vf{};
      for (int64_t b = 0; b < B; ++b) total += part.load(grad + b * S * D + i);
      part.store(out + i, total * factor);
    });
  });
}

void embed_reset_fwd(const Host& host, DType dtype, const EmbedReset& in, void* x, void* y,
                     void* z) {
  (dtype == DType::f32 ? forward<float> : forward<bf16>)(host, in, x, y, z);
}
void embed_reset_bwd(const Host& host, DType dtype, const void* grad, Tokens tokens, float* out,
                     int64_t B, int64_t S, int64_t P, int64_t D, int64_t V, float factor) {
  (dtype == DType::f32 ? embedding_gradient<float> : embedding_gradient<bf16>)(
      host, grad, tokens, out, B, S, P, D, V, factor);
}
void embed_reset_positions_bwd(const Host& host, DType dtype, const void* grad, float* out,
                               int64_t B, int64_t S, int64_t D, float factor) {
  (dtype == DType::f32 ? position_gradient<float> : position_gradient<bf16>)(host, grad, out, B, S,
                                                                             D, factor);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
