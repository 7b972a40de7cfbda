// One access of each half of a head per thread.
#pragma once
#include "vec.cuh"

namespace trm_fast {
namespace cuda {

// Rows of q, of k and of v are `stride` elements apart, those of out 3 H K. `columns` = H K / 2 / VEC
// accesses of a half-row; BACK turns by the opposite angle.
template <class T, int VEC, bool BACK>
__global__ void rotate_qkv_kernel(const T* __restrict__ q, const T* __restrict__ k,
                                  const T* __restrict__ v, const float* __restrict__ cos,
                                  const float* __restrict__ sin, T* __restrict__ out, int64_t rows,
                                  int64_t S, int64_t H, int64_t K, int64_t stride) {
  const int64_t half = K / 2, columns = 3 * H * (half / VEC), i = thread_index();
  if (i >= rows * columns) return;
  const Place at = place(i, columns), in_row = place(at.column, H * (half / VEC)),
              in_head = place(in_row.column, half / VEC);
  const int64_t part = in_row.row, offset = in_head.row * K + in_head.column * VEC;
  const T* from = (part == 0 ? q : part == 1 ? k : v) + at.row * stride + offset;
  T* to = out + (at.row * 3 + part) * H * K + offset;
  const Pack<T, VEC> first = load<VEC>(from), second = load<VEC>(from + half);
  if (part == 2 || cos == nullptr) {
    store(to, first);
    store(to + half, second);
    return;
  }
  const int64_t table = at.row % S * K + in_head.column * VEC;
  const Floats<VEC> x1 = up(first), x2 = up(second), c1 = up(load<VEC>(cos + table)),
                    c2 = up(load<VEC>(cos + table + half)), s1 = up(load<VEC>(sin + table)),
                    s2 = up(load<VEC>(sin + table + half));
  store(to, down<T>(each<VEC>([&](int e) {
          return BACK ? x1[e] * c1[e] + x2[e] * s2[e] : x1[e] * c1[e] - x2[e] * s1[e];
        })));
  store(to + half, down<T>(each<VEC>([&](int e) {
          return BACK ? x2[e] * c2[e] - x1[e] * s1[e] : x2[e] * c2[e] + x1[e] * s2[e];
        })));
}

}  // namespace cuda
}  // namespace trm_fast
