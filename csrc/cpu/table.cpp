// The table of one instruction set.
#include "kernels.h"

namespace trm_fast {
namespace TRM_ISA {
#define X(name, args) void name args;
TRM_CPU_KERNELS(X)
#undef X

extern const Kernels table;
#define TRM_TEXT_(x) #x
#define TRM_TEXT(x) TRM_TEXT_(x)
const Kernels table = {
    TRM_TEXT(TRM_ISA),
#define X(name, args) &name,
    TRM_CPU_KERNELS(X)
#undef X
};
}  // namespace TRM_ISA
}  // namespace trm_fast
