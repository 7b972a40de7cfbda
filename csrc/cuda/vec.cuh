// Elements in memory and in registers: 16 bytes at a time where alignment allows, floats inside.
//
// Kernels are templates over the element T and VEC, the elements of one access: 16 bytes, or 1.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include <initializer_list>

#include "kernels.h"

namespace trm_fast {
namespace cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int WARP = 32;

template <class T>
constexpr int WIDE = 16 / (int)sizeof(T);

__device__ __forceinline__ float up(float v) { return v; }
__device__ __forceinline__ float up(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float up(f16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T down(float v);
template <>
__device__ __forceinline__ float down<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 down<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 down<f16>(float v) {
  return __float2half_rn(v);
}

// What v is once it was stored as T: the reference rounds between the steps of an operation.
template <class T>
__device__ __forceinline__ float rounded(float v) {
  return up(down<T>(v));
}

// VEC elements as one access moves them: whole words, so that elements of 16 bits take half the
// registers of floats while they wait. Pack<T, 1> is one element.
template <class T, int VEC>
struct Pack {
  static constexpr int WORDS = VEC * (int)sizeof(T) / 4;
  static_assert(WORDS % 4 == 0, "one element or whole 16 bytes");
  uint32_t word[WORDS];
};
template <class T>
struct Pack<T, 1> {
  T element;
};

template <int VEC, class T>
__device__ __forceinline__ Pack<T, VEC> load(const T* __restrict__ p) {
  Pack<T, VEC> pack;
  if constexpr (VEC == 1) {
    pack.element = *p;
  } else {
#pragma unroll
    for (int i = 0; i < Pack<T, VEC>::WORDS; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      pack.word[i] = v.x, pack.word[i + 1] = v.y, pack.word[i + 2] = v.z, pack.word[i + 3] = v.w;
    }
  }
  return pack;
}

template <class T, int VEC>
__device__ __forceinline__ void store(T* p, const Pack<T, VEC>& pack) {
  if constexpr (VEC == 1) {
    *p = pack.element;
  } else {
// By an instruction of its own: the compiler may take an assignment to pieces.
#pragma unroll
    for (int i = 0; i < Pack<T, VEC>::WORDS; i += 4)
      __stwb(reinterpret_cast<uint4*>(p) + i / 4,
             make_uint4(pack.word[i], pack.word[i + 1], pack.word[i + 2], pack.word[i + 3]));
  }
}

__device__ __forceinline__ float2 up_pair(uint32_t word, bf16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ __forceinline__ float2 up_pair(uint32_t word, f16) {
  __half2 pair;
  memcpy(&pair, &word, sizeof pair);
  return __half22float2(pair);
}
__device__ __forceinline__ uint32_t down_pair(float a, float b, bf16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
__device__ __forceinline__ uint32_t down_pair(float a, float b, f16) {
  const __half2 pair = __floats2half2_rn(a, b);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <int VEC>
struct Floats {
  float v[VEC];
  __device__ __forceinline__ float& operator[](int i) { return v[i]; }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

template <class T, int VEC>
__device__ __forceinline__ Floats<VEC> up(const Pack<T, VEC>& pack) {
  Floats<VEC> f;
  if constexpr (VEC == 1) {
    f[0] = up(pack.element);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) f[e] = __uint_as_float(pack.word[e]);
  } else {
#pragma unroll
    for (int e = 0; e < VEC; e += 2) {
      const float2 pair = up_pair(pack.word[e / 2], T{});
      f[e] = pair.x, f[e + 1] = pair.y;
    }
  }
  return f;
}

template <class T, int VEC>
__device__ __forceinline__ Pack<T, VEC> down(const Floats<VEC>& f) {
  Pack<T, VEC> pack;
  if constexpr (VEC == 1) {
    pack.element = down<T>(f[0]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int e = 0; e < VEC; ++e) pack.word[e] = __float_as_uint(f[e]);
  } else {
#pragma unroll
    for (int e = 0; e < VEC; e += 2) pack.word[e / 2] = down_pair(f[e], f[e + 1], T{});
  }
  return pack;
}

// f(e) for every element of an access: the floats that it gives.
template <int VEC, class F>
__device__ __forceinline__ Floats<VEC> each(const F& f) {
  Floats<VEC> out;
#pragma unroll
  for (int e = 0; e < VEC; ++e) out[e] = f(e);
  return out;
}

// The same bits in every lane, always added in the same order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// Where thread `index` of a matrix with `columns` accesses a row is. A division of 64 bits costs as
// much as the memory access, so it is left to matrices that need it.
struct Place {
  int64_t row, column;
};
__device__ __forceinline__ Place place(int64_t index, int64_t columns) {
  if ((index | columns) >> 32 == 0) {
    const uint32_t row = (uint32_t)index / (uint32_t)columns;
    return {row, (uint32_t)index - row * (uint32_t)columns};
  }
  return {index / columns, index % columns};
}

__device__ __forceinline__ int64_t thread_index() {
  return (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= (uintptr_t)p;
  return bits % 16 == 0;
}

inline unsigned blocks_for(int64_t count, int64_t per_block) {
  return (unsigned)((count + per_block - 1) / per_block);
}

// f(T{}) for the type that `dtype` names.
template <class F>
cudaError_t by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace trm_fast
