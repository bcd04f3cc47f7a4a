// What a launch is asked to do, beside its tensors and its plan: plain numbers, shared by host and device.
#pragma once

#include <cstdint>

// Passed to kernels by value; see XentPlan for why it looks like this.
struct XentArgs {
  int64_t stage;  // Stage
  int64_t dtype;  // LogitsType
  int64_t rows;
  int64_t cols;           // of this class shard
  int64_t logits_stride;  // elements from row to row
  int64_t output_stride;  // the same of the gradient
  int64_t class_start;    // the class of column 0
  int64_t num_classes;    // of all shards
  int64_t ignore_index;
  int64_t reduction;      // Reduction of row_math.h
  int64_t read_ignored;   // statistics of ignored rows too
  int64_t unit_upstream;  // the gradient of the loss is 1 and no tensor
  int64_t factor_dtype;   // LogitsType: of the factor of scale
  float logit_scale;      // t
  float grad_scale;       // u
  float target_share;     // 1 - e, e the label smoothing
  float class_share;      // e / num_classes
  float lse_square_scale;
  float softcap;  // c, 0: none
};

namespace npu_xent {

// The parts of an operation that are launches of their own.
enum class Stage : int64_t {
  whole,
  partial_stats,  // row_stats, split: statistics of parts
  log_prob_only,  // row_stats, split: log_prob from given statistics
  join_parts,     // reduce_rows: parts into rows
  block_totals,   // reduce_rows: kept weight and rows, class weights, a sum a block
  join_totals,    // reduce_rows: sums of those
  block_loss,     // reduce_rows: losses, or a sum of them a block
  join_loss,      // reduce_rows: the sum of those
};

}  // namespace npu_xent
