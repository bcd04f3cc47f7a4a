// Gather: dst[i] is the element of src at byte srcBaseAddr + srcOffset[i].
#pragma once

#include "cann_sim/vector_engine.h"

namespace cann_sim {

template <typename T>
void gather(Place where, const Lanes& lanes, const AscendC::LocalTensor<T>& dst, const AscendC::LocalTensor<T>& src,
            const AscendC::LocalTensor<uint32_t>& offsets, uint64_t base, Strides to) {
  CANN_SIM_TYPES(Gather, T, int16_t, uint16_t, half, bfloat16_t, int32_t, uint32_t, float);
  if (lanes.repeats == 0) {
    return;
  }
  const Operand<T> out("dst", dst, to);
  check_dst("Gather", where, lanes, out);
  require_alignment("Gather", where, "src", src, kBlockBytes);
  require_alignment("Gather", where, "srcOffset", offsets, kBlockBytes);
  const uint64_t count = uint64_t{lanes.repeats - 1} * lanes.width + (lanes.prefix ? lanes.tail : lanes.width);
  require_range("Gather", where, "srcOffset", offsets, 0, count * sizeof(uint32_t), sizeof(uint32_t));
  Accesses reads(offsets.address(), count * sizeof(uint32_t)), writes;
  add_accesses(writes, out, lanes);
  const auto on = [&](uint32_t repeat, uint32_t lane) {
    return lanes.prefix ? lane < lanes.active_in(repeat) : lanes.on(lane);
  };
  const auto from = [&](uint32_t repeat, uint32_t lane) { return base + offsets.data()[repeat * lanes.width + lane]; };
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (!on(repeat, lane)) {
        continue;
      }
      const uint64_t at = from(repeat, lane);
      if (at % sizeof(T) != 0) {
        core().fail(
            "alignment", where,
            format("Gather: element %u is at byte %llu of src, no multiple of its %u bytes",
                   repeat * lanes.width + lane, static_cast<unsigned long long>(at), static_cast<unsigned>(sizeof(T))));
      }
      require_range("Gather", where, "src", src, at, sizeof(T), sizeof(T));
      reads.add(src.address() + at, sizeof(T));
    }
  }
  const uint64_t end = dst.address() + extent(out, lanes);
  if (dst.address() < src.address() + src.bytes() && src.address() < end && dst.address() == src.address()) {
    core().fail("overlap", where, "Gather: dst and src are the same memory, which it does not support");
  }
  core().vector("Gather", where, VectorClass::gather, lanes.repeats, sizeof(T), reads, writes);
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (on(repeat, lane)) {
        *advance(dst.data(), out.lane_offset(repeat, lane)) = src.data()[from(repeat, lane) / sizeof(T)];
      }
    }
  }
}

}  // namespace cann_sim

namespace AscendC {

template <typename T, typename M>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
            const uint32_t srcBaseAddr, const M mask, const int64_t repeatTime, const int64_t dstRepStride,
            CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::repeat_lanes<true, T>("Gather", where, mask, repeatTime);
  ::cann_sim::gather(where, lanes, dst, src, srcOffset, srcBaseAddr,
                     ::cann_sim::strides_of("Gather", where, "dst", 1, dstRepStride, 1, 65535));
}
template <typename T>
void Gather(const LocalTensor<T>& dst, const LocalTensor<T>& src, const LocalTensor<uint32_t>& srcOffset,
            const uint32_t srcBaseAddr, const uint32_t count, CANN_SIM_HERE) {
  const auto lanes = ::cann_sim::count_lanes<true, T>("Gather", where, count);
  ::cann_sim::gather(where, lanes, dst, src, srcOffset, srcBaseAddr, ::cann_sim::contiguous_strides<T>(lanes.width));
}

}  // namespace AscendC
