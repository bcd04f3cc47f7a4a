// DataCopy and DataCopyPad: parameter rules, hazards, the copy itself, and its bytes and time.
#include "cann_sim/copy.h"

#include "core_state.h"

namespace cann_sim {

namespace {

constexpr uint32_t kMaxBlocks = 4095, kMaxBlockBytes = 2097151;

// The addresses of a transfer's blocks.
struct Layout {
  uint64_t ub_block, ub_step, gm_step;
  uint64_t ub_extent;

  explicit Layout(const Transfer& transfer)
      : ub_block((transfer.left + transfer.length + transfer.right + 31) / 32 * 32),
        ub_step(ub_block + transfer.ub_gap),
        gm_step(transfer.length + transfer.gm_gap),
        ub_extent((transfer.count - 1) * ub_step + ub_block) {}
};

void fill(uint8_t* to, uint64_t bytes, const void* pattern, uint32_t element_bytes) {
  for (uint64_t at = 0; at < bytes; at += element_bytes) {
    std::memcpy(to + at, pattern, std::min<uint64_t>(element_bytes, bytes - at));
  }
}

void require_gm_alignment(const char* op, Place where, const char* name, uint64_t address, const Transfer& transfer) {
  if (address % transfer.gm_alignment != 0) {
    core().fail("alignment", where,
                format("%s: the GM address of %s is not a multiple of the element's %u bytes", op, name,
                       transfer.gm_alignment));
  }
}

// Calls visit(start, end) for each contiguous range of device memory; once if the blocks are adjacent.
template <typename Visit>
void for_each_gm_range(uint64_t base, const Transfer& transfer, const Layout& layout, Visit visit) {
  if (transfer.gm_gap == 0) {
    visit(base, base + transfer.count * transfer.length);
    return;
  }
  for (uint32_t block = 0; block < transfer.count; ++block) {
    visit(base + block * layout.gm_step, base + block * layout.gm_step + transfer.length);
  }
}

uint32_t bursts(const Transfer& transfer, const Layout& layout) {
  const bool whole = transfer.gm_gap == 0 && transfer.ub_gap == 0 && layout.ub_block == transfer.length;
  return whole ? 1 : transfer.count;
}

}  // namespace

void check_blocks(const char* op, Place where, uint32_t count, uint64_t length, uint32_t element_bytes) {
  if (count > kMaxBlocks) {
    core().fail("copy-params", where, format("%s: blockCount %u is above %u", op, count, kMaxBlocks));
  }
  if (length > kMaxBlockBytes) {
    core().fail(
        "copy-params", where,
        format("%s: blockLen of %llu bytes is above %u", op, static_cast<unsigned long long>(length), kMaxBlockBytes));
  }
  if (length % element_bytes != 0) {
    core().fail("copy-params", where,
                format("%s: blockLen of %llu bytes is not a multiple of the element's %u", op,
                       static_cast<unsigned long long>(length), element_bytes));
  }
}

void check_padding(const char* op, Place where, uint32_t left, uint32_t right, uint64_t value, bool is_pad,
                   uint32_t element_bytes) {
  if (left * element_bytes > 32 || right * element_bytes > 32) {
    core().fail("copy-params", where,
                format("%s: leftPadding %u and rightPadding %u of %u-byte elements: each side is at most 32 bytes", op,
                       left, right, element_bytes));
  }
  if (element_bytes == 8 && is_pad && value != 0) {
    core().fail("copy-params", where, format("%s: paddingValue of a 64-bit type must be 0", op));
  }
}

void check_count(const char* op, Place where, uint64_t count, uint32_t element_bytes) {
  if (count * element_bytes % 32 != 0) {
    core().fail(
        "copy-params", where,
        format("%s of %llu elements is %llu bytes, which is not a multiple of 32: the hardware would silently round "
               "it; DataCopyPad takes any length",
               op, static_cast<unsigned long long>(count), static_cast<unsigned long long>(count * element_bytes)));
  }
}

void copy_in(const char* op, Place where, const LocalTensorBase& dst, const void* src, const Transfer& transfer,
             uint32_t element_bytes) {
  if (transfer.count == 0 || transfer.length == 0) {
    return;
  }
  Core& self = core();
  CoreState& state = self.state();
  const Layout layout(transfer);
  require_range(op, where, "dst", dst, 0, layout.ub_extent, element_bytes);
  require_alignment(op, where, "dst", dst, 32);
  const Instruction instruction = state.begin(Pipe::MTE2, op, where);
  const auto base = reinterpret_cast<uint64_t>(src);
  require_gm_alignment(op, where, "src", base, transfer);
  for_each_gm_range(base, transfer, layout,
                    [&](uint64_t start, uint64_t end) { state.read_gm(self, instruction, start, end); });
  if (state.check) {
    const bool undefined = transfer.fill == Transfer::Fill::undefined;
    if (!undefined && transfer.ub_gap == 0) {
      state.write_ub(self, instruction, dst.address(), dst.address() + static_cast<uint32_t>(layout.ub_extent));
    } else {
      for (uint32_t block = 0; block < transfer.count; ++block) {
        const auto start = static_cast<uint32_t>(dst.address() + block * layout.ub_step);
        const auto end = static_cast<uint32_t>(start + layout.ub_block);
        if (undefined) {  // the padding has undefined values, so it counts as unwritten
          state.write_ub(self, instruction, start, end, ByteState::unwritten);
          const auto data = start + transfer.left;
          state.write_ub(self, instruction, data, data + static_cast<uint32_t>(transfer.length));
        } else {
          state.write_ub(self, instruction, start, end);
        }
      }
    }
  }
  const uint64_t bytes = transfer.count * transfer.length;
  state.result->read_bytes += bytes;
  state.timing.transfer(Pipe::MTE2, bytes, bursts(transfer, layout), instruction.place);

  const auto* from = static_cast<const uint8_t*>(src);
  uint8_t* to = self.ub() + dst.address();
  if (bursts(transfer, layout) == 1 && layout.ub_block == transfer.length) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (uint32_t block = 0; block < transfer.count; ++block, from += layout.gm_step, to += layout.ub_step) {
    std::memcpy(to + transfer.left, from, transfer.length);
    const uint64_t tail = transfer.left + transfer.length;
    if (transfer.fill == Transfer::Fill::first_element) {
      fill(to + tail, layout.ub_block - tail, from, element_bytes);
    } else if (transfer.fill == Transfer::Fill::value) {
      fill(to, transfer.left, &transfer.value, element_bytes);
      fill(to + tail, layout.ub_block - tail, &transfer.value, element_bytes);
    } else {
      std::memset(to, 0xFF, transfer.left);
      std::memset(to + tail, 0xFF, layout.ub_block - tail);
    }
  }
}

void copy_out(const char* op, Place where, void* dst, const LocalTensorBase& src, const Transfer& transfer,
              uint32_t element_bytes) {
  if (transfer.count == 0 || transfer.length == 0) {
    return;
  }
  Core& self = core();
  CoreState& state = self.state();
  const Layout layout(transfer);
  require_range(op, where, "src", src, 0, layout.ub_extent - (layout.ub_block - transfer.length), element_bytes);
  require_alignment(op, where, "src", src, 32);
  const Instruction instruction = state.begin(Pipe::MTE3, op, where);
  if (state.check) {
    if (layout.ub_step == transfer.length) {
      state.read_ub(self, instruction, src.address(), static_cast<uint32_t>(src.address() + layout.ub_extent));
    } else {
      for (uint32_t block = 0; block < transfer.count; ++block) {
        const auto start = static_cast<uint32_t>(src.address() + block * layout.ub_step);
        state.read_ub(self, instruction, start, start + static_cast<uint32_t>(transfer.length));
      }
    }
  }
  const auto base = reinterpret_cast<uint64_t>(dst);
  require_gm_alignment(op, where, "dst", base, transfer);
  for_each_gm_range(base, transfer, layout,
                    [&](uint64_t start, uint64_t end) { state.write_gm(self, instruction, start, end); });
  const uint64_t bytes = transfer.count * transfer.length;
  state.result->written_bytes += bytes;
  state.timing.transfer(Pipe::MTE3, bytes, bursts(transfer, layout), instruction.place);

  const uint8_t* from = self.ub() + src.address();
  auto* to = static_cast<uint8_t*>(dst);
  for (uint32_t block = 0; block < transfer.count; ++block, from += layout.ub_step, to += layout.gm_step) {
    std::memcpy(to, from, transfer.length);
  }
}

void copy_local(const char* op, Place where, const LocalTensorBase& dst, const LocalTensorBase& src, uint32_t count,
                uint32_t length, uint32_t src_gap, uint32_t dst_gap, uint32_t element_bytes) {
  if (count == 0 || length == 0) {
    return;
  }
  Core& self = core();
  CoreState& state = self.state();
  const auto extent = [&](uint32_t gap) { return uint64_t{count - 1} * (length + gap) + length; };
  require_range(op, where, "dst", dst, 0, extent(dst_gap), element_bytes);
  require_range(op, where, "src", src, 0, extent(src_gap), element_bytes);
  require_alignment(op, where, "dst", dst, 32);
  require_alignment(op, where, "src", src, 32);
  const bool apart =
      dst.address() + extent(dst_gap) <= src.address() || src.address() + extent(src_gap) <= dst.address();
  if (!apart && (dst.address() != src.address() || (count > 1 && src_gap != dst_gap))) {
    self.fail("overlap", where,
              format("%s: dst at UB byte %u and src at %u overlap in part", op, dst.address(), src.address()));
  }
  const Instruction instruction = state.begin(Pipe::V, op, where);
  if (state.check) {
    Accesses reads, writes;
    for (uint32_t block = 0; block < count; ++block) {
      reads.add(src.address() + uint64_t{block} * (length + src_gap), length);
      writes.add(dst.address() + uint64_t{block} * (length + dst_gap), length);
    }
    state.hazards_ub(self, instruction, reads, writes);
  }
  state.timing.local_copy(uint64_t{count} * length, count, instruction.place);
  for (uint32_t block = 0; block < count; ++block) {
    std::memmove(self.ub() + dst.address() + uint64_t{block} * (length + dst_gap),
                 self.ub() + src.address() + uint64_t{block} * (length + src_gap), length);
  }
}

}  // namespace cann_sim
