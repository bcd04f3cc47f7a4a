// Device blocks and page-locked host blocks, filled with poison and surrounded by canaries, and the tensors in them.
#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "calls.h"
#include "cann_sim/launch.h"
#include "order.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

constexpr size_t kCanary = 512;          // bytes on either side
constexpr size_t kAlignment = 512;       // of a block
constexpr unsigned char kPoison = 0xFF;  // NaN in fp32, fp16, bf16 and fp64
constexpr unsigned char kGuard = 0xC9;

struct Tensor {
  uint64_t bytes, registration;
};

struct Memory {
  std::mutex mutex;
  std::map<uint64_t, std::shared_ptr<Block>> blocks;  // by start
  std::map<uint64_t, Tensor> tensors;
  std::map<int32_t, uint64_t> used, peak;
  std::set<uint64_t> overrun;  // numbers of blocks already reported
  uint64_t allocations = 0;
};

Memory& memory() {
  return lasting<Memory>(2);
}

uint64_t capacity() {
  static const uint64_t bytes = static_cast<uint64_t>(from_environment("CANN_SIM_MEMORY_MB", 4096)) << 20;
  return bytes;
}

const char* kind(bool on_device) {
  return on_device ? "device memory" : "page-locked host memory";
}

std::shared_ptr<Block> find_locked(uint64_t address) {
  auto found = memory().blocks.upper_bound(address);
  if (found == memory().blocks.begin()) {
    return nullptr;
  }
  --found;
  return address < found->second->end() ? found->second : nullptr;
}

aclError allocate(void** out, size_t bytes, bool on_device) {
  if (out == nullptr || bytes == 0) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                out == nullptr ? "memory is to be allocated into a null pointer" : "an allocation of 0 bytes");
  }
  if (current_context() == nullptr && on_device) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "device memory is to be allocated, but this thread has set no device");
  }
  const int32_t device = current_context() == nullptr ? 0 : current_context()->device;
  uint64_t number = 0;
  {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    uint64_t& used = memory().used[device];
    if (on_device && (bytes > capacity() || used > capacity() - bytes)) {
      return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                  text("out of memory: %zu bytes are wanted, device %d has %llu of %llu left (CANN_SIM_MEMORY_MB)",
                       bytes, device, static_cast<unsigned long long>(capacity() - used),
                       static_cast<unsigned long long>(capacity())));
    }
    if (on_device) {
      used += bytes;
      memory().peak[device] = std::max(memory().peak[device], used);
    }
    number = ++memory().allocations;
  }
  const auto block = std::make_shared<Block>(bytes, device, on_device, number);
  if (block->start() == 0) {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    memory().used[device] -= on_device ? bytes : 0;
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, text("the host has no %zu bytes left", bytes));
  }
  if (on_device) {
    // A task may have recorded an access to an earlier block at this address just after it was freed.
    forget_accesses(block->start(), block->end());
    block->registration = cann_sim_register(reinterpret_cast<void*>(block->start()), bytes, 0);
  }
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().blocks[block->start()] = block;
  *out = reinterpret_cast<void*>(block->start());
  return ACL_SUCCESS;
}

aclError release(void* address, bool on_device) {
  const auto start = reinterpret_cast<uint64_t>(address);
  std::shared_ptr<Block> block;
  std::string overrun;
  {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    block = find_locked(start);
    if (block == nullptr || block->start() != start || block->on_device != on_device) {
      return fail(ACL_ERROR_RT_PARAM_INVALID,
                  text("%p is to be freed, which is %s", address,
                       block == nullptr          ? "no memory that was allocated here, or was freed before"
                       : block->start() != start ? "inside a block, not its start"
                                                 : kind(block->on_device)));
    }
    if (memory().overrun.count(block->number) == 0) {
      overrun = block->overrun();
    }
    block->freed = true;
    memory().blocks.erase(start);
    if (on_device) {
      memory().used[block->device] -= block->bytes;
    }
  }
  if (on_device) {
    cann_sim_unregister(block->registration);
    forget_accesses(block->start(), block->end());
  }
  if (!overrun.empty()) {
    report_error("canary", overrun);
    return fail(ACL_ERROR_RT_MEMORY_FREE, "canary: " + overrun);
  }
  return ACL_SUCCESS;
}

}  // namespace

Block::Block(size_t bytes, int32_t device, bool on_device, uint64_t number)
    : bytes(bytes), device(device), on_device(on_device), number(number) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  base_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, kCanary + rounded + kCanary));
  data_ = base_ == nullptr ? nullptr : base_ + kCanary;
  room_ = rounded - bytes + kCanary;
  if (base_ == nullptr) {
    return;
  }
  std::memset(base_, kGuard, kCanary);
  std::memset(data_, kPoison, bytes);
  std::memset(data_ + bytes, kGuard, room_);
}

Block::~Block() {
  std::free(base_);
}

std::string Block::overrun() const {
  const auto found = [&](const char* where, long long offset) {
    return text("block %llu of %zu bytes (%s, device %d) was overwritten %s: byte %lld",
                static_cast<unsigned long long>(number), bytes, kind(on_device), device, where, offset);
  };
  for (size_t i = kCanary; i-- > 0;) {
    if (base_[i] != kGuard) {
      return found("before its start", static_cast<long long>(i) - static_cast<long long>(kCanary));
    }
  }
  for (size_t i = 0; i < room_; ++i) {
    if (data_[bytes + i] != kGuard) {
      return found("behind its end", static_cast<long long>(bytes + i));
    }
  }
  return "";
}

std::shared_ptr<Block> find_block(const void* address) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  return find_locked(reinterpret_cast<uint64_t>(address));
}

bool was_freed(const Block& block) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  return block.freed;
}

std::string describe_memory(uint64_t start, uint64_t end) {
  const auto range = [&](uint64_t from) {
    return text("bytes [%llu, %llu)", static_cast<unsigned long long>(start - from),
                static_cast<unsigned long long>(end - from));
  };
  const std::lock_guard<std::mutex> lock(memory().mutex);
  if (auto tensor = memory().tensors.upper_bound(start); tensor != memory().tensors.begin()) {
    --tensor;
    if (start < tensor->first + tensor->second.bytes) {
      return text("%s of a tensor of %llu bytes at %#llx", range(tensor->first).c_str(),
                  static_cast<unsigned long long>(tensor->second.bytes),
                  static_cast<unsigned long long>(tensor->first));
    }
  }
  if (const std::shared_ptr<Block> block = find_locked(start)) {
    return text("%s of device block %llu of %zu bytes", range(block->start()).c_str(),
                static_cast<unsigned long long>(block->number), block->bytes);
  }
  return text("%llu bytes at %#llx", static_cast<unsigned long long>(end - start),
              static_cast<unsigned long long>(start));
}

void tensor_allocated(const void* start, size_t bytes) {
  tensor_freed(start);
  const uint64_t registration = cann_sim_register_part(start, bytes);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().tensors[reinterpret_cast<uint64_t>(start)] = {bytes, registration};
}

void tensor_freed(const void* start) {
  uint64_t registration = 0;
  {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    const auto found = memory().tensors.find(reinterpret_cast<uint64_t>(start));
    if (found == memory().tensors.end()) {
      return;
    }
    registration = found->second.registration;
    memory().tensors.erase(found);
  }
  cann_sim_unregister(registration);
}

DeviceMemory memory_of(int32_t device) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  DeviceMemory found;
  found.used = memory().used[device];
  found.peak = memory().peak[device];
  found.capacity = capacity();
  for (const auto& [start, block] : memory().blocks) {
    if (block->on_device && block->device == device) {
      found.blocks.push_back(block);
    }
  }
  for (const auto& [start, tensor] : memory().tensors) {
    const std::shared_ptr<Block> block = find_locked(start);
    if (block != nullptr && block->on_device && block->device == device) {
      found.tensors.push_back({start, tensor.bytes});
    }
  }
  return found;
}

std::vector<std::shared_ptr<Block>> host_blocks() {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  std::vector<std::shared_ptr<Block>> found;
  for (const auto& [start, block] : memory().blocks) {
    if (!block->on_device) {
      found.push_back(block);
    }
  }
  return found;
}

void check_canaries() {
  std::vector<std::string> overruns;
  {
    const std::lock_guard<std::mutex> lock(memory().mutex);
    for (const auto& [start, block] : memory().blocks) {
      const std::string overrun = block->overrun();
      if (!overrun.empty() && memory().overrun.insert(block->number).second) {
        overruns.push_back(overrun);
      }
    }
  }
  for (const std::string& overrun : overruns) {
    report_error("canary", overrun);
  }
}

}  // namespace cann_sim::acl

extern "C" {

aclError aclrtMalloc(void** memory, size_t bytes, aclrtMemMallocPolicy /*policy*/) {
  CANN_SIM_API();
  return allocate(memory, bytes, true);
}

aclError aclrtMallocAlign32(void** memory, size_t bytes, aclrtMemMallocPolicy /*policy*/) {
  CANN_SIM_API();
  return allocate(memory, bytes, true);
}

aclError aclrtMallocHost(void** memory, size_t bytes) {
  CANN_SIM_API();
  return allocate(memory, bytes, false);
}

aclError aclrtFree(void* memory) {
  CANN_SIM_API();
  return release(memory, true);
}

aclError aclrtFreeHost(void* memory) {
  CANN_SIM_API();
  return release(memory, false);
}

aclError aclrtGetMemInfo(aclrtMemAttr /*attribute*/, size_t* free_bytes, size_t* total) {
  CANN_SIM_API();
  if (current_context() == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetMemInfo: this thread has set no device");
  }
  const std::lock_guard<std::mutex> lock(memory().mutex);
  *total = capacity();
  *free_bytes = capacity() - memory().used[current_context()->device];
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  CANN_SIM_API();
  const std::shared_ptr<Block> block = find_block(pointer);
  *attributes = {};
  attributes->pageSize = 4096;
  attributes->location.type = block == nullptr   ? ACL_MEM_LOCATION_TYPE_UNREGISTERED
                              : block->on_device ? ACL_MEM_LOCATION_TYPE_DEVICE
                                                 : ACL_MEM_LOCATION_TYPE_HOST;
  attributes->location.id = block == nullptr ? 0 : static_cast<uint32_t>(block->device);
  return ACL_SUCCESS;
}

}  // extern "C"
