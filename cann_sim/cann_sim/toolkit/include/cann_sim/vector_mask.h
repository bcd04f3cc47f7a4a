// The vector mask register, and which lanes of each repeat of an instruction take part.
#pragma once

#include "cann_sim/core.h"
#include "cann_sim/vector_params.h"

namespace cann_sim {

constexpr uint32_t kRepeatBytes = 256, kBlockBytes = 32;

// Lanes of a repeat that holds elements of these types.
template <typename... T>
constexpr uint32_t repeat_width() {
  uint32_t widest = 1;
  ((widest = sizeof(T) > widest ? sizeof(T) : widest), ...);
  return kRepeatBytes / widest;
}

struct Lanes {
  uint32_t width = 0;             // lanes of a repeat: 256 bytes of the widest operand
  uint32_t repeats = 0;           // 0: the instruction does nothing
  uint32_t active = 0, tail = 0;  // prefix: lanes that take part in each repeat, and in the last one
  uint64_t low = 0, high = 0;     // otherwise: a bit each lane
  bool prefix = true;
  bool whole = false;  // a count form

  uint32_t active_in(uint32_t repeat) const { return repeat + 1 == repeats ? tail : active; }
  bool on(uint32_t lane) const { return ((lane < 64 ? low >> lane : high >> (lane - 64)) & 1) != 0; }
  // Whether any of lanes [first, first + count) of a repeat takes part.
  bool any(uint32_t repeat, uint32_t first, uint32_t count) const {
    if (prefix) {
      return first < active_in(repeat);
    }
    for (uint32_t lane = first; lane < first + count; ++lane) {
      if (on(lane)) {
        return true;
      }
    }
    return false;
  }
};

inline Lanes no_lanes(uint32_t width) {
  Lanes lanes;
  lanes.width = width;
  return lanes;
}

// The first `count` lanes over as many repeats as that takes (count form, counter mode).
inline Lanes counted_lanes(const char* op, Place where, uint64_t count, uint32_t width) {
  Lanes lanes = no_lanes(width);
  if (count > kUbBytes) {
    core().fail("mask", where,
                format("%s: %llu elements in counter mode, more than the unified buffer has", op,
                       static_cast<unsigned long long>(count)));
  }
  lanes.repeats = static_cast<uint32_t>((count + width - 1) / width);
  lanes.active = width;
  lanes.tail = lanes.repeats == 0 ? 0 : static_cast<uint32_t>(count - uint64_t{lanes.repeats - 1} * width);
  return lanes;
}

// The first `active` lanes of each repeat.
inline Lanes prefix_lanes(uint32_t active, uint32_t repeats, uint32_t width) {
  Lanes lanes = no_lanes(width);
  lanes.repeats = active == 0 ? 0 : repeats;
  lanes.active = lanes.tail = active;
  return lanes;
}

inline uint64_t low_bits(uint64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

inline Lanes masked_lanes(uint64_t low, uint64_t high, uint32_t repeats, uint32_t width) {
  low &= low_bits(width);
  high = width > 64 ? high & low_bits(width - 64) : 0;
  if (high == 0 && (low & (low + 1)) == 0) {
    return prefix_lanes(static_cast<uint32_t>(__builtin_popcountll(low)), repeats, width);
  }
  if (low == ~uint64_t{0} && (high & (high + 1)) == 0) {
    return prefix_lanes(64 + static_cast<uint32_t>(__builtin_popcountll(high)), repeats, width);
  }
  Lanes lanes = no_lanes(width);
  lanes.repeats = repeats;
  lanes.low = low;
  lanes.high = high;
  lanes.prefix = false;
  return lanes;
}

inline void set_mask_bits(uint64_t low, uint64_t high) {
  Core::Mask& mask = core().mask;
  mask.low = low;
  mask.high = high;
  mask.count = low > ~uint32_t{0} ? ~uint32_t{0} : static_cast<uint32_t>(low);
}

// Whatever the mask register and mode say.
inline Lanes register_lanes(const char* op, Place where, uint32_t repeats, uint32_t width) {
  const Core::Mask& mask = core().mask;
  return mask.counter ? counted_lanes(op, where, mask.low, width) : masked_lanes(mask.low, mask.high, repeats, width);
}

inline uint32_t require_repeat(const char* op, Place where, int64_t repeat, int64_t most = 255) {
  if (repeat < 0 || repeat > most) {
    core().fail("repeat", where,
                format("%s: repeatTime is %lld, allowed are 0 to %lld", op, static_cast<long long>(repeat),
                       static_cast<long long>(most)));
  }
  return static_cast<uint32_t>(repeat);
}

inline void set_prefix_mask(const char* op, Place where, uint64_t mask, uint32_t width) {
  if (mask == 0 || mask > width) {
    core().fail("mask", where,
                format("%s: mask is %llu, allowed are 1 to %u, the elements of a repeat", op,
                       static_cast<unsigned long long>(mask), width));
  }
  set_mask_bits(low_bits(mask), mask > 64 ? low_bits(mask - 64) : 0);
}

inline void set_bit_mask(const char* op, Place where, uint64_t low, uint64_t high, uint32_t width) {
  if ((width <= 64 && high != 0) || (width < 64 && (low >> width) != 0)) {
    core().fail("mask", where,
                format("%s: the mask {0x%llx, 0x%llx} has bits beyond the %u elements of a repeat", op,
                       static_cast<unsigned long long>(low), static_cast<unsigned long long>(high), width));
  }
  if (low == 0 && high == 0) {
    core().fail("mask", where, format("%s: no bit of the mask is set", op));
  }
  set_mask_bits(low, high);
}

// Puts the mask an API was given, a number of lanes or an array of bits, into the register. In counter mode it is the
// number of elements.
inline void take_mask(const char* op, Place where, uint64_t mask, uint32_t width) {
  if (core().mask.counter) {
    set_mask_bits(mask, 0);
  } else {
    set_prefix_mask(op, where, mask, width);
  }
}
inline void take_mask(const char* op, Place where, const uint64_t* mask, uint32_t width) {
  if (core().mask.counter) {
    set_mask_bits(mask[0], 0);
  } else {
    set_bit_mask(op, where, mask[0], mask[1], width);
  }
}

// The lanes of a repeat form. With isSetMask the mask goes to the register first, and stays there; in counter mode the
// number of repeats follows from it.
template <bool isSetMask, typename... T, typename M>
Lanes repeat_lanes(const char* op, Place where, M mask, int64_t repeat) {
  const uint32_t repeats = require_repeat(op, where, repeat);
  if constexpr (isSetMask) {
    take_mask(op, where, mask, repeat_width<T...>());
  }
  return register_lanes(op, where, repeats, repeat_width<T...>());
}

// For the APIs that split their repeats into instructions of at most 255.
template <typename T, typename M>
Lanes any_repeat_lanes(const char* op, Place where, M mask, int64_t repeat) {
  const uint32_t repeats = require_repeat(op, where, repeat, 0x7fffffff);
  take_mask(op, where, mask, repeat_width<T>());
  return register_lanes(op, where, repeats, repeat_width<T>());
}

// The lanes of a count form, which leaves normal mode and the full mask behind.
template <bool isSetMask, typename... T>
Lanes count_lanes(const char* op, Place where, int64_t count) {
  constexpr uint32_t width = repeat_width<T...>();
  if constexpr (!isSetMask) {
    return register_lanes(op, where, 1, width);
  }
  if (count < 0) {
    core().fail("params", where, format("%s: count is %lld", op, static_cast<long long>(count)));
  }
  core().mask = Core::Mask{};
  Lanes lanes = counted_lanes(op, where, static_cast<uint64_t>(count), width);
  lanes.whole = true;
  return lanes;
}

}  // namespace cann_sim

namespace AscendC {

inline void SetMaskCount() {
  ::cann_sim::core().mask.counter = true;
}

inline void SetMaskNorm() {
  ::cann_sim::core().mask.counter = false;
}

inline void ResetMask() {
  ::cann_sim::set_mask_bits(~uint64_t{0}, ~uint64_t{0});
}

template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(const uint64_t maskHigh, const uint64_t maskLow, CANN_SIM_HERE) {
  if constexpr (mode == MaskMode::COUNTER) {
    ::cann_sim::set_mask_bits(maskLow, 0);
  } else {
    ::cann_sim::set_bit_mask("SetVectorMask", where, maskLow, maskHigh, ::cann_sim::kRepeatBytes / sizeof(T));
  }
}

template <typename T, MaskMode mode = MaskMode::NORMAL>
void SetVectorMask(int32_t len, CANN_SIM_HERE) {
  if (len < 0) {
    ::cann_sim::core().fail("mask", where, ::cann_sim::format("SetVectorMask: len is %d", len));
  }
  if (mode == MaskMode::COUNTER || ::cann_sim::core().mask.counter) {
    ::cann_sim::set_mask_bits(static_cast<uint64_t>(len), 0);
  } else {
    ::cann_sim::set_prefix_mask("SetVectorMask", where, static_cast<uint64_t>(len),
                                ::cann_sim::kRepeatBytes / sizeof(T));
  }
}

}  // namespace AscendC
