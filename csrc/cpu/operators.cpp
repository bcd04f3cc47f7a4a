// The primitives on the CPU: translates tensors to the torch-free rows of rows.h, and picks threads and instruction
// set.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include "checks.h"
#include "cpu/rows.h"
#include "cpu/whole_loss.h"
#include "ops.h"
#include "output_allocator.h"

namespace npu_xent::cpu {
namespace {

// The loops for this machine. ATEN_CPU_CAPABILITY overrides the choice, as for torch's own kernels.
const KernelTable& kernels() {
  static const KernelTable& table = kernel_table(at::get_cpu_capability());
  return table;
}

// Calls f with a null pointer of the storage type of `dtype`, which has been checked.
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

// Threads for `work` elements. Tasks are scheduled dynamically, since ignored rows are cheap.
Parallel parallel_for_elements(int64_t work) {
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

// Autograd runs these kernels below the key that would bump the version after an in-place write.
void note_written(const Tensor& tensor) {
  tensor.unsafeGetTensorImpl()->bump_version();
}

// Of [N, C], or of the images [B, R, C] of R rows each, with a stride of 1 for the rows or for the classes.
Layout layout_of(const Tensor& t) {
  const int64_t column = t.size(-1) == 1 ? 1 : t.stride(-1);
  return t.dim() == 2 ? Layout{std::max<int64_t>(t.size(0), 1), 0, t.stride(0), column}
                      : Layout{std::max<int64_t>(t.size(1), 1), t.stride(0), t.stride(1), column};
}

// The logits, or a copy of them if layout_of cannot describe them, or if vectors of so few rows are not worth it.
Tensor readable(const Tensor& logits) {
  constexpr int64_t kFewRows = 8;
  const auto layout = layout_of(logits);
  if (layout.column == 1 || (layout.row == 1 && (logits.dim() == 3 || layout.inner >= kFewRows))) {
    return logits;
  }
  return logits.dim() == 2 ? logits.contiguous() : logits.transpose(1, 2).contiguous().transpose(1, 2);
}

// The arguments of a sweep, checked and converted for rows.h. Logits are copied only where `readable` says so.
struct Inputs {
  Tensor logits, target;
  OptionalTensor weight, temperature;
  RowOptions options;

  Inputs(const Options& o, const Tensor& logits_, const Tensor& target_, const OptionalTensor& weight_,
         const OptionalTensor& temperature_ = std::nullopt, bool check_targets = true)
      : options(row_options(o, logits_.size(-1))) {
    check_storages({{"logits", logits_}, {"target", target_}, {"weight", weight_}, {"temperature", temperature_}});
    logits = readable(logits_);
    target = target_.contiguous();
    if (weight_) {
      weight = weight_->to(stats_dtype(logits.scalar_type())).contiguous();
    }
    if (check_targets) {
      check_target_range(options, target);
    }
    if (temperature_) {
      temperature = temperature_->to(stats_dtype(logits.scalar_type())).contiguous();
      check_temperatures(*temperature, target, options.ignore_index);
    }
  }

  at::TensorOptions stats_options() const { return logits.options().dtype(stats_dtype(logits.scalar_type())); }
  // In the dtype and shape of the logits: contiguous, but for [B, R, C] with adjacent rows.
  Tensor new_output() const {
    if (logits.dim() == 2) {
      return empty_output(logits.size(0), logits.size(1), logits.options());
    }
    const int64_t images = logits.size(0), rows = logits.size(1), classes = logits.size(2);
    return empty_output(images * classes, rows, logits.options()).view({images, classes, rows}).transpose(1, 2);
  }

  template <typename scalar_t>
  Rows<scalar_t> rows() const {
    return {options,
            const_data<scalar_t>(logits),
            layout_of(logits),
            target.numel(),
            logits.size(-1),
            const_data<int64_t>(target),
            weight ? const_data<acc_t<scalar_t>>(*weight) : nullptr,
            temperature ? const_data<acc_t<scalar_t>>(*temperature) : nullptr};
  }
};

// Where to write a tensor like the logits; nowhere if it is not wanted.
template <typename scalar_t>
Output<scalar_t> output(const Tensor& t, bool wanted = true) {
  return {wanted ? data<scalar_t>(t) : nullptr, wanted ? layout_of(t) : Layout{}};
}

// The totals in double, whatever the tensor's dtype.
std::array<double, kTotals> read_totals(const OptionalTensor& totals) {
  std::array<double, kTotals> result{};
  if (!totals) {
    return result;
  }
  check_storages({{"totals", totals}});
  const auto values = totals->to(at::kDouble).contiguous();
  std::copy_n(const_data<double>(values), result.size(), result.begin());
  return result;
}

struct StatsTensors {
  Tensor lse, lse_low, picked, wsum, entropy, top1;

  StatsTensors(const Inputs& in, const StatsWanted& wanted)
      : lse(at::empty({in.target.numel()}, in.stats_options())),
        lse_low(at::empty_like(lse)),
        picked(at::empty_like(lse)),
        wsum(wanted.wsum ? at::empty_like(lse) : not_wanted(lse.options())),
        entropy(wanted.entropy ? at::empty_like(lse) : not_wanted(lse.options())),
        top1(at::empty({wanted.top1 ? in.target.numel() : 0}, lse.options().dtype(at::kBool))),
        wanted_(wanted) {}

  template <typename scalar_t>
  Stats<scalar_t> pointers() const {
    using acc = acc_t<scalar_t>;
    return {data<acc>(lse),
            data<acc>(lse_low),
            data<acc>(picked),
            wanted_.wsum ? data<acc>(wsum) : nullptr,
            wanted_.entropy ? data<acc>(entropy) : nullptr,
            wanted_.top1 ? data<bool>(top1) : nullptr};
  }

 private:
  StatsWanted wanted_;
};

// An upstream gradient in the statistics dtype; stride 0 when one value serves all rows.
struct UpstreamTensor {
  OptionalTensor values;
  int64_t stride = 0;

  UpstreamTensor(const OptionalTensor& grad, const char* name, Reduction reduction, at::ScalarType dtype) {
    check_storages({{name, grad}});
    if (grad) {
      values = grad->to(dtype).reshape(-1);
      stride = reduction == Reduction::none ? values->stride(0) : 0;
    }
  }
  template <typename acc>
  const acc* pointer() const {
    return values ? const_data<acc>(*values) : nullptr;
  }
};

RowStats row_stats_cpu(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                       const OptionalTensor& row_temperature, bool need_log_prob, const StatsWanted& wanted) {
  check_row_stats(o, logits, target, weight, row_temperature);
  const Inputs in(o, logits, target, weight, row_temperature);
  const StatsTensors stats(in, wanted);
  const auto log_prob = need_log_prob ? in.new_output() : not_wanted(logits.options());
  with_storage_type(logits.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    row_stats(kernels().of<scalar_t>(), in.rows<scalar_t>(), wanted.read_ignored || need_log_prob,
              stats.pointers<scalar_t>(), output<scalar_t>(log_prob, need_log_prob),
              parallel_for_elements(logits.numel()));
  });
  return {stats.lse, stats.lse_low, stats.picked, stats.wsum, log_prob, stats.entropy, stats.top1};
}

template <bool over_logits>
GradOf<over_logits> row_grad_cpu(const Options& o, const Tensor& logits, const Tensor& target,
                                 const OptionalTensor& weight, const ForGrad& x) {
  check_row_grad(o, logits, target, weight, x);
  if (over_logits) {
    check_dense(logits);
  }
  const Inputs in(o, logits, target, weight, x.row_temperature);
  const auto denominators = read_totals(x.totals);
  check_storages({{"lse", x.lse}, {"lse_low", x.lse_low}, {"entropy", x.entropy}});
  const auto dense = [](const OptionalTensor& t) { return t ? t->contiguous() : Tensor(); };
  const auto lse = dense(x.lse), lse_low = dense(x.lse_low), entropy = dense(x.entropy);
  const auto dtype = lse.scalar_type();
  const UpstreamTensor from_loss(x.grad_loss, "grad_loss", o.reduction, dtype);
  const UpstreamTensor from_z(x.grad_z_loss, "grad_z_loss", o.reduction, dtype);
  const UpstreamTensor from_lse(x.grad_lse, "grad_lse", Reduction::none, dtype);
  const UpstreamTensor from_entropy(x.grad_entropy, "grad_entropy", Reduction::none, dtype);
  const auto grad = over_logits ? logits : in.new_output();
  with_storage_type(grad.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar_t>;
    const auto pointer = [](const Tensor& t) { return t.defined() ? const_data<acc>(t) : nullptr; };
    row_grad(kernels().of<scalar_t>(), in.rows<scalar_t>(), denominators.data(),
             {from_loss.pointer<acc>(), from_z.pointer<acc>(), from_lse.pointer<acc>(), from_entropy.pointer<acc>(),
              from_loss.stride, from_z.stride, from_lse.stride, from_entropy.stride},
             pointer(lse), pointer(lse_low), pointer(entropy), output<scalar_t>(grad),
             parallel_for_elements(grad.numel()));
  });
  if constexpr (over_logits) {
    note_written(logits);
  } else {
    return grad;
  }
}

template <bool over_logits>
StatsGradOf<over_logits> row_stats_grad_cpu(const Options& o, const Tensor& logits, const Tensor& target,
                                            const OptionalTensor& weight, const Tensor& totals, bool read_ignored) {
  check_row_stats_grad(o, logits, target, weight, totals);
  if (over_logits) {
    check_dense(logits);
  }
  const Inputs in(o, logits, target, weight);
  StatsWanted wanted;
  wanted.wsum = o.need_wsum();
  const StatsTensors stats(in, wanted);
  const auto denominators = read_totals(totals);
  const auto grad = over_logits ? logits : in.new_output();
  with_storage_type(grad.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    row_stats_grad(kernels().of<scalar_t>(), in.rows<scalar_t>(), read_ignored, denominators.data(),
                   stats.pointers<scalar_t>(), output<scalar_t>(grad), parallel_for_elements(grad.numel()));
  });
  if constexpr (over_logits) {
    note_written(logits);
    return {stats.lse, stats.lse_low, stats.picked, stats.wsum};
  } else {
    return {stats.lse, stats.lse_low, stats.picked, stats.wsum, grad};
  }
}

// The totals, or with statistics the losses. Both read every target, and raise if one is out of range.
template <typename acc>
void reduce(const RowOptions& options, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
            const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum,
            const double* totals, const Tensor& loss, const Tensor& z_loss, const Tensor& new_totals) {
  check_storages(
      {{"target", target}, {"weight", weight}, {"lse", lse}, {"lse_low", lse_low}, {"picked", picked}, {"wsum", wsum}});
  const auto dtype = c10::CppTypeToScalarType<acc>::value;
  const auto values = [&](const OptionalTensor& t) { return t ? t->to(dtype).contiguous() : Tensor(); };
  const auto pointer = [](const Tensor& t) { return t.defined() ? const_data<acc>(t) : nullptr; };
  const auto targets = target.contiguous();
  const auto w = values(weight);
  const auto* y = const_data<int64_t>(targets);
  const int64_t n = target.numel();
  const auto parallel = parallel_for_elements(n);
  int64_t bad;
  if (!lse) {
    bad = reduce_totals(kernels().of<acc>().sums, options, y, n, pointer(w), data<double>(new_totals), parallel);
  } else {
    const auto row_lse = values(lse), row_low = values(lse_low), row_picked = values(picked);
    const auto row_wsum = options.label_smoothing != 0 ? values(wsum) : Tensor();
    bad =
        reduce_loss(kernels().of<acc>().sums, options, y, n, pointer(w), pointer(row_lse), pointer(row_low),
                    pointer(row_picked), pointer(row_wsum), totals, data<double>(loss), data<double>(z_loss), parallel);
  }
  if (bad >= 0) {
    raise_bad_target(options, y, bad);
  }
}

Reduced reduce_rows_cpu(const Options& o, const Tensor& target, const OptionalTensor& weight, const OptionalTensor& lse,
                        const OptionalTensor& lse_low, const OptionalTensor& picked, const OptionalTensor& wsum,
                        const OptionalTensor& totals, at::ScalarType loss_dtype) {
  check_reduce_rows(o, target, weight, lse, lse_low, picked, wsum, totals, loss_dtype);
  const auto options = row_options(o, 0);
  const auto exact = target.options().dtype(at::kDouble);
  const auto out = target.options().dtype(loss_dtype);
  const auto stats = lse ? lse->scalar_type() : stats_dtype(loss_dtype);
  if (!lse) {
    const auto sums = at::empty({kTotals}, exact);
    reduce<double>(options, target, weight, lse, lse_low, picked, wsum, nullptr, {}, {}, sums);
    return {not_wanted(out), not_wanted(out), sums.to(stats)};
  }
  // Summed in double and rounded once.
  const auto shape = o.reduction == Reduction::none ? target.sizes() : at::IntArrayRef{};
  const auto loss = at::empty(shape, exact), z_loss = at::empty(shape, exact);
  const auto denominators = read_totals(totals);
  const auto run = stats == at::kDouble ? reduce<double> : reduce<float>;
  run(options, target, weight, lse, lse_low, picked, wsum, denominators.data(), loss, z_loss, {});
  return {loss.to(loss_dtype), o.lse_square_scale == 0 ? not_wanted(out) : z_loss.to(loss_dtype),
          not_wanted(target.options().dtype(stats))};
}

// The rows of class probabilities.
struct ProbInputs {
  Inputs in;
  Tensor probabilities;

  ProbInputs(const Options& o, const Tensor& logits, const Tensor& probabilities_, const OptionalTensor& weight)
      : in(o, logits, at::empty({0}, logits.options().dtype(at::kLong)), weight) {
    check_storages({{"probabilities", probabilities_}});
    probabilities = readable(probabilities_);
  }
  template <typename scalar_t>
  Rows<scalar_t> rows() const {
    auto rows = in.rows<scalar_t>();
    rows.target = nullptr;
    rows.n_rows = n_rows(in.logits).expect_int();
    rows.probabilities = const_data<scalar_t>(probabilities);
    rows.probability_layout = layout_of(probabilities);
    return rows;
  }
};

ProbStats prob_row_stats_cpu(const Options& o, const Tensor& logits, const Tensor& probabilities,
                             const OptionalTensor& weight) {
  check_prob_rows(o, logits, probabilities, weight);
  const ProbInputs given(o, logits, probabilities, weight);
  const auto lse = at::empty({n_rows(logits).expect_int()}, given.in.stats_options());
  const auto lse_low = at::empty_like(lse), cross = at::empty_like(lse), part_sum = at::empty_like(lse);
  with_storage_type(logits.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar_t>;
    const Stats<scalar_t> stats{data<acc>(lse), data<acc>(lse_low), nullptr, data<acc>(cross), nullptr,
                                nullptr,        data<acc>(part_sum)};
    row_stats(kernels().of<scalar_t>(), given.rows<scalar_t>(), /*read_ignored=*/true, stats, Output<scalar_t>{},
              parallel_for_elements(logits.numel()));
  });
  return {lse, lse_low, cross, part_sum};
}

ProbGrads prob_row_grad_cpu(const Options& o, const Tensor& logits, const Tensor& probabilities,
                            const OptionalTensor& weight, const Tensor& lse, const Tensor& lse_low,
                            const Tensor& part_sum, const Tensor& grad_loss, const Tensor& grad_lse,
                            std::array<bool, 2> wanted) {
  const std::initializer_list<Named> of_rows{
      {"lse", lse}, {"lse_low", lse_low}, {"part_sum", part_sum}, {"grad_loss", grad_loss}, {"grad_lse", grad_lse}};
  check_prob_row_grad(o, logits, probabilities, weight, of_rows);
  check_storages(of_rows);
  const ProbInputs given(o, logits, probabilities, weight);
  const auto high = lse.contiguous(), low = lse_low.contiguous(), sums = part_sum.contiguous(),
             from_loss = grad_loss.contiguous(), from_lse = grad_lse.contiguous();
  const auto make = [&](bool is_wanted) { return is_wanted ? given.in.new_output() : not_wanted(logits.options()); };
  const auto of_logits = make(wanted[0]), of_probabilities = make(wanted[1]);
  with_storage_type(logits.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar_t>;
    auto rows = given.rows<scalar_t>();
    rows.part_sum = const_data<acc>(sums);
    const auto parallel = parallel_for_elements(logits.numel());
    const double ones[kTotals] = {1, 1, 1};
    if (wanted[0]) {
      const Upstream<scalar_t> upstream{
          const_data<acc>(from_loss), nullptr, const_data<acc>(from_lse), nullptr, 1, 0, 1, 0};
      row_grad(kernels().of<scalar_t>(), rows, ones, upstream, const_data<acc>(high), const_data<acc>(low),
               static_cast<const acc*>(nullptr), output<scalar_t>(of_logits), parallel);
    }
    if (wanted[1]) {
      probability_grad(kernels().of<scalar_t>(), rows, const_data<acc>(from_loss), const_data<acc>(high),
                       const_data<acc>(low), output<scalar_t>(of_probabilities), parallel);
    }
  });
  return {of_logits, of_probabilities};
}

// The value of a tensor of one.
double value_of(const Tensor& factor) {
  switch (factor.scalar_type()) {
    case at::kFloat:
      return *const_data<float>(factor);
    case at::kDouble:
      return *const_data<double>(factor);
    default:
      return factor.to(at::kDouble).item<double>();
  }
}

void scale_cpu(const Tensor& self, const Tensor& factor) {
  check_scale(self, factor);
  check_storages({{"the gradient", self}, {"the upstream gradient", factor}});
  const double value = factor.is_cpu() ? value_of(factor) : factor.to(at::kDouble).item<double>();
  if (value == 1) {
    return;
  }
  with_storage_type(self.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    scale(kernels().of<scalar_t>(), data<scalar_t>(self), self.numel(), value, parallel_for_elements(self.numel()));
  });
  note_written(self);
}

// A scalar or an empty tensor, allocated without the dispatcher.
Tensor unseen(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::detail::empty_cpu(sizes, dtype, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
}
Tensor rounded(double value, at::ScalarType dtype) {
  auto result = unseen({}, dtype);
  if (dtype == at::kDouble) {
    *data<double>(result) = value;
  } else if (dtype == at::kFloat) {
    *data<float>(result) = static_cast<float>(value);
  } else if (dtype == at::kBFloat16) {
    *result.data_ptr<at::BFloat16>() = static_cast<at::BFloat16>(static_cast<float>(value));
  } else {
    *result.data_ptr<at::Half>() = static_cast<at::Half>(static_cast<float>(value));
  }
  return result;
}

}  // namespace

bool unobserved(const Tensor& a, const Tensor& b, const OptionalTensor& c) {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  auto keys = a.key_set() | b.key_set() | (c ? c->key_set() : c10::DispatchKeySet());
  keys = (keys | tls.included_) - tls.excluded_ - c10::autograd_dispatch_keyset - c10::autocast_dispatch_keyset -
         c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
  return keys.highestPriorityTypeId() == c10::DispatchKey::CPU && !at::hasCallbacks();
}

LossAndStats whole_loss(const Options& o, const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                        const Wanted& wanted, Gradient gradient) {
  if (gradient == Gradient::over_logits) {
    check_dense(logits);
  }
  const Inputs in(o, logits, target, weight, std::nullopt, /*check_targets=*/false);  // the totals check them
  const int64_t n = in.target.numel();
  const auto dtype = stats_dtype(logits.scalar_type());
  LossAndStats out;
  out.log_prob = unseen({0}, logits.scalar_type());
  out.lse = unseen({wanted.lse ? n : 0}, dtype);
  if (gradient != Gradient::none) {
    out.grad = gradient == Gradient::fresh ? in.new_output() : logits;
  }
  with_storage_type(logits.scalar_type(), [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    using acc = acc_t<scalar_t>;
    // Four numbers a row, in memory that is kept for the next call unless there are many.
    constexpr size_t kKept = 1 << 16;
    static thread_local const std::unique_ptr<acc[]> kept(new acc[kKept]);
    const size_t numbers = 4 * static_cast<size_t>(n);
    const std::unique_ptr<acc[]> large(numbers > kKept ? new acc[numbers] : nullptr);
    acc* memory = large ? large.get() : kept.get();
    const auto rows = in.rows<scalar_t>();
    const bool need_wsum = o.need_wsum();
    const Stats<scalar_t> stats{wanted.lse ? data<acc>(out.lse) : memory, memory + n, memory + 2 * n,
                                need_wsum ? memory + 3 * n : nullptr,     nullptr,    nullptr};
    std::array<double, kTotals> totals;
    double loss, z_loss;
    const auto by_row = parallel_for_elements(n), by_element = parallel_for_elements(logits.numel());
    const auto& sums = kernels().of<scalar_t>().sums;
    const int64_t bad = reduce_totals(sums, in.options, rows.target, n, rows.weight, totals.data(), by_row);
    if (bad >= 0) {
      raise_bad_target(in.options, rows.target, bad);
    }
    for (double& total : totals) {
      // As reduce_rows returns them. Volatile, since GCC 12 drops the rounding where it vectorises this loop.
      const volatile acc as_returned = static_cast<acc>(total);
      total = as_returned;
    }
    if (gradient == Gradient::none) {
      row_stats(kernels().of<scalar_t>(), rows, wanted.lse, stats, Output<scalar_t>{}, by_element);
    } else {
      row_stats_grad(kernels().of<scalar_t>(), rows, wanted.lse, totals.data(), stats, output<scalar_t>(out.grad),
                     by_element);
    }
    reduce_loss(sums, in.options, rows.target, n, rows.weight, stats.lse, stats.lse_low, stats.picked, stats.wsum,
                totals.data(), &loss, &z_loss, by_row);
    out.loss = rounded(loss, wanted.loss_dtype);
    out.z_loss = o.lse_square_scale == 0 ? unseen({0}, wanted.loss_dtype) : rounded(z_loss, wanted.loss_dtype);
  });
  if (gradient == Gradient::over_logits) {
    note_written(logits);
  }
  return out;
}

void scale(const Tensor& self, const Tensor& factor) {
  scale_cpu(self, factor);
}

TORCH_LIBRARY_IMPL(npu_xent, CPU, m) {
  m.impl("row_stats", flat<row_stats_cpu>);
  m.impl("row_grad", flat<row_grad_cpu<false>>);
  m.impl("row_grad_", flat<row_grad_cpu<true>>);
  m.impl("row_stats_grad", flat<row_stats_grad_cpu<false>>);
  m.impl("row_stats_grad_", flat<row_stats_grad_cpu<true>>);
  m.impl("reduce_rows", flat<reduce_rows_cpu>);
  m.impl("scale_", scale_cpu);
  m.impl("prob_row_stats", flat<prob_row_stats_cpu>);
  m.impl("prob_row_grad", flat<prob_row_grad_cpu>);
}

}  // namespace npu_xent::cpu
