// The machinery every vector API shares: it checks the operands of an instruction, tells the core what the instruction
// reads and writes, and runs an element function over the lanes that take part.
#pragma once

#include <type_traits>
#include <vector>

#include "cann_sim/core.h"
#include "cann_sim/half.h"
#include "cann_sim/tensor.h"
#include "cann_sim/vector_mask.h"

namespace cann_sim {

template <typename T, typename... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

// A compile error that names the operation and lists its types; the compiler prints the offending one.
#define CANN_SIM_TYPES(op, T, ...) \
  static_assert(::cann_sim::one_of<T, __VA_ARGS__>, #op " supports these element types on Atlas A2: " #__VA_ARGS__)

// Strides in blocks of 32 bytes.
struct Strides {
  uint32_t block = 1, repeat = 8;
};

inline Strides strides_of(const char* op, Place where, const char* name, int64_t block, int64_t repeat,
                          int64_t most_block, int64_t most_repeat) {
  if (block < 0 || block > most_block || repeat < 0 || repeat > most_repeat) {
    core().fail("params", where,
                format("%s: strides of %s are %lld (blocks) and %lld (repeats), allowed are 0 to %lld and 0 to %lld",
                       op, name, static_cast<long long>(block), static_cast<long long>(repeat),
                       static_cast<long long>(most_block), static_cast<long long>(most_repeat)));
  }
  return Strides{static_cast<uint32_t>(block), static_cast<uint32_t>(repeat)};
}

// One operand of an instruction, whatever its type.
struct OperandBase {
  const char* name;
  const LocalTensorBase* tensor;
  uint32_t element;
  Strides strides;

  uint32_t per_block() const { return kBlockBytes / element; }
  uint32_t address() const { return tensor->address(); }
  uint64_t block_offset(uint32_t repeat, uint32_t block) const {
    return (uint64_t{repeat} * strides.repeat + uint64_t{block} * strides.block) * kBlockBytes;
  }
  uint64_t lane_offset(uint32_t repeat, uint32_t lane) const {
    return block_offset(repeat, lane / per_block()) + uint64_t{lane % per_block()} * element;
  }
  // Whether the lanes follow one another without a gap through all repeats.
  bool contiguous(const Lanes& lanes) const {
    return lanes.prefix &&
           (lanes.repeats == 1 ||
            (lanes.active == lanes.width && strides.repeat * kBlockBytes == lanes.width * element)) &&
           (strides.block == 1 || (lanes.repeats == 1 && lanes.tail <= per_block()));
  }
};

template <typename T>
struct Operand : OperandBase {
  Operand(const char* name, const AscendC::LocalTensor<T>& tensor, Strides strides)
      : OperandBase{name, &tensor, sizeof(T), strides}, local(tensor) {}

  // As in the base, with a division by a constant.
  static constexpr uint32_t kPerBlock = kBlockBytes / sizeof(T);
  uint64_t lane_offset(uint32_t repeat, uint32_t lane) const {
    return block_offset(repeat, lane / kPerBlock) + uint64_t{lane % kPerBlock} * sizeof(T);
  }
  const AscendC::LocalTensor<T>& local;
};

// In a count form all operands are contiguous.
template <typename T>
Strides contiguous_strides(uint32_t width) {
  return Strides{1, width * static_cast<uint32_t>(sizeof(T)) / kBlockBytes};
}

// Bytes from the operand's start to the end of the last lane that takes part in repeats [0, repeats).
inline uint64_t extent(const OperandBase& operand, const Lanes& lanes) {
  const uint32_t per_block = operand.per_block();
  uint64_t end = 0;
  const auto reach = [&](uint32_t repeat, uint32_t lane) {
    const uint64_t bytes = operand.lane_offset(repeat, lane) + operand.element;
    end = bytes > end ? bytes : end;
  };
  const auto prefix = [&](uint32_t repeat) {
    const uint32_t active = lanes.active_in(repeat);
    reach(repeat, operand.strides.block == 0 ? (active < per_block ? active : per_block) - 1 : active - 1);
  };
  if (lanes.prefix) {
    prefix(lanes.repeats - 1);
    if (lanes.repeats > 1) {
      prefix(lanes.repeats - 2);
    }
  } else {
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (lanes.on(lane)) {
        reach(lanes.repeats - 1, lane);
      }
    }
  }
  return end;
}

// The byte ranges of the lanes that take part.
inline void add_accesses(Accesses& list, const OperandBase& operand, const Lanes& lanes) {
  const uint32_t start = operand.address();
  if (operand.contiguous(lanes)) {
    list.add(start, (uint64_t{lanes.repeats - 1} * lanes.active + lanes.tail) * operand.element);
    return;
  }
  const uint32_t repeats = operand.strides.repeat == 0 ? 1 : lanes.repeats;
  const uint32_t per_block = operand.per_block();
  for (uint32_t repeat = 0; repeat < repeats; ++repeat) {
    if (!lanes.prefix) {
      for (uint32_t lane = 0; lane < lanes.width; ++lane) {
        if (lanes.on(lane)) {
          list.add(start + operand.lane_offset(repeat, lane), operand.element);
        }
      }
      continue;
    }
    const uint32_t active = lanes.active_in(repeat);
    if (operand.strides.block == 1) {
      list.add(start + operand.block_offset(repeat, 0), uint64_t{active} * operand.element);
      continue;
    }
    for (uint32_t first = 0; first < active; first += per_block) {
      const uint32_t count = active - first < per_block ? active - first : per_block;
      list.add(start + operand.lane_offset(repeat, first), uint64_t{count} * operand.element);
      if (operand.strides.block == 0) {
        break;
      }
    }
  }
}

// "overlap": in a count form dst and a source are the same or apart. In a repeat form that holds for the blocks of a
// repeat, and no repeat reads what an earlier one wrote, unless it accumulates (which some operations document).
inline void check_overlap(const char* op, Place where, const Lanes& lanes, const OperandBase& dst,
                          const OperandBase& src, bool accumulates) {
  const uint64_t dst_bytes = extent(dst, lanes), src_bytes = extent(src, lanes);
  if (dst.address() + dst_bytes <= src.address() || src.address() + src_bytes <= dst.address()) {
    return;
  }
  const bool same = dst.address() == src.address() && dst.element == src.element &&
                    dst.strides.block == src.strides.block && dst.strides.repeat == src.strides.repeat;
  const uint32_t dst_blocks = (lanes.width - 1) / dst.per_block() + 1;
  if (same && (lanes.repeats == 1 || dst.strides.repeat >= (dst_blocks - 1) * dst.strides.block + 1)) {
    return;
  }
  const auto refuse = [&](uint32_t repeat, const char* what) {
    core().fail("overlap", where,
                format("%s: dst (UB bytes %u to %llu) and %s (%u to %llu) overlap: in repeat %u %s", op, dst.address(),
                       static_cast<unsigned long long>(dst.address() + dst_bytes), src.name, src.address(),
                       static_cast<unsigned long long>(src.address() + src_bytes), repeat, what));
  };
  if (lanes.whole) {
    refuse(0, "they must be the same or apart");
  }
  std::vector<uint8_t> written(kUbBytes / kBlockBytes);
  const auto block_index = [](const OperandBase& operand, uint32_t repeat, uint32_t block) {
    return static_cast<uint32_t>((operand.address() + operand.block_offset(repeat, block)) / kBlockBytes);
  };
  const uint32_t src_blocks = (lanes.width - 1) / src.per_block() + 1;
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    for (uint32_t s = 0; s < src_blocks; ++s) {
      if (!lanes.any(repeat, s * src.per_block(), src.per_block())) {
        continue;
      }
      const uint32_t read = block_index(src, repeat, s);
      if (written[read] != 0 && !accumulates) {
        refuse(repeat, "it reads what an earlier repeat wrote");
      }
      for (uint32_t d = 0; d < dst_blocks; ++d) {
        const bool overlap =
            lanes.any(repeat, d * dst.per_block(), dst.per_block()) && block_index(dst, repeat, d) == read;
        if (overlap && (d != s || dst.element != src.element)) {
          refuse(repeat, "they must be the same or apart");
        }
      }
    }
    for (uint32_t d = 0; d < dst_blocks; ++d) {
      if (lanes.any(repeat, d * dst.per_block(), dst.per_block())) {
        written[block_index(dst, repeat, d)] = 1;
      }
    }
  }
}

// Start and range of an operand.
inline void check_operand(const char* op, Place where, const Lanes& lanes, const OperandBase& operand) {
  require_alignment(op, where, operand.name, *operand.tensor, kBlockBytes);
  require_range(op, where, operand.name, *operand.tensor, 0, extent(operand, lanes), operand.element);
}

inline void check_dst(const char* op, Place where, const Lanes& lanes, const OperandBase& dst) {
  check_operand(op, where, lanes, dst);
  if (dst.strides.block == 0 && (!lanes.prefix || lanes.active > dst.per_block())) {
    core().fail("params", where, format("%s: the block stride of dst is 0, its blocks would overwrite each other", op));
  }
}

// Checks an instruction with element-wise operands and hands it to the core. `accumulates` is a bit each source: it
// may read what an earlier repeat wrote.
inline void begin_vector(const char* op, Place where, VectorClass kind, const Lanes& lanes, const OperandBase& dst,
                         const OperandBase* const* sources, uint32_t count, uint32_t accumulates) {
  check_dst(op, where, lanes, dst);
  for (uint32_t i = 0; i < count; ++i) {
    check_operand(op, where, lanes, *sources[i]);
  }
  Accesses reads, writes;
  if (core().checking()) {
    for (uint32_t i = 0; i < count; ++i) {
      if (sources[i] != &dst) {  // an operation that also reads its dst names it twice
        check_overlap(op, where, lanes, dst, *sources[i], ((accumulates >> i) & 1) != 0);
      }
      add_accesses(reads, *sources[i], lanes);
    }
    add_accesses(writes, dst, lanes);
  }
  uint32_t widest = dst.element;
  for (uint32_t i = 0; i < count; ++i) {
    widest = sources[i]->element > widest ? sources[i]->element : widest;
  }
  const uint32_t beats = (lanes.width * widest + kRepeatBytes - 1) / kRepeatBytes;
  core().vector(op, where, kind, lanes.repeats * beats, widest, reads, writes);
}

// ---- Data effects ----

// Loops run over local copies of this many elements: constant trip counts vectorise at any optimisation level, and
// copies need no proof that operands do not alias.
constexpr uint32_t kChunk = 64;

template <typename T>
struct Chunk {
  T at[kChunk];
};

template <typename T>
T* advance(T* data, uint64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const uint8_t, uint8_t>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(data) + bytes);
}

template <typename T>
Chunk<T> load_chunk(const T* from, uint32_t count) {
  Chunk<T> chunk;
  std::memcpy(chunk.at, from, count * sizeof(T));
  return chunk;
}

// Lanes [first, first + count) of a repeat; `first` is the first lane of a block.
template <typename T>
Chunk<T> load_lanes(const Operand<T>& operand, uint32_t repeat, uint32_t first, uint32_t count) {
  const T* data = operand.local.data();
  if (operand.strides.block == 1) {
    return load_chunk(advance(data, operand.lane_offset(repeat, first)), count);
  }
  Chunk<T> chunk;
  constexpr uint32_t block = Operand<T>::kPerBlock;
  uint32_t lane = 0;
  for (; lane + block <= count; lane += block) {
    std::memcpy(chunk.at + lane, advance(data, operand.lane_offset(repeat, first + lane)), kBlockBytes);
  }
  if (lane < count) {
    std::memcpy(chunk.at + lane, advance(data, operand.lane_offset(repeat, first + lane)), (count - lane) * sizeof(T));
  }
  return chunk;
}

template <typename T>
void store_lanes(const Operand<T>& operand, uint32_t repeat, uint32_t first, uint32_t count, const Chunk<T>& chunk) {
  T* data = operand.local.data();
  if (operand.strides.block == 1) {
    std::memcpy(advance(data, operand.lane_offset(repeat, first)), chunk.at, count * sizeof(T));
    return;
  }
  for (uint32_t lane = 0; lane < count; lane += Operand<T>::kPerBlock) {
    const uint32_t left = count - lane, part = left < Operand<T>::kPerBlock ? left : Operand<T>::kPerBlock;
    std::memcpy(advance(data, operand.lane_offset(repeat, first + lane)), chunk.at + lane, part * sizeof(T));
  }
}

// Out of line, as elementwise below: once in a program for each operation and type is enough to compile.
template <typename D, typename Op, typename... S>
__attribute__((noinline)) Chunk<D> apply_chunk(const Op& op, uint32_t count, const Chunk<S>&... src) {
  Chunk<D> result;
  if (count == kChunk) {
    for (uint32_t i = 0; i < kChunk; ++i) {
      result.at[i] = op(src.at[i]...);
    }
  } else {
    for (uint32_t i = 0; i < count; ++i) {
      result.at[i] = op(src.at[i]...);
    }
  }
  return result;
}

template <typename Op, typename D, typename... S>
void apply_flat(const Op& op, uint64_t count, D* dst, const S*... src) {
  uint64_t done = 0;
  for (; done + kChunk <= count; done += kChunk) {
    const Chunk<D> result = apply_chunk<D>(op, kChunk, load_chunk(src + done, kChunk)...);
    std::memcpy(dst + done, result.at, sizeof(result));
  }
  if (done < count) {
    const auto rest = static_cast<uint32_t>(count - done);
    const Chunk<D> result = apply_chunk<D>(op, rest, load_chunk(src + done, rest)...);
    std::memcpy(dst + done, result.at, rest * sizeof(D));
  }
}

template <typename Op, typename D, typename... S>
void apply_lanes(const Op& op, const Lanes& lanes, const Operand<D>& dst, const Operand<S>&... src) {
  if (dst.contiguous(lanes) && (src.contiguous(lanes) && ...)) {
    apply_flat(op, uint64_t{lanes.repeats - 1} * lanes.active + lanes.tail, dst.local.data(),
               static_cast<const S*>(src.local.data())...);
    return;
  }
  for (uint32_t repeat = 0; repeat < lanes.repeats; ++repeat) {
    if (lanes.prefix) {
      const uint32_t active = lanes.active_in(repeat);
      for (uint32_t lane = 0; lane < active; lane += kChunk) {
        const uint32_t part = active - lane < kChunk ? active - lane : kChunk;
        store_lanes(dst, repeat, lane, part, apply_chunk<D>(op, part, load_lanes(src, repeat, lane, part)...));
      }
      continue;
    }
    for (uint32_t lane = 0; lane < lanes.width; ++lane) {
      if (lanes.on(lane)) {
        *advance(dst.local.data(), dst.lane_offset(repeat, lane)) =
            op(*advance(static_cast<const S*>(src.local.data()), src.lane_offset(repeat, lane))...);
      }
    }
  }
}

// Checks, accounts for and runs one element-wise instruction: dst[lane] = op(src[lane]...).
template <typename Op, typename D, typename... S>
__attribute__((noinline)) void elementwise(const char* name, Place where, VectorClass kind, uint32_t accumulates,
                                           const Lanes& lanes, const Op& op, const Operand<D>& dst,
                                           const Operand<S>&... src) {
  if (lanes.repeats == 0) {
    return;
  }
  const OperandBase* const sources[] = {&src..., nullptr};
  begin_vector(name, where, kind, lanes, dst, sources, sizeof...(S), accumulates);
  apply_lanes(op, lanes, dst, src...);
}

}  // namespace cann_sim
