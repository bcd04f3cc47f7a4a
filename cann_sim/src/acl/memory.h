// Memory allocated by AscendCL: device blocks, page-locked host blocks, and tensors inside device blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "acl/acl.h"

namespace cann_sim::acl {

// One allocation. Its memory is released after the last task that uses it.
class Block {
 public:
  Block(size_t bytes, int32_t device, bool on_device, uint64_t number);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Describes a write outside of the block; "" if there was none.
  std::string overrun() const;

  uint64_t start() const { return reinterpret_cast<uint64_t>(data_); }
  uint64_t end() const { return start() + bytes; }

  const size_t bytes;
  const int32_t device;
  const bool on_device;
  const uint64_t number;  // counts all allocations, for messages
  bool freed = false;     // under the lock of memory.cpp
  uint64_t registration = 0;

 private:
  uint8_t *base_, *data_;
  size_t room_;  // bytes after the data
};

std::shared_ptr<Block> find_block(const void* address);  // the live block that contains it, or null
bool was_freed(const Block& block);
// "bytes [a, b) of ...": describes a range of device memory for messages.
std::string describe_memory(uint64_t start, uint64_t end);

void tensor_allocated(const void* start, size_t bytes);
void tensor_freed(const void* start);

struct DeviceMemory {
  uint64_t used = 0, peak = 0, capacity = 0;
  std::vector<std::shared_ptr<Block>> blocks;
  struct Tensor {
    uint64_t start, bytes;
  };
  std::vector<Tensor> tensors;
};
DeviceMemory memory_of(int32_t device);
std::vector<std::shared_ptr<Block>> host_blocks();
// Checks the canaries of all live blocks and reports overwritten ones, each block once.
void check_canaries();

}  // namespace cann_sim::acl
