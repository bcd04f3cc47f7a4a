// The vectorised loops of the CPU implementation, each over one chunk of one row of logits. Compiled once per
// instruction set; the table for this machine is picked at run time. Raw pointers and plain structs only: the loops use
// at::vec and nothing else of torch.
#pragma once

#include <cstdint>
#include <string>

#include "row_math.h"

namespace npu_xent::cpu {

// 16-bit storage types, so that including this file does not require torch.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Statistics are fp32, or fp64 for fp64 logits.
template <typename scalar_t>
struct acc_type {
  using type = float;
};
template <>
struct acc_type<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename acc_type<scalar_t>::type;

// The argument of the softmax for a stored logit x: z(x) = scale x, or softcap tanh(scale x / softcap) if softcap > 0.
template <typename acc>
struct LogitMap {
  acc scale, softcap;
};

template <typename acc>
struct ChunkStats {
  acc max;  // of z; NaN if any element is NaN
  acc sum;  // of exp(z - max); 0 when max is not finite
  // 0 unless requested:
  acc tilted;  // of (z - max) exp(z - max), for the entropy
  acc wsum;    // of w (z - max)
  acc weight;  // of w
};

// row_types.h has these.
template <typename scalar_t>
struct Rows;
template <typename scalar_t>
struct Stats;
template <typename scalar_t>
struct Upstream;
template <typename scalar_t>
struct Output;
template <typename acc>
struct TileMemory;
struct Tile;

// Whole sweeps over the rows of a tile, which lie side by side, one in each lane: for rows with few classes, and for
// classes that are not adjacent in memory. Arguments as in rows.h; outputs past the caches need ChunkKernels::finish.
template <typename scalar_t>
struct TileKernels {
  using acc = acc_t<scalar_t>;

  int64_t block;  // the number of lanes of a tile is a multiple of this
  void (*stats)(const Rows<scalar_t>& rows, const Tile& tile, bool read_ignored, const Stats<scalar_t>& out,
                const Output<scalar_t>& log_prob, TileMemory<acc>& memory);
  void (*grad)(const Rows<scalar_t>& rows, const Tile& tile, const double* totals, const Upstream<scalar_t>& upstream,
               const acc* lse, const acc* lse_low, const acc* entropy, const Output<scalar_t>& grad,
               TileMemory<acc>& memory);
  void (*stats_grad)(const Rows<scalar_t>& rows, const Tile& tile, bool read_ignored, const double* totals,
                     const Stats<scalar_t>& out, const Output<scalar_t>& grad, TileMemory<acc>& memory);
  void (*probability_grad)(const Rows<scalar_t>& rows, const Tile& tile, const acc* grad_loss, const acc* lse,
                           const acc* lse_low, const Output<scalar_t>& grad, TileMemory<acc>& memory);
};

// The sum of value(i), as sums side by side, which fill a vector and need not wait for each other.
template <typename Value, typename F>
Value sum_of(int64_t begin, int64_t end, const F& value) {
  constexpr int64_t kSums = 8;
  Value sums[kSums]{};
  int64_t i = begin;
  for (; i + kSums <= end; i += kSums) {
    for (int64_t k = 0; k < kSums; ++k) {
      sums[k] += value(i + k);
    }
  }
  for (; i < end; ++i) {
    sums[0] += value(i);
  }
  for (int64_t k = 1; k < kSums; ++k) {
    sums[0] += sums[k];
  }
  return sums[0];
}

// Loops over one value a row, acc the statistics' type.
template <typename acc>
struct SumKernels {
  // Whether a target is neither a class nor ignore_index.
  bool (*any_bad)(const RowOptions& options, const int64_t* target, int64_t n);
  // The number of targets that are not `ignored`.
  double (*kept_rows)(const int64_t* target, int64_t n, int64_t ignored);
  // The sum of share (lse + lse_low - picked) - per_class wsum over the other rows; NaN if an lse is not finite. A term
  // whose factor is 0 is not read.
  double (*loss)(const int64_t* target, int64_t n, int64_t ignored, double share, double per_class, const acc* lse,
                 const acc* lse_low, const acc* picked, const acc* wsum);
};

// x: the chunk's logits; n > 0 of them; w: its class weights, or null for all ones; z: see LogitMap; slope: 1 or, with
// a softcap, 1 - (z / softcap)^2.
template <typename scalar_t>
struct ChunkKernels {
  using acc = acc_t<scalar_t>;

  // Statistics. `exps`, if not null, receives exp(z - max), all 0 when max is not finite. Prefetches n elements at
  // `next`, which may be null or past the end.
  ChunkStats<acc> (*stats)(const scalar_t* x, const acc* w, int64_t n, LogitMap<acc> map, bool need_wsum,
                           bool need_tilted, acc* exps, const scalar_t* next);
  // The functions below write to `out`. With past_cache they bypass the caches; then call `finish` afterwards, and out
  // must not be x. out = slope (scale exps - offset w); out may be x
  void (*grad_from_exps)(const scalar_t* x, const acc* exps, const acc* w, int64_t n, LogitMap<acc> map, acc scale,
                         acc offset, scalar_t* out, bool past_cache);
  // out = slope ((scale + tilt (z - shift)) exp(z - shift) - offset w); out may be x
  void (*grad)(const scalar_t* x, const acc* w, int64_t n, LogitMap<acc> map, acc shift, acc scale, acc tilt,
               acc offset, scalar_t* out, bool past_cache);
  // out = z - lse - lse_low
  void (*log_prob)(const scalar_t* x, int64_t n, LogitMap<acc> map, acc lse, acc lse_low, scalar_t* out,
                   bool past_cache);
  void (*fill)(scalar_t* out, int64_t n, acc value, bool past_cache);
  // The largest scale x. It may miss a NaN.
  acc (*max)(const scalar_t* x, int64_t n, acc scale);
  // out *= scale
  void (*scale)(scalar_t* out, int64_t n, acc scale);
  // out = w (kept q + per_class): the part of each class in the loss of class probabilities q
  void (*parts)(const scalar_t* q, const acc* w, int64_t n, acc kept, acc per_class, acc* out);
  // out = factor w (z - lse - lse_low), and 0 where a part is 0 and z is -inf
  void (*parts_grad)(const scalar_t* x, const acc* parts, const acc* w, int64_t n, LogitMap<acc> map, acc lse,
                     acc lse_low, acc factor, scalar_t* out, bool past_cache);
  // z of one logit, bitwise identical to its value in a chunk.
  acc (*mapped)(const scalar_t* x, LogitMap<acc> map);
  void (*store)(scalar_t* out, acc value);
  // Makes this thread's cache-bypassing stores visible to other threads.
  void (*finish)();
  TileKernels<scalar_t> tile;
  SumKernels<acc> sums;
};

struct KernelTable {
  ChunkKernels<float> f32;
  ChunkKernels<double> f64;
  ChunkKernels<bf16> bf16_;
  ChunkKernels<f16> f16_;

  template <typename scalar_t>
  const ChunkKernels<scalar_t>& of() const;
};

template <>
inline const ChunkKernels<float>& KernelTable::of<float>() const {
  return f32;
}
template <>
inline const ChunkKernels<double>& KernelTable::of<double>() const {
  return f64;
}
template <>
inline const ChunkKernels<bf16>& KernelTable::of<bf16>() const {
  return bf16_;
}
template <>
inline const ChunkKernels<f16>& KernelTable::of<f16>() const {
  return f16_;
}

// The table for `capability`, one of torch's names (DEFAULT, AVX2, AVX512, SVE256); the baseline if this library has no
// variant of that name.
const KernelTable& kernel_table(const std::string& capability);

// The variants in this library, separated by spaces.
std::string compiled_capabilities();
// The name of the variant that kernel_table returns.
std::string variant_name(const std::string& capability);

}  // namespace npu_xent::cpu
