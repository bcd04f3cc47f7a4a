// From tensors to the torch-free rows of rows.h: dtypes, pointers, threads and the memory of large outputs.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "checks.h"
#include "cpu/allocator.h"
#include "cpu/rows.h"
#include "ops.h"

namespace npu_xent::cpu {

// The loops for this machine. ATEN_CPU_CAPABILITY overrides the choice, as it does for torch's own.
const KernelTable& kernels();

// Calls f with a null pointer of the storage type of `dtype`, which the checks have let through.
template <typename F>
void with_storage_type(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<bf16*>(nullptr));
    case at::kHalf:
      return f(static_cast<f16*>(nullptr));
    default:
      TORCH_INTERNAL_ASSERT(false, "npu_xent: unchecked dtype ", dtype);
  }
}

template <typename scalar_t>
scalar_t* data(const Tensor& t) {
  return static_cast<scalar_t*>(t.data_ptr());
}
template <typename scalar_t>
const scalar_t* const_data(const Tensor& t) {
  return static_cast<const scalar_t*>(t.const_data_ptr());
}

// Threads for `work` elements. Tasks are handed out as threads ask for them, so that cheap (ignored) rows cost no
// balance.
inline Parallel parallel_for_elements(int64_t work) {
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t threads =
      std::clamp<int64_t>(work / kElementsPerThread, 1, at::in_parallel_region() ? 1 : at::get_num_threads());
  return {threads, [threads](int64_t n_tasks, const std::function<void(int64_t)>& task) {
            std::atomic<int64_t> next{0};
            at::parallel_for(0, std::min(threads, n_tasks), 1, [&](int64_t, int64_t) {
              for (int64_t i = next++; i < n_tasks; i = next++) {
                task(i);
              }
            });
          }};
}

// The arguments of a sweep, checked and in the form that rows.h takes. Unit column strides are read in place.
struct Inputs {
  Tensor logits, target;
  OptionalTensor weight;
  int64_t num_classes, class_start, ignore_index;
  double logit_scale, softcap;

  Inputs(const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_, int64_t ignore_index_,
         double logit_scale_, std::optional<double> softcap_, int64_t class_start_, std::optional<int64_t> num_classes_)
      : logits(logits_.size(1) == 1 || logits_.stride(1) == 1 ? logits_ : logits_.contiguous()),
        target(target_.contiguous()),
        num_classes(class_count(logits_, class_start_, num_classes_)),
        class_start(class_start_),
        ignore_index(ignore_index_),
        logit_scale(logit_scale_),
        softcap(softcap_.value_or(0)) {
    if (weight_) {
      weight = weight_->to(stats_dtype(logits.scalar_type())).contiguous();
    }
    check_target_range(target, num_classes, ignore_index);
  }

  int64_t n_rows() const { return logits.size(0); }
  int64_t n_cols() const { return logits.size(1); }
  at::TensorOptions stats_options() const { return logits.options().dtype(stats_dtype(logits.scalar_type())); }

  template <typename scalar_t>
  Rows<scalar_t> rows() const {
    return {const_data<scalar_t>(logits),
            logits.stride(0),
            n_rows(),
            n_cols(),
            const_data<int64_t>(target),
            weight ? const_data<acc_t<scalar_t>>(*weight) : nullptr,
            class_start,
            ignore_index,
            logit_scale,
            softcap};
  }
};

// The totals in double, whatever the tensor's dtype.
inline std::array<double, kTotals> read_totals(const Tensor& totals) {
  const auto values = totals.to(at::kDouble).contiguous();
  std::array<double, kTotals> result;
  std::copy_n(const_data<double>(values), result.size(), result.begin());
  return result;
}

struct StatsTensors {
  Tensor lse, lse_low, picked, wsum;

  StatsTensors(const Inputs& in, bool need_wsum)
      : lse(at::empty({in.n_rows()}, in.stats_options())),
        lse_low(at::empty({in.n_rows()}, in.stats_options())),
        picked(at::empty({in.n_rows()}, in.stats_options())),
        wsum(at::empty({need_wsum ? in.n_rows() : 0}, in.stats_options())),
        need_wsum_(need_wsum) {}

  template <typename scalar_t>
  Stats<scalar_t> pointers() const {
    using acc = acc_t<scalar_t>;
    return {data<acc>(lse), data<acc>(lse_low), data<acc>(picked), need_wsum_ ? data<acc>(wsum) : nullptr};
  }

 private:
  bool need_wsum_;
};

// A contiguous [N, C] tensor in the logits' dtype.
inline Tensor empty_like_logits(const Inputs& in) {
  return empty_output(in.n_rows(), in.n_cols(), in.logits.options());
}

}  // namespace npu_xent::cpu
