// Rates of the microkernels, timed where nothing else runs in between.
#include <tuple>

#include "bind.h"

namespace trm_fast {

static Tensor new_rates(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, std::vector<int64_t>{count}, ScalarType::Double);
}

static Tensor micro_rate_peak(const Tensor& like, int64_t steps, int64_t count) {
  const char* op = "micro_rate_peak";
  const bool int8 = like.scalar_type() == ScalarType::Char;
  const DType dtype = int8 ? DType::f32 : dtype_of(op, like);
  STD_TORCH_CHECK(steps > 0 && count > 0, op, ": steps and count must be positive");
  Tensor rates = new_rates(like, count);
  auto* to = (double*)rates.mutable_data_ptr();
  if (int8)
    kernels().int8_rate_peak(steps, count, to);
  else
    kernels().micro_rate_peak(dtype, steps, count, to);
  return rates;
}

static std::tuple<Tensor, Tensor> micro_rate_product(const Tensor& a, const Tensor& w,
                                                     int64_t times, int64_t count) {
  const char* op = "micro_rate_product";
  const bool int8 = a.scalar_type() == ScalarType::Char;
  const DType dtype = int8 ? DType::f32 : dtype_of(op, a);
  STD_TORCH_CHECK(a.dim() == 2 && w.dim() == 2, op, ": a and w are [M, K] and [N, K]");
  const int64_t M = a.size(0), N = w.size(0), K = a.size(1);
  STD_TORCH_CHECK(M > 0 && N > 0 && K > 0 && N % 16 == 0 && K % 16 == 0, op,
                  ": widths must be positive multiples of 16");
  STD_TORCH_CHECK(times > 0 && count > 0, op, ": times and count must be positive");
  check_tensor(op, "a", a, {M, K}, a.scalar_type());
  check_tensor(op, "w", w, {N, K}, a.scalar_type());
  const ScalarType type = int8 ? ScalarType::Float : a.scalar_type();
  Tensor out = torch::stable::new_empty(a, std::vector<int64_t>{M, N}, type);
  Tensor rates = new_rates(a, count);
  const TorchHost host;
  if (int8)
    kernels().int8_rate_product(host, (const int8_t*)a.const_data_ptr(),
                                (const int8_t*)w.const_data_ptr(), (float*)out.mutable_data_ptr(), M,
                                N, K, times, count, (double*)rates.mutable_data_ptr());
  else
    kernels().micro_rate_product(host, dtype, a.const_data_ptr(), w.const_data_ptr(),
                               out.mutable_data_ptr(), M, N, K, times, count,
                               (double*)rates.mutable_data_ptr());
  return {out, rates};
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("micro_rate_peak", TORCH_BOX(&trm_fast::micro_rate_peak));
  m.impl("micro_rate_product", TORCH_BOX(&trm_fast::micro_rate_product));
}
