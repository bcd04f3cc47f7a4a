// The numbers that a kernel launch takes besides its tensors and its plan, shared by host and device. Plain C++17
// without torch or CANN.
#pragma once

#include <cstdint>

// Passed to kernels by value; XentPlan says why it has this form.
struct XentArgs {
  int64_t stage;  // Stage
  int64_t dtype;  // LogitsType
  int64_t rows;
  int64_t cols;           // of this class shard
  int64_t logits_stride;  // elements from row to row
  int64_t output_stride;  // the same for the gradient
  int64_t class_start;    // the class of column 0
  int64_t num_classes;    // of all shards
  int64_t ignore_index;
  int64_t reduction;      // Reduction
  int64_t read_ignored;   // compute statistics of ignored rows too
  int64_t unit_upstream;  // the gradient of the loss is 1, and there is no tensor for it
  int64_t adds_to_a;      // row_grad: what is added to a, instead of the gradient of z, is in its tensor
  int64_t factor_dtype;   // LogitsType of the factor of scale
  int64_t row_scaled;     // each row's logits are multiplied by a number of the row
  int64_t by_row;         // the kernel needs memory for that number, an entropy or top1
  float logit_scale;      // t
  float grad_scale;       // u
  float target_share;     // 1 - e, with e the label smoothing
  float class_share;      // e / num_classes
  float lse_square_scale;
  float softcap;  // c, 0: none
};

// The members of XentArgs, f(name) for each: csrc/module.cpp tells Python the layout from this list.
#define XENT_ARGS_MEMBERS(f)                                                                                        \
  f(stage) f(dtype) f(rows) f(cols) f(logits_stride) f(output_stride) f(class_start) f(num_classes) f(ignore_index) \
      f(reduction) f(read_ignored) f(unit_upstream) f(adds_to_a) f(factor_dtype) f(row_scaled) f(by_row)            \
          f(logit_scale) f(grad_scale) f(target_share) f(class_share) f(lse_square_scale) f(softcap)

#define XENT_SIZE(name) +sizeof(XentArgs::name)
static_assert(sizeof(XentArgs) == 0 XENT_ARGS_MEMBERS(XENT_SIZE), "a member is not in the list, or there is padding");
#undef XENT_SIZE

namespace npu_xent {

// The launches that an operation consists of.
enum class Stage : int64_t {
  whole,
  partial_stats,  // row_stats, split: statistics of parts
  log_prob_only,  // row_stats, split: log_prob from given statistics
  join_parts,     // reduce_rows: parts into rows
  block_totals,   // reduce_rows: the totals of each block of rows, and the sum of each block of class weights
  join_totals,    // reduce_rows: sums of those
  block_loss,     // reduce_rows: losses, or their sum for each block
  join_loss,      // reduce_rows: the sum of those
};

enum class Reduction : int64_t { none, mean, sum };

// With adds_to_a, the target of a row that has none, whose coefficients b and s are 0.
constexpr int64_t kNoTarget = -3;

// The numbers in the `totals` tensor, in this order: the class weights of the kept rows' targets added up, the number
// of kept rows, and the sum of all class weights.
enum Totals : int64_t { kKeptWeight, kKeptRows, kClassWeight, kTotals };

}  // namespace npu_xent
