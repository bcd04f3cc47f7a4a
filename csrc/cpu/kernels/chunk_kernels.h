// The vectorised loops of the CPU implementation: what happens to one chunk of one row of logits.
// Compiled once per instruction set; which table serves this machine is decided at run time.
// Raw pointers and plain structs only: of torch the loops take the arithmetic of at::vec, and nothing else.
#pragma once

#include <cstdint>
#include <string>

namespace npu_xent::cpu {

// 16-bit storage types, named here so that nobody who includes this file needs torch's.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Statistics are kept in fp32, in fp64 for fp64 logits.
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

// What the softmax sees of a stored logit: z(x) = scale x or, unless softcap is 0, softcap tanh(scale x / softcap).
template <typename acc>
struct LogitMap {
  acc scale, softcap;
};

template <typename acc>
struct ChunkStats {
  acc max;  // of z; NaN if any element is NaN
  acc sum;  // of exp(z - max); 0 when max is not finite
  // Unless asked for 0:
  acc wsum;    // of w (z - max)
  acc weight;  // of w
};

// x: the chunk's logits; n > 0 of them; w: its class weights, or null for all ones; z: see LogitMap; slope: 1 or, with
// a softcap, 1 - (z / softcap)^2.
template <typename scalar_t>
struct ChunkKernels {
  using acc = acc_t<scalar_t>;

  // Statistics; `exps` (null: not wanted) receives exp(z - max), all 0 when max is not finite. Meanwhile n elements at
  // `next` (null: none; nor need they exist) come into the cache.
  ChunkStats<acc> (*stats)(const scalar_t* x, const acc* w, int64_t n, LogitMap<acc> map, bool need_wsum, acc* exps,
                           const scalar_t* next);
  // Those below write. past_cache: not through the caches, for what is not read again soon; `finish` comes after, and
  // out is not x. out = slope (scale exps - offset w); out may be x
  void (*grad_from_exps)(const scalar_t* x, const acc* exps, const acc* w, int64_t n, LogitMap<acc> map, acc scale,
                         acc offset, scalar_t* out, bool past_cache);
  // out = slope (scale exp(z - shift) - offset w); out may be x
  void (*grad)(const scalar_t* x, const acc* w, int64_t n, LogitMap<acc> map, acc shift, acc scale, acc offset,
               scalar_t* out, bool past_cache);
  // out = z - lse - lse_low
  void (*log_prob)(const scalar_t* x, int64_t n, LogitMap<acc> map, acc lse, acc lse_low, scalar_t* out,
                   bool past_cache);
  void (*fill)(scalar_t* out, int64_t n, acc value, bool past_cache);
  // out *= scale
  void (*scale)(scalar_t* out, int64_t n, acc scale);
  // z of one logit, with the bits that it has in a chunk.
  acc (*mapped)(const scalar_t* x, LogitMap<acc> map);
  void (*store)(scalar_t* out, acc value);
  // Makes what this thread has written past the cache visible to others.
  void (*finish)();
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

// The table for `capability`, one of torch's names (DEFAULT, AVX2, AVX512, SVE256); the baseline for any
// name that this library holds no variant for.
const KernelTable& kernel_table(const std::string& capability);

// The variants in this library, separated by spaces.
std::string compiled_capabilities();

}  // namespace npu_xent::cpu
