// The operands of the sweeps over rows, as plain structs: shared by the sweeps (rows.h) and the vectorised loops
// (kernels/).
#pragma once

#include <cstdint>

#include "cpu/kernels/chunk_kernels.h"
#include "row_math.h"

namespace npu_xent::cpu {

// Where rows lie: class c of row n is at (n / inner) outer + (n % inner) row + c column.
struct Layout {
  int64_t inner, outer, row, column;

  // Rows with adjacent classes and a single stride.
  static Layout of_rows(int64_t n_rows, int64_t stride) { return {n_rows, 0, stride, 1}; }
  int64_t row_start(int64_t n) const { return n / inner * outer + n % inner * row; }
};

// The logits of n_rows rows, or of one class shard of them, with targets and class weights. The stride of the classes
// is 1, or else that of the rows.
template <typename scalar_t>
struct Rows {
  RowOptions options;
  const scalar_t* logits;
  Layout layout;
  int64_t n_rows, n_cols;
  const int64_t* target;               // [n_rows], each in [0, number of classes) or ignore_index, or null
  const acc_t<scalar_t>* weight;       // of all classes, or null for all ones
  const acc_t<scalar_t>* temperature;  // of each row, or null for all ones
  // Class probabilities q of each row, or null. With them class c has the part v_c = w_c ((1 - e) q_c + e/C) in the
  // loss, which takes the place of w_c in wsum and in the gradient; there are no targets; and the gradient needs
  // part_sum, the sum of each row's parts.
  const scalar_t* probabilities = nullptr;
  Layout probability_layout{};  // of as many rows an image as the logits'
  const acc_t<scalar_t>* part_sum = nullptr;

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
  acc_t<scalar_t>*lse, *lse_low;
  acc_t<scalar_t>* picked;  // null without targets
  // Null: not wanted.
  acc_t<scalar_t>*wsum, *entropy;
  bool* top1;
  acc_t<scalar_t>* part_sum = nullptr;  // with probabilities; wsum then is of the parts
};

// The upstream gradients of each row, before the division of a mean. Null means zeros; stride 0 means one value for all
// rows.
template <typename scalar_t>
struct Upstream {
  const acc_t<scalar_t>*grad_loss, *grad_z_loss, *grad_lse, *grad_entropy;
  int64_t loss_stride, z_loss_stride, lse_stride, entropy_stride;
};

// An output like the logits. Null data: not wanted.
template <typename scalar_t>
struct Output {
  scalar_t* data;
  Layout layout;
  bool past_cache = false;  // for the loops; the sweeps set it
};

// Consecutive rows, of one image or of several with few rows, side by side in the lanes of vectors; and the number of
// classes that are taken at once.
struct Tile {
  int64_t first, rows, lanes, classes;
};
constexpr int64_t kMaxLanes = 256;
// The values that a tile takes at once: 64 KiB of fp32, for a second-level cache.
constexpr int64_t kMaxTile = 16384;

// A thread's memory for one tile. Arrays have one value per lane.
template <typename acc>
struct TileMemory {
  // planes[c * lanes + i] is class c of row i. `rows` holds them row by row, with space for a vector behind them.
  // `parts` has the classes' parts in the loss of probabilities, in the order of planes.
  alignas(64) acc planes[kMaxTile], parts[kMaxTile];
  alignas(64) acc rows[kMaxTile + 64];
  alignas(64) acc scale[kMaxLanes], softcap[kMaxLanes], kept[kMaxLanes], keep[kMaxLanes];
  alignas(64) acc max[kMaxLanes], sum[kMaxLanes], rounding[kMaxLanes], tilted[kMaxLanes], wsum[kMaxLanes];
  alignas(64) acc place[kMaxLanes], picked[kMaxLanes], rival[kMaxLanes], at_target[kMaxLanes];
  alignas(64) acc shift[kMaxLanes], factor[kMaxLanes], tilt[kMaxLanes], offset[kMaxLanes];
  alignas(64) double all_max[kMaxLanes], all_sum[kMaxLanes], all_tilted[kMaxLanes], all_wsum[kMaxLanes];
  alignas(64) double special[kMaxLanes], reference[kMaxLanes], log_sum[kMaxLanes], high[kMaxLanes], low[kMaxLanes];
  alignas(64) double a[kMaxLanes], b[kMaxLanes], s[kMaxLanes], u[kMaxLanes], h[kMaxLanes], entropy[kMaxLanes];
  alignas(64) double weight[kMaxLanes], below[kMaxLanes], work[kMaxLanes], part_sum[kMaxLanes], all_parts[kMaxLanes];
  alignas(64) int64_t target[kMaxLanes], column[kMaxLanes];
};

}  // namespace npu_xent::cpu
