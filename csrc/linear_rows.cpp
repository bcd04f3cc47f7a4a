// The linear_* primitives: the logits are computed chunk by chunk, all chunks in the same buffer.
//
// The GEMMs are aten's and the sweeps over the logits are the other primitives, so one implementation serves every
// device. On the CPU ignored rows are dropped before the GEMMs: a chunk gathers the kept rows. On other devices reading
// the target would synchronize, so ignored rows go through the GEMMs and the sweeps skip them.
#include <ATen/TensorOperators.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "ops.h"
#include "output_allocator.h"

namespace npu_xent::composite {
namespace {

// Default chunk_rows: 4 % of the memory of all logits in fp32, clamped to [128 or 256, 512] rows (enough for GEMM
// efficiency and to amortize the update of the gradient of linear_weight); at least 32 MiB.
int64_t default_chunk_rows(int64_t n_rows, int64_t n_cols, int64_t element_size) {
  constexpr int64_t kMany = 512, kStep = 32, kBytes = int64_t{32} << 20;
  const int64_t few = element_size == 2 ? 256 : 128;
  const int64_t share = n_rows * 4 / (25 * element_size) / kStep * kStep;
  return std::max(std::clamp(share, few, kMany), kBytes / (n_cols * element_size));
}

struct Chunk {
  Tensor input;   // [n, H]
  Tensor target;  // [n]
  Tensor places;  // [n], indices of these rows among all; undefined if they are [begin, begin + size)
  int64_t begin, size;

  // The rows of this chunk of a tensor with all rows.
  Tensor of(const Tensor& all) const { return places.defined() ? all.index_select(0, places) : slice(all); }
  OptionalTensor of(const OptionalTensor& all) const { return all ? OptionalTensor(of(*all)) : std::nullopt; }
  void put(const Tensor& all, const Tensor& part) const {
    if (places.defined()) {
      all.index_copy_(0, places, part);
    } else {
      slice(all).copy_(part);
    }
  }
  Tensor slice(const Tensor& all) const { return all.narrow(0, begin, size); }
};

class LinearSweep {
 public:
  // With `read_ignored`, chunks include ignored rows.
  LinearSweep(const Options& o, const LinearRows& rows, bool read_ignored) : rows_(rows) {
    check_storages({{"input", rows.input},
                    {"linear_weight", rows.linear_weight},
                    {"linear_bias", rows.linear_bias},
                    {"target", rows.target},
                    {"weight", rows.weight}});
    const auto row = row_options(o, n_classes());
    ignore_index_ = row.ignore_index;
    if (rows.weight) {  // once, not in each chunk
      rows_.weight = rows.weight->to(stats_dtype(rows.input.scalar_type()));
    }
    const int64_t n = rows.input.size(0);
    may_have_ignored_ = true;
    n_kept_ = n;
    if (rows.input.is_cpu()) {
      rows_.target = rows.target.contiguous();
      check_target_range(row, rows_.target);
      const auto* y = rows_.target.const_data_ptr<int64_t>();
      may_have_ignored_ = std::find(y, y + n, ignore_index_) != y + n;
      if (may_have_ignored_ && !read_ignored) {
        kept_ = rows_.target.ne(ignore_index_).nonzero().squeeze(1);
        n_kept_ = kept_.numel();
        may_have_ignored_ = false;
      }
    }
    chunk_rows_ = rows.chunk_rows.value_or(default_chunk_rows(n_kept_, n_classes(), rows.input.element_size()));
  }

  const LinearRows& rows() const { return rows_; }
  int64_t ignore_index() const { return ignore_index_; }
  int64_t n_rows() const { return rows_.input.size(0); }
  int64_t n_classes() const { return rows_.linear_weight.size(0); }
  bool one_chunk() const { return n_kept_ <= chunk_rows_; }
  // Whether chunks may contain ignored rows.
  bool may_have_ignored() const { return may_have_ignored_; }
  // Whether some rows are in no chunk.
  bool has_gaps() const { return kept_.defined(); }

  // Calls f(chunk, its logits); f may overwrite the logits.
  template <typename F>
  void for_each_chunk(const F& f) const {
    const auto buffer = at::empty({std::min(chunk_rows_, n_kept_), n_classes()}, rows_.input.options());
    const auto transposed = rows_.linear_weight.t();
    for (int64_t begin = 0; begin < n_kept_; begin += chunk_rows_) {
      Chunk chunk{{}, {}, {}, begin, std::min(chunk_rows_, n_kept_ - begin)};
      if (kept_.defined()) {
        chunk.places = chunk.slice(kept_);
      }
      chunk.input = chunk.of(rows_.input);
      chunk.target = chunk.of(rows_.target);
      auto logits = buffer.narrow(0, 0, chunk.size);
      if (rows_.linear_bias) {
        at::addmm_out(logits, *rows_.linear_bias, chunk.input, transposed);
      } else {
        at::mm_out(logits, chunk.input, transposed);
      }
      f(chunk, logits);
    }
  }

  at::ScalarType stats() const { return stats_dtype(rows_.input.scalar_type()); }
  // [N], or [0] if not wanted; zeros for rows in no chunk.
  Tensor new_values(at::ScalarType dtype, bool wanted) const {
    const auto options = rows_.input.options().dtype(dtype);
    return has_gaps() ? at::zeros({wanted ? n_rows() : 0}, options) : at::empty({wanted ? n_rows() : 0}, options);
  }

 private:
  LinearRows rows_;
  Tensor kept_;  // indices of the rows in chunks; undefined if all are
  int64_t ignore_index_, n_kept_, chunk_rows_;
  bool may_have_ignored_;
};

// One value per row, for all rows.
class AllRows {
 public:
  explicit AllRows(const LinearSweep& sweep) : sweep_(sweep) {}

  // The i-th kind of value, for the rows of one chunk; empty if not wanted.
  void put(size_t i, const Chunk& chunk, const Tensor& values) {
    if (chunk.size == sweep_.n_rows()) {  // it has all rows
      values_[i] = values;
      return;
    }
    if (!values_[i].defined()) {
      values_[i] = sweep_.new_values(values.scalar_type(), values.numel() != 0);
    }
    if (values.numel() != 0) {
      chunk.put(values_[i], values);
    }
  }
  // Zeros if there was no chunk.
  Tensor value(size_t i, bool wanted = true, std::optional<at::ScalarType> dtype = std::nullopt) {
    return values_[i].defined() ? values_[i] : sweep_.new_values(dtype.value_or(sweep_.stats()), wanted);
  }

 private:
  const LinearSweep& sweep_;
  std::array<Tensor, 6> values_;
};

// sum += part, in blocks of rows because torch first copies a 16-bit part to fp32.
void add_in_blocks(const Tensor& sum, const Tensor& part) {
  constexpr int64_t kElements = int64_t{1} << 19;
  const int64_t n_rows = sum.size(0), block = std::max<int64_t>(kElements / std::max<int64_t>(sum.size(1), 1), 1);
  for (int64_t begin = 0; begin < n_rows; begin += block) {
    const int64_t size = std::min(block, n_rows - begin);
    sum.narrow(0, begin, size).add_(part.narrow(0, begin, size));
  }
}

// Accumulates the gradients of input, linear_weight and linear_bias from the gradients of the chunks' logits. Gradients
// that are not wanted have shape [0].
class LinearGrads {
 public:
  LinearGrads(const LinearSweep& sweep, std::array<bool, 3> wanted);
  // With grad_lse, ignored rows have a gradient too, except where it is 0.
  void add(const Chunk& chunk, const Tensor& grad_logits, const OptionalTensor& grad_lse = std::nullopt);
  std::tuple<Tensor, Tensor, Tensor> results();

 private:
  void add_to_linear_weight(const Chunk& chunk, const Tensor& grad_logits, const OptionalTensor& grad_lse);

  const LinearSweep& sweep_;
  std::array<bool, 3> wanted_;
  bool first_ = true;
  Tensor input_, linear_weight_;
  Tensor linear_weight_sum_;  // fp32; only for 16-bit dtypes and several chunks
  Tensor linear_bias_sum_;    // in fp32 or fp64
};

LinearGrads::LinearGrads(const LinearSweep& sweep, std::array<bool, 3> wanted) : sweep_(sweep), wanted_(wanted) {
  const auto& rows = sweep.rows();
  const auto options = rows.input.options();
  const auto sums = options.dtype(stats_dtype(rows.input.scalar_type()));
  const auto none = [&] { return at::empty({0}, options); };  // outputs of an operator share no memory
  input_ = !wanted[0]         ? none()
           : sweep.has_gaps() ? at::zeros(rows.input.sizes(), options)
                              : at::empty(rows.input.sizes(), options);
  linear_weight_ = wanted[1] ? empty_output(sweep.n_classes(), rows.linear_weight.size(1), options) : none();
  if (wanted[1] && sums.dtype() != options.dtype() && !sweep.one_chunk()) {
    linear_weight_sum_ = empty_output(sweep.n_classes(), rows.linear_weight.size(1), sums);
  }
  linear_bias_sum_ = wanted[2] ? at::zeros({sweep.n_classes()}, sums) : none();
}

void LinearGrads::add(const Chunk& chunk, const Tensor& grad_logits, const OptionalTensor& grad_lse) {
  if (wanted_[0]) {
    if (chunk.places.defined()) {
      auto part = at::empty({chunk.size, input_.size(1)}, input_.options());
      at::mm_out(part, grad_logits, sweep_.rows().linear_weight);  // an out= call, which autocast does not cast
      chunk.put(input_, part);
    } else {
      auto part = chunk.slice(input_);
      at::mm_out(part, grad_logits, sweep_.rows().linear_weight);
    }
  }
  if (wanted_[1]) {
    add_to_linear_weight(chunk, grad_logits, grad_lse);
  }
  if (wanted_[2]) {
    linear_bias_sum_.add_(grad_logits.sum(0, /*keepdim=*/false, linear_bias_sum_.scalar_type()));
  }
  first_ = false;
}

void LinearGrads::add_to_linear_weight(const Chunk& chunk, const Tensor& grad_logits, const OptionalTensor& grad_lse) {
  auto input = chunk.input;
  if (sweep_.may_have_ignored()) {
    // The gradient of ignored rows is 0, but 0 times a NaN input would be NaN.
    auto zero = chunk.target.eq(sweep_.ignore_index());
    zero = grad_lse ? zero.logical_and(grad_lse->eq(0)) : zero;
    input = input.masked_fill(zero.unsqueeze(1), 0);
  }
  if (first_ || linear_weight_sum_.defined()) {
    at::mm_out(linear_weight_, grad_logits.t(), input);
  } else {
    linear_weight_.addmm_(grad_logits.t(), input);
  }
  if (!linear_weight_sum_.defined()) {
    return;
  }
  // linear_weight_ holds this chunk's part; results() writes the sum to it.
  if (first_) {
    linear_weight_sum_.copy_(linear_weight_);
  } else {
    add_in_blocks(linear_weight_sum_, linear_weight_);
  }
}

std::tuple<Tensor, Tensor, Tensor> LinearGrads::results() {
  if (first_ && wanted_[1]) {  // there was no chunk
    linear_weight_.zero_();
  } else if (linear_weight_sum_.defined()) {
    linear_weight_.copy_(linear_weight_sum_);
  }
  return {input_, linear_weight_, linear_bias_sum_.to(sweep_.rows().input.scalar_type())};
}

LinearStats linear_row_stats_composite(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                       const OptionalTensor& linear_bias, const Tensor& target,
                                       const OptionalTensor& weight, const OptionalTensor& row_temperature,
                                       std::optional<int64_t> chunk_rows, const StatsWanted& wanted) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_linear_row_stats(o, rows, row_temperature);
  const LinearSweep sweep(o, rows, wanted.read_ignored);
  if (row_temperature) {  // here, where messages can name the row
    check_temperatures(*row_temperature, sweep.rows().target, sweep.ignore_index());
  }
  AllRows all(sweep);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto [lse, lse_low, picked, wsum, _, entropy, top1] = row_stats(
        o, logits, chunk.target, sweep.rows().weight, chunk.of(row_temperature), /*need_log_prob=*/false, wanted);
    size_t i = 0;
    for (const auto& values : {lse, lse_low, picked, wsum, entropy, top1}) {
      all.put(i++, chunk, values);
    }
  });
  return {all.value(0),
          all.value(1),
          all.value(2),
          all.value(3, wanted.wsum),
          all.value(4, wanted.entropy),
          all.value(5, wanted.top1, at::kBool)};
}

LinearGrad linear_row_grad_composite(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                     const OptionalTensor& linear_bias, const Tensor& target,
                                     const OptionalTensor& weight, const ForGrad& operands,
                                     std::optional<int64_t> chunk_rows, std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_linear_row_grad(o, rows, operands);
  check_storages({{"temperature", operands.row_temperature},
                  {"the gradient of the loss", operands.grad_loss},
                  {"the gradient of lse", operands.grad_lse},
                  {"the gradient of the entropy", operands.grad_entropy}});
  const LinearSweep sweep(o, rows, /*read_ignored=*/operands.grad_lse.has_value());
  LinearGrads grads(sweep, output_mask);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto by_row = [&](const OptionalTensor& grad) {
      return grad ? chunk.of(OptionalTensor(grad->reshape(-1))) : grad;
    };
    const auto upstream = [&](const OptionalTensor& grad) {
      return o.reduction == Reduction::none ? by_row(grad) : grad;
    };
    ForGrad of_chunk{chunk.of(operands.lse),
                     chunk.of(operands.lse_low),
                     operands.totals,
                     upstream(operands.grad_loss),
                     upstream(operands.grad_z_loss),
                     by_row(operands.grad_lse),
                     chunk.of(operands.row_temperature),
                     chunk.of(operands.entropy),
                     by_row(operands.grad_entropy)};
    row_grad<true>(o, logits, chunk.target, sweep.rows().weight, of_chunk);
    grads.add(chunk, logits, of_chunk.grad_lse);
  });
  return grads.results();
}

LinearStatsGrad linear_row_stats_grad_composite(const Options& o, const Tensor& input, const Tensor& linear_weight,
                                                const OptionalTensor& linear_bias, const Tensor& target,
                                                const OptionalTensor& weight, const Tensor& totals,
                                                std::optional<int64_t> chunk_rows, bool read_ignored,
                                                std::array<bool, 3> output_mask) {
  const LinearRows rows{input, linear_weight, linear_bias, target, weight, chunk_rows};
  check_linear_row_stats_grad(o, rows, totals);
  const LinearSweep sweep(o, rows, read_ignored);
  AllRows all(sweep);
  LinearGrads grads(sweep, output_mask);
  sweep.for_each_chunk([&](const Chunk& chunk, const Tensor& logits) {
    const auto [lse, lse_low, picked, wsum] =
        row_stats_grad<true>(o, logits, chunk.target, sweep.rows().weight, totals, read_ignored);
    size_t i = 0;
    for (const auto& values : {lse, lse_low, picked, wsum}) {
      all.put(i++, chunk, values);
    }
    grads.add(chunk, logits);
  });
  return std::tuple_cat(std::tuple{all.value(0), all.value(1), all.value(2), all.value(3, o.need_wsum())},
                        grads.results());
}

}  // namespace

TORCH_LIBRARY_IMPL(npu_xent, CompositeExplicitAutograd, m) {
  m.impl("linear_row_stats", flat<linear_row_stats_composite>);
  m.impl("linear_row_grad", flat<linear_row_grad_composite>);
  m.impl("linear_row_stats_grad", flat<linear_row_stats_grad_composite>);
}

}  // namespace npu_xent::composite
