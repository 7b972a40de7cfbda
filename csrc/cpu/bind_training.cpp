// The loss and the optimizer.
#include <tuple>

#include "bind.h"

namespace trm_fast {

// Every label is a class or -100: others would be answered with an infinite loss, silently.
template <class Label>
static void check_labels(const char* op, const Label* labels, int64_t N, int64_t V) {
  bool broken = false;
  for (int64_t i = 0; i < N; ++i)
    broken |= (labels[i] < 0 || (int64_t)labels[i] >= V) && labels[i] != -100;
  for (int64_t i = 0; broken && i < N; ++i)
    STD_TORCH_CHECK((labels[i] >= 0 && (int64_t)labels[i] < V) || labels[i] == -100, op,
                    ": label ", i, " is ", (int64_t)labels[i], ", expected 0 to ", V - 1,
                    " or -100");
}

// Checks logits [N,V] and labels [N]; returns whether these are int64.
static bool check_answers(const char* op, const Tensor& logits, const Tensor& labels) {
  STD_TORCH_CHECK(logits.dim() == 2, op, ": logits are ", shape_text(logits), ", expected [N, V]");
  const int64_t N = logits.size(0), V = logits.size(1);
  STD_TORCH_CHECK(V > 0 && V <= INT32_MAX, op, ": a vocabulary of ", V);
  check_tensor(op, "logits", logits, {N, V}, logits.scalar_type());
  const bool wide = labels.scalar_type() == ScalarType::Long;
  check_tensor(op, "labels", labels, {N}, wide ? ScalarType::Long : ScalarType::Int);
  if (wide)
    check_labels(op, (const int64_t*)labels.const_data_ptr(), N, V);
  else
    check_labels(op, (const int32_t*)labels.const_data_ptr(), N, V);
  return wide;
}

static std::tuple<Tensor, Tensor, Tensor> stablemax_loss(const Tensor& logits,
                                                         const Tensor& labels) {
  const char* op = "stablemax_loss";
  const DType dtype = dtype_of(op, logits);
  const bool wide = check_answers(op, logits, labels);
  const int64_t N = logits.size(0), V = logits.size(1);
  const std::vector<int64_t> shape{N};
  Tensor loss = new_floats(logits, {N}),
         preds = torch::stable::new_empty(logits, shape, ScalarType::Long),
         correct = torch::stable::new_empty(logits, shape, ScalarType::Bool);
  const TorchHost host;
  kernels().stablemax_loss_fwd(host, dtype, logits.const_data_ptr(), labels.const_data_ptr(), wide,
                               (float*)loss.mutable_data_ptr(), (int64_t*)preds.mutable_data_ptr(),
                               (uint8_t*)correct.mutable_data_ptr(), N, V);
  return {loss, preds, correct};
}

static Tensor stablemax_loss_bwd(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  const char* op = "stablemax_loss_bwd";
  const DType dtype = dtype_of(op, logits);
  const bool wide = check_answers(op, logits, labels);
  const int64_t N = logits.size(0), V = logits.size(1);
  check_tensor(op, "grad", grad, {N}, ScalarType::Float);
  Tensor d = torch::stable::empty_like(logits);
  const TorchHost host;
  kernels().stablemax_loss_bwd(host, dtype, (const float*)grad.const_data_ptr(),
                               logits.const_data_ptr(), labels.const_data_ptr(), wide,
                               d.mutable_data_ptr(), N, V);
  return d;
}

// `t` as the kernel takes it: contiguous, as many elements as its parameter, on the CPU.
static StepTensor step_tensor(const char* name, const Tensor& t, int64_t count) {
  const char* op = "adam_atan2_ema_";
  const DType dtype = dtype_of(op, t);
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " is not on the CPU");
  STD_TORCH_CHECK(t.numel() == count, op, ": one of ", name, " is ", shape_text(t), ", expected ",
                  count, " elements as its parameter has");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": one of ", name, " is not contiguous");
  return {t.mutable_data_ptr(), dtype};
}

static void adam_atan2_ema_(std::vector<Tensor> params, std::vector<Tensor> grads,
                            std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                            std::vector<Tensor> emas, std::vector<Tensor> copies,
                            const Tensor& coefficients, double beta1, double beta2) {
  const char* op = "adam_atan2_ema_";
  const size_t count = params.size();
  STD_TORCH_CHECK(
      grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count, op, ": ",
      grads.size(), " gradients, ", exp_avgs.size(), " and ", exp_avg_sqs.size(),
      " averages for ", count, " parameters");
  check_tensor(op, "coefficients", coefficients, {6}, ScalarType::Float);
  const float* given = (const float*)coefficients.const_data_ptr();
  const StepSettings settings{(float)(1 - beta1), (float)(1 - beta2), given[0], given[1],
                              given[2],           given[3],           given[4]};
  std::vector<StepTensors> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t n = params[i].numel();
    const StepTensor none{nullptr, DType::f32};
    tensors.push_back({step_tensor("params", params[i], n), step_tensor("grads", grads[i], n),
                       step_tensor("exp_avgs", exp_avgs[i], n),
                       step_tensor("exp_avg_sqs", exp_avg_sqs[i], n),
                       i < emas.size() ? step_tensor("emas", emas[i], n) : none,
                       i < copies.size() ? step_tensor("copies", copies[i], n) : none, n});
  }
  if (given[5] != 0) return;  // the step is left out
  const TorchHost host;
  kernels().adam_atan2_ema_step(host, tensors.data(), (int64_t)count, settings);
}

}  // namespace trm_fast

STABLE_TORCH_LIBRARY_IMPL(trm_fast_ext, CPU, m) {
  m.impl("stablemax_loss", TORCH_BOX(&trm_fast::stablemax_loss));
  m.impl("stablemax_loss_bwd", TORCH_BOX(&trm_fast::stablemax_loss_bwd));
  m.impl("adam_atan2_ema_", TORCH_BOX(&trm_fast::adam_atan2_ema_));
}
