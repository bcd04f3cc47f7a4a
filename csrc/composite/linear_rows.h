// Rows whose logits are a product, chunk by chunk: the logits of one chunk at a time, all chunks in the same memory.
//
// The products are aten's, the sweeps over the logits are the primitives' own; so this is one implementation for every
// device. On the CPU, where looking at the target costs nothing, ignored rows are left out before the products: a chunk
// then gathers the rows that are kept. Elsewhere looking would mean waiting, and the sweeps pass over them.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "checks.h"
#include "ops.h"

namespace npu_xent::composite {

// Rows in a chunk, unless the caller says: those whose logits have 4 % of the memory of all logits in fp32, but so many
// that the products are near their best speed and that adding to the gradient of linear_weight, which every chunk does,
// costs little beside them; and so few that more would bring nothing. Memory of 32 MiB is not worth saving.
inline int64_t default_chunk_rows(int64_t n_rows, int64_t n_cols, int64_t element_size) {
  constexpr int64_t kMany = 512, kStep = 32, kBytes = int64_t{32} << 20;
  const int64_t few = element_size == 2 ? 256 : 128;
  const int64_t share = n_rows * 4 / (25 * element_size) / kStep * kStep;
  return std::max(std::clamp(share, few, kMany), kBytes / (n_cols * element_size));
}

struct Chunk {
  Tensor input;   // [n, H]
  Tensor target;  // [n]
  Tensor places;  // [n], where these rows are among all; undefined if they follow one another, from `begin` on
  int64_t begin, size;

  // These rows of a tensor that has all.
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
  // With `read_ignored`, ignored rows have logits too.
  LinearSweep(const LinearRows& rows, bool read_ignored) : rows_(rows) {
    if (rows.weight) {  // once, not in each chunk
      rows_.weight = rows.weight->to(stats_dtype(rows.input.scalar_type()));
    }
    const int64_t n = rows.input.size(0);
    may_have_ignored_ = true;
    n_kept_ = n;
    if (rows.input.is_cpu()) {
      rows_.target = rows.target.contiguous();
      check_target_range(rows_.target, n_classes(), rows.ignore_index);
      const auto* y = rows_.target.const_data_ptr<int64_t>();
      may_have_ignored_ = std::find(y, y + n, rows.ignore_index) != y + n;
      if (may_have_ignored_ && !read_ignored) {
        kept_ = rows_.target.ne(rows.ignore_index).nonzero().squeeze(1);
        n_kept_ = kept_.numel();
        may_have_ignored_ = false;
      }
    }
    chunk_rows_ = rows.chunk_rows.value_or(default_chunk_rows(n_kept_, n_classes(), rows.input.element_size()));
  }

  const LinearRows& rows() const { return rows_; }
  int64_t n_rows() const { return rows_.input.size(0); }
  int64_t n_classes() const { return rows_.linear_weight.size(0); }
  bool one_chunk() const { return n_kept_ <= chunk_rows_; }
  // Whether a chunk may have ignored rows in it.
  bool may_have_ignored() const { return may_have_ignored_; }
  // Whether some rows are in no chunk.
  bool has_gaps() const { return kept_.defined(); }

  // f(chunk, its logits, which f may overwrite).
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

  // [N], or [0] if not wanted; zeros where no chunk will write.
  Tensor new_values(bool wanted = true) const {
    const auto options = rows_.input.options().dtype(stats_dtype(rows_.input.scalar_type()));
    return has_gaps() ? at::zeros({wanted ? n_rows() : 0}, options) : at::empty({wanted ? n_rows() : 0}, options);
  }

 private:
  LinearRows rows_;
  Tensor kept_;  // the rows that are in chunks, if not all are
  int64_t n_kept_, chunk_rows_;
  bool may_have_ignored_;
};

// One value a row, of all rows.
struct LinearStats {
  Tensor lse, lse_low, picked, wsum;

  LinearStats(const LinearSweep& sweep, bool need_wsum)
      : lse(sweep.new_values()),
        lse_low(sweep.new_values()),
        picked(sweep.new_values()),
        wsum(sweep.new_values(need_wsum)) {}

  void put(const Chunk& chunk, const Tensor& chunk_lse, const Tensor& chunk_low, const Tensor& chunk_picked,
           const Tensor& chunk_wsum) {
    if (chunk.size == lse.size(0)) {  // it has all rows
      lse = chunk_lse;
      lse_low = chunk_low;
      picked = chunk_picked;
      wsum = chunk_wsum;
      return;
    }
    chunk.put(lse, chunk_lse);
    chunk.put(lse_low, chunk_low);
    chunk.put(picked, chunk_picked);
    if (wsum.numel() != 0) {
      chunk.put(wsum, chunk_wsum);
    }
  }
};

// The gradients of input, linear_weight and linear_bias, out of those of the logits of chunks. Those that are not
// wanted have shape [0].
class LinearGrads {
 public:
  LinearGrads(const LinearSweep& sweep, std::array<bool, 3> wanted);
  void add(const Chunk& chunk, const Tensor& grad_logits);
  std::tuple<Tensor, Tensor, Tensor> results();

 private:
  void add_to_linear_weight(const Chunk& chunk, const Tensor& grad_logits);

  const LinearSweep& sweep_;
  std::array<bool, 3> wanted_;
  bool first_ = true;
  Tensor input_, linear_weight_;
  Tensor linear_weight_sum_;  // in fp32, of 16 bits and several chunks
  Tensor linear_bias_sum_;    // in fp32 or fp64
};

}  // namespace npu_xent::composite
