// Sweeps over rows: the layer of the CPU implementation between the vectorised loops (kernels/) and torch
// (operators.cpp). Torch-free: threads come in as a `Parallel`.
//
// A row is cut into chunks of a fixed width, and chunk results are merged in ascending order. Threads take whole rows,
// or single chunks when there are few rows. Either way results are bitwise independent of the number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>

#include "cpu/kernels/chunk_kernels.h"
#include "row_math.h"

namespace npu_xent::cpu {

// Runs task(0), ..., task(n_tasks - 1), in any order, on up to `threads` threads.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t n_tasks, const std::function<void(int64_t)>& task)> run;
};

// The logits of n_rows rows, or of one class shard of them, with targets and class weights.
template <typename scalar_t>
struct Rows {
  RowOptions options;
  const scalar_t* logits;
  int64_t row_stride, n_rows, n_cols;
  const int64_t* target;               // [n_rows], each in [0, number of classes) or ignore_index
  const acc_t<scalar_t>* weight;       // of all classes, or null for all ones
  const acc_t<scalar_t>* temperature;  // of each row, or null for all ones

  // A temperature divides the scale, the softcap, and the outermost factor of the gradient.
  double divided(double option, int64_t n) const { return temperature ? option / temperature[n] : option; }
  LogitMap<acc_t<scalar_t>> logit_map(int64_t n) const {
    return {static_cast<acc_t<scalar_t>>(divided(options.logit_scale, n)),
            static_cast<acc_t<scalar_t>>(divided(options.softcap, n))};
  }
};

// One value per row.
template <typename scalar_t>
struct Stats {
  acc_t<scalar_t>*lse, *lse_low, *picked;
  // Null: not wanted.
  acc_t<scalar_t>*wsum, *entropy;
  bool* top1;
};

// The upstream gradients of each row, before the division of a mean. Null means zeros; stride 0 means one value for all
// rows.
template <typename scalar_t>
struct Upstream {
  const acc_t<scalar_t>*grad_loss, *grad_z_loss, *grad_lse, *grad_entropy;
  int64_t loss_stride, z_loss_stride, lse_stride, entropy_stride;
};

// Statistics of every row, and log_prob [n_rows, n_cols] unless null. Ignored rows count as zeros and are not read
// unless `read_ignored`.
template <typename scalar_t>
void row_stats(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
               const Stats<scalar_t>& out, scalar_t* log_prob, const Parallel& parallel);

// The gradient from statistics, [n_rows, n_cols] with row stride `grad_stride`; `grad` may be the logits. `totals` has
// kTotals values; a null lse_low means zeros; `entropy` is read only for a gradient of it.
template <typename scalar_t>
void row_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, const double* totals,
              const Upstream<scalar_t>& upstream, const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low,
              const acc_t<scalar_t>* entropy, scalar_t* grad, int64_t grad_stride, const Parallel& parallel);

// Both in one sweep, with an upstream gradient of 1.
template <typename scalar_t>
void row_stats_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
                    const double* totals, const Stats<scalar_t>& out, scalar_t* grad, int64_t grad_stride,
                    const Parallel& parallel);

// x[0:n] *= factor
template <typename scalar_t>
void scale(const ChunkKernels<scalar_t>& kernels, scalar_t* x, int64_t n, double factor, const Parallel& parallel);

// totals[kTotals] over all rows. Returns the first row whose target is out of range (the totals are then
// meaningless), or -1.
template <typename acc>
int64_t reduce_totals(const RowOptions& options, const int64_t* target, int64_t n_rows, const acc* weight,
                      double* totals, const Parallel& parallel);

// The loss and z-loss: one value per row for Reduction::none, else one value each. Returns the same as reduce_totals.
template <typename acc>
int64_t reduce_loss(const RowOptions& options, const int64_t* target, int64_t n_rows, const acc* weight, const acc* lse,
                    const acc* lse_low, const acc* picked, const acc* wsum, const double* totals, double* loss,
                    double* z_loss, const Parallel& parallel);

}  // namespace npu_xent::cpu
