// The gradients of input, linear_weight and linear_bias, added up chunk by chunk.
#include <ATen/ops/sum.h>

#include "composite/linear_rows.h"
#include "cpu/memory.h"

namespace npu_xent::composite {
namespace {

// Columns of linear_weight's gradient that are made at a time in 16 bits: what is added to fp32 is still in the cache.
constexpr int64_t kColumns = 2048;

Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options) {
  auto t = at::empty(sizes, options);
  if (t.is_cpu()) {
    cpu::use_huge_pages(t.data_ptr(), t.nbytes());
  }
  return t;
}

}  // namespace

LinearGrads::LinearGrads(const LinearSweep& sweep, std::array<bool, 3> wanted) : sweep_(sweep), wanted_(wanted) {
  const auto& rows = sweep.rows();
  const auto options = rows.input.options();
  const auto sums = sweep.one_chunk() ? options : options.dtype(stats_dtype(rows.input.scalar_type()));
  const auto none = at::empty({0}, options);
  input_ = !wanted[0]         ? none
           : sweep.has_gaps() ? at::zeros(rows.input.sizes(), options)
                              : at::empty(rows.input.sizes(), options);
  linear_weight_ = wanted[1] ? empty_large(rows.linear_weight.sizes(), sums) : none;
  linear_bias_ =
      wanted[2] ? at::zeros({sweep.n_classes()}, options.dtype(stats_dtype(rows.input.scalar_type()))) : none;
}

void LinearGrads::add(const Chunk& chunk, const Tensor& grad_logits) {
  if (wanted_[0]) {
    if (chunk.places.defined()) {
      chunk.put(input_, grad_logits.mm(sweep_.rows().linear_weight));
    } else {
      auto part = chunk.slice(input_);
      at::mm_out(part, grad_logits, sweep_.rows().linear_weight);
    }
  }
  if (wanted_[1]) {
    add_to_linear_weight(chunk, grad_logits);
  }
  if (wanted_[2]) {
    linear_bias_.add_(grad_logits.sum(0, /*keepdim=*/false, linear_bias_.scalar_type()));
  }
  first_ = false;
}

void LinearGrads::add_to_linear_weight(const Chunk& chunk, const Tensor& grad_logits) {
  auto input = chunk.input;
  if (sweep_.may_have_ignored()) {
    // Their logits have the gradient 0; 0 times a NaN would still be one.
    input = input.masked_fill(chunk.target.eq(sweep_.rows().ignore_index).unsqueeze(1), 0);
  }
  const auto transposed = grad_logits.t();
  if (linear_weight_.scalar_type() == input.scalar_type()) {
    if (first_) {
      at::mm_out(linear_weight_, transposed, input);
    } else {
      linear_weight_.addmm_(transposed, input);
    }
    return;
  }
  for (int64_t begin = 0; begin < sweep_.n_classes(); begin += kColumns) {
    const int64_t size = std::min(kColumns, sweep_.n_classes() - begin);
    auto sum = linear_weight_.narrow(0, begin, size);
    const auto part = transposed.narrow(0, begin, size).mm(input);
    if (first_) {
      sum.copy_(part);
    } else {
      sum.add_(part);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> LinearGrads::results() {
  if (first_ && wanted_[1]) {  // there was no chunk
    linear_weight_.zero_();
  }
  const auto dtype = sweep_.rows().input.scalar_type();
  return {input_, linear_weight_.to(dtype), linear_bias_.to(dtype)};
}

}  // namespace npu_xent::composite
