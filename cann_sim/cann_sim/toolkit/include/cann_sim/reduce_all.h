// ReduceSum, ReduceMax, ReduceMin: one result of a whole tensor. The vector unit works repeat by repeat, the scalar
// unit writes the result; the functions order both with whatever comes before and after, as the device's do.
// Sums: by pairs inside a repeat; over repeats in sequence (count form) or by pairs again (repeat form).
#pragma once

#include "cann_sim/reduce.h"

namespace cann_sim {

// What a reduction of a whole tensor works with.
template <typename T>
struct Reduction {
  const char* op;
  Place where;
  Lanes lanes;
  const AscendC::LocalTensor<T>& dst;
  Operand<T> src;
  const AscendC::LocalTensor<T>& tmp;
};

// The vector unit reduces src into `tmp_elements` of the temporary.
template <typename T>
void begin_reduce_all(const Reduction<T>& r, uint64_t tmp_elements) {
  check_operand(r.op, r.where, r.lanes, r.src);
  Accesses reads, writes;
  add_accesses(reads, r.src, r.lanes);
  if (tmp_elements != 0) {
    require_alignment(r.op, r.where, "sharedTmpBuffer", r.tmp, kBlockBytes);
    require_range(r.op, r.where, "sharedTmpBuffer", r.tmp, 0, tmp_elements * sizeof(T), sizeof(T));
    writes.add(r.tmp.address(), tmp_elements * sizeof(T));
  }
  core().vector(r.op, r.where, VectorClass::reduce, r.lanes.repeats, sizeof(T), reads, writes);
}

// Later levels work in the temporary, each after the one before.
template <typename T>
void reduce_again(const Reduction<T>& r, uint64_t tmp_elements) {
  core().order(Pipe::V, Pipe::V);
  const Accesses touched(r.tmp.address(), tmp_elements * sizeof(T));
  const auto repeats = static_cast<uint32_t>((tmp_elements * sizeof(T) + kRepeatBytes - 1) / kRepeatBytes);
  core().vector(r.op, r.where, VectorClass::reduce, repeats, sizeof(T), touched, touched);
}

// The scalar unit takes the result from the temporary or from a register and writes dst.
template <typename T>
void finish_reduce_all(const Reduction<T>& r, const T* results, uint32_t count, bool from_tmp) {
  require_alignment(r.op, r.where, "dst", r.dst, count * sizeof(T));
  require_range(r.op, r.where, "dst", r.dst, 0, count * sizeof(T), sizeof(T));
  core().order(Pipe::V, Pipe::S);
  const Accesses none, read(r.tmp.address(), from_tmp ? sizeof(T) : 0), write(r.dst.address(), count * sizeof(T));
  core().scalar(r.op, r.where, read, write);
  std::memcpy(r.dst.data(), results, count * sizeof(T));
  core().order(Pipe::S, Pipe::V);
  core().order(Pipe::S, Pipe::MTE3);
}

// What the temporary holds afterwards is not for kernels: NaN shows up in whoever relies on it.
template <typename T>
void spoil(const AscendC::LocalTensor<T>& tmp, uint64_t elements) {
  std::memset(static_cast<void*>(tmp.data()), 0xff, elements * sizeof(T));
}

template <typename T>
uint64_t round_to_blocks(uint64_t elements) {
  constexpr uint64_t per_block = kBlockBytes / sizeof(T);
  return (elements + per_block - 1) / per_block * per_block;
}

template <typename T>
std::vector<T> repeat_sums(const Reduction<T>& r) {
  std::vector<T> sums;
  for (uint32_t repeat = 0; repeat < r.lanes.repeats; ++repeat) {
    float values[kMostLanes];
    load_repeat(r.src, r.lanes, repeat, -0.0f, values);
    sums.push_back(tree_sum<T>(values, r.lanes.width));
  }
  return sums;
}

template <typename T>
void reduce_sum_count(const Reduction<T>& r) {
  if (r.lanes.repeats == 0) {
    return;
  }
  begin_reduce_all(r, 0);
  const std::vector<T> sums = repeat_sums(r);
  T total = sums[0];
  for (size_t i = 1; i < sums.size(); ++i) {
    total = ops::Add{}(total, sums[i]);
  }
  finish_reduce_all(r, &total, 1, false);
}

template <typename T>
void reduce_sum_repeats(const Reduction<T>& r) {
  if (r.lanes.repeats == 0) {
    return;
  }
  uint64_t used = round_to_blocks<T>(r.lanes.repeats);
  begin_reduce_all(r, used);
  std::vector<T> sums = repeat_sums(r);
  spoil(r.tmp, used);
  while (sums.size() > 1) {
    reduce_again(r, round_to_blocks<T>(sums.size()));
    std::vector<T> next;
    for (size_t first = 0; first < sums.size(); first += r.lanes.width) {
      float values[kMostLanes];
      for (uint32_t lane = 0; lane < r.lanes.width; ++lane) {
        values[lane] = first + lane < sums.size() ? float(sums[first + lane]) : -0.0f;
      }
      next.push_back(tree_sum<T>(values, r.lanes.width));
    }
    sums = next;
  }
  finish_reduce_all(r, sums.data(), 1, true);
}

// Elements of the temporary: value and index for each repeat; with an index wanted, the levels lie one after another.
template <typename T>
uint64_t extreme_tmp(uint32_t repeats, bool index) {
  constexpr uint32_t per_repeat = kRepeatBytes / sizeof(T);
  uint64_t outputs = uint64_t{repeats} * 2, elements = round_to_blocks<T>(outputs);
  while (index && outputs > 2) {
    outputs = (outputs + per_repeat - 1) / per_repeat * 2;
    elements += round_to_blocks<T>(outputs);
  }
  return elements;
}

template <ReduceType type, typename T>
void reduce_extreme(const Reduction<T>& r, bool index, uint32_t tmp_repeats) {
  if (r.lanes.repeats == 0) {
    return;
  }
  const uint64_t used = extreme_tmp<T>(tmp_repeats == 0 ? 1 : tmp_repeats, index);
  begin_reduce_all(r, used);
  float best = 0;
  uint64_t best_index = 0;
  for (uint32_t repeat = 0; repeat < r.lanes.repeats; ++repeat) {
    float values[kMostLanes];
    load_repeat(r.src, r.lanes, repeat, absent_value<type>(), values);
    const Extreme<T> extreme = find_extreme<type, T>(r.lanes, values);
    if (repeat == 0 || beats<type>(float(extreme.value), best)) {
      best = float(extreme.value);
      // The index counts elements of src from its start, strides included.
      best_index = uint64_t{repeat} * r.src.strides.repeat * r.src.per_block() + extreme.index;
    }
  }
  if (index && sizeof(T) == 2 && best_index > 65535) {
    core().fail("params", r.where,
                format("%s: the index %llu does not fit the 16 bits it has with half", r.op,
                       static_cast<unsigned long long>(best_index)));
  }
  for (uint64_t level = r.lanes.repeats; level > 1; level = (level * 2 * sizeof(T) + kRepeatBytes - 1) / kRepeatBytes) {
    reduce_again(r, round_to_blocks<T>(level * 2 < used ? level * 2 : used));
  }
  spoil(r.tmp, used);
  T results[2] = {T(best), T(0)};
  std::memcpy(&results[1], &best_index, sizeof(T));  // little endian
  finish_reduce_all(r, results, index ? 2 : 1, true);
}

template <typename T>
Operand<T> reduced_repeats(const char* op, Place where, const AscendC::LocalTensor<T>& src, int64_t stride) {
  return Operand<T>("src", src, Strides{1, stride16(op, where, "srcRepStride", stride)});
}

}  // namespace cann_sim

namespace AscendC {

template <typename T, bool isSetMask = true>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,
               const int32_t count, CANN_SIM_HERE) {
  CANN_SIM_TYPES(ReduceSum, T, half, float);
  using namespace ::cann_sim;
  const Lanes lanes = count_lanes<isSetMask, T>("ReduceSum", where, count);
  reduce_sum_count<T>(
      {"ReduceSum", where, lanes, dst, Operand<T>("src", src, contiguous_strides<T>(lanes.width)), sharedTmpBuffer});
}
template <typename T, typename M>
void ReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,
               const M mask, const int64_t repeatTime, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(ReduceSum, T, half, float);
  using namespace ::cann_sim;
  const Lanes lanes = any_repeat_lanes<T>("ReduceSum", where, mask, repeatTime);
  reduce_sum_repeats<T>(
      {"ReduceSum", where, lanes, dst, reduced_repeats("ReduceSum", where, src, srcRepStride), sharedTmpBuffer});
}

#define CANN_SIM_REDUCE_EXTREME(NAME, TYPE)                                                                            \
  template <typename T>                                                                                                \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer,               \
            const int32_t count, bool calIndex = false, CANN_SIM_HERE) {                                               \
    CANN_SIM_TYPES(NAME, T, half, float);                                                                              \
    using namespace ::cann_sim;                                                                                        \
    const Lanes lanes = count_lanes<true, T>(#NAME, where, count);                                                     \
    const Operand<T> from("src", src, contiguous_strides<T>(lanes.width));                                             \
    reduce_extreme<ReduceType::TYPE, T>({#NAME, where, lanes, dst, from, sharedTmpBuffer}, calIndex,                   \
                                        static_cast<uint32_t>(count) / repeat_width<T>());                             \
  }                                                                                                                    \
  template <typename T, typename M>                                                                                    \
  void NAME(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<T>& sharedTmpBuffer, const M mask, \
            const int64_t repeatTime, const int64_t srcRepStride, bool calIndex = false, CANN_SIM_HERE) {              \
    CANN_SIM_TYPES(NAME, T, half, float);                                                                              \
    using namespace ::cann_sim;                                                                                        \
    const Lanes lanes = any_repeat_lanes<T>(#NAME, where, mask, repeatTime);                                           \
    const Operand<T> from = reduced_repeats(#NAME, where, src, srcRepStride);                                          \
    reduce_extreme<ReduceType::TYPE, T>({#NAME, where, lanes, dst, from, sharedTmpBuffer}, calIndex, lanes.repeats);   \
  }

CANN_SIM_REDUCE_EXTREME(ReduceMax, MAX)
CANN_SIM_REDUCE_EXTREME(ReduceMin, MIN)

#undef CANN_SIM_REDUCE_EXTREME

}  // namespace AscendC
