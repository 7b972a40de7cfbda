// Picks the table that this CPU runs fastest, among those that were compiled in.
//
// The builder defines TRM_HAS_<set> for each: a library made for one machine holds one, a wheel all.
#include "kernels.h"

namespace trm_fast {

#define TRM_TABLE(set)        \
  namespace set {             \
  extern const Kernels table; \
  }
#ifdef TRM_HAS_avx512_bf16
TRM_TABLE(avx512_bf16)
#endif
#ifdef TRM_HAS_avx512
TRM_TABLE(avx512)
#endif
#ifdef TRM_HAS_avx2
TRM_TABLE(avx2)
#endif
#ifdef TRM_HAS_generic
TRM_TABLE(generic)
#endif

static const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#ifdef TRM_HAS_avx512_bf16
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    return &avx512_bf16::table;
#endif
#ifdef TRM_HAS_avx512
  if (avx512) return &avx512::table;
#endif
#ifdef TRM_HAS_avx2
  if (avx2) return &avx2::table;
#endif
  (void)avx512;
#endif
#ifdef TRM_HAS_generic
  return &generic::table;
#else
  return nullptr;
#endif
}

const Kernels* kernels_or_null() {
  static const Kernels* chosen = best();
  return chosen;
}

}  // namespace trm_fast

// What the kernels in use were compiled for; empty where this CPU can run none of them. Asked right
// after loading, before any operation.
extern "C" __attribute__((visibility("default"))) const char* trm_fast_instruction_set() {
  const trm_fast::Kernels* found = trm_fast::kernels_or_null();
  return found ? found->name : "";
}
