// Reductions inside a repeat: WholeReduce*, BlockReduce*, PairReduceSum, RepeatReduceSum, and their newer names
// ReduceRepeat, ReduceDataBlock, ReducePairElem. Sums add neighbours, then neighbouring sums, and so on, rounding to
// the type each time. Of several extremes the first counts; a NaN counts as the extreme (not documented).
#pragma once

#include <limits>

#include "cann_sim/vector_engine.h"
#include "cann_sim/vector_ops.h"

namespace cann_sim {

using AscendC::ReduceOrder;
using AscendC::ReduceType;

constexpr uint32_t kMostLanes = 128;

template <typename T>
struct Extreme {
  T value;
  uint32_t index;
};

// Sum of `width` (a power of two) values by pairs; lanes that are off hold -0, which changes no sum.
template <typename T>
T tree_sum(float* values, uint32_t width) {
  for (; width > 1; width /= 2) {
    for (uint32_t i = 0; i < width / 2; ++i) {
      const float sum = values[2 * i] + values[2 * i + 1];
      values[i] = float(T(sum));
    }
  }
  return T(values[0]);
}

template <ReduceType type>
bool beats(float candidate, float best) {
  if (best != best) {
    return false;
  }
  return candidate != candidate || (type == ReduceType::MAX ? candidate > best : candidate < best);
}

// The lanes of a repeat as float; those that take no part get `absent`, which changes no result.
template <typename T>
void load_repeat(const Operand<T>& src, const Lanes& lanes, uint32_t repeat, float absent, float* values) {
  const uint32_t active = lanes.prefix ? lanes.active_in(repeat) : 0;
  for (uint32_t lane = 0; lane < active; lane += kChunk) {
    const uint32_t part = active - lane < kChunk ? active - lane : kChunk;
    const Chunk<T> chunk = load_lanes(src, repeat, lane, part);
    const Chunk<float> wide = apply_chunk<float>([](T value) { return float(value); }, part, chunk);
    std::memcpy(values + lane, wide.at, part * sizeof(float));
  }
  for (uint32_t lane = active; lane < lanes.width; ++lane) {
    values[lane] = !lanes.prefix && lanes.on(lane)
                       ? float(*advance(static_cast<const T*>(src.local.data()), src.lane_offset(repeat, lane)))
                       : absent;
  }
}

template <ReduceType type>
constexpr float absent_value() {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  return type == ReduceType::SUM ? -0.0f : type == ReduceType::MAX ? -infinity : infinity;
}

// The first extreme of a repeat, whose width is a multiple of 8.
template <ReduceType type, typename T>
Extreme<T> find_extreme(const Lanes& lanes, const float* values) {
  float best[8];
  uint32_t nan[8] = {};
  std::memcpy(best, values, sizeof(best));
  for (uint32_t lane = 0; lane < lanes.width; lane += 8) {
    for (uint32_t i = 0; i < 8; ++i) {
      const float value = values[lane + i];
      best[i] = (type == ReduceType::MAX ? value > best[i] : value < best[i]) ? value : best[i];
      nan[i] |= value != value ? 1u : 0u;
    }
  }
  bool any_nan = false;
  float extreme = best[0];
  for (uint32_t i = 0; i < 8; ++i) {
    any_nan = any_nan || nan[i] != 0;
    extreme = beats<type>(best[i], extreme) ? best[i] : extreme;
  }
  for (uint32_t lane = 0; lane < lanes.width; ++lane) {
    if ((any_nan ? values[lane] != values[lane] : values[lane] == extreme) && (lanes.prefix || lanes.on(lane))) {
      return {T(values[lane]), lane};
    }
  }
  return {T(extreme), 0};
}

inline uint32_t stride16(const char* op, Place where, const char* name, int64_t stride) {
  if (stride < 0 || stride > 65535) {
    core().fail("params", where,
                format("%s: %s is %lld, allowed are 0 to 65535", op, name, static_cast<long long>(stride)));
  }
  return static_cast<uint32_t>(stride);
}

// Checks a reduction. `cover(list, repeat)` adds the byte ranges that a repeat writes, relative to dst. A result may
// land on what its own or an earlier repeat read (reductions in place), not on what a later one is to read.
template <typename T, typename Cover>
void begin_reduce(const char* op, Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst,
                  const Operand<T>& src, uint32_t alignment, const Cover& cover) {
  require_alignment(op, where, "dst", dst, alignment);
  check_operand(op, where, lanes, src);
  Accesses writes;
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    cover(writes, repeat);
  }
  for (const Access& write : writes) {
    require_range(op, where, "dst", dst, write.offset, write.bytes, sizeof(T));
  }
  if (!core().checking()) {
    core().vector(op, where, VectorClass::reduce, lanes.repeats, sizeof(T), writes, writes);
    return;
  }
  Accesses reads, absolute;
  add_accesses(reads, src, lanes);
  for (const Access& write : writes) {
    absolute.add(uint64_t{dst.address()} + write.offset, write.bytes);
  }
  for (uint32_t repeat = 0; repeat + 1 < lanes.repeats; ++repeat) {
    Accesses written;
    cover(written, repeat);
    for (const Access& write : written) {
      // Repeats read upwards: the next one's start is the lowest byte still to be read.
      const uint64_t begin = dst.address() + write.offset, end = begin + write.bytes;
      const uint64_t unread = src.address() + src.block_offset(repeat + 1, 0);
      const uint64_t last = src.address() + extent(src, lanes);
      if (end > unread && begin < last) {
        core().fail("overlap", where,
                    format("%s: the result of repeat %u (UB bytes %llu to %llu) overwrites src before it is read", op,
                           repeat, static_cast<unsigned long long>(begin), static_cast<unsigned long long>(end)));
      }
    }
  }
  core().vector(op, where, VectorClass::reduce, lanes.repeats, sizeof(T), reads, absolute);
}

// One result for each repeat: a sum, or an extreme with its lane.
template <ReduceType type, typename T>
void whole_reduce(const char* op, Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, int64_t dst_stride, int64_t src_block, int64_t src_repeat,
                  ReduceOrder order) {
  const uint32_t stride = stride16(op, where, "dstRepStride", dst_stride);
  const Operand<T> from("src", src, strides_of(op, where, "src", src_block, src_repeat, 65535, 65535));
  if (lanes.repeats == 0) {
    return;
  }
  const bool value_only = type == ReduceType::SUM || order == ReduceOrder::ORDER_ONLY_VALUE;
  const uint32_t unit = value_only                               ? sizeof(T)
                        : order == ReduceOrder::ORDER_ONLY_INDEX ? sizeof(uint32_t)
                                                                 : 2 * sizeof(T);
  begin_reduce(op, where, lanes, dst, from, unit,
               [&](Accesses& list, uint32_t repeat) { list.add(uint64_t{repeat} * stride * unit, unit); });
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    float values[kMostLanes];
    load_repeat(from, lanes, repeat, absent_value<type>(), values);
    uint8_t* to = reinterpret_cast<uint8_t*>(dst.data()) + uint64_t{repeat} * stride * unit;
    if constexpr (type == ReduceType::SUM) {
      const T sum = tree_sum<T>(values, lanes.width);
      std::memcpy(to, &sum, sizeof(T));
    } else {
      const Extreme<T> extreme = find_extreme<type, T>(lanes, values);
      // The index has the bits of an integer as wide as T; alone it is a uint32_t.
      if (order == ReduceOrder::ORDER_ONLY_INDEX) {
        std::memcpy(to, &extreme.index, sizeof(uint32_t));
        continue;
      }
      const bool index_first = order == ReduceOrder::ORDER_INDEX_VALUE;
      std::memcpy(to + (index_first ? sizeof(T) : 0), &extreme.value, sizeof(T));
      if (order != ReduceOrder::ORDER_ONLY_VALUE) {
        std::memcpy(to + (index_first ? 0 : sizeof(T)), &extreme.index, sizeof(T));  // little endian
      }
    }
  }
}

// One result for each block, or for each pair of lanes. Groups none of whose lanes take part are not written.
template <ReduceType type, typename T>
void group_reduce(const char* op, Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst,
                  const AscendC::LocalTensor<T>& src, uint32_t group, int64_t dst_stride, int64_t src_block,
                  int64_t src_repeat) {
  const uint32_t stride = stride16(op, where, "dstRepStride", dst_stride);
  const Operand<T> from("src", src, strides_of(op, where, "src", src_block, src_repeat, 65535, 65535));
  if (lanes.repeats == 0) {
    return;
  }
  const uint32_t groups = lanes.width / group, unit = groups * sizeof(T);
  const uint32_t alignment = unit < kBlockBytes ? unit : kBlockBytes;
  begin_reduce(op, where, lanes, dst, from, alignment, [&](Accesses& list, uint32_t repeat) {
    for (uint32_t g = 0; g < groups; ++g) {
      if (lanes.any(repeat, g * group, group)) {
        list.add(uint64_t{repeat} * stride * unit + g * sizeof(T), sizeof(T));
      }
    }
  });
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    float values[kMostLanes];
    load_repeat(from, lanes, repeat, absent_value<type>(), values);
    T* to = advance(dst.data(), uint64_t{repeat} * stride * unit);
    for (uint32_t g = 0; g < groups; ++g) {
      if (!lanes.any(repeat, g * group, group)) {
        continue;
      }
      if constexpr (type == ReduceType::SUM) {
        to[g] = tree_sum<T>(values + g * group, group);
      } else {
        float best = values[g * group];
        for (uint32_t lane = g * group + 1; lane < (g + 1) * group; ++lane) {
          const float value = values[lane];
          const bool better = type == ReduceType::MAX ? value > best : value < best;
          best = better || value != value ? value : best;
        }
        to[g] = T(best);
      }
    }
  }
}

}  // namespace cann_sim

namespace AscendC {

// In all of these the mask is a number of lanes or an array of bits.
template <typename T, bool isSetMask = true, typename M>
void WholeReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const M mask, const int64_t repeatTime,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, CANN_SIM_HERE) {
  CANN_SIM_TYPES(WholeReduceMax, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("WholeReduceMax", where, mask, repeatTime);
  ::cann_sim::whole_reduce<ReduceType::MAX>("WholeReduceMax", where, lanes, dst, src, dstRepStride, srcBlkStride,
                                            srcRepStride, order);
}

template <typename T, bool isSetMask = true, typename M>
void WholeReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src, const M mask, const int64_t repeatTime,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride,
                    ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, CANN_SIM_HERE) {
  CANN_SIM_TYPES(WholeReduceMin, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("WholeReduceMin", where, mask, repeatTime);
  ::cann_sim::whole_reduce<ReduceType::MIN>("WholeReduceMin", where, lanes, dst, src, dstRepStride, srcBlkStride,
                                            srcRepStride, order);
}

template <typename T, bool isSetMask = true, typename M>
void BlockReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime, const M mask,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(BlockReduceSum, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("BlockReduceSum", where, mask, repeatTime);
  ::cann_sim::group_reduce<ReduceType::SUM>("BlockReduceSum", where, lanes, dst, src,
                                            ::cann_sim::kBlockBytes / sizeof(T), dstRepStride, srcBlkStride,
                                            srcRepStride);
}

template <typename T, bool isSetMask = true, typename M>
void BlockReduceMax(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime, const M mask,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(BlockReduceMax, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("BlockReduceMax", where, mask, repeatTime);
  ::cann_sim::group_reduce<ReduceType::MAX>("BlockReduceMax", where, lanes, dst, src,
                                            ::cann_sim::kBlockBytes / sizeof(T), dstRepStride, srcBlkStride,
                                            srcRepStride);
}

template <typename T, bool isSetMask = true, typename M>
void BlockReduceMin(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime, const M mask,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(BlockReduceMin, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("BlockReduceMin", where, mask, repeatTime);
  ::cann_sim::group_reduce<ReduceType::MIN>("BlockReduceMin", where, lanes, dst, src,
                                            ::cann_sim::kBlockBytes / sizeof(T), dstRepStride, srcBlkStride,
                                            srcRepStride);
}

template <typename T, bool isSetMask = true, typename M>
void PairReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime, const M mask,
                   const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(PairReduceSum, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("PairReduceSum", where, mask, repeatTime);
  ::cann_sim::group_reduce<ReduceType::SUM>("PairReduceSum", where, lanes, dst, src, 2, dstRepStride, srcBlkStride,
                                            srcRepStride);
}

template <typename T, bool isSetMask = true, typename M>
void WholeReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const M mask, const int64_t repeatTime,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(WholeReduceSum, T, half, float);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("WholeReduceSum", where, mask, repeatTime);
  ::cann_sim::whole_reduce<ReduceType::SUM>("WholeReduceSum", where, lanes, dst, src, dstRepStride, srcBlkStride,
                                            srcRepStride, ReduceOrder::ORDER_ONLY_VALUE);
}

// dstBlkStride has no effect.
template <typename T, bool isSetMask = true, typename M>
void RepeatReduceSum(const LocalTensor<T>& dst, const LocalTensor<T>& src, const int64_t repeatTime, const M mask,
                     const int64_t dstBlkStride, const int64_t srcBlkStride, const int64_t dstRepStride,
                     const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(RepeatReduceSum, T, half, float);
  static_cast<void>(dstBlkStride);
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("RepeatReduceSum", where, mask, repeatTime);
  ::cann_sim::whole_reduce<ReduceType::SUM>("RepeatReduceSum", where, lanes, dst, src, dstRepStride, srcBlkStride,
                                            srcRepStride, ReduceOrder::ORDER_ONLY_VALUE);
}

// The newer names, with the kind of reduction as a template parameter.
template <ReduceType reduceType, typename T, typename U, bool isSetMask = true, typename M>
void ReduceRepeat(const LocalTensor<T>& dst, const LocalTensor<U>& src, const M mask, const int64_t repeatTime,
                  const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride,
                  ReduceOrder order = ReduceOrder::ORDER_VALUE_INDEX, CANN_SIM_HERE) {
  CANN_SIM_TYPES(ReduceRepeat, T, half, float);
  static_assert(std::is_same_v<T, U>, "ReduceRepeat: dst and src have one type on Atlas A2");
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("ReduceRepeat", where, mask, repeatTime);
  ::cann_sim::whole_reduce<reduceType>("ReduceRepeat", where, lanes, dst, src, dstRepStride, srcBlkStride, srcRepStride,
                                       order);
}

template <ReduceType reduceType, typename T, typename U, bool isSetMask = true, typename M>
void ReduceDataBlock(const LocalTensor<T>& dst, const LocalTensor<U>& src, const M mask, const int64_t repeatTime,
                     const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride,
                     CANN_SIM_HERE) {
  CANN_SIM_TYPES(ReduceDataBlock, T, half, float);
  static_assert(std::is_same_v<T, U>, "ReduceDataBlock: dst and src have one type on Atlas A2");
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("ReduceDataBlock", where, mask, repeatTime);
  ::cann_sim::group_reduce<reduceType>("ReduceDataBlock", where, lanes, dst, src, ::cann_sim::kBlockBytes / sizeof(T),
                                       dstRepStride, srcBlkStride, srcRepStride);
}

template <ReduceType reduceType, typename T, typename U, bool isSetMask = true, typename M>
void ReducePairElem(const LocalTensor<T>& dst, const LocalTensor<U>& src, const M mask, const int64_t repeatTime,
                    const int64_t dstRepStride, const int64_t srcBlkStride, const int64_t srcRepStride, CANN_SIM_HERE) {
  CANN_SIM_TYPES(ReducePairElem, T, half, float);
  static_assert(std::is_same_v<T, U>, "ReducePairElem: dst and src have one type on Atlas A2");
  static_assert(reduceType == ReduceType::SUM, "ReducePairElem only sums");
  const auto lanes = ::cann_sim::repeat_lanes<isSetMask, T>("ReducePairElem", where, mask, repeatTime);
  ::cann_sim::group_reduce<reduceType>("ReducePairElem", where, lanes, dst, src, 2, dstRepStride, srcBlkStride,
                                       srcRepStride);
}

}  // namespace AscendC
