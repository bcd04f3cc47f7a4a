// Sweeps over rows: the layer of the CPU implementation between the vectorised loops (kernels/) and torch
// (operators.cpp). Torch-free: threads come in as a `Parallel`.
//
// A row is cut into chunks of a fixed width, and chunk results are merged in ascending order. Threads take whole rows,
// or single chunks when there are few rows. Rows with few classes, or whose classes are not adjacent, go in tiles
// instead: side by side, one in each lane of a vector. In any case results are bitwise independent of the number of
// threads.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/row_types.h"

namespace npu_xent::cpu {

// Runs task(0), ..., task(n_tasks - 1), in any order, on up to `threads` threads.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t n_tasks, const std::function<void(int64_t)>& task)> run;
};

// Statistics of every row, and log_prob unless its data is null. Ignored rows count as zeros unless `read_ignored`.
template <typename scalar_t>
void row_stats(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
               const Stats<scalar_t>& out, const Output<scalar_t>& log_prob, const Parallel& parallel);

// The gradient from statistics; `grad` may be the logits. `totals` has kTotals values; a null lse_low means zeros;
// `entropy` is read only for a gradient of it.
template <typename scalar_t>
void row_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, const double* totals,
              const Upstream<scalar_t>& upstream, const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low,
              const acc_t<scalar_t>* entropy, const Output<scalar_t>& grad, const Parallel& parallel);

// Both in one sweep, with an upstream gradient of 1.
template <typename scalar_t>
void row_stats_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows, bool read_ignored,
                    const double* totals, const Stats<scalar_t>& out, const Output<scalar_t>& grad,
                    const Parallel& parallel);

// The gradient of the probabilities, from the upstream gradient of each row's loss.
template <typename scalar_t>
void probability_grad(const ChunkKernels<scalar_t>& kernels, const Rows<scalar_t>& rows,
                      const acc_t<scalar_t>* grad_loss, const acc_t<scalar_t>* lse, const acc_t<scalar_t>* lse_low,
                      const Output<scalar_t>& grad, const Parallel& parallel);

// x[0:n] *= factor
template <typename scalar_t>
void scale(const ChunkKernels<scalar_t>& kernels, scalar_t* x, int64_t n, double factor, const Parallel& parallel);

// totals[kTotals] over all rows. Returns the first row whose target is out of range (the totals are then
// meaningless), or -1.
template <typename acc>
int64_t reduce_totals(const SumKernels<acc>& kernels, const RowOptions& options, const int64_t* target, int64_t n_rows,
                      const acc* weight, double* totals, const Parallel& parallel);

// The loss and z-loss: one value per row for Reduction::none, else one value each. Returns the same as reduce_totals.
template <typename acc>
int64_t reduce_loss(const SumKernels<acc>& kernels, const RowOptions& options, const int64_t* target, int64_t n_rows,
                    const acc* weight, const acc* lse, const acc* lse_low, const acc* picked, const acc* wsum,
                    const double* totals, double* loss, double* z_loss, const Parallel& parallel);

}  // namespace npu_xent::cpu
