// Loops over elements that come in any number: whole vectors first, then what is left.
#pragma once
#include "host.h"
#include "vec.h"

namespace trm_fast {
namespace TRM_ISA {

// How a vector is read and written: all of its lanes, or the first few.
struct Whole {
  template <class T>
  INL vf load(const T* p) const {
    return TRM_ISA::load(p);
  }
  template <class T>
  INL void store(T* p, vf v) const {
    TRM_ISA::store(p, v);
  }
};
struct Part {
  int64_t count;
  template <class T>
  INL vf load(const T* p) const {
    return load_first(p, count);
  }
  template <class T>
  INL void store(T* p, vf v) const {
    store_first(p, count, v);
  }
};

// f(first element, Whole or Part) for every vector of [begin, end).
template <class F>
INL void each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + VL <= end; i += VL) f(i, Whole{});
  if (i < end) f(i, Part{end - i});
}

// f(begin, end): rows of `width` elements, at least some thousands of elements at a time.
template <class F>
INL void parallel_rows(const Host& host, int64_t rows, int64_t width, const F& f) {
  const int64_t grain = larger<int64_t>(1, 8192 / larger<int64_t>(width, 1));
  parallel_ranges(host, rows, grain, [&](int64_t, int64_t begin, int64_t end) { f(begin, end); });
}

template <class T>
INL vf rounded_to(vf v) {
  return rounded((const T*)nullptr, v);
}

}  // namespace TRM_ISA
}  // namespace trm_fast
