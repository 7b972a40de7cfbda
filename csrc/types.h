// What kernels of both libraries are given: no torch, no CUDA.
//
// Dims: B batch, S tokens incl. prefix, P puzzle-prefix tokens, D width, V vocabulary.
#pragma once
#include <stdint.h>

namespace trm_fast {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A contiguous tensor of any of the dtypes; data is null where there is none.
struct Source {
  const void* data;
  DType dtype;
};
// Identifiers of tokens, int32 or int64.
struct Tokens {
  const void* data;
  bool wide;
};
// A state whose rows are contiguous: elements from one item and one token to the next.
struct StateView {
  const void* data;
  int64_t item, token;
};
// Of P puzzle rows and then S - P tokens: tokens [B, S - P], rows [B, P, D] or none, embedding
// [V, D], positions [S, D] or none, halted [B], y and z [B, S, D], y_init and z_init [D]. The
// sources are float or of the states' dtype.
struct EmbedReset {
  Tokens tokens;
  Source rows, embedding, positions;
  const bool* halted;
  StateView y, z;
  Source y_init, z_init;
  float scale;
  int64_t B, S, P, V, D;
};
constexpr float POSITION_SCALE = 0.707106781f;  // keeps the variance of token + position a token's

}  // namespace trm_fast
