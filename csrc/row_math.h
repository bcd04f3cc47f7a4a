// The formulas of the loss. With x the logits of row n, y its target, k = 0 if the row is ignored and 1 otherwise,
// t the logit scale, w the class weights, W their sum, C classes, e the label smoothing, zs the z-loss scale:
//
//   lse = log sum_c exp(t x_c)      picked = t x_y      wsum = sum_c w_c (t x_c - lse)
//   l   = k [ (1-e) w_y (lse - picked) - (e/C) wsum ]        z = k zs lse^2
//   dL/dx_c = u ( a p_c - b [c = y] - s w_c ),   p_c = exp(t x_c - lse)
//   a = k G [ (1-e) w_y + (e/C) W ] + k Z 2 zs lse + g      b = k G (1-e) w_y      s = k G e/C
//
// H = -sum_c p_c log p_c, and with h its upstream gradient dL/dx_c also gets - u h p_c (log p_c + H).
//
// A term whose factor (1-e) w_y or w_c is 0 counts as 0, even if its logit is -inf.
//
// With a softcap, cap tanh(t x / cap) replaces t x throughout, and u (1 - tanh(t x / cap)^2) replaces u. A temperature
// T divides t, cap and u.
//
// lse is stored as the sum of two numbers, `lse` and `lse_low`, and wsum is relative to lse; otherwise logits far from
// 0 would cost the loss its precision. G, Z and g are the upstream gradients of the row's l, z and lse; u is t
// unless grad_scale is given. Plain C++17 without torch, shared by the CPU and the C++ tests;
// the composite and the device kernels have the formulas in their own operations.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "tiling/row_args.h"

namespace npu_xent {

// The derivative of c tanh(x / c) where its value is `capped`; softcap 0 means none.
inline double softcap_slope(double capped, double softcap) {
  return softcap == 0 ? 1 : (1 - capped / softcap) * (1 + capped / softcap);
}

// The options as plain numbers; options.h has their meaning.
struct RowOptions {
  Reduction reduction = Reduction::mean;
  int64_t ignore_index = -100;
  double label_smoothing = 0;
  double lse_square_scale = 0;
  int64_t num_classes = 0;  // of all class shards together
  int64_t class_start = 0;  // the class of column 0
  double logit_scale = 1;
  double softcap = 0;     // 0: none
  double grad_scale = 1;  // u of the formulas

  bool is_bad(int64_t target) const {
    const bool is_class = static_cast<uint64_t>(target) < static_cast<uint64_t>(num_classes);
    return !is_class & (target != ignore_index);
  }
};

// l and z, kept separate because a mean divides them by different numbers.
struct RowLoss {
  double loss = 0, z_loss = 0;

  void operator+=(const RowLoss& other) {
    loss += other.loss;
    z_loss += other.z_loss;
  }
};

// The loss of a kept row; NaN if lse is not finite, that is for rows with a NaN or +inf, or of only -inf.
inline RowLoss row_loss(const RowOptions& o, double weight, double lse, double lse_low, double picked, double wsum) {
  if (!std::isfinite(lse)) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan};
  }
  const double share = (1 - o.label_smoothing) * weight;
  double loss = share == 0 ? 0 : share * (lse - picked + lse_low);  // the target's logit may be -inf
  if (o.label_smoothing != 0) {
    loss -= o.label_smoothing / static_cast<double>(o.num_classes) * wsum;
  }
  const double z_loss = o.lse_square_scale * lse * lse;
  return {loss, z_loss};
}

// a without g, b and s of a kept row.
struct RowCoefficients {
  double a, b, s;
};

inline RowCoefficients row_coefficients(const RowOptions& o, double weight, double class_weight, double lse,
                                        double grad_loss, double grad_z) {
  const double per_class = o.label_smoothing / static_cast<double>(o.num_classes);
  const double b = grad_loss * (1 - o.label_smoothing) * weight;
  double a = b;
  if (o.label_smoothing != 0) {
    a += grad_loss * per_class * class_weight;
  }
  if (o.lse_square_scale != 0) {
    a += grad_z * 2 * o.lse_square_scale * lse;
  }
  return {a, b, grad_loss * per_class};
}

// The first row whose target is neither a class nor ignore_index, or -1.
inline int64_t first_bad_target(const RowOptions& o, const int64_t* target, int64_t n_rows) {
  constexpr int64_t kBlock = 1024;  // looked at without branches
  for (int64_t begin = 0; begin < n_rows; begin += kBlock) {
    const int64_t end = begin + kBlock < n_rows ? begin + kBlock : n_rows;
    bool any = false;
    for (int64_t n = begin; n < end; ++n) {
      any |= o.is_bad(target[n]);
    }
    for (int64_t n = begin; any && n < end; ++n) {
      if (o.is_bad(target[n])) {
        return n;
      }
    }
  }
  return -1;
}

}  // namespace npu_xent
