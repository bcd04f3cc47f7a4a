// The gradients of input, linear_weight and linear_bias, added up chunk by chunk.
#include <ATen/ops/sum.h>

#include "composite/linear_rows.h"
#include "cpu/allocator.h"

namespace npu_xent::composite {
namespace {

Tensor empty_matrix(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  return options.device().is_cpu() ? cpu::empty_output(rows, columns, options) : at::empty({rows, columns}, options);
}

// sum += part in blocks of rows, since torch makes a copy of a 16-bit part in fp32 first.
void add_in_blocks(const Tensor& sum, const Tensor& part) {
  constexpr int64_t kElements = int64_t{1} << 19;
  const int64_t n_rows = sum.size(0), block = std::max<int64_t>(kElements / std::max<int64_t>(sum.size(1), 1), 1);
  for (int64_t begin = 0; begin < n_rows; begin += block) {
    const int64_t size = std::min(block, n_rows - begin);
    sum.narrow(0, begin, size).add_(part.narrow(0, begin, size));
  }
}

}  // namespace

LinearGrads::LinearGrads(const LinearSweep& sweep, std::array<bool, 3> wanted) : sweep_(sweep), wanted_(wanted) {
  const auto& rows = sweep.rows();
  const auto options = rows.input.options();
  const auto sums = options.dtype(stats_dtype(rows.input.scalar_type()));
  const auto none = [&] { return at::empty({0}, options); };  // outputs of an operator share no memory
  input_ = !wanted[0]         ? none()
           : sweep.has_gaps() ? at::zeros(rows.input.sizes(), options)
                              : at::empty(rows.input.sizes(), options);
  linear_weight_ = wanted[1] ? empty_matrix(sweep.n_classes(), rows.linear_weight.size(1), options) : none();
  if (wanted[1] && sums.dtype() != options.dtype() && !sweep.one_chunk()) {
    linear_weight_sum_ = empty_matrix(sweep.n_classes(), rows.linear_weight.size(1), sums);
  }
  linear_bias_sum_ = wanted[2] ? at::zeros({sweep.n_classes()}, sums) : none();
}

void LinearGrads::add(const Chunk& chunk, const Tensor& grad_logits) {
  if (wanted_[0]) {
    if (chunk.places.defined()) {
      auto part = at::empty({chunk.size, input_.size(1)}, input_.options());
      at::mm_out(part, grad_logits, sweep_.rows().linear_weight);  // autocast leaves it alone, as it does the others
      chunk.put(input_, part);
    } else {
      auto part = chunk.slice(input_);
      at::mm_out(part, grad_logits, sweep_.rows().linear_weight);
    }
  }
  if (wanted_[1]) {
    add_to_linear_weight(chunk, grad_logits);
  }
  if (wanted_[2]) {
    linear_bias_sum_.add_(grad_logits.sum(0, /*keepdim=*/false, linear_bias_sum_.scalar_type()));
  }
  first_ = false;
}

void LinearGrads::add_to_linear_weight(const Chunk& chunk, const Tensor& grad_logits) {
  auto input = chunk.input;
  if (sweep_.may_have_ignored()) {
    // Their logits have the gradient 0; 0 times a NaN would still be one.
    input = input.masked_fill(chunk.target.eq(sweep_.rows().ignore_index).unsqueeze(1), 0);
  }
  if (first_ || linear_weight_sum_.defined()) {
    at::mm_out(linear_weight_, grad_logits.t(), input);
  } else {
    linear_weight_.addmm_(grad_logits.t(), input);
  }
  if (!linear_weight_sum_.defined()) {
    return;
  }
  // linear_weight_ has the part of this chunk, and the result in the end.
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

}  // namespace npu_xent::composite
