// Work on several threads, and memory to work in.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

// f(i) for every i < count.
template <class F>
INL void parallel(const Host& host, int64_t count, const F& f) {
  host.run(
      count, [](void* context, int64_t i) { (*(const F*)context)(i); }, const_cast<F*>(&f));
}

// f(slot, begin, end): [0, count) divided among at most host.threads slots, in order, so that each
// slot has a scratch of its own. Ranges begin at multiples of `grain`. What is computed must not
// depend on the division.
template <class F>
INL void parallel_ranges(const Host& host, int64_t count, int64_t grain, const F& f) {
  const int64_t pieces = ceil_div(count, grain);
  const int64_t slots = smaller<int64_t>(host.threads, pieces);
  parallel(host, slots, [&](int64_t slot) {
    const int64_t begin = slot * pieces / slots * grain, end = (slot + 1) * pieces / slots * grain;
    f(slot, begin, smaller(end, count));
  });
}

template <class A>
INL A* allocate(const Host& host, int64_t count) {
  return (A*)host.allocate(&host, (size_t)larger<int64_t>(count, 1) * sizeof(A));
}

template <class T>
INL void copy_floats(const Host& host, const float* from, T* to, int64_t count) {
  parallel_ranges(host, count, 1 << 14, [&](int64_t, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + VL <= end; i += VL) store(to + i, load(from + i));
    for (; i < end; ++i) set(to + i, from[i]);
  });
}

// to = from, or to += from.
INL void add_floats(const Host& host, const float* from, float* to, int64_t count, bool add) {
  parallel_ranges(host, count, 1 << 14, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = add ? to[i] + from[i] : from[i];
  });
}

}  // namespace TRM_ISA
}  // namespace trm_fast
